//! Batches, and many at once.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onlyonce_core::driver::{Claim, ClaimResult, HeldClaim, Owner, Store, Token};

use super::StoreHarness;
use super::tools::*;

/// A key that stands twice in one batch is given once, so that one pipeline never runs it twice at the same time.
pub async fn second_claim_in_a_batch_is_in_progress(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let before = take(&*store, A, "owned", LONG).await;
    let twice = [claim("new"), claim("owned"), claim("new"), claim("owned")];
    let answers = claim_all(&*store, A, &twice, LONG).await;
    let ClaimResult::Acquired { token, .. } = answers[0] else {
        panic!("the first is new: {answers:?}");
    };
    assert!(matches!(answers[1], ClaimResult::Acquired { token, .. } if token > before.token));
    for busy in &answers[2..] {
        assert!(
            matches!(busy, ClaimResult::InProgress { .. }),
            "{answers:?}"
        );
    }
    let key = key("new");
    let first = HeldClaim::new(key, token);
    assert_eq!(Call::Complete.one(&*store, first).await, Ok(()));
}

/// Each entry's answer stands where the entry stood, whatever the others are.
pub async fn answers_follow_the_batch(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let completed = take(&*store, A, "done", LONG).await;
    assert_eq!(Call::Complete.one(&*store, completed).await, Ok(()));
    let busy = take(&*store, A, "busy", LONG).await;
    let batch = [
        claim("new-2"),
        claim("done"),
        claim("busy"),
        claim_for("done", "other payload"),
        claim("new-1"),
        claim("done"),
    ];
    let answers = claim_all(&*store, B, &batch, LONG).await;
    let [
        ClaimResult::Acquired { token: second, .. },
        ClaimResult::Completed { .. },
        ClaimResult::InProgress { .. },
        ClaimResult::PayloadMismatch,
        ClaimResult::Acquired { token: first, .. },
        ClaimResult::Completed { .. },
    ] = answers[..]
    else {
        panic!("{answers:?}");
    };
    // The tokens belong to the keys that they stand for.
    let held = |name, token| HeldClaim::new(key(name), token);
    let (first, second) = (held("new-1", first), held("new-2", second));
    for call in [Call::Renew, Call::Start, Call::Complete] {
        let batch = [made_up(busy), second, completed, first];
        let verdicts = call.each(&*store, &batch).await;
        assert_eq!(verdicts, [FENCED, Ok(()), FENCED, Ok(())], "{call:?}");
    }
    // One after another: the second finds it done, or gone.
    for call in [Call::Complete, Call::Release] {
        let held = take(&*store, A, &format!("twice-{call:?}"), LONG).await;
        let verdicts = call.each(&*store, &[held, held]).await;
        assert_eq!(verdicts, [Ok(()), FENCED], "{call:?}");
    }
}

/// Far more entries than one statement or request may have.
pub async fn large_batches_are_taken_whole(harness: &dyn StoreHarness) {
    const ENTRIES: usize = 5000;
    let store = harness.store().await;
    let claims: Vec<_> = (0..ENTRIES).map(|n| claim(&n.to_string())).collect();
    let answers = claim_all(&*store, A, &claims, LONG).await;
    let held: Vec<HeldClaim> = (claims.iter().zip(answers))
        .map(|(claim, answer)| match answer {
            ClaimResult::Acquired { token, .. } => HeldClaim::new(claim.key, token),
            other => panic!("nothing was claimed before, got {other:?}"),
        })
        .collect();
    for call in [Call::Renew, Call::Start] {
        let verdicts = call.each(&*store, &held).await;
        assert!(verdicts.iter().all(Result::is_ok), "{call:?}");
    }
    // Outcomes of their own, so that a mix-up shows.
    let outcome = |n: usize| Some(n.to_string().into());
    let with_outcome = |(n, held): (usize, &HeldClaim)| {
        let mut completion = completion(*held);
        completion.outcome = outcome(n);
        completion
    };
    let batch: Vec<_> = held.iter().enumerate().map(with_outcome).collect();
    let verdicts = store.complete(&batch).await.expect("it completes");
    assert_eq!(verdicts, vec![Ok(()); ENTRIES]);
    let answers = claim_all(&*store, B, &claims, LONG).await;
    for (n, answer) in answers.into_iter().enumerate() {
        let outcome = outcome(n);
        assert_eq!(answer, ClaimResult::Completed { outcome });
    }
}

/// Two that ask for the same keys in opposite orders, at the same time, both have their answers: a store that locks rows takes them
/// in an order of its own.
pub async fn opposite_orders_do_not_block_each_other(harness: &dyn StoreHarness) {
    const ROUNDS: usize = 12;
    const KEYS: usize = 40;
    let (one, other) = (harness.store().await, harness.store().await);
    for round in 0..ROUNDS {
        let claims: Vec<_> = (0..KEYS).map(|n| claim(&format!("{round}-{n}"))).collect();
        let reversed: Vec<_> = claims.iter().rev().copied().collect();
        let (forth, back) = futures_util::future::join(
            claim_all(&*one, A, &claims, LONG),
            claim_all(&*other, B, &reversed, LONG),
        )
        .await;
        let held = |claims: &[Claim], answers: Vec<ClaimResult>| -> Vec<HeldClaim> {
            let answers = claims.iter().zip(answers);
            let held = answers.filter_map(|(claim, answer)| match answer {
                ClaimResult::Acquired { token, .. } => Some(HeldClaim::new(claim.key, token)),
                _ => None,
            });
            held.collect()
        };
        let mut all = held(&claims, forth);
        all.extend(held(&reversed, back));
        assert_eq!(all.len(), KEYS, "each key has one owner");
        let reversed: Vec<_> = all.iter().rev().copied().collect();
        for call in [Call::Renew, Call::Start, Call::Complete] {
            let (forth, back) =
                futures_util::future::join(call.each(&*one, &all), call.each(&*other, &reversed))
                    .await;
            let done = forth.iter().chain(&back).filter(|verdict| verdict.is_ok());
            let once = call == Call::Complete;
            assert_eq!(done.count(), if once { KEYS } else { 2 * KEYS }, "{call:?}");
        }
    }
}

/// Nothing in, nothing out.
pub async fn empty_batches_are_harmless(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    assert!(claim_all(&*store, A, &[], LONG).await.is_empty());
    for call in CALLS {
        assert!(call.each(&*store, &[]).await.is_empty());
    }
    assert_eq!(store.prune(0).await.expect("it prunes"), 0);
}

const KEYS: [&str; 4] = ["k0", "k1", "k2", "k3"];

/// What all owners see of one key.
#[derive(Default)]
struct Watched {
    /// Who believes to own it now, or 0.
    owner: AtomicU64,
    last: Mutex<Option<Token>>,
    won: AtomicU64,
}

/// Claims all keys again and again; whoever is given one holds it for a moment and releases it.
async fn contend(store: Arc<dyn Store>, owner: Owner, watched: Arc<[Watched; 4]>, rounds: usize) {
    let claims = KEYS.map(claim);
    for _ in 0..rounds {
        let answers = claim_all(&*store, owner, &claims, LONG).await;
        let mut won = Vec::new();
        for ((answer, watched), name) in answers.into_iter().zip(&*watched).zip(KEYS) {
            let ClaimResult::Acquired { token, .. } = answer else {
                assert!(
                    matches!(answer, ClaimResult::InProgress { .. }),
                    "{answer:?}"
                );
                continue;
            };
            let before = watched.owner.swap(owner.0, Ordering::SeqCst);
            assert_eq!(before, 0, "{owner:?} was given {name} beside its owner");
            let last = watched.last.lock().expect("no panic").replace(token);
            assert!(last < Some(token), "{name}: {token:?} after {last:?}");
            watched.won.fetch_add(1, Ordering::SeqCst);
            let key = key(name);
            won.push((HeldClaim::new(key, token), watched));
        }
        tokio::task::yield_now().await;
        for (_, watched) in &won {
            watched.owner.store(0, Ordering::SeqCst);
        }
        let held: Vec<HeldClaim> = won.into_iter().map(|(held, _)| held).collect();
        let verdicts = Call::Release.each(&*store, &held).await;
        assert!(verdicts.iter().all(Result::is_ok), "{verdicts:?}");
        tokio::task::yield_now().await;
    }
}

/// Ten thousand claims by eight owners, through handles of their own: at any time a key has one owner, and its tokens
/// only rise.
pub async fn one_live_owner_per_key(harness: &dyn StoreHarness) {
    const ROUNDS: usize = 10_000 / 8 / KEYS.len();
    let watched = Arc::new(std::array::from_fn(|_| Watched::default()));
    let mut owners = Vec::new();
    for owner in 1..=8 {
        let store = harness.store().await;
        let contend = contend(store, Owner(owner), Arc::clone(&watched), ROUNDS);
        owners.push(tokio::spawn(contend));
    }
    for owner in owners {
        owner.await.expect("no panic");
    }
    let won: BTreeMap<_, _> = KEYS
        .into_iter()
        .zip(watched.iter().map(|w| w.won.load(Ordering::SeqCst)))
        .collect();
    assert!(won.values().all(|won| *won > 0), "nobody won: {won:?}");
}

/// Removes what has expired, a few at a time, and nothing else.
pub async fn prune_removes_only_what_has_expired(harness: &dyn StoreHarness) {
    let store = harness.store().await;
    let short = harness.lease();
    let mut batch = Vec::new();
    let names: Vec<String> = (0..5).map(|n| format!("short-{n}")).collect();
    for name in names.iter().map(String::as_str).chain(["long"]) {
        let held = take(&*store, A, name, LONG).await;
        let mut completion = completion(held);
        completion.retention = if name == "long" { LONG } else { short };
        batch.push(completion);
    }
    let live = take(&*store, A, "live", LONG).await;
    let expired = take(&*store, A, "expired", short).await;
    assert_eq!(Call::Start.one(&*store, expired).await, Ok(()));
    store.complete(&batch).await.expect("it completes");
    assert_eq!(store.prune(100).await.expect("it prunes"), 0, "too early");
    assert_eq!(ask(&*store, B, "short-0").await, done(), "retention lasts");

    expire(harness).await;
    let mut removed = Vec::new();
    for _ in 0..4 {
        removed.push(store.prune(2).await.expect("it prunes"));
    }
    if harness.prunes_by_itself() {
        assert!(removed.iter().all(|n| *n <= 2), "{removed:?}");
    } else {
        assert_eq!(removed, [2, 2, 1, 0]);
    }
    for name in &names {
        take(&*store, B, name, LONG).await;
    }
    assert_eq!(ask(&*store, B, "long").await, done());
    assert_eq!(Call::Renew.one(&*store, live).await, Ok(()));
    // A claim is no record: what it knows of its past is kept.
    let (_, in_doubt) = take_key(&*store, B, "expired", Duration::from_secs(1)).await;
    assert!(in_doubt.is_some(), "a started claim was forgotten");
}
