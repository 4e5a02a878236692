//! Handlers that take longer than an ack deadline.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::{ConfigRisk, Pipeline, Report, State};
use onlyonce_pubsub::v1::{
    AcknowledgeRequest, GetSubscriptionRequest, ModifyAckDeadlineRequest, Subscription,
};
use tokio::time::{Instant, sleep};
use tonic::Code;

use super::script::*;
use super::*;

/// When handlers end, and how.
#[derive(Clone, Default)]
struct Runs {
    begun: Arc<AtomicUsize>,
    finished: Arc<AtomicUsize>,
    ended: Arc<Mutex<Option<Instant>>>,
}

/// Notes when the handler ends, however it does.
struct End(Runs);

impl Drop for End {
    fn drop(&mut self) {
        *self.0.ended.lock().unwrap() = Some(Instant::now());
    }
}

async fn slow(_: String, State(runs): State<Runs>, tx: &mut MemoryTx) {
    runs.begun.fetch_add(1, Ordering::Relaxed);
    let _end = End(runs.clone());
    tx.push("effect");
    sleep(seconds(180)).await;
    runs.finished.fetch_add(1, Ordering::Relaxed);
}

/// A message whose handler takes three ack deadlines, until the pipeline is idle.
async fn run(
    extend: impl Fn(&ModifyAckDeadlineRequest) -> Answer + Send + 'static,
) -> (Script, Runs, MemoryStore, Report) {
    let plain = Subscription {
        enable_message_ordering: false,
        ..subscription()
    };
    let mut message = message_of("", "m");
    let attributes = &mut message.message.as_mut().unwrap().attributes;
    attributes.insert("idempotency-key".into(), "m".into());
    let brought = onlyonce_pubsub::v1::PullResponse {
        received_messages: vec![message],
    };
    let script = Script::of([pull().gets(ok(brought))])
        .then(move |_: &GetSubscriptionRequest| ok(plain.clone()))
        .then(|_: &AcknowledgeRequest| done())
        .then(extend);
    let (store, runs) = (MemoryStore::new(), Runs::default());
    let pipeline = Pipeline::transactional(source(&script), store.clone())
        .allow(ConfigRisk::StoreForgets)
        .dead_letter(MemoryQueue::new("dead"))
        .state(runs.clone())
        .stop_when_idle(seconds(30));
    let report = pipeline.run(slow).await.unwrap();
    (script, runs, store, report)
}

#[tokio::test(start_paused = true)]
async fn a_handler_of_three_ack_deadlines_finishes_once() {
    let (script, runs, store, report) = run(|_| done()).await;
    assert_eq!(runs.begun.load(Ordering::Relaxed), 1, "it ran once");
    assert_eq!(store.effects(), ["effect"]);
    assert_eq!((report.applied, report.cancelled), (1, 0));
    // One each time a third of the lease has passed, seen at the next ninth of it: every 4/9, or 6.75 in three leases.
    let extensions = script.sent::<ModifyAckDeadlineRequest>().len();
    assert!((5..=9).contains(&extensions), "{extensions} extensions");
    assert_eq!(script.sent::<AcknowledgeRequest>().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_handler_whose_extensions_fail_is_cancelled_before_its_lease_ends() {
    for extend in [
        |_: &ModifyAckDeadlineRequest| never(),
        |_: &ModifyAckDeadlineRequest| refused(Code::Unavailable, "later"),
    ] {
        let begun = Instant::now();
        let (script, runs, store, report) = run(extend).await;
        let ended = runs.ended.lock().unwrap().unwrap();
        assert!(ended - begun <= seconds(60), "{:?}", ended - begun);
        assert_eq!(runs.begun.load(Ordering::Relaxed), 1);
        assert_eq!(runs.finished.load(Ordering::Relaxed), 0);
        assert!(
            store.effects().is_empty(),
            "its effect must not be committed"
        );
        assert_eq!((report.applied, report.cancelled), (0, 1));
        assert!(
            script.sent::<ModifyAckDeadlineRequest>().len() >= 2,
            "it was tried again"
        );
        assert!(script.sent::<AcknowledgeRequest>().is_empty());
    }
}

/// A lost lease ends its own handler and no other.
#[tokio::test(start_paused = true)]
async fn a_handler_whose_lease_is_lost_is_cancelled_at_once() {
    let begun = Instant::now();
    let (_script, runs, store, report) = run(|request| {
        let ids = request.ack_ids.iter().map(String::as_str);
        let lost: Vec<_> = ids.map(|id| (id.to_owned(), INVALID.to_owned())).collect();
        refused(Code::FailedPrecondition, "Some failed.").naming(lost)
    })
    .await;
    assert_eq!(runs.finished.load(Ordering::Relaxed), 0);
    assert!(store.effects().is_empty());
    assert_eq!(report.cancelled, 1);
    assert!(
        begun.elapsed() < seconds(60 + 30),
        "long before its end by the clock"
    );
}
