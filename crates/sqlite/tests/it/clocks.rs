//! Clocks that are set, by seconds, hours, weeks, or to 1970: nothing ends sooner for it, and nothing lasts for longer than
//! it should from then on.

use std::time::Duration;

use onlyonce_core::driver::{
    ClaimResult, Disposition, HeldClaim, Owner, Settlement, Sink, Source, Store,
};
use onlyonce_sqlite::{SqliteQueue, SqliteStore};

use crate::support::*;

const SECOND: i64 = 1_000;
const HOUR: i64 = 3_600 * SECOND;
const DAYS: i64 = 24 * HOUR;

/// Milliseconds by which a clock is set.
const STEPS: [i64; 8] = [
    5 * SECOND,
    -5 * SECOND,
    3 * HOUR,
    -3 * HOUR,
    20 * DAYS,
    -20 * DAYS,
    // To 1970, and from there to now: a boot without a battery that NTP corrects.
    -1_700_000_000 * SECOND,
    1_700_000_000 * SECOND,
];

async fn claim_one(store: &SqliteStore, n: u64) -> ClaimResult {
    let claimed = store.claim(Owner::random(), &[claim(n)], LEASE).await;
    claimed.unwrap().remove(0)
}

fn is_busy(claimed: &ClaimResult) -> bool {
    matches!(claimed, ClaimResult::InProgress { retry_in } if *retry_in <= LEASE)
}

#[tokio::test]
async fn a_claim_ends_one_lease_from_now_whatever_the_clock_does() {
    for step in STEPS {
        let scene = Scene::new();
        let store = SqliteStore::open(scene.config()).await.unwrap();
        let first = token(&claim_one(&store, 1).await);
        scene.step(step);
        let held = HeldClaim::new(key(1), first);
        assert!(is_busy(&claim_one(&store, 1).await), "{step}: too early");
        scene.pass(LEASE / 2);
        assert_eq!(store.renew(&[held], LEASE).await.unwrap(), [Ok(())]);
        scene.step(-step);
        scene.pass(LEASE - Duration::from_secs(1));
        assert!(is_busy(&claim_one(&store, 1).await), "{step}: too early");
        scene.pass(Duration::from_secs(1));
        let next = claim_one(&store, 1).await;
        assert!(token(&next) > first, "{step}: {next:?}");
    }
}

#[tokio::test]
async fn a_record_is_kept_for_its_retention_whatever_the_clock_does() {
    for step in STEPS {
        let scene = Scene::new();
        let store = SqliteStore::open(scene.config()).await.unwrap();
        let claimed = claim_one(&store, 1).await;
        let done = completion(1, token(&claimed));
        assert_eq!(store.complete(&[done]).await.unwrap(), [Ok(())]);
        // For the time of one prune, and for good.
        for step in [step, -step, step] {
            scene.step(step);
            assert_eq!(store.prune(10).await.unwrap(), 0, "{step}");
        }
        scene.pass(DAY - Duration::from_secs(1));
        assert_eq!(store.prune(10).await.unwrap(), 0, "{step}");
        assert_eq!(
            claim_one(&store, 1).await,
            ClaimResult::Completed { outcome: None }
        );
        scene.pass(Duration::from_secs(1));
        assert_eq!(store.prune(10).await.unwrap(), 1, "{step}: kept too long");
    }
}

#[tokio::test]
async fn the_queue_keeps_its_leases_delays_and_retention_whatever_the_clock_does() {
    for step in STEPS {
        let scene = Scene::new();
        let queue = SqliteQueue::open(scene.config()).await.unwrap();
        let published = queue.publish(&messages(&["one"], None)).await;
        published.into_iter().for_each(Result::unwrap);
        scene.step(step);
        let got = queue.receive(limit(10)).await.unwrap();
        assert_eq!(got.len(), 1, "{step}: neither late nor a dead letter");
        scene.step(step);
        let none = queue.receive(limit(10)).await.unwrap();
        assert!(none.is_empty(), "{step}: it is leased");
        scene.pass(LEASE);
        let again = queue.receive(limit(10)).await.unwrap();
        assert_eq!(again.len(), 1, "{step}: its lease has ended");
        let delay = Duration::from_secs(10);
        let nack = Settlement::new(again[0].receipt.clone(), Disposition::Nack { delay });
        scene.step(-2 * step);
        assert!(queue.settle(&[nack]).await[0].is_applied());
        scene.step(step);
        assert!(queue.receive(limit(10)).await.unwrap().is_empty());
        scene.pass(delay);
        let last = queue.receive(limit(10)).await.unwrap();
        assert_eq!(last.len(), 1, "{step}: its delay has ended");
        assert_eq!(last[0].attempt, Some(3));
    }
}

/// While the machine is off no time is seen to pass; afterwards it goes on where it was.
#[tokio::test]
async fn time_goes_on_where_it_was_after_a_restart_of_the_machine() {
    for step in STEPS {
        let scene = Scene::new();
        let open = || async { SqliteStore::open(scene.config()).await.unwrap() };
        let store = open().await;
        let done = completion(1, token(&claim_one(&store, 1).await));
        assert_eq!(store.complete(&[done]).await.unwrap(), [Ok(())]);
        scene.pass(DAY / 2);
        let before = token(&claim_one(&store, 2).await);
        drop(store);
        scene.reboot();
        scene.step(step);
        let store = open().await;
        assert!(is_busy(&claim_one(&store, 2).await), "{step}");
        assert_eq!(store.prune(10).await.unwrap(), 0, "{step}");
        scene.pass(LEASE);
        assert!(token(&claim_one(&store, 2).await) > before, "{step}");
        scene.pass(DAY / 2);
        assert_eq!(store.prune(10).await.unwrap(), 1, "{step}");
    }
}
