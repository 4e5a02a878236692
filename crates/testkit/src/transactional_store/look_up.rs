//! What may run without a claim.

use std::time::Duration;

use bytes::Bytes;
use onlyonce_core::driver::{LookUp, LookedUp, Transaction as _, TransactionalStore};
use tokio::time::sleep;

use super::{TransactionalStoreHarness, begin, commit, complete_one, effects};
use crate::store::tools::*;

async fn look_up<S: TransactionalStore>(store: &S, name: &str) -> LookedUp {
    let answers = store.look_up(&[claim(name)]).await.expect("it looks up");
    match answers[..] {
        [LookUp::New(looked_up)] => looked_up,
        _ => panic!("`{name}` should be new: {answers:?}"),
    }
}

/// Records, claims and payloads are told apart, and nothing is written.
pub async fn look_up_tells_what_is_there(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let claimed = take(&store, A, "claimed", LONG).await;
    take(&store, A, "expired", harness.lease()).await;
    let completed = take(&store, A, "completed", LONG).await;
    assert_eq!(Call::Complete.one(&store, completed).await, Ok(()));
    expire(harness).await;

    let names = ["new", "claimed", "expired", "completed"];
    let mut batch = names.map(claim).to_vec();
    batch.push(claim_for("completed", "another payload"));
    let answers = store.look_up(&batch).await.expect("it looks up");
    let outcome = Some(Bytes::from_static(b"outcome"));
    let [LookUp::New(new), rest @ ..] = &answers[..] else {
        panic!("nothing is there yet: {answers:?}");
    };
    assert_eq!(new.key, key("new"));
    assert_eq!(
        rest,
        [
            LookUp::Claimed,
            LookUp::Claimed,
            LookUp::Completed { outcome },
            LookUp::PayloadMismatch
        ]
    );
    assert_eq!(Call::Renew.one(&store, claimed).await, Ok(()));
    take(&store, B, "new", LONG).await;
}

/// Two that looked a key up while it was new both run, and one of them commits.
pub async fn looked_up_message_takes_effect_once(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let (first, second) = (look_up(&store, "k").await, look_up(&store, "k").await);
    let other = look_up(&store, "other").await;
    let mut tx = begin(&store).await;
    assert_eq!(complete_one(harness, &mut tx, "first", first).await, Ok(()));
    assert_eq!(complete_one(harness, &mut tx, "again", first).await, FENCED);
    commit(tx).await;
    assert_eq!(ask(&store, B, "k").await, done());

    let mut tx = begin(&store).await;
    assert_eq!(
        complete_one(harness, &mut tx, "second", second).await,
        FENCED
    );
    assert_eq!(complete_one(harness, &mut tx, "other", other).await, Ok(()));
    commit(tx).await;
    assert_eq!(effects(harness).await, ["first", "other"]);
}

/// Whoever has claimed the key meanwhile finds it recorded.
pub async fn record_of_a_look_up_fences_claims(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let looked_up = look_up(&store, "k").await;
    let held = take(&store, B, "k", LONG).await;
    let mut tx = begin(&store).await;
    assert_eq!(
        complete_one(harness, &mut tx, "effect", looked_up).await,
        Ok(())
    );
    commit(tx).await;
    for call in CALLS {
        assert_eq!(call.one(&store, held).await, FENCED, "{call:?}");
    }
    let mut tx = begin(&store).await;
    assert_eq!(complete_one(harness, &mut tx, "late", held).await, FENCED);
    commit(tx).await;
    assert_eq!(effects(harness).await, ["effect"]);
    assert_eq!(ask(&store, B, "k").await, done());
}

/// Nor does a look-up count where a claim has been completed meanwhile.
pub async fn record_of_a_claim_fences_look_ups(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let looked_up = look_up(&store, "k").await;
    let held = take(&store, B, "k", LONG).await;
    let mut tx = begin(&store).await;
    assert_eq!(
        complete_one(harness, &mut tx, "claimed", held).await,
        Ok(())
    );
    commit(tx).await;
    let mut tx = begin(&store).await;
    assert_eq!(
        complete_one(harness, &mut tx, "looked up", looked_up).await,
        FENCED
    );
    commit(tx).await;
    assert_eq!(effects(harness).await, ["claimed"]);
}

/// Somebody else's record may have been made and pruned since: a look-up counts for no longer than a record is kept.
pub async fn look_up_counts_for_no_longer_than_a_record(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let looked_up = look_up(&store, "k").await;
    expire(harness).await;
    let mut late = completion(looked_up);
    late.retention = harness.lease();
    let mut tx = begin(&store).await;
    harness.write(&mut tx, "late").await;
    assert_eq!(
        tx.complete(std::slice::from_ref(&late))
            .await
            .expect("it answers"),
        FENCED
    );
    let in_time = complete_one(harness, &mut tx, "in time", looked_up);
    assert_eq!(in_time.await, Ok(()), "its record is kept for longer");
    commit(tx).await;
    assert_eq!(effects(harness).await, ["in time"]);
}

/// Works through all keys until each is done, without a claim.
async fn race<H: TransactionalStoreHarness>(harness: &H, keys: &[String]) {
    const TRIES: usize = 10_000;
    let store = harness.transactional().await;
    let mut todo: Vec<&String> = keys.iter().collect();
    for _ in 0..TRIES {
        let Some(name) = todo.first() else { return };
        let looked_up = match store.look_up(&[claim(name)]).await.as_deref() {
            Ok([LookUp::New(looked_up)]) => *looked_up,
            Ok([LookUp::Completed { .. }]) => {
                todo.remove(0);
                continue;
            }
            _ => {
                sleep(Duration::from_millis(1)).await;
                continue;
            }
        };
        let Ok(mut tx) = store.begin().await else {
            continue;
        };
        harness.write(&mut tx, name).await;
        // Whatever goes wrong, the next look-up tells what became of it.
        if let Ok(Ok(())) = tx.complete(&[completion(looked_up)]).await {
            tx.commit().await.ok();
        }
    }
    panic!("not done after {TRIES} tries: {todo:?}");
}

/// Four race through the same keys without claims: each effect is there exactly once.
pub async fn racing_look_ups_take_effect_once(harness: &impl TransactionalStoreHarness) {
    let mut keys: Vec<String> = (0..40).map(|n| format!("k{n}")).collect();
    futures_util::future::join_all((0..4).map(|_| race(harness, &keys))).await;
    keys.sort();
    assert_eq!(effects(harness).await, keys);
}
