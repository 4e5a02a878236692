//! Who owns a delivery, and until when.

use onlyonce_core::driver::{Disposition, ExtendResult};
use tokio::time::{Instant, sleep};

use super::SourceHarness;
use super::tools::*;

/// The live queue tells its lease, or that it cannot be read.
pub async fn queue_info_tells_the_lease(harness: &dyn SourceHarness) {
    let source = harness.source().await;
    let info = source.queue_info().await.expect("the queue can be read");
    if able(&*source).await.timed_lease && info.unknown.is_empty() {
        assert_eq!(info.lease, Some(harness.lease()));
    }
    if able(&*source).await.dead_letter && info.unknown.is_empty() {
        assert!(info.dead_letter.is_some(), "where dead letters go");
    }
}

/// A lease that ends gives the message to whoever asks, and never sooner than the lease said. Without timed leases
/// nothing ends by itself.
pub async fn expired_lease_redelivers(harness: &dyn SourceHarness) {
    publish(harness, &numbered("m", 1)).await;
    let both = [&harness.source().await, &harness.source().await];
    let (first, second, mut held) = whoever_receives(harness, both, 1).await;
    let held = held.remove(0);
    if !able(&**first).await.timed_lease {
        assert_eq!(held.lease.until, None, "without a clock there is no end");
        sleep(harness.lease()).await;
        nothing(harness, &**second).await;
        return applied(&**first, &[held], &Disposition::Ack).await;
    }
    let until = held.lease.until.expect("a timed lease has an end");
    assert!(
        until <= Instant::now() + harness.lease(),
        "counted too late"
    );
    let again = collect_one(harness, &**second).await;
    assert!(
        Instant::now() + CLOCKS >= until,
        "it came again although the lease had {:?} to go",
        until - Instant::now()
    );
    if able(&**first).await.counts_attempts {
        assert_eq!(again.attempt, Some(2));
    }
    applied(&**second, &[again], &Disposition::Ack).await;
}

/// An extended lease outlives its first end, and ends at the new one.
pub async fn extend_keeps_the_lease(harness: &dyn SourceHarness) {
    publish(harness, &numbered("m", 1)).await;
    let both = [&harness.source().await, &harness.source().await];
    let (first, second, held) = whoever_receives(harness, both, 1).await;
    let longer = harness.lease() * 2;
    if !able(&**first).await.extend {
        not_extended(&first.extend(&receipts(&held), longer).await);
        return applied(&**first, &held, &Disposition::Ack).await;
    }
    let mut until = Instant::now() + harness.lease();
    // Half-way, and again half-way into the extension.
    for _ in 0..2 {
        sleep(until.saturating_duration_since(Instant::now()) / 2).await;
        until = Instant::now() + longer;
        let answers = first.extend(&receipts(&held), longer).await;
        let ExtendResult::Extended(granted) = answers[0] else {
            panic!("{answers:?}");
        };
        let asked = until + CLOCKS;
        assert!(
            granted <= asked,
            "it says {:?} more than it was asked for",
            granted - asked
        );
        until = granted;
    }
    sleep(until.saturating_duration_since(Instant::now()) / 2).await;
    nothing(harness, &**second).await;
    let again = [collect_one(harness, &**second).await];
    assert!(Instant::now() + CLOCKS >= until, "it came again too soon");
    applied(&**second, &again, &Disposition::Ack).await;
}

/// Whoever lost a delivery can no longer touch it: not settle it, not extend it, not take it from its new owner.
pub async fn late_settlement_disturbs_nobody(harness: &dyn SourceHarness) {
    publish(harness, &numbered("m", 1)).await;
    let (first, second) = (harness.source().await, harness.source().await);
    if !able(&*first).await.timed_lease {
        return;
    }
    let lost = [collect_one(harness, &*first).await];
    let held = [collect_one(harness, &*second).await];
    for disposition in [NACK, Disposition::Ack] {
        lease_lost(&*first, &settle(&*first, &lost, &disposition).await).await;
    }
    if able(&*first).await.extend {
        let answers = first.extend(&receipts(&lost), harness.lease()).await;
        let lost = matches!(answers[..], [ExtendResult::LeaseLost]);
        assert!(lost, "the lease had ended, got {answers:?}");
    }
    nothing(harness, &*first).await;
    // Had the late ack removed it, it would not come back.
    applied(&*second, &held, &NACK).await;
    assert_eq!(drain(harness, &*second, 1).await, ["m1"]);
}
