//! The life of one key: claimed, started, renewed, taken over, released, done.

use onlyonce_core::driver::{ClaimResult, HeldClaim, Starts};

use super::StoreHarness;
use super::tools::*;

/// What was completed is a duplicate ever after, with its outcome, for every owner and handle.
pub async fn completed_key_is_a_duplicate(harness: &dyn StoreHarness) {
    let (store, other) = (harness.store().await, harness.store().await);
    let with = take(&*store, A, "with", LONG).await;
    let without = take(&*store, A, "without", LONG).await;
    let mut batch = [completion(with), completion(without)];
    batch[1].outcome = None;
    let verdicts = store.complete(&batch).await.expect("it completes");
    assert_eq!(verdicts, [Ok(()), Ok(())]);
    for (store, owner) in [(&store, A), (&other, B)] {
        assert_eq!(ask(&**store, owner, "with").await, done());
        let none = ClaimResult::Completed { outcome: None };
        assert_eq!(ask(&**store, owner, "without").await, none);
    }
}

/// A live claim makes everyone else wait, and tells for how long at most.
pub async fn live_claim_is_in_progress_for_others(harness: &dyn StoreHarness) {
    let (store, other) = (harness.store().await, harness.store().await);
    take(&*store, A, "k", LONG).await;
    for _ in 0..2 {
        let answer = ask(&*other, B, "k").await;
        let ClaimResult::InProgress { retry_in } = answer else {
            panic!("A owns it, but B is told {answer:?}");
        };
        assert!(!retry_in.is_zero() && retry_in <= LONG, "{retry_in:?}");
    }
}

/// An owner that lost the answer asks again: it gets a higher token, and the token it never saw is worth nothing.
pub async fn same_owner_claims_again_with_a_higher_token(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let first = take(&*store, A, "k", LONG).await;
    let second = take(&*store, A, "k", LONG).await;
    assert!(second.token > first.token, "{first:?} then {second:?}");
    assert_eq!(Call::Complete.one(&*store, first).await, FENCED);
    assert_eq!(Call::Complete.one(&*store, second).await, Ok(()));
}

/// A claim that ends is given to whoever asks next, under a higher token.
pub async fn expired_claim_is_taken_over(harness: &dyn StoreHarness) {
    let (store, other) = (harness.store().await, harness.store().await);
    let first = take(&*store, A, "k", harness.lease()).await;
    assert!(matches!(
        ask(&*other, B, "k").await,
        ClaimResult::InProgress { .. }
    ));
    expire(harness).await;
    let second = take(&*other, B, "k", LONG).await;
    assert!(second.token > first.token, "{first:?} then {second:?}");
    assert!(matches!(
        ask(&*store, A, "k").await,
        ClaimResult::InProgress { .. }
    ));
    assert_eq!(Call::Complete.one(&*other, second).await, Ok(()));
}

/// Whoever was taken over can do nothing more, and what it tries leaves the new owner alone.
pub async fn stale_token_is_fenced(harness: &dyn StoreHarness) {
    let (store, other) = (harness.store().await, harness.store().await);
    for call in CALLS {
        let name = format!("{call:?}");
        let stale = take(&*store, A, &name, harness.lease()).await;
        expire(harness).await;
        let newest = take(&*other, B, &name, LONG).await;
        assert_eq!(call.one(&*store, stale).await, FENCED, "{call:?}");
        assert_eq!(call.one(&*store, made_up(newest)).await, FENCED, "{call:?}");
        // Still B's, not started by A, not done.
        let answer = ask(&*store, A, &name).await;
        assert!(
            matches!(answer, ClaimResult::InProgress { .. }),
            "{call:?}: {answer:?}"
        );
        let (again, in_doubt) = take_key(&*other, B, &name, LONG).await;
        assert_eq!(in_doubt, None, "{call:?} with a stale token had an effect");
        assert_eq!(Call::Complete.one(&*other, again).await, Ok(()), "{call:?}");
    }
}

/// A token that completed or released is spent, and a key that was never claimed has none.
pub async fn token_is_fenced_once_it_is_spent(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let completed = take(&*store, A, "completed", LONG).await;
    let released = take(&*store, A, "released", LONG).await;
    assert_eq!(Call::Complete.one(&*store, completed).await, Ok(()));
    assert_eq!(Call::Release.one(&*store, released).await, Ok(()));
    let mut never = made_up(completed);
    never.key = key("never");
    for call in CALLS {
        for held in [completed, released, never] {
            assert_eq!(call.one(&*store, held).await, FENCED, "{call:?} {held:?}");
        }
    }
    assert_eq!(ask(&*store, B, "completed").await, done());
    take(&*store, B, "released", LONG).await;
    take(&*store, B, "never", LONG).await;
}

/// An owner that is late, but was not taken over, may still renew and complete: nobody else can have run.
pub async fn expired_claim_that_nobody_took_completes(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let mut held = Vec::new();
    for call in CALLS {
        held.push(take(&*store, A, &format!("{call:?}"), harness.lease()).await);
    }
    expire(harness).await;
    for (call, held) in CALLS.into_iter().zip(held) {
        assert_eq!(call.one(&*store, held).await, Ok(()), "{call:?}");
    }
    let answer = ask(&*store, B, "Renew").await;
    assert!(
        matches!(answer, ClaimResult::InProgress { .. }),
        "{answer:?}"
    );
    let (_, in_doubt) = take_key(&*store, B, "Start", LONG).await;
    assert!(in_doubt.is_some(), "it was started");
    assert_eq!(ask(&*store, B, "Complete").await, done());
    take(&*store, B, "Release", LONG).await;
}

/// Renewal moves the end, as often as it is asked.
pub async fn renewed_claim_outlives_its_first_lease(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let held = take(&*store, A, "k", harness.lease()).await;
    for _ in 0..3 {
        harness.expire(harness.lease() * 3 / 5).await;
        let answer = ask(&*store, B, "k").await;
        let ClaimResult::InProgress { retry_in } = answer else {
            panic!("it was renewed, but B is told {answer:?}");
        };
        assert!(retry_in <= harness.lease(), "{retry_in:?}");
        let verdicts = store.renew(&[held], harness.lease()).await;
        assert_eq!(verdicts.expect("it renews"), [Ok(())]);
    }
    expire(harness).await;
    take(&*store, B, "k", LONG).await;
}

/// A released key is as if never claimed, but for its token; even one that was started, since its owner knows that
/// nothing of it stays.
pub async fn released_key_is_new(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let mut last = take(&*store, A, "k", LONG).await;
    for owner in [B, A, A] {
        assert_eq!(Call::Start.one(&*store, last).await, Ok(()));
        assert_eq!(Call::Release.one(&*store, last).await, Ok(()));
        let next = take(&*store, owner, "k", LONG).await;
        assert!(next.token > last.token, "{last:?} then {next:?}");
        last = next;
    }
}

/// Only a claim that was started leaves doubt.
pub async fn in_doubt_only_after_a_start(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    take(&*store, A, "waited", harness.lease()).await;
    let started = take(&*store, A, "started", harness.lease()).await;
    assert_eq!(Call::Start.one(&*store, started).await, Ok(()));
    expire(harness).await;
    assert_eq!(take_key(&*store, B, "waited", LONG).await.1, None);
    assert!(take_key(&*store, B, "started", LONG).await.1.is_some());
}

/// Doubt stays until someone completes or releases: a takeover that dies before it starts does not clear it, and the
/// owner itself hears of it as well.
pub async fn doubt_outlives_takeovers(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let started = take(&*store, A, "k", harness.lease()).await;
    assert_eq!(Call::Start.one(&*store, started).await, Ok(()));
    for owner in [A, B, C] {
        if owner != A {
            expire(harness).await;
        }
        let (_, in_doubt) = take_key(&*store, owner, "k", harness.lease()).await;
        let starts = Starts::new(started.token, 1);
        assert_eq!(in_doubt, Some(starts), "{owner:?} must be told");
    }
}

/// Each claim that is marked as started counts once, and the last is named, until one is completed or released: that many
/// workers may have died of the message, and what was decided about one run was not decided about the next.
pub async fn starts_are_counted(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let mut before = None;
    for (owner, count) in [(A, 1), (B, 2), (B, 3), (C, 4)] {
        let (held, in_doubt) = take_key(&*store, owner, "k", harness.lease()).await;
        assert_eq!(in_doubt, before, "before the start of {owner:?}");
        for _ in 0..2 {
            assert_eq!(Call::Start.one(&*store, held).await, Ok(()));
        }
        // One that dies before it starts changes nothing.
        expire(harness).await;
        let last = held.token;
        before = Some(Starts::new(last, count));
        let (_, in_doubt) = take_key(&*store, A, "k", harness.lease()).await;
        assert_eq!(in_doubt, before, "after the start of {owner:?}");
        expire(harness).await;
    }
    let (held, _) = take_key(&*store, A, "k", LONG).await;
    assert_eq!(Call::Release.one(&*store, held).await, Ok(()));
    take(&*store, B, "k", LONG).await;
}

/// A key that was used for another payload is never taken for a duplicate, nor run as if it were new.
pub async fn other_payload_is_a_mismatch(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let started = take(&*store, A, "started", harness.lease()).await;
    assert_eq!(Call::Start.one(&*store, started).await, Ok(()));
    expire(harness).await;
    take(&*store, A, "live", LONG).await;
    let completed = take(&*store, A, "done", LONG).await;
    assert_eq!(Call::Complete.one(&*store, completed).await, Ok(()));
    let released = take(&*store, A, "released", LONG).await;
    assert_eq!(Call::Release.one(&*store, released).await, Ok(()));
    for owner in [A, B] {
        for name in ["started", "live", "done"] {
            let other = [claim_for(name, "other payload")];
            let answers = claim_all(&*store, owner, &other, LONG).await;
            assert_eq!(
                answers,
                [ClaimResult::PayloadMismatch],
                "{name} for {owner:?}"
            );
        }
    }
    let other = [claim_for("released", "other payload")];
    let answer = claim_all(&*store, B, &other, LONG).await.remove(0);
    assert!(matches!(answer, ClaimResult::Acquired { .. }), "{answer:?}");
    // And the conflict changed nothing.
    let answer = ask(&*store, B, "started").await;
    assert!(matches!(answer, ClaimResult::Acquired { .. }), "{answer:?}");
    assert_eq!(ask(&*store, B, "done").await, done());
}

/// A claim that expired without having been started has had no effect, so a payload that was corrected since may have the
/// key; and whoever had it before may not complete the other one.
pub async fn corrected_payload_takes_over_what_never_started(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let held = take(&*store, A, "k", harness.lease()).await;
    expire(harness).await;
    let corrected = [claim_for("k", "corrected")];
    let answer = claim_all(&*store, B, &corrected, LONG).await.remove(0);
    let ClaimResult::Acquired {
        token, in_doubt, ..
    } = answer
    else {
        panic!("it is taken over: {answer:?}");
    };
    assert!(token > held.token && in_doubt.is_none());
    assert_eq!(Call::Complete.one(&*store, held).await, FENCED);
    // The key is the corrected payload's now.
    let before = claim_all(&*store, A, &[claim("k")], LONG).await;
    assert_eq!(before, [ClaimResult::PayloadMismatch]);
    let again = claim_all(&*store, A, &corrected, LONG).await;
    assert!(
        matches!(again[0], ClaimResult::InProgress { .. }),
        "{again:?}"
    );
}

/// Each claim that expires is counted, until one is completed or released: that many owners may have died of the message.
pub async fn takeovers_are_counted(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let lease = harness.lease();
    let takeovers = async |owner| {
        let answer = claim_all(&*store, owner, &[claim("k")], lease)
            .await
            .remove(0);
        let ClaimResult::Acquired {
            token, takeovers, ..
        } = answer
        else {
            panic!("it should be new, it is {answer:?}");
        };
        let key = key("k");
        (takeovers, HeldClaim::new(key, token))
    };
    for n in 0..3 {
        let owner = if n % 2 == 0 { A } else { B };
        assert_eq!(takeovers(owner).await.0, n);
        expire(harness).await;
    }
    let (count, _) = takeovers(A).await;
    assert_eq!(count, 3);
    let (count, held) = takeovers(A).await;
    assert_eq!(count, 3, "its own live claim has not expired");
    assert_eq!(store.release(&[held]).await.expect("it is there"), [Ok(())]);
    assert_eq!(takeovers(B).await.0, 0);
}
