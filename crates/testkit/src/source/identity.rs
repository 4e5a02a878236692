//! Which queue it is, and which message.

use std::collections::HashSet;

use onlyonce_core::DedupKey;
use onlyonce_core::driver::{
    Claim, ClaimResult, Disposition, Fingerprint, KeyDigest, Owner, Scope, Source, Store as _,
};
use onlyonce_core::memory::MemoryStore;

use super::SourceHarness;
use super::tools::*;

async fn identity(source: &dyn Source) -> String {
    let info = source.queue_info().await.expect("it can be inspected");
    let identity = info.identity.expect("it tells its identity");
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

/// A queue of the same name in another place has another identity: a message that is equal in both, its key included, is new
/// in each, although both share one store.
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
        let delivery = collect_one(harness, &*source).await;
        let scope = Scope::new("default", identity(&*source).await);
        let claim = Claim::new(
            KeyDigest::new(&scope, &DedupKey::new("payment")),
            Fingerprint::of(&delivery.message.body),
        );
        let claimed = store
            .claim(Owner::random(), &[claim], harness.lease())
            .await;
        let claimed = claimed.expect("the store is there");
        assert!(
            matches!(claimed[0], ClaimResult::Acquired { .. }),
            "{claimed:?}"
        );
    }
}

/// Where messages have an id of the broker's, no two have the same one: neither while both are held, nor after the first is
/// gone.
pub async fn broker_id_is_given_once(harness: &dyn SourceHarness) {
    let source = harness.source().await;
    let mut given = HashSet::new();
    for round in ["a", "b", "c"] {
        publish(harness, &numbered(round, 2)).await;
        let held = collect(harness, &*source, 2).await;
        for id in held.iter().filter_map(|one| one.message.broker_id.clone()) {
            assert!(given.insert(id.clone()), "{id} was given twice");
        }
        applied(&*source, &held, &Disposition::Ack).await;
    }
}
