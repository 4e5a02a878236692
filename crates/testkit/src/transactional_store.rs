//! The checks of a [`TransactionalStore`]: see [`transactional_store_suite!`](crate::transactional_store_suite).
//!
//! They come on top of [`store`](crate::store)'s, which the same store must pass as well.

mod look_up;

pub use look_up::*;

use std::future::Future;
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::ErrorKind;
use onlyonce_core::driver::{
    ClaimResult, HeldClaim, Owner, Precondition, Store, Transaction, TransactionalStore,
};
use tokio::time::sleep;

use crate::Gap;
use crate::store::StoreHarness;
use crate::store::tools::*;

/// What the checks need of a store whose transactions carry effects: a place to write to, and to read from.
#[async_trait]
pub trait TransactionalStoreHarness: StoreHarness {
    /// The store.
    type Store: TransactionalStore;

    /// A new handle on the store, as another process would open it.
    async fn transactional(&self) -> Self::Store;

    /// Writes `effect` within a transaction.
    async fn write(&self, tx: &mut <Self::Store as TransactionalStore>::Tx, effect: &str);

    /// Does within a transaction what the store lets pass until the commit, and refuses then: as what breaks a deferred
    /// foreign key.
    async fn break_constraint(&self, tx: &mut <Self::Store as TransactionalStore>::Tx);

    /// Every committed effect, in any order; read from outside of all transactions, without waiting for those that are
    /// open.
    async fn effects(&self) -> Vec<String>;

    /// The checks of this suite that are known to fail.
    fn transaction_gaps(&self) -> &'static [Gap] {
        &[]
    }
}

/// The names of all checks.
pub const CHECKS: &[&str] = crate::__transactional_store_checks! { names };

/// Runs one check, or asserts that it fails where a [`Gap`] says so.
pub async fn run(
    harness: &impl TransactionalStoreHarness,
    name: &str,
    check: impl Future<Output = ()>,
) {
    crate::gap::run(CHECKS, name, harness.transaction_gaps(), check).await;
}

async fn effects(harness: &impl TransactionalStoreHarness) -> Vec<String> {
    let mut effects = harness.effects().await;
    effects.sort();
    effects
}

async fn begin<S: TransactionalStore>(store: &S) -> S::Tx {
    store.begin().await.expect("it begins")
}

/// Writes an effect and ends the savepoint.
async fn complete_one<H: TransactionalStoreHarness>(
    harness: &H,
    tx: &mut <H::Store as TransactionalStore>::Tx,
    effect: &str,
    precondition: impl Into<Precondition>,
) -> Result<(), onlyonce_core::driver::Fenced> {
    harness.write(tx, effect).await;
    let verdict = tx.complete(&[completion(precondition)]).await;
    verdict.expect("the store can be reached")
}

async fn commit(tx: impl Transaction) {
    tx.commit().await.expect("it commits");
}

/// Nothing is seen before the commit, and everything after it.
pub async fn effect_and_record_commit_together(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let held = take(&store, A, "k", LONG).await;
    let mut tx = begin(&store).await;
    assert_eq!(complete_one(harness, &mut tx, "effect", held).await, Ok(()));
    assert!(effects(harness).await.is_empty(), "not committed yet");
    commit(tx).await;
    assert_eq!(effects(harness).await, ["effect"]);
    assert_eq!(ask(&*harness.store().await, B, "k").await, done());
}

/// What `commit` has confirmed is there after a crash.
pub async fn effect_and_record_survive_a_crash(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let held = take(&store, A, "k", LONG).await;
    let mut tx = begin(&store).await;
    assert_eq!(complete_one(harness, &mut tx, "effect", held).await, Ok(()));
    commit(tx).await;
    drop(store);
    harness.crash().await;
    assert_eq!(effects(harness).await, ["effect"]);
    assert_eq!(ask(&harness.transactional().await, B, "k").await, done());
}

/// Several messages share a commit; one that fails takes only its own effects with it.
pub async fn rollback_takes_back_only_its_savepoint(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let mut held = Vec::new();
    for name in ["k1", "k2", "k3"] {
        held.push(take(&store, A, name, LONG).await);
    }
    let mut tx = begin(&store).await;
    assert_eq!(complete_one(harness, &mut tx, "one", held[0]).await, Ok(()));
    harness.write(&mut tx, "two").await;
    tx.rollback().await.expect("it rolls back");
    tx.rollback()
        .await
        .expect("nothing to roll back is harmless");
    assert_eq!(
        complete_one(harness, &mut tx, "three", held[2]).await,
        Ok(())
    );
    commit(tx).await;
    assert_eq!(effects(harness).await, ["one", "three"]);
    for (name, is_done) in [("k1", true), ("k2", false), ("k3", true)] {
        let answer = ask(&store, B, name).await;
        assert_eq!(answer == done(), is_done, "{name}: {answer:?}");
    }
    assert_eq!(Call::Renew.one(&store, held[1]).await, Ok(()), "still held");
}

/// A savepoint that was not completed is not committed.
pub async fn unfinished_savepoint_is_not_committed(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let held = take(&store, A, "k", LONG).await;
    let mut tx = begin(&store).await;
    assert_eq!(
        complete_one(harness, &mut tx, "finished", held).await,
        Ok(())
    );
    harness.write(&mut tx, "unfinished").await;
    commit(tx).await;
    assert_eq!(effects(harness).await, ["finished"]);
}

/// A transaction that is dropped has never been, and holds up nobody.
pub async fn dropped_transaction_leaves_nothing(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let held = take(&store, A, "k", LONG).await;
    let mut tx = begin(&store).await;
    assert_eq!(
        complete_one(harness, &mut tx, "dropped", held).await,
        Ok(())
    );
    drop(tx);
    assert_eq!(Call::Renew.one(&store, held).await, Ok(()), "still held");
    let mut tx = begin(&store).await;
    assert_eq!(complete_one(harness, &mut tx, "kept", held).await, Ok(()));
    commit(tx).await;
    assert_eq!(effects(harness).await, ["kept"]);
}

/// Whoever was taken over is told so before the commit, loses its effects, and takes no others with them.
pub async fn stale_token_is_fenced(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let stale = take(&store, A, "stale", harness.lease()).await;
    let good = take(&store, A, "good", LONG).await;
    expire(harness).await;
    let newest = take(&store, B, "stale", LONG).await;

    let mut tx = begin(&store).await;
    assert_eq!(complete_one(harness, &mut tx, "stale", stale).await, FENCED);
    assert_eq!(complete_one(harness, &mut tx, "good", good).await, Ok(()));
    assert_eq!(complete_one(harness, &mut tx, "stale", stale).await, FENCED);
    commit(tx).await;
    assert_eq!(effects(harness).await, ["good"]);

    let mut tx = begin(&store).await;
    assert_eq!(
        complete_one(harness, &mut tx, "newest", newest).await,
        Ok(())
    );
    commit(tx).await;
    assert_eq!(effects(harness).await, ["good", "newest"]);
}

/// The last savepoint may complete with the commit; fenced, it takes nothing with it that came before.
pub async fn last_savepoint_completes_with_the_commit(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let stale = take(&store, A, "stale", harness.lease()).await;
    let (one, two) = (
        take(&store, A, "one", LONG).await,
        take(&store, A, "two", LONG).await,
    );
    expire(harness).await;
    take(&store, B, "stale", LONG).await;
    for (first, last, verdict) in [(None, one, Ok(())), (Some(two), stale, FENCED)] {
        let mut tx = begin(&store).await;
        if let Some(first) = first {
            assert_eq!(
                complete_one(harness, &mut tx, "second", first).await,
                Ok(())
            );
        }
        harness.write(&mut tx, &format!("last, {verdict:?}")).await;
        let result = tx.complete_and_commit(&[completion(last)]).await;
        assert_eq!(result.expect("the store can be reached"), verdict);
    }
    assert_eq!(effects(harness).await, ["last, Ok(())", "second"]);
    assert_eq!(ask(&store, B, "one").await, done());
    assert_eq!(ask(&store, B, "two").await, done());
}

/// A token completes once, in this transaction or in an earlier one.
pub async fn savepoint_completes_once(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let held = take(&store, A, "k", LONG).await;
    let mut tx = begin(&store).await;
    assert_eq!(complete_one(harness, &mut tx, "first", held).await, Ok(()));
    assert_eq!(complete_one(harness, &mut tx, "second", held).await, FENCED);
    commit(tx).await;
    let mut tx = begin(&store).await;
    assert_eq!(complete_one(harness, &mut tx, "third", held).await, FENCED);
    commit(tx).await;
    assert_eq!(effects(harness).await, ["first"]);
}

/// A savepoint of several messages records all of them, or none if one is fenced, and its effect is there or not with them.
pub async fn savepoint_of_several_messages_is_recorded_whole(
    harness: &impl TransactionalStoreHarness,
) {
    let store = harness.transactional().await;
    let stale = take(&store, A, "stale", harness.lease()).await;
    let (one, two) = (
        take(&store, A, "one", LONG).await,
        take(&store, A, "two", LONG).await,
    );
    expire(harness).await;
    take(&store, B, "stale", LONG).await;
    let mut tx = begin(&store).await;
    harness.write(&mut tx, "all three").await;
    let verdict = tx.complete(&[one, stale, two].map(completion)).await;
    assert_eq!(verdict.expect("the store can be reached"), FENCED);
    commit(tx).await;
    assert!(effects(harness).await.is_empty());
    for key in ["one", "two"] {
        assert_ne!(ask(&store, B, key).await, done());
    }
    for (effect, last, verdict) in [("third", stale, FENCED), ("both", two, Ok(()))] {
        let mut tx = begin(&store).await;
        harness.write(&mut tx, effect).await;
        let result = tx.complete_and_commit(&[one, last].map(completion)).await;
        assert_eq!(result.expect("the store can be reached"), verdict);
    }
    assert_eq!(effects(harness).await, ["both"]);
    for key in ["one", "two"] {
        assert_eq!(ask(&store, B, key).await, done());
    }
}

/// Late, but not taken over: nobody else can have run.
pub async fn expired_claim_that_nobody_took_completes(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let held = take(&store, A, "k", harness.lease()).await;
    expire(harness).await;
    let mut tx = begin(&store).await;
    assert_eq!(complete_one(harness, &mut tx, "late", held).await, Ok(()));
    commit(tx).await;
    assert_eq!(effects(harness).await, ["late"]);
}

/// A claim that expires while a transaction is open is either taken over or committed, never both.
pub async fn takeover_and_commit_exclude_each_other(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let other = harness.transactional().await;
    for round in 0..5 {
        let name = format!("k{round}");
        let held = take(&store, A, &name, harness.lease()).await;
        let mut tx = begin(&store).await;
        assert_eq!(complete_one(harness, &mut tx, &name, held).await, Ok(()));
        expire(harness).await;
        // The takeover may have to wait for the commit, so it runs beside it.
        let takeover = async { other.claim(B, &[claim(&name)], LONG).await };
        let commit = async {
            for _ in 0..round {
                tokio::task::yield_now().await;
            }
            tx.commit().await
        };
        let (takeover, committed) = futures_util::future::join(takeover, commit).await;
        let effective = effects(harness).await.contains(&name);
        assert_eq!(effective, committed.is_ok(), "{committed:?}");
        // An error is an answer too: the store may refuse to wait so long.
        if let Ok(answer) = takeover {
            assert_eq!(answer[0] == done(), effective, "{answer:?}");
        }
    }
}

/// A commit that the store refuses is not one whose answer was lost: nothing of it happened, and the claims are as before.
pub async fn refused_commit_leaves_nothing(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    for finish in [false, true] {
        let (good, bad) = match finish {
            true => ("good", "bad"),
            false => ("other good", "other bad"),
        };
        let (held, guilty) = (
            take(&store, A, good, LONG).await,
            take(&store, A, bad, LONG).await,
        );
        let mut tx = store.begin_alone().await.expect("it begins");
        assert_eq!(complete_one(harness, &mut tx, good, held).await, Ok(()));
        harness.write(&mut tx, bad).await;
        harness.break_constraint(&mut tx).await;
        let last = completion(guilty);
        let refused = match finish {
            true => tx
                .complete_and_commit(std::slice::from_ref(&last))
                .await
                .map(drop),
            false => match tx.complete(std::slice::from_ref(&last)).await {
                Ok(_) => tx.commit().await,
                Err(error) => Err(error),
            },
        };
        let error = refused.expect_err("the constraint is broken");
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(!error.is_retryable(), "the same again is refused again");
        assert!(effects(harness).await.is_empty());
        let verdicts = Call::Renew.each(&store, &[held, guilty]).await;
        assert_eq!(verdicts, [Ok(()), Ok(())], "still held");
    }
}

/// Whoever may have shared a commit with what was refused is told that nothing happened, or that it is done; alone, it is
/// done.
pub async fn refused_commit_spares_the_others(harness: &impl TransactionalStoreHarness) {
    let store = harness.transactional().await;
    let mut names: Vec<String> = (0..8).map(|n| format!("good {n}")).collect();
    names.insert(4, "bad".into());
    let mut held = Vec::new();
    for name in &names {
        held.push(take(&store, A, name, LONG).await);
    }
    let run = async |alone: bool, name: &str, held: HeldClaim| {
        let mut tx = match alone {
            true => store.begin_alone().await.expect("it begins"),
            false => begin(&store).await,
        };
        harness.write(&mut tx, name).await;
        if name == "bad" {
            harness.break_constraint(&mut tx).await;
        }
        tx.complete_and_commit(&[completion(held)]).await
    };
    let all = names.iter().zip(&held);
    let together = all.clone().map(|(name, held)| run(false, name, *held));
    let together = futures_util::future::join_all(together).await;
    for ((name, held), answer) in all.zip(together) {
        assert!(name != "bad" || answer.is_err(), "it cannot be done");
        if answer.is_err() {
            // The store either knows that nothing happened, or the claim tells.
            assert_eq!(Call::Renew.one(&store, *held).await, Ok(()), "{name}");
            assert!(!effects(harness).await.contains(name), "{name}");
            let alone = run(true, name, *held).await;
            assert_eq!(alone.is_ok(), name != "bad", "{name}: {alone:?}");
        }
    }
    names.retain(|name| name != "bad");
    assert_eq!(effects(harness).await, names);
    assert_ne!(ask(&store, A, "bad").await, done());
}

/// Works through all keys until each is done.
async fn race<H: TransactionalStoreHarness>(harness: &H, owner: Owner, keys: &[String]) {
    let store = harness.transactional().await;
    let mut todo: Vec<&String> = keys.iter().collect();
    while let Some(name) = todo.first() {
        let token = match store.claim(owner, &[claim(name)], LONG).await.as_deref() {
            Ok([ClaimResult::Acquired { token, .. }]) => *token,
            Ok([ClaimResult::Completed { .. }]) => {
                todo.remove(0);
                continue;
            }
            // Busy, or an error that may pass: look at another key meanwhile.
            _ => {
                todo.rotate_left(1);
                sleep(Duration::from_millis(1)).await;
                continue;
            }
        };
        let key = key(name);
        let Ok(mut tx) = store.begin().await else {
            continue;
        };
        harness.write(&mut tx, name).await;
        // Whatever goes wrong, the next claim tells what became of it.
        if let Ok(Ok(())) = tx.complete(&[completion(HeldClaim::new(key, token))]).await {
            tx.commit().await.ok();
        }
    }
}

/// Four owners race through the same keys: each effect is there exactly once.
pub async fn racing_owners_take_effect_once(harness: &impl TransactionalStoreHarness) {
    let mut keys: Vec<String> = (0..40).map(|n| format!("k{n}")).collect();
    let owners = (1..=4).map(|owner| race(harness, Owner(owner), &keys));
    futures_util::future::join_all(owners).await;
    keys.sort();
    assert_eq!(effects(harness).await, keys);
}
