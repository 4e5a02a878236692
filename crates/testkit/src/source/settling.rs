//! What a settlement does, and what it must not do.

use std::time::Duration;

use onlyonce_core::driver::{Disposition, Receipt, SettleResult, Settlement};
use tokio::time::{Instant, sleep};

use super::SourceHarness;
use super::tools::*;

/// What was acked never comes again, not even to another consumer, not even when its lease would have ended.
pub async fn ack_removes(harness: &dyn SourceHarness) {
    publish(harness, &numbered("m", 3)).await;
    let source = harness.source().await;
    drain(harness, &*source, 3).await;
    source.close().await.expect("it closes");
    let other = harness.source().await;
    nothing(harness, &*other).await;
    if able(&*other).await.timed_lease {
        sleep(harness.lease()).await;
        nothing(harness, &*other).await;
    }
}

/// What was given back comes again, with the next number.
pub async fn nack_redelivers(harness: &dyn SourceHarness) {
    publish(harness, &numbered("m", 1)).await;
    let source = harness.source().await;
    let counts = able(&*source).await.counts_attempts;
    for attempt in 1..=3 {
        let delivery = collect_one(harness, &*source).await;
        assert_eq!(delivery.attempt, counts.then_some(attempt));
        assert_eq!(body(&delivery.message), "m1");
        applied(&*source, &[delivery], &NACK).await;
    }
    assert_eq!(drain(harness, &*source, 1).await, ["m1"]);
}

/// A delay holds a message back for as long as it says, or is refused.
pub async fn delayed_nack_waits(harness: &dyn SourceHarness) {
    publish(harness, &numbered("m", 1)).await;
    let source = harness.source().await;
    let delay = harness.lease() * 2;
    let held = [collect_one(harness, &*source).await];
    if !able(&*source).await.delayed_nack {
        unsupported(&settle(&*source, &held, &Disposition::Nack { delay }).await);
        return applied(&*source, &held, &Disposition::Ack).await;
    }
    let begun = Instant::now();
    applied(&*source, &held, &Disposition::Nack { delay }).await;
    let again = [collect_one(harness, &*source).await];
    let took = begun.elapsed();
    assert!(took + CLOCKS >= delay, "{took:?} instead of {delay:?}");
    applied(&*source, &again, &Disposition::Ack).await;
}

/// Settling twice does nothing, and breaks nothing.
pub async fn second_ack_is_harmless(harness: &dyn SourceHarness) {
    publish(harness, &numbered("m", 2)).await;
    let source = harness.source().await;
    let held = collect(harness, &*source, 2).await;
    applied(&*source, &held[..1], &Disposition::Ack).await;
    let again = settle(&*source, &held[..1], &Disposition::Ack).await;
    let harmless = matches!(again[0], SettleResult::Applied | SettleResult::LeaseLost);
    assert!(harmless, "{again:?}");
    applied(&*source, &held[1..], &Disposition::Ack).await;
    nothing(harness, &*source).await;
}

/// In one batch, receipts that are spent or were never given leave the others alone.
pub async fn bad_receipt_affects_only_itself(harness: &dyn SourceHarness) {
    publish(harness, &numbered("m", 3)).await;
    let source = harness.source().await;
    let held = collect(harness, &*source, 3).await;
    applied(&*source, &held[..1], &Disposition::Ack).await;

    let mut receipts = receipts(&held);
    let mut bogus = harness.made_up(&receipts[1]);
    bogus.push(Receipt::new("of another broker"));
    receipts.splice(2..2, bogus.clone());
    let ack = |receipt| Settlement::new(receipt, Disposition::Ack);
    let batch: Vec<_> = receipts.into_iter().map(ack).collect();
    let answers = source.settle(&batch).await;
    assert_eq!(answers.len(), batch.len());
    assert!(answers[1].is_applied(), "{answers:?}");
    assert!(answers[answers.len() - 1].is_applied(), "{answers:?}");
    for answer in &answers[2..answers.len() - 1] {
        assert!(!answer.is_applied(), "a made-up receipt was {answer:?}");
    }
    if able(&*source).await.extend {
        for answer in source.extend(&bogus, harness.lease()).await {
            assert!(!answer.is_extended(), "a made-up receipt was {answer:?}");
        }
    }
    nothing(harness, &*source).await;
    publish(harness, &numbered("later", 1)).await;
    assert_eq!(drain(harness, &*source, 1).await, ["later1"]);
}

/// Acks out of order settle nothing below them: exactly the unsettled come back, and where acks are cumulative perhaps what
/// was acked beyond them.
pub async fn acks_settle_nothing_but_themselves(harness: &dyn SourceHarness) {
    publish(harness, &numbered("m", 6)).await;
    let source = harness.source().await;
    let mut held = collect(harness, &*source, 6).await;
    held.sort_by_key(|delivery| body(&delivery.message));
    for chosen in [5, 1, 3] {
        applied(&*source, &held[chosen..=chosen], &Disposition::Ack).await;
    }
    source.close().await.expect("it closes");
    let other = harness.source().await;
    let texts = |chosen: [&str; 3]| chosen.map(str::to_owned).to_vec();
    let again = may_come_again(able(&*other).await, texts(["m2", "m4", "m6"]));
    drain_exactly(harness, &*other, texts(["m1", "m3", "m5"]), again).await;
}

/// A dead letter is in the dead-letter queue, with its reason, and nowhere else; or the source says that it cannot.
pub async fn dead_letter_keeps_its_reason(harness: &dyn SourceHarness) {
    const REASON: &str = "handler failed: größer als erlaubt";
    publish(harness, &numbered("m", 2)).await;
    let source = harness.source().await;
    let mut held = collect(harness, &*source, 2).await;
    held.sort_by_key(|delivery| body(&delivery.message));
    let reason = REASON.to_owned();
    let dead_letter = Disposition::DeadLetter { reason };
    if !able(&*source).await.dead_letter {
        unsupported(&settle(&*source, &held, &dead_letter).await);
        return applied(&*source, &held, &Disposition::Ack).await;
    }
    applied(&*source, &held[..1], &dead_letter).await;
    applied(&*source, &held[1..], &Disposition::Ack).await;
    nothing(harness, &*source).await;

    let deadline = Instant::now() + harness.patience();
    let dead = loop {
        let dead = harness.dead_letters().await;
        if !dead.is_empty() || Instant::now() > deadline {
            break dead;
        }
        sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(dead.len(), 1, "{dead:?}");
    assert_eq!(dead[0].body, "m1");
    assert!(dead[0].reason.contains(REASON), "{dead:?}");
}
