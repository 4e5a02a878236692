//! What outlives the store's own process.

use bytes::Bytes;
use onlyonce_core::driver::ClaimResult;

use super::StoreHarness;
use super::tools::*;

/// Once `complete` has returned, nothing makes the key new again.
pub async fn record_survives_a_crash(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let held = take(&*store, A, "k", LONG).await;
    assert_eq!(Call::Complete.one(&*store, held).await, Ok(()));
    drop(store);
    harness.crash().await;
    let store = harness.store().await;
    assert_eq!(ask(&*store, B, "k").await, done());
    assert_eq!(Call::Complete.one(&*store, held).await, FENCED);
}

/// A crash may lose claims, but a token from before it never beats one from after it.
pub async fn tokens_rise_across_a_crash(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let claimed = take(&*store, A, "claimed", harness.lease()).await;
    let released = take(&*store, A, "released", LONG).await;
    assert_eq!(Call::Release.one(&*store, released).await, Ok(()));
    drop(store);
    harness.crash().await;
    let store = harness.store().await;
    expire(harness).await;
    for (before, name) in [(claimed, "claimed"), (released, "released")] {
        let after = take(&*store, B, name, LONG).await;
        assert!(after.token > before.token, "{before:?} then {after:?}");
        assert_eq!(Call::Complete.one(&*store, before).await, FENCED);
        assert_eq!(Call::Complete.one(&*store, after).await, Ok(()));
    }
}

/// An outcome of some size comes back byte for byte.
pub async fn outcome_of_64_kib_is_replayed(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let bytes: Bytes = (0..64 * 1024).map(|n| (n % 251) as u8).collect();
    let held = take(&*store, A, "k", LONG).await;
    let mut batch = [completion(held)];
    batch[0].outcome = Some(bytes.clone());
    let verdicts = store.complete(&batch).await.expect("it completes");
    assert_eq!(verdicts, [Ok(())]);
    let ClaimResult::Completed { outcome } = ask(&*store, B, "k").await else {
        panic!("it was completed");
    };
    assert!(outcome == Some(bytes), "the outcome was changed");
    // None and empty are different outcomes.
    let held = take(&*store, A, "empty", LONG).await;
    let mut batch = [completion(held)];
    batch[0].outcome = Some(Bytes::new());
    store.complete(&batch).await.expect("it completes");
    let outcome = Some(Bytes::new());
    assert_eq!(
        ask(&*store, B, "empty").await,
        ClaimResult::Completed { outcome }
    );
}
