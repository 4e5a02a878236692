//! A poll that brings more of a group than a receive may return: nothing of it overtakes what was received.

use onlyonce_core::driver::{Delivery, Source as _};
use tokio::time::timeout;

use super::script::*;

const FIFO: &str = "orders.fifo?visibility_timeout=30s";
const NOW: std::time::Duration = std::time::Duration::ZERO;

/// A source whose poll has brought all of a group, of which only `a` was received.
async fn with_followers(steps: Vec<Step>) -> (Script, onlyonce_sqs::SqsSource, Vec<Delivery>) {
    let brings = receive().gets(messages(&["a", "b", "c"]).after(seconds(1)));
    let script = Script::of([brings].into_iter().chain(steps));
    let source = script.source(FIFO);
    let dropped = timeout(NOW, source.receive(limit(10, seconds(20)))).await;
    assert!(dropped.is_err(), "its poll goes on");
    let head = source.receive(limit(1, seconds(20))).await.unwrap();
    assert_eq!(names(&head), ["a"]);
    (script, source, head)
}

#[tokio::test(start_paused = true)]
async fn followers_wait_until_the_head_is_settled() {
    let (_script, source, head) = with_followers(vec![delete(&["a"]).gets(done(1))]).await;
    let early = source.receive(limit(10, seconds(2))).await.unwrap();
    assert_eq!(names(&early), [""; 0]);
    assert_eq!(words(&source.settle(&[ack(&head[0])]).await), ["applied"]);
    let rest = source.receive(limit(10, seconds(20))).await.unwrap();
    assert_eq!(names(&rest), ["b", "c"]);
}

#[tokio::test(start_paused = true)]
async fn followers_are_given_back_with_the_head_before_it() {
    let back = change_visibility(&["c", "b", "a"], 0).gets(done(3));
    let (_script, source, head) = with_followers(vec![back]).await;
    let answers = source.settle(&[nack(&head[0], NOW)]).await;
    assert_eq!(
        words(&answers),
        ["applied"],
        "one answer for each that was asked for"
    );
    let later = source.receive(limit(10, seconds(2))).await.unwrap();
    assert_eq!(names(&later), [""; 0], "they come again behind it");
}
