//! What goes in comes out.

use std::time::Duration;

use onlyonce_core::Message;
use onlyonce_core::driver::{Disposition, Ordering};
use tokio::time::{Instant, sleep};

use super::SourceHarness;
use super::tools::*;

/// Body, attributes, dedup id and group arrive as they were sent.
pub async fn message_survives_the_queue(harness: &dyn SourceHarness) {
    let every_byte: Vec<u8> = (0..=255).collect();
    let sent = Message::new(every_byte)
        .with_dedup_id("id-1")
        .with_group("group-1")
        .with_attribute("plain", "text")
        .with_attribute("unicode", "ünï çødé \u{2713} 漢字 🦀");
    publish(harness, std::slice::from_ref(&sent)).await;
    let source = harness.source().await;
    let delivery = collect_one(harness, &*source).await;
    let got = &delivery.message;
    assert_eq!(got.body, sent.body);
    assert_eq!(got.attributes, sent.attributes);
    assert_eq!(got.dedup_id, sent.dedup_id);
    if able(&*source).await.ordering != Ordering::None {
        assert_eq!(got.group, sent.group);
    }
    assert_eq!(delivery.malformed, None);
    let attempt = able(&*source).await.counts_attempts.then_some(1);
    assert_eq!(delivery.attempt, attempt, "attempts are counted from 1");
    applied(&*source, &[delivery], &Disposition::Ack).await;
}

async fn body_survives(harness: &dyn SourceHarness, size: usize) {
    let sent: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
    let message = Message::new(sent.clone()).with_dedup_id("sized");
    publish(harness, &[message]).await;
    let source = harness.source().await;
    let delivery = collect_one(harness, &*source).await;
    assert_eq!(delivery.message.body.len(), size);
    assert!(delivery.message.body == sent, "the body was changed");
    applied(&*source, &[delivery], &Disposition::Ack).await;
}

/// A message without a payload is a message.
pub async fn empty_body_survives_the_queue(harness: &dyn SourceHarness) {
    body_survives(harness, 0).await;
}

/// The largest body that the broker promises to take.
pub async fn large_body_survives_the_queue(harness: &dyn SourceHarness) {
    body_survives(harness, harness.large_body()).await;
}

/// An empty queue answers after the wait: not much sooner, which would make callers spin, and not never.
pub async fn empty_receive_returns_after_its_wait(harness: &dyn SourceHarness) {
    let source = harness.source().await;
    let wait = Duration::from_secs(1);
    let begun = Instant::now();
    let got = source.receive(limit(1, wait)).await.expect("it is open");
    assert!(got.is_empty());
    let took = begun.elapsed();
    assert!(took + CLOCKS >= wait, "it returned after {took:?}");
    assert!(took < harness.patience(), "it returned after {took:?}");
}

/// A receive that waits is woken by a message, long before its wait ends.
pub async fn receive_wakes_when_a_message_comes(harness: &dyn SourceHarness) {
    let source = harness.source().await;
    let wait = harness.patience();
    let waits = {
        let source = source.clone();
        tokio::spawn(async move { source.receive(limit(1, wait)).await })
    };
    sleep(harness.quiet()).await;
    publish(harness, &numbered("m", 1)).await;
    let got = waits.await.expect("no panic").expect("it is open");
    assert_eq!(bodies_of(&got), ["m1"]);
    applied(&*source, &got, &Disposition::Ack).await;
}

/// Neither more messages nor, but for the last one, more bytes than asked for.
pub async fn receive_respects_its_limit(harness: &dyn SourceHarness) {
    const BODY: usize = 1000;
    let big = |n: usize| Message::new(vec![b'x'; BODY]).with_dedup_id(n.to_string());
    publish(harness, &(0..10).map(big).collect::<Vec<_>>()).await;
    let source = harness.source().await;
    let mut limit = limit(3, harness.patience());
    let got = source.receive(limit).await.expect("it is open");
    assert!((1..=3).contains(&got.len()), "{} of at most 3", got.len());
    applied(&*source, &got, &Disposition::Ack).await;

    (limit.messages, limit.bytes) = (7, 2 * BODY);
    let got = source.receive(limit).await.expect("it is open");
    // Two bodies reach it, whatever their ids and attributes weigh.
    assert!((1..=2).contains(&got.len()), "{} of at most 2", got.len());

    limit.bytes = 1;
    let got = source.receive(limit).await.expect("it is open");
    assert_eq!(got.len(), 1, "the first comes whatever its size");
}

/// Nothing in, nothing out.
pub async fn empty_batches_are_harmless(harness: &dyn SourceHarness) {
    let (source, sink) = (harness.source().await, harness.sink().await);
    assert!(sink.publish(&[]).await.is_empty());
    assert!(source.settle(&[]).await.is_empty());
    assert!(source.extend(&[], harness.lease()).await.is_empty());
    sink.close().await.expect("it closes");
    sink.close().await.expect("closing twice is harmless");
}

/// Where the sink says that it stops a group at its first failure, what follows one is not published, and may be tried again.
pub async fn failed_message_stops_its_group(harness: &dyn SourceHarness) {
    let sink = harness.sink().await;
    let info = sink.sink_info().await.expect("it is there");
    let Some(refused) = harness.refused_message().filter(|_| info.stops_groups) else {
        return;
    };
    let mut batch = grouped("g", 2);
    batch.insert(1, refused.with_group("g"));
    batch.extend(grouped("h", 1));
    let results = sink.publish(&batch).await;
    let taken: Vec<bool> = results.iter().map(Result::is_ok).collect();
    assert_eq!(taken, [true, false, false, true], "{results:?}");
    let error = results[2].as_ref().expect_err("seen just now");
    assert!(error.is_retryable(), "{error}");
    let source = harness.source().await;
    assert_eq!(sorted(drain(harness, &*source, 2).await), ["g1", "h1"]);
    nothing(harness, &*source).await;
}

/// One message that the broker does not take leaves those beside it alone, and is not worth a retry.
pub async fn refused_message_affects_only_itself(harness: &dyn SourceHarness) {
    let Some(refused) = harness.refused_message() else {
        return;
    };
    let mut batch = numbered("m", 2);
    batch.insert(1, refused);
    let sink = harness.sink().await;
    let results = sink.publish(&batch).await;
    let taken: Vec<bool> = results.iter().map(Result::is_ok).collect();
    assert_eq!(taken, [true, false, true], "{results:?}");
    let error = results[1].as_ref().expect_err("seen just now");
    assert!(!error.is_retryable(), "{error}");
    let source = harness.source().await;
    assert_eq!(sorted(drain(harness, &*source, 2).await), ["m1", "m2"]);
    nothing(harness, &*source).await;
}
