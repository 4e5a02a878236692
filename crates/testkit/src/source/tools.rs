use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::Message;
use onlyonce_core::driver::{
    Acks, Capabilities, Delivery, Disposition, ExtendResult, Receipt, ReceiveLimits, SettleResult,
    Settlement, Source,
};
use tokio::time::{Instant, sleep};

use super::SourceHarness;

pub(super) const NACK: Disposition = Disposition::Nack {
    delay: Duration::ZERO,
};

/// How far two clocks that run at the same rate may disagree.
pub(super) const CLOCKS: Duration = Duration::from_millis(20);

pub(super) fn limit(messages: usize, wait: Duration) -> ReceiveLimits {
    ReceiveLimits::new(messages, wait)
}

/// Messages `prefix1`, `prefix2`…; the body is the dedup id.
pub(super) fn numbered(prefix: &str, count: usize) -> Vec<Message> {
    let text = |n| format!("{prefix}{n}");
    (1..=count)
        .map(|n| Message::new(text(n)).with_dedup_id(text(n)))
        .collect()
}

/// [`numbered`], in the group `prefix`.
pub(super) fn grouped(prefix: &str, count: usize) -> Vec<Message> {
    let messages = numbered(prefix, count).into_iter();
    messages.map(|m| m.with_group(prefix)).collect()
}

pub(super) fn body(message: &Message) -> String {
    String::from_utf8_lossy(&message.body).into_owned()
}

pub(super) fn bodies<'a>(messages: impl IntoIterator<Item = &'a Message>) -> Vec<String> {
    messages.into_iter().map(body).collect()
}

pub(super) fn bodies_of(deliveries: &[Delivery]) -> Vec<String> {
    deliveries.iter().map(|d| body(&d.message)).collect()
}

pub(super) fn sorted(mut texts: Vec<String>) -> Vec<String> {
    texts.sort();
    texts
}

pub(super) async fn publish(harness: &dyn SourceHarness, messages: &[Message]) {
    let sink = harness.sink().await;
    let results = sink.publish(messages).await;
    assert_eq!(results.len(), messages.len(), "one result per message");
    for result in results {
        result.expect("the sink takes it");
    }
    sink.close().await.expect("the sink closes");
}

/// What can be done with the live queue.
pub(super) async fn able(source: &dyn Source) -> Capabilities {
    let info = source.queue_info().await;
    info.expect("the queue can be looked at").capabilities
}

/// One receive; errors that can pass are waited out.
pub(super) async fn receive(source: &dyn Source, limits: ReceiveLimits) -> Vec<Delivery> {
    let deliveries = match source.receive(limits).await {
        Ok(deliveries) => deliveries,
        Err(error) if error.is_retryable() => Vec::new(),
        Err(error) => panic!("receive failed: {error}"),
    };
    if deliveries.is_empty() {
        // A source that answers at once would else keep the clock from going on.
        sleep(Duration::from_millis(1)).await;
    }
    deliveries
}

/// Receives exactly `count` deliveries, all unsettled, or fails.
pub(super) async fn collect(
    harness: &dyn SourceHarness,
    source: &dyn Source,
    count: usize,
) -> Vec<Delivery> {
    let deadline = Instant::now() + harness.patience();
    let mut all = Vec::new();
    while all.len() < count {
        let rest = deadline.saturating_duration_since(Instant::now());
        assert!(
            !rest.is_zero(),
            "{} of {count} came in time: {:?}",
            all.len(),
            bodies_of(&all)
        );
        all.extend(receive(source, limit(count - all.len(), rest)).await);
    }
    assert_eq!(all.len(), count, "a receive returned more than its limit");
    all
}

/// [`collect`] of a single delivery.
pub(super) async fn collect_one(harness: &dyn SourceHarness, source: &dyn Source) -> Delivery {
    collect(harness, source, 1).await.remove(0)
}

/// Receives from whichever of two consumers gets what waits: where each has partitions of its own, only one does. Returns
/// that one, the other, and what came.
pub(super) async fn whoever_receives<'a>(
    harness: &dyn SourceHarness,
    [mut one, mut other]: [&'a Arc<dyn Source>; 2],
    count: usize,
) -> (&'a Arc<dyn Source>, &'a Arc<dyn Source>, Vec<Delivery>) {
    let deadline = Instant::now() + harness.patience();
    loop {
        let got = receive(&**one, limit(count, harness.quiet())).await;
        if !got.is_empty() {
            return (one, other, got);
        }
        assert!(Instant::now() < deadline, "nothing came to either");
        std::mem::swap(&mut one, &mut other);
    }
}

/// What was acked, if it may come again all the same to another consumer: an older message was not acked, and the broker
/// keeps only a position.
pub(super) fn may_come_again(able: Capabilities, beyond_a_gap: Vec<String>) -> Vec<String> {
    match able.acks {
        Acks::Cumulative => beyond_a_gap,
        _ => Vec::new(),
    }
}

/// Receives and acks all that must come, and beside that nothing but what may, each at most once.
pub(super) async fn drain_exactly(
    harness: &dyn SourceHarness,
    source: &dyn Source,
    must: Vec<String>,
    may: Vec<String>,
) {
    let deadline = Instant::now() + harness.patience();
    let (mut must, mut may) = (BTreeSet::from_iter(must), BTreeSet::from_iter(may));
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        assert!(must.is_empty() || !rest.is_zero(), "missing: {must:?}");
        let wait = if must.is_empty() {
            harness.quiet()
        } else {
            rest
        };
        let got = receive(source, limit(10, wait)).await;
        if got.is_empty() && must.is_empty() {
            return;
        }
        applied(source, &got, &Disposition::Ack).await;
        for body in bodies_of(&got) {
            let expected = must.remove(&body) || may.remove(&body);
            assert!(expected, "{body} came; missing: {must:?}");
        }
    }
}

/// Receives and acks `count` messages, and returns their bodies in the order in which they came.
pub(super) async fn drain(
    harness: &dyn SourceHarness,
    source: &dyn Source,
    count: usize,
) -> Vec<String> {
    let deadline = Instant::now() + harness.patience();
    let mut all = Vec::new();
    while all.len() < count {
        let rest = deadline.saturating_duration_since(Instant::now());
        assert!(!rest.is_zero(), "{count} expected, these came: {all:?}");
        let deliveries = receive(source, limit(count - all.len(), rest)).await;
        all.extend(bodies_of(&deliveries));
        applied(source, &deliveries, &Disposition::Ack).await;
    }
    all
}

/// Nothing comes for a while.
pub(super) async fn nothing(harness: &dyn SourceHarness, source: &dyn Source) {
    let deliveries = receive(source, limit(10, harness.quiet())).await;
    let came = bodies_of(&deliveries);
    assert!(came.is_empty(), "nothing should come, but {came:?} did");
}

pub(super) fn settlements(deliveries: &[Delivery], disposition: &Disposition) -> Vec<Settlement> {
    let settlement =
        |delivery: &Delivery| Settlement::new(delivery.receipt.clone(), disposition.clone());
    deliveries.iter().map(settlement).collect()
}

pub(super) fn receipts(deliveries: &[Delivery]) -> Vec<Receipt> {
    deliveries.iter().map(|d| d.receipt.clone()).collect()
}

pub(super) async fn settle(
    source: &dyn Source,
    deliveries: &[Delivery],
    disposition: &Disposition,
) -> Vec<SettleResult> {
    let answers = source.settle(&settlements(deliveries, disposition)).await;
    assert_eq!(answers.len(), deliveries.len(), "one answer per settlement");
    answers
}

/// Settles, and is told that it was done.
pub(super) async fn applied(
    source: &dyn Source,
    deliveries: &[Delivery],
    disposition: &Disposition,
) {
    for answer in settle(source, deliveries, disposition).await {
        assert!(
            answer.is_applied(),
            "{disposition:?} was answered {answer:?}"
        );
    }
}

/// The answer to what a source cannot do: it says so, for good.
pub(super) fn unsupported(answers: &[SettleResult]) {
    for answer in answers {
        let refused = matches!(answer, SettleResult::Unknown(error) if !error.is_retryable());
        assert!(
            refused,
            "a missing capability must be refused, got {answer:?}"
        );
    }
}

/// The same of an extension.
pub(super) fn not_extended(answers: &[ExtendResult]) {
    for answer in answers {
        let refused = matches!(answer, ExtendResult::Unknown(error) if !error.is_retryable());
        assert!(
            refused,
            "a missing capability must be refused, got {answer:?}"
        );
    }
}

/// The answer to a receipt whose lease has ended. A source that cannot ask its broker may not know.
pub(super) async fn lease_lost(source: &dyn Source, answers: &[SettleResult]) {
    for answer in answers {
        let lost = matches!(answer, SettleResult::LeaseLost);
        let unaware = answer.is_applied() && !able(source).await.acks.confirms();
        assert!(lost || unaware, "the lease had ended, got {answer:?}");
    }
}
