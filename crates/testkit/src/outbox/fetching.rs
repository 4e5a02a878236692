//! What a fetch returns.

use std::time::Duration;

use onlyonce_core::Message;
use onlyonce_core::driver::{Fetch, OutboxDisposition};

use super::OutboxHarness;
use super::tools::*;
use crate::store::tools::{A, LONG};

/// The same messages come again, under the same ids, until they are settled.
pub async fn ids_are_stable_across_fetches(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    let ids = publish_all(harness, &["a1", "b1", "a2"]).await;
    let first = fetch(&*outbox, A).await;
    let second = fetch(&*harness.outbox().await, A).await;
    assert_eq!(first, second);
    let named: Vec<_> = first.iter().map(|outgoing| outgoing.id).collect();
    assert_eq!(named, ids);
    assert_eq!(ids.len(), 3);
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
}

/// As many messages and bytes as are asked for, from the first on; one at least.
pub async fn fetch_respects_its_limits(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    publish_all(harness, &["a1", "a2", "b1"]).await;
    let limited = |messages, bytes| Fetch::new(A, messages, LONG).with_bytes(bytes);
    for (messages, bytes, expected) in [
        (2, usize::MAX, &["a1", "a2"][..]),
        (1, usize::MAX, &["a1"]),
        (3, 1, &["a1"]),
        (3, grouped("a1").size() + 1, &["a1", "a2"]),
        (1000, 1 << 20, &["a1", "a2", "b1"]),
    ] {
        let fetched = fetch_with(&*outbox, limited(messages, bytes)).await.0;
        assert_eq!(bodies(&fetched), expected, "{messages}, {bytes}");
    }
}

/// Each destination has its own messages, lease and order.
pub async fn destinations_are_apart(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    let blocked = harness.publish(OUT, grouped("g1")).await;
    harness.publish("other", grouped("g1")).await;
    harness.publish("other", grouped("g2")).await;
    fetch(&*outbox, A).await;
    settle(&*outbox, A, blocked, failed(LONG)).await;
    let other = outbox.fetch("other", Fetch::new(A, 10, LONG)).await;
    let onlyonce_core::driver::FetchResult::Fetched { messages, .. } = other.expect("it answers")
    else {
        panic!("nobody has it");
    };
    assert_eq!(bodies(&messages), ["g1", "g2"]);
    assert!(fetch(&*outbox, A).await.is_empty());
}

/// What is blocked takes no place among the messages asked for.
pub async fn blocked_messages_hide_nothing(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    let head = harness.publish(OUT, grouped("g1")).await;
    for _ in 0..50 {
        harness.publish(OUT, grouped("g2")).await;
    }
    harness.publish(OUT, grouped("h1")).await;
    harness.publish(OUT, message("-")).await;
    fetch(&*outbox, A).await;
    settle(&*outbox, A, head, failed(LONG)).await;
    let fetched = fetch_with(&*outbox, Fetch::new(A, 2, LONG)).await.0;
    assert_eq!(bodies(&fetched), ["h1", "-"]);
}

/// What has no group waits for nobody.
pub async fn message_without_a_group_waits_for_nobody(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    let mut ids = Vec::new();
    for body in ["1", "2", "3"] {
        ids.push(harness.publish(OUT, message(body)).await);
    }
    harness.publish(OUT, Message::new("4").with_group("")).await;
    fetch(&*outbox, A).await;
    settle(&*outbox, A, ids[0], failed(LONG)).await;
    settle(&*outbox, A, ids[1], set_aside()).await;
    let waiting = Fetch::new(A, 10, LONG).waiting_for_set_aside(true);
    let fetched = fetch_with(&*outbox, waiting).await.0;
    assert_eq!(bodies(&fetched), ["3", "4"]);
    // A group without a name is one all the same.
    assert_eq!(fetched[1].message.group.as_deref(), Some(""));
}

/// Nothing in, nothing out.
pub async fn empty_outbox_is_harmless(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    let (fetched, ready_in, _) = fetch_with(&*outbox, Fetch::new(A, 1, Duration::ZERO)).await;
    assert_eq!((fetched.len(), ready_in), (0, None));
    assert!(settle_all(&*outbox, A, &[]).await.is_empty());
    let none = onlyonce_core::driver::OutgoingId::random();
    for disposition in [OutboxDisposition::Sent, failed(LONG), set_aside()] {
        settle(&*outbox, A, none, disposition).await;
    }
    assert!(
        outbox
            .set_aside(OUT, 10)
            .await
            .expect("it answers")
            .is_empty()
    );
    assert_eq!(outbox.requeue(OUT, &[none]).await.expect("it answers"), 0);
    assert_eq!(outbox.requeue(OUT, &[]).await.expect("it answers"), 0);
    outbox.release(A, OUT).await.expect("it answers");
    outbox.release(A, "unheard of").await.expect("it answers");
}
