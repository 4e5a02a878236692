//! What is put into the dead-letter queue, and when the worker stops instead.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::*;
use onlyonce_core::driver::*;
use onlyonce_core::handler::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore};
use onlyonce_core::*;
use tokio::sync::Notify;

/// A dead-letter queue that refuses the first letters, and tells that it did.
fn refusing(letters: usize) -> (FaultySink, Arc<Notify>) {
    let refused = Arc::new(Notify::new());
    let tell = refused.clone();
    let sink = FaultySink::new(move |call| {
        (call < letters).then(|| {
            tell.notify_one();
            Error::new(ErrorKind::Other, "full")
        })
    });
    (sink, refused)
}

type Runs = Arc<Mutex<Vec<String>>>;

/// Fails message 0 for good the first time, and never again.
async fn handle(body: String, State(runs): State<Runs>) -> Result<(), Failure> {
    let mut runs = runs.lock().unwrap();
    let before = runs.iter().filter(|run| **run == body).count();
    runs.push(body.clone());
    match (body.as_str(), before) {
        ("0", 0) => Err(Failure::dead_letter("a bad day")),
        _ => Ok(()),
    }
}

fn pipeline(queue: &MemoryQueue, dead: &FaultySink, runs: &Runs) -> Builder<NoTx> {
    Pipeline::at_least_once(queue.clone())
        .dead_letter(dead.clone())
        .state(runs.clone())
        .stop_when_idle(Duration::from_secs(120))
}

async fn group_of_three() -> (MemoryQueue, Runs) {
    let queue = MemoryQueue::new("orders");
    publish(&queue, (0..3).map(|n| numbered(n).with_group("g"))).await;
    (queue, Runs::default())
}

/// What was decided is kept, and the group waits for it.
#[tokio::test(start_paused = true)]
async fn a_group_waits_until_its_dead_letter_is_confirmed() {
    let (queue, runs) = group_of_three().await;
    let (dead, _) = refusing(1);
    let report = pipeline(&queue, &dead, &runs).run(handle).await.unwrap();
    assert_eq!((report.applied, report.dead_lettered), (2, 1));
    assert_eq!(*runs.lock().unwrap(), ["0", "1", "2"]);
    assert_eq!(dead.queue.depth(), 1);
}

/// Another worker does not know what was decided: the message runs again, before those that follow it.
#[tokio::test(start_paused = true)]
async fn a_message_that_could_not_be_set_aside_is_not_overtaken() {
    let (queue, runs) = group_of_three().await;
    let (dead, refused) = refusing(usize::MAX);
    tokio::select! {
        biased;
        () = async {
            refused.notified().await;
            tokio::time::sleep(Duration::from_secs(5)).await;
        } => {}
        _ = pipeline(&queue, &dead, &runs).run(handle) => unreachable!("it has work"),
    }
    let report = pipeline(&queue, &dead, &runs).run(handle).await.unwrap();
    assert_eq!(report.applied, 3);
    assert_eq!(*runs.lock().unwrap(), ["0", "0", "1", "2"]);
}

/// Its lease ends between two tries to leave its dead letter, and another worker leaves it meanwhile.
#[tokio::test(start_paused = true)]
async fn what_is_not_leased_any_more_leaves_no_dead_letter() {
    let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(30));
    publish(&queue, [numbered(0)]).await;
    let started = tokio::time::Instant::now();
    let full_at_first = FaultySink::new(move |_| {
        let full = started.elapsed() < Duration::from_millis(29_900);
        full.then(|| Error::new(ErrorKind::Other, "full").retryable(true))
    });
    let mut never_full = FaultySink::new(|_| None);
    never_full.queue = full_at_first.queue.clone();
    let work = async |dead: &FaultySink| {
        let mut source = FaultyQueue::new(&queue);
        source.extend = false;
        let fails = || async { Err::<(), _>(Failure::dead_letter("a bad day")) };
        Pipeline::at_least_once(source)
            .dead_letter(dead.clone())
            .prefetch(1, 1 << 20)
            .stop_when_idle(Duration::from_secs(300))
            .run(fails)
            .await
            .unwrap()
    };
    let later = async {
        tokio::time::sleep(Duration::from_secs(10)).await;
        work(&never_full).await
    };
    tokio::join!(work(&full_at_first), later);
    assert_eq!(never_full.queue.depth(), 1);
    assert_eq!((queue.depth(), queue.in_flight()), (0, 0));
}

/// A dead letter whose removal from the queue is not known holds its group until it is.
#[tokio::test(start_paused = true)]
async fn a_dead_letter_that_may_come_again_is_not_overtaken() {
    for fault in [Fault::Refused, Fault::ReplyLost] {
        let (queue, runs) = group_of_three().await;
        let mut source = FaultyQueue::new(&queue);
        source.settle = first(1, fault);
        source.retryable = false;
        let report = Pipeline::at_least_once(source)
            .state(runs.clone())
            .stop_when_idle(Duration::from_secs(120))
            .run(handle)
            .await
            .unwrap();
        let runs = runs.lock().unwrap().clone();
        let last_of_0 = runs.iter().rposition(|run| run == "0");
        let first_of_1 = runs.iter().position(|run| run == "1");
        assert!(last_of_0 < first_of_1, "{fault:?}: {runs:?}, {report:?}");
    }
}

/// A key policy that does not fit the queue would move it to the dead-letter queue as a whole.
#[tokio::test(start_paused = true)]
async fn a_worker_whose_first_messages_have_no_key_stops_and_says_what_to_set() {
    let queue = MemoryQueue::new("orders");
    publish(&queue, (0..200).map(|n| Message::new(n.to_string()))).await;
    let error = Pipeline::idempotent(queue.clone(), MemoryStore::new())
        .stop_when_idle(IDLE)
        .run(|| async {})
        .await
        .expect_err("it cannot work");
    assert_eq!(error.error.kind(), ErrorKind::Config);
    let text = error.to_string();
    for part in ["idempotency-key", "or_content", "orders"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!((queue.depth(), queue.dead_letters().len()), (200, 0));
}

/// So would a handler that cannot read what the queue holds.
#[tokio::test(start_paused = true)]
async fn a_worker_that_cannot_read_its_first_messages_stops_and_says_why() {
    let queue = MemoryQueue::new("orders");
    publish(
        &queue,
        (0..200).map(|n| Message::new("{").with_dedup_id(n.to_string())),
    )
    .await;
    let error = Pipeline::idempotent(queue.clone(), MemoryStore::new())
        .stop_when_idle(IDLE)
        .run(|Json(_): Json<u32>| async {})
        .await
        .expect_err("it cannot work");
    assert_eq!(error.error.kind(), ErrorKind::Config);
    let text = error.to_string();
    assert!(text.contains("JSON") && text.contains("orders"), "{text}");
    assert!(
        error.report.received >= 10,
        "what was done until then is told: {error:?}"
    );
    assert_eq!((queue.depth(), queue.dead_letters().len()), (191, 9));
}

#[tokio::test(start_paused = true)]
async fn a_message_that_cannot_be_read_among_others_is_set_aside() {
    let queue = MemoryQueue::new("orders");
    let body = |n: usize| if n == 5 { "5" } else { "{" };
    let all = (0..40).map(|n| Message::new(body(n)).with_dedup_id(n.to_string()));
    publish(&queue, all).await;
    let report = Pipeline::idempotent(queue.clone(), MemoryStore::new())
        .stop_when_idle(IDLE)
        .run(|Json(_): Json<u32>| async {})
        .await
        .unwrap();
    assert_eq!((report.applied, report.dead_lettered), (1, 39));
}

#[tokio::test(start_paused = true)]
async fn a_message_without_a_key_among_others_is_set_aside() {
    let queue = MemoryQueue::new("orders");
    let keyless = |n: usize| Message::new(n.to_string());
    let all = (0..40).map(|n| if n == 5 { numbered(n) } else { keyless(n) });
    publish(&queue, all).await;
    let report = Pipeline::idempotent(queue.clone(), MemoryStore::new())
        .stop_when_idle(IDLE)
        .run(|| async {})
        .await
        .unwrap();
    assert_eq!((report.applied, report.dead_lettered), (1, 39));
}

/// A queue that was moved keeps its records if it is given the identity that it had.
#[tokio::test(start_paused = true)]
async fn records_are_found_again_under_the_identity_that_the_queue_had() {
    let store = MemoryStore::new();
    let before = MemoryQueue::new("orders");
    let identity = before.queue_info().await.unwrap().identity.unwrap();
    for (queue, given, expected) in [
        (before, None, (1, 0)),
        (MemoryQueue::new("orders"), None, (1, 0)),
        (MemoryQueue::new("orders"), Some(identity), (0, 1)),
    ] {
        publish(&queue, [numbered(0)]).await;
        let mut pipeline = Pipeline::idempotent(queue, store.clone()).stop_when_idle(IDLE);
        if let Some(identity) = given {
            pipeline = pipeline.identity(identity);
        }
        let report = pipeline.run(|| async {}).await.unwrap();
        assert_eq!((report.applied, report.duplicates), expected);
    }
}

/// Its ack is lost, so it comes again. It is acked, not run: each run would leave another dead letter.
#[tokio::test(start_paused = true)]
async fn a_dead_letter_whose_ack_was_lost_is_acked_when_it_comes_again() {
    let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(10));
    publish(&queue, [numbered(0)]).await;
    let (dead, runs) = (MemoryQueue::new("dead"), Runs::default());
    let mut source = FaultyQueue::new(&queue);
    source.settle = first(3, Fault::Refused);
    source.retryable = false;
    let report = Pipeline::at_least_once(source)
        .dead_letter(dead.clone())
        .state(runs.clone())
        .stop_when_idle(Duration::from_secs(120))
        .run(handle)
        .await
        .unwrap();
    assert_eq!(*runs.lock().unwrap(), ["0"], "{report:?}");
    assert_eq!((queue.depth(), dead.depth()), (0, 1), "{report:?}");
}

/// What has no key comes to no worker, and is acked all the same.
#[tokio::test(start_paused = true)]
async fn so_is_one_that_never_runs() {
    let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(10));
    publish(&queue, [Message::new("0"), numbered(1)]).await;
    let (dead, runs) = (MemoryQueue::new("dead"), Runs::default());
    let mut source = FaultyQueue::new(&queue);
    source.settle = first(4, Fault::Refused);
    source.retryable = false;
    let report = Pipeline::idempotent(source, MemoryStore::new())
        .dead_letter(dead.clone())
        .state(runs.clone())
        .stop_when_idle(Duration::from_secs(120))
        .run(handle)
        .await
        .unwrap();
    assert_eq!(*runs.lock().unwrap(), ["1"], "{report:?}");
    assert_eq!((queue.depth(), dead.depth()), (0, 1), "{report:?}");
}
