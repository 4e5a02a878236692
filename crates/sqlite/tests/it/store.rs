//! What the store answers, and that only what must be is synced.

use crate::support::*;
use bytes::Bytes;
use onlyonce_core::driver::{
    Claim, ClaimResult, Fenced, Fingerprint, HeldClaim, Owner, Store, Token,
};
use onlyonce_sqlite::SqliteStore;
use std::time::Duration;

#[tokio::test]
async fn a_key_is_claimed_busy_then_done() {
    let scene = Scene::new();
    let store = SqliteStore::open(scene.config()).await.unwrap();
    let (a, b) = (Owner::random(), Owner::random());
    let claimed = store.claim(a, &[claim(1)], LEASE).await.unwrap();
    let held = token(&claimed[0]);
    scene.pass(Duration::from_secs(10));
    assert_eq!(
        store.claim(b, &[claim(1)], LEASE).await.unwrap(),
        [ClaimResult::InProgress {
            retry_in: Duration::from_secs(20)
        }]
    );
    let mut done = completion(1, held);
    done.outcome = Some(Bytes::from_static(b"receipt 7"));
    assert_eq!(store.complete(&[done.clone()]).await.unwrap(), [Ok(())]);
    assert_eq!(
        store.claim(b, &[claim(1)], LEASE).await.unwrap(),
        [ClaimResult::Completed {
            outcome: Some(Bytes::from_static(b"receipt 7"))
        }]
    );
    assert_eq!(store.complete(&[done]).await.unwrap(), [Err(Fenced)]);
}

#[tokio::test]
async fn a_batch_is_answered_as_if_one_by_one() {
    let scene = Scene::new();
    let store = SqliteStore::open(scene.config()).await.unwrap();
    let owner = Owner::random();
    let answers = store
        .claim(owner, &[claim(1), claim(1), claim(2)], LEASE)
        .await
        .unwrap();
    assert!(
        matches!(answers[1], ClaimResult::InProgress { .. }),
        "{answers:?}"
    );
    assert!(token(&answers[2]) > token(&answers[0]));
    // In a later batch, the owner's own claim is taken over.
    let again = store.claim(owner, &[claim(1)], LEASE).await.unwrap();
    assert!(token(&again[0]) > token(&answers[2]));
    let old = completion(1, token(&answers[0]));
    assert_eq!(store.complete(&[old]).await.unwrap(), [Err(Fenced)]);
}

#[tokio::test]
async fn another_payload_is_a_mismatch_whether_claimed_or_done() {
    let scene = Scene::new();
    let store = SqliteStore::open(scene.config()).await.unwrap();
    let owner = Owner::random();
    let other = Claim::new(key(1), Fingerprint::of(b"another"));
    let claimed = store.claim(owner, &[claim(1)], LEASE).await.unwrap();
    let conflict = [ClaimResult::PayloadMismatch];
    assert_eq!(store.claim(owner, &[other], LEASE).await.unwrap(), conflict);
    let done = completion(1, token(&claimed[0]));
    assert_eq!(store.complete(&[done]).await.unwrap(), [Ok(())]);
    assert_eq!(store.claim(owner, &[other], LEASE).await.unwrap(), conflict);
}

#[tokio::test]
async fn only_a_started_claim_that_expires_is_in_doubt_and_stays_so() {
    let scene = Scene::new();
    let store = SqliteStore::open(scene.config()).await.unwrap();
    let (a, b, c) = (Owner::random(), Owner::random(), Owner::random());
    let answers = store.claim(a, &[claim(1), claim(2)], LEASE).await.unwrap();
    let started = HeldClaim::new(key(2), token(&answers[1]));
    assert_eq!(store.start(&[started]).await.unwrap(), [Ok(())]);
    scene.pass(LEASE);
    let in_doubt = |claimed: &ClaimResult| {
        matches!(
            claimed,
            ClaimResult::Acquired {
                in_doubt: Some(_),
                ..
            }
        )
    };
    let taken = store.claim(b, &[claim(1), claim(2)], LEASE).await.unwrap();
    assert_eq!((in_doubt(&taken[0]), in_doubt(&taken[1])), (false, true));
    assert_eq!(store.renew(&[started], LEASE).await.unwrap(), [Err(Fenced)]);
    // b dies before it starts: what a did is no more certain for that.
    scene.pass(LEASE);
    let taken = store.claim(c, &[claim(2)], LEASE).await.unwrap();
    assert!(in_doubt(&taken[0]));
    let held = HeldClaim::new(key(2), token(&taken[0]));
    assert_eq!(store.release(&[held]).await.unwrap(), [Ok(())]);
    let taken = store.claim(a, &[claim(2)], LEASE).await.unwrap();
    assert!(!in_doubt(&taken[0]));
}

#[tokio::test]
async fn an_expired_claim_that_nobody_took_is_renewed_and_completes() {
    let scene = Scene::new();
    let store = SqliteStore::open(scene.config()).await.unwrap();
    let answers = store
        .claim(Owner::random(), &[claim(1)], LEASE)
        .await
        .unwrap();
    let held = HeldClaim::new(key(1), token(&answers[0]));
    scene.pass(LEASE * 2);
    assert_eq!(store.renew(&[held], LEASE).await.unwrap(), [Ok(())]);
    let busy = store
        .claim(Owner::random(), &[claim(1)], LEASE)
        .await
        .unwrap();
    assert_eq!(busy, [ClaimResult::InProgress { retry_in: LEASE }]);
    scene.pass(LEASE * 2);
    let done = completion(1, held.token);
    assert_eq!(store.complete(&[done]).await.unwrap(), [Ok(())]);
}

#[tokio::test]
async fn claims_are_not_synced_and_records_are() {
    let scene = Scene::new();
    let store = SqliteStore::open(scene.config()).await.unwrap();
    let before = store.database().commits();
    let answers = store
        .claim(Owner::random(), &[claim(1)], LEASE)
        .await
        .unwrap();
    let claimed = store.database().commits();
    assert_eq!(claimed.full, before.full);
    assert!(claimed.normal > before.normal);
    let done = completion(1, token(&answers[0]));
    store
        .complete(&[done])
        .await
        .unwrap()
        .pop()
        .unwrap()
        .unwrap();
    assert_eq!(store.database().commits().full, claimed.full + 1);
}

#[tokio::test]
async fn records_are_pruned_when_their_retention_has_passed() {
    let scene = Scene::new();
    let store = SqliteStore::open(scene.config()).await.unwrap();
    let owner = Owner::random();
    let batch: Vec<Claim> = (0..10).map(claim).collect();
    let answers = store.claim(owner, &batch, LEASE).await.unwrap();
    let done: Vec<_> = (0..9)
        .map(|n| {
            let mut done = completion(n, token(&answers[n as usize]));
            done.retention = if n < 5 { DAY } else { DAY * 2 };
            done
        })
        .collect();
    store.complete(&done).await.unwrap();
    assert_eq!(store.prune(100).await.unwrap(), 0);
    scene.pass(DAY);
    assert_eq!(store.prune(3).await.unwrap(), 3);
    assert_eq!(store.prune(100).await.unwrap(), 2);
    assert_eq!(store.prune(100).await.unwrap(), 0);
    let again = store.claim(owner, &batch[4..6], LEASE).await.unwrap();
    assert!(
        matches!(again[0], ClaimResult::Acquired { .. }),
        "{again:?}"
    );
    assert!(
        matches!(again[1], ClaimResult::Completed { .. }),
        "{again:?}"
    );
    // The claim that was never settled expired a day ago and is still known.
    let taken = store
        .claim(Owner::random(), &batch[9..], LEASE)
        .await
        .unwrap();
    assert!(token(&taken[0]) > token(&answers[9]));
}

#[tokio::test]
async fn tokens_jump_to_a_new_epoch_when_the_file_is_opened() {
    let scene = Scene::new();
    let mut last = Token(0);
    for n in 0..3 {
        let store = SqliteStore::open(scene.config()).await.unwrap();
        let claimed = store
            .claim(Owner::random(), &[claim(n)], LEASE)
            .await
            .unwrap();
        let token = token(&claimed[0]);
        assert!(token.0 >> 32 > last.0 >> 32, "{token:?} after {last:?}");
        last = token;
    }
}
