//! Which queue it is.

use onlyonce_core::memory::MemoryStore;
use onlyonce_core::{DedupKey, Hazard, Pipeline, Report, Source};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::SourceHarness;
use super::tools::*;

async fn identity(source: &dyn Source) -> String {
    let inspection = source.inspect().await.expect("it can be inspected");
    let identity = inspection.identity.expect("it tells its identity");
    assert!(!identity.is_empty());
    identity
}

/// Every consumer of a queue tells the same identity, before and after its connection broke.
pub async fn identity_is_told_and_stays(harness: &dyn SourceHarness) {
    let source = harness.source().await;
    let told = identity(&*source).await;
    assert_eq!(identity(&*harness.source().await).await, told);
    harness.break_connection().await;
    assert_eq!(identity(&*source).await, told);
}

/// A queue of the same name in another place has another identity: a message that is equal in both, its dedup id
/// included, takes effect in each, although both share one store.
pub async fn namesake_is_another_queue(harness: &dyn SourceHarness) {
    let (source, sink) = (harness.source().await, harness.sink().await);
    let (other, other_sink) = harness.namesake().await;
    assert_eq!(source.name(), other.name(), "the harness's part");
    assert_ne!(identity(&*source).await, identity(&*other).await);
    let store = MemoryStore::new();
    for (source, sink) in [(source, sink), (other, other_sink)] {
        for result in sink.publish(&numbered("payment", 1)).await {
            result.expect("the sink takes it");
        }
        sink.close().await.expect("the sink closes");
        let report = take_one(harness, source, store.clone()).await;
        assert_eq!((report.applied, report.duplicates), (1, 0), "{report:?}");
    }
}

/// Runs a pipeline until it has handled a message.
async fn take_one(
    harness: &dyn SourceHarness,
    source: std::sync::Arc<dyn Source>,
    store: MemoryStore,
) -> Report {
    let (handled, mut first) = mpsc::channel(1);
    let patience = harness.patience();
    let hazards = [
        Hazard::ShortRetention,
        Hazard::DeliveryLimit,
        Hazard::GivesUp,
        Hazard::NoDeadLetter,
    ];
    let pipeline = Pipeline::idempotent(source, store).shutdown(async move {
        let _ = timeout(patience, first.recv()).await;
    });
    let pipeline = hazards
        .into_iter()
        .fold(pipeline, |p, hazard| p.allow(hazard));
    let run = pipeline.run(move |_: DedupKey| {
        let handled = handled.clone();
        async move {
            let _ = handled.try_send(());
        }
    });
    run.await.expect("it runs")
}
