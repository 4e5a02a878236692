//! What needs a hand on the broker itself: `./tests/run rabbitmq`. `ONLYONCE_RABBITMQ_CTL` runs rabbitmqctl against it,
//! as `localstack/rabbitmq-4.0 ctl DIR` does. It changes the whole node, so these run one after another.

use std::process::Command;
use std::time::Duration;

use crate::common::*;
use onlyonce_core::{Action, Answer, Sink as _, Source as _};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

static NODE: Mutex<()> = Mutex::const_new(());

fn ctl(arguments: &[&str]) -> String {
    let set = std::env::var_os("ONLYONCE_RABBITMQ_CTL").is_some();
    assert!(
        set,
        "set ONLYONCE_RABBITMQ_CTL to `localstack/rabbitmq-4.0 ctl DIR`"
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", "$ONLYONCE_RABBITMQ_CTL \"$@\"", "sh"]);
    let output = shell.args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Sets the acknowledgement time-out of new channels, and how often it is looked at.
fn set_consumer_timeout(millis: u32, tick: u32) {
    let eval = format!(
        "application:set_env(rabbit, consumer_timeout, {millis}), application:set_env(rabbit, channel_tick_interval, {tick})."
    );
    ctl(&["eval", &eval]);
}

/// Puts the broker's defaults back, whatever the test came to.
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        set_consumer_timeout(1_800_000, 60_000);
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn an_overdue_message_comes_again_and_its_old_receipt_is_worthless() {
    let _node = NODE.lock().await;
    let _restore = Restore;
    set_consumer_timeout(2_000, 500);
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("overdue", kind, &[]).await;
        queue.fill(2).await;
        let source = queue.source("&consumer_timeout=2s");
        let begun = Instant::now();
        let held = receive(&source, 2).await;
        let until = held[0].lease.until.unwrap();
        // Less what the broker's clock may be ahead: it runs from when it sent them.
        assert!(until >= begun + Duration::from_millis(1_800));
        assert!(until <= Instant::now() + Duration::from_millis(1_800));
        let lost = held[0].lease.lost.as_ref().unwrap();
        timeout(PATIENCE, lost.cancelled()).await.unwrap();
        assert!(
            Instant::now() >= until,
            "the lease ended sooner than it said"
        );
        let again = receive(&source, 2).await;
        for answer in settle(&source, &held, &Action::Ack).await {
            assert!(matches!(answer, Answer::LeaseLost), "{answer:?}");
        }
        ack(&source, &again).await;
        source.close().await.unwrap();
        queue.assert_left(0).await;
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn source_and_sink_outlive_a_restart_of_the_broker() {
    let _node = NODE.lock().await;
    let queue = Queue::declare("restart", Kind::Quorum, &[]).await;
    let (source, sink) = (queue.source(""), queue.sink(""));
    assert!(sink.publish(&[numbered(0)]).await[0].is_ok());
    let held = receive(&source, 1).await;
    ctl(&["stop_app"]);
    let error = sink.publish(&[numbered(1)]).await.remove(0).unwrap_err();
    assert!(error.is_retryable(), "{error}");
    let deadline = Instant::now() + PATIENCE;
    let failed = loop {
        assert!(Instant::now() < deadline, "no error came");
        if let Err(error) = source.receive(limit(1)).await {
            break error;
        }
    };
    assert!(failed.is_retryable(), "{failed}");
    ctl(&["start_app"]);
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = sink.publish(&[numbered(1)]).await.remove(0) {
        assert!(error.is_retryable() && Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The second may be there twice: a publish whose confirmation was lost.
    let mut back = receive(&source, 2).await;
    back.dedup_by_key(|delivery| delivery.message.dedup_id.clone());
    assert_eq!(sorted(bodies(&back)), numbers(0..2));
    assert!(matches!(
        settle(&source, &held, &Action::Ack).await[0],
        Answer::LeaseLost
    ));
    source.close().await.unwrap();
    sink.close().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn connections_closed_by_the_operator_are_opened_again() {
    let _node = NODE.lock().await;
    let queue = Queue::declare("operator", Kind::Classic, &[]).await;
    queue.fill(3).await;
    let source = queue.source("");
    let held = receive(&source, 3).await;
    ctl(&["close_all_connections", "maintenance"]);
    let lost = held[0].lease.lost.as_ref().unwrap();
    timeout(PATIENCE, lost.cancelled()).await.unwrap();
    assert_eq!(sorted(drain(&source, 3).await), numbers(0..3));
    source.close().await.unwrap();
}

/// Whatever is dropped half-way, no connection stays, least of all one with a consumer that keeps messages to itself.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn nothing_stays_open() {
    let _node = NODE.lock().await;
    let queue = Queue::declare("open", Kind::Classic, &[]).await;
    queue.fill(5).await;
    let connections = || {
        let list = ctl(&["list_connections", "client_properties"]);
        list.matches(&queue.name).count()
    };
    let source = queue.source("");
    receive(&source, 1).await;
    assert_eq!(connections(), 1, "it is seen");
    source.close().await.unwrap();
    // At every moment of opening, until it has been open a few times. The heartbeat would close what was forgotten.
    let (source, sink) = (
        || queue.source("&heartbeat=600s"),
        || queue.sink("&heartbeat=600s"),
    );
    let (mut opened, deadline) = (0, Instant::now() + 4 * PATIENCE);
    for millis in 0.. {
        let why = "a consumer that was forgotten holds the messages";
        assert!(Instant::now() < deadline, "{why}");
        let short = Duration::from_millis(millis);
        let (closed, dropped) = (source(), source());
        let got = timeout(short, closed.receive(limit(1))).await;
        closed.close().await.unwrap();
        opened += usize::from(got.is_ok());
        let _ = timeout(short, dropped.receive(limit(1))).await;
        drop(dropped);
        let sink = sink();
        let _ = timeout(short, sink.publish(&[numbered(0)])).await;
        let _ = timeout(short, sink.close()).await;
        let _ = timeout(short, source().inspect()).await;
        if opened > 10 {
            break;
        }
    }
    queue.purge().await;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let open = connections();
        if open == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{open} connections are open");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
