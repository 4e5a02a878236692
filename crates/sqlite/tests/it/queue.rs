//! The embedded queue: order, leases, dead letters, many messages.

use crate::support::*;
use onlyonce_core::attributes::DEAD_LETTER_REASON;
use onlyonce_core::driver::{
    Delivery, Disposition, ExtendResult, Receipt, ReceiveLimits, SettleResult, Settlement, Sink,
    Source,
};
use onlyonce_core::{ErrorKind, Message, Pipeline};
use onlyonce_sqlite::{SqliteQueue, SqliteStore, rusqlite};
use std::sync::Arc;
use std::time::Duration;

async fn open(scene: &Scene) -> SqliteQueue {
    SqliteQueue::open(scene.config()).await.unwrap()
}

async fn publish(queue: &SqliteQueue, batch: &[Message]) {
    for result in queue.publish(batch).await {
        result.unwrap();
    }
}

async fn receive(queue: &SqliteQueue, n: usize) -> Vec<Delivery> {
    queue.receive(limit(n)).await.unwrap()
}

fn texts(deliveries: &[Delivery]) -> Vec<String> {
    let text = |d: &Delivery| String::from_utf8(d.message.body.to_vec()).unwrap();
    deliveries.iter().map(text).collect()
}

async fn settle(
    queue: &SqliteQueue,
    deliveries: &[Delivery],
    disposition: Disposition,
) -> Vec<SettleResult> {
    let settlement = |d: &Delivery| Settlement::new(d.receipt.clone(), disposition.clone());
    let batch: Vec<_> = deliveries.iter().map(settlement).collect();
    queue.settle(&batch).await
}

async fn applied(queue: &SqliteQueue, deliveries: &[Delivery], disposition: Disposition) {
    for answer in settle(queue, deliveries, disposition).await {
        assert!(answer.is_applied(), "{answer:?}");
    }
}

fn nack(delay: Duration) -> Disposition {
    Disposition::Nack { delay }
}

#[tokio::test]
async fn a_message_comes_back_whole() {
    let scene = Scene::new();
    let queue = open(&scene).await;
    let sent = Message::new("body")
        .with_dedup_id("d-1")
        .with_group("g")
        .with_attribute("a", "1");
    publish(&queue, std::slice::from_ref(&sent)).await;
    let got = receive(&queue, 10).await;
    let message = &got[0].message;
    assert_eq!(message.body, sent.body);
    assert_eq!(message.attributes, sent.attributes);
    assert_eq!(message.dedup_id, sent.dedup_id);
    assert_eq!(message.group, sent.group);
    assert!(message.published_at.is_some() && message.broker_id.is_some());
    assert_eq!(got[0].attempt, Some(1));
    applied(&queue, &got, Disposition::Ack).await;
    scene.pass(DAY);
    assert!(receive(&queue, 10).await.is_empty());
}

#[tokio::test]
async fn a_group_waits_for_its_head_and_no_other_does() {
    let scene = Scene::new();
    let queue = open(&scene).await;
    publish(&queue, &messages(&["a1", "a2", "a3"], Some("a"))).await;
    publish(&queue, &messages(&["b1"], Some("b"))).await;
    publish(&queue, &messages(&["x"], None)).await;
    let got = receive(&queue, 3).await;
    assert_eq!(texts(&got), ["a1", "b1", "x"], "one group fills no batch");
    assert!(receive(&queue, 10).await.is_empty(), "a2 waits for a1");
    applied(&queue, &got[..1], nack(Duration::from_secs(5))).await;
    assert!(receive(&queue, 10).await.is_empty(), "a1 is delayed");
    scene.pass(Duration::from_secs(5));
    let got = receive(&queue, 10).await;
    assert_eq!(texts(&got), ["a1", "a2", "a3"]);
    assert_eq!(got[0].attempt, Some(2));
    // The middle one is given back with a delay, the head is done: the third waits behind the second.
    applied(&queue, &got[..1], Disposition::Ack).await;
    applied(&queue, &got[1..2], nack(Duration::from_secs(5))).await;
    applied(&queue, &got[2..], nack(Duration::ZERO)).await;
    assert!(receive(&queue, 10).await.is_empty());
    scene.pass(Duration::from_secs(5));
    assert_eq!(texts(&receive(&queue, 10).await), ["a2", "a3"]);
}

#[tokio::test]
async fn what_follows_a_leased_or_delayed_message_is_not_delivered_with_the_head() {
    let scene = Scene::new();
    let queue = open(&scene).await;
    publish(&queue, &messages(&["a1", "a2", "a3"], Some("a"))).await;
    let got = receive(&queue, 10).await;
    applied(&queue, &got[..1], nack(Duration::ZERO)).await;
    applied(&queue, &got[2..], nack(Duration::ZERO)).await;
    let head = receive(&queue, 10).await;
    assert_eq!(texts(&head), ["a1"], "a2 is leased");
    applied(&queue, &head, nack(Duration::ZERO)).await;
    applied(&queue, &got[1..2], nack(Duration::from_secs(5))).await;
    let head = receive(&queue, 10).await;
    assert_eq!(texts(&head), ["a1"], "a2 is delayed");
    applied(&queue, &head, nack(Duration::ZERO)).await;
    scene.pass(Duration::from_secs(5));
    assert_eq!(texts(&receive(&queue, 10).await), ["a1", "a2", "a3"]);
}

#[tokio::test]
async fn a_lease_that_ends_makes_the_old_receipt_worthless() {
    let scene = Scene::new();
    let queue = open(&scene).await;
    publish(&queue, &messages(&["x"], None)).await;
    let old = receive(&queue, 1).await;
    scene.pass(LEASE);
    let new = receive(&queue, 1).await;
    assert_eq!(new[0].attempt, Some(2));
    for disposition in [
        Disposition::Ack,
        nack(Duration::ZERO),
        Disposition::DeadLetter { reason: "x".into() },
    ] {
        let answers = settle(&queue, &old, disposition).await;
        assert!(matches!(answers[0], SettleResult::LeaseLost), "{answers:?}");
    }
    let answers = queue.extend(&[old[0].receipt.clone()], LEASE).await;
    assert!(matches!(answers[0], ExtendResult::LeaseLost), "{answers:?}");
    assert!(receive(&queue, 1).await.is_empty(), "the new lease stands");
    applied(&queue, &new, Disposition::Ack).await;
}

#[tokio::test]
async fn an_extended_lease_lasts() {
    let scene = Scene::new();
    let queue = open(&scene).await;
    publish(&queue, &messages(&["x"], None)).await;
    let got = receive(&queue, 1).await;
    scene.pass(Duration::from_secs(29));
    assert!(queue.extend(&[got[0].receipt.clone()], LEASE).await[0].is_extended());
    scene.pass(Duration::from_secs(29));
    assert!(receive(&queue, 1).await.is_empty());
    let foreign = Receipt::new("of another broker");
    let answers = queue.extend(&[foreign], LEASE).await;
    assert!(matches!(answers[0], ExtendResult::LeaseLost));
    applied(&queue, &got, Disposition::Ack).await;
}

#[tokio::test]
async fn dead_letters_keep_group_order_and_their_reason() {
    let scene = Scene::new();
    let queue = open(&scene).await;
    publish(&queue, &messages(&["a1", "a2", "a3"], Some("a"))).await;
    let got = receive(&queue, 10).await;
    // In the wrong order, to see that theirs is kept.
    for i in [1, 0] {
        let reason = format!("no. {i}");
        applied(&queue, &got[i..=i], Disposition::DeadLetter { reason }).await;
    }
    let dead = SqliteQueue::open(scene.config().queue("orders.dead"))
        .await
        .unwrap();
    let letters = receive(&dead, 10).await;
    assert_eq!(texts(&letters), ["a1", "a2"]);
    assert_eq!(letters[0].attempt, Some(1));
    let reason = letters[0].message.attributes.get(DEAD_LETTER_REASON);
    assert_eq!(reason, Some("no. 0"));
    applied(&queue, &got[2..], nack(Duration::ZERO)).await;
    assert_eq!(texts(&receive(&queue, 10).await), ["a3"], "a3 moved up");
}

/// A queue that is its own dead-letter queue would run for ever what it sets aside, and one with the dead letters of another
/// has other records.
#[tokio::test]
async fn a_pipeline_does_not_start_on_dead_letters() {
    let scene = Scene::new();
    let (queue, same) = (open(&scene).await, open(&scene).await);
    let own = Pipeline::at_least_once(queue).dead_letter(same);
    let refused = own.run(async || {}).await.unwrap_err();
    assert!(refused.to_string().contains("OwnDeadLetters"), "{refused}");

    let store = SqliteStore::open(scene.config()).await.unwrap();
    let dead = scene.config().queue("orders.dead");
    let dead = SqliteQueue::open(dead).await.unwrap();
    let with_records = Pipeline::idempotent(dead, store);
    let refused = with_records.run(async || {}).await.unwrap_err();
    assert!(refused.to_string().contains("DeadLetterQueue"), "{refused}");

    // Nobody's dead letters, whatever its name.
    let alone = scene.config().queue("alone.dead");
    let alone = SqliteQueue::open(alone).await.unwrap();
    let info = alone.queue_info().await.unwrap();
    assert_eq!(info.dead_letters_of, [""; 0]);
}

#[tokio::test]
async fn too_many_deliveries_or_too_much_age_make_a_dead_letter() {
    let scene = Scene::new();
    let mut config = scene.config();
    config.max_deliveries = Some(2);
    config.retention = Some(DAY);
    let queue = SqliteQueue::open(config).await.unwrap();
    publish(&queue, &messages(&["poison"], None)).await;
    for attempt in 1..=2 {
        assert_eq!(receive(&queue, 1).await[0].attempt, Some(attempt));
        scene.pass(LEASE);
    }
    publish(&queue, &messages(&["old"], None)).await;
    assert_eq!(texts(&receive(&queue, 10).await), ["old"]);
    scene.pass(DAY);
    assert!(receive(&queue, 10).await.is_empty());
    let dead = SqliteQueue::open(scene.config().queue("orders.dead"))
        .await
        .unwrap();
    let letters = receive(&dead, 10).await;
    assert_eq!(texts(&letters), ["poison", "old"]);
    let reason = |i: usize| letters[i].message.attributes.get(DEAD_LETTER_REASON);
    assert!(reason(0).unwrap().contains("2 times"));
    assert!(reason(1).unwrap().contains("retention"));
}

#[tokio::test]
async fn limits_on_bytes_and_messages_hold() {
    let scene = Scene::new();
    let queue = open(&scene).await;
    publish(&queue, &messages(&["12345", "12345", "12345"], None)).await;
    let small = ReceiveLimits::new(10, Duration::ZERO).with_bytes(10);
    assert_eq!(queue.receive(small).await.unwrap().len(), 2);
    let tiny = small.with_bytes(1);
    assert_eq!(queue.receive(tiny).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_waiting_receive_is_woken_by_a_publish() {
    let scene = Scene::new();
    let queue = Arc::new(open(&scene).await);
    let waiting = tokio::spawn({
        let queue = Arc::clone(&queue);
        async move {
            let mut limit = limit(1);
            limit.wait = Duration::from_secs(60);
            queue.receive(limit).await.unwrap()
        }
    });
    publish(&queue, &messages(&["x"], None)).await;
    assert_eq!(texts(&waiting.await.unwrap()), ["x"]);
}

#[tokio::test]
async fn closing_gives_back_in_order() {
    let scene = Scene::new();
    let (first, second) = (open(&scene).await, open(&scene).await);
    publish(&first, &messages(&["a1", "a2", "a3"], Some("a"))).await;
    let got = receive(&first, 10).await;
    Source::close(&first).await.unwrap();
    Source::close(&first).await.unwrap();
    let error = first.receive(limit(1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    let answers = settle(&first, &got, Disposition::Ack).await;
    assert!(matches!(answers[0], SettleResult::LeaseLost), "{answers:?}");
    assert_eq!(texts(&receive(&second, 10).await), ["a1", "a2", "a3"]);
}

#[tokio::test]
async fn a_dropped_receive_loses_nothing() {
    let scene = Scene::new();
    let queue = Arc::new(open(&scene).await);
    let all: Vec<String> = (0..200).map(|n| n.to_string()).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    publish(&queue, &messages(&all, None)).await;
    let mut got = Vec::new();
    for n in 0.. {
        let receiving = tokio::spawn({
            let queue = Arc::clone(&queue);
            async move { queue.receive(limit(3)).await.unwrap() }
        });
        // Dropped before, during or after the command, as it comes.
        tokio::time::sleep(Duration::from_micros(n * 7 % 150)).await;
        receiving.abort();
        if let Ok(deliveries) = receiving.await {
            got.extend(deliveries);
        }
        if n > 200 {
            // The clock stands still, so no lease ever ends: what is missing would stay away.
            let rest = receive(&queue, 300).await;
            if rest.is_empty() {
                break;
            }
            got.extend(rest);
        }
    }
    // A result that was sent and then dropped unread was kept for the next caller.
    let mut seen = texts(&got);
    seen.sort_by_key(|text| text.parse::<u32>().unwrap());
    assert_eq!(seen, all);
}

#[tokio::test]
async fn a_row_that_somebody_else_spoilt_holds_nobody_back() {
    for (change, malformed) in [
        ("message SET attempts = -1", None),
        ("message SET published_at = 9223372036854775807", None),
        ("message SET queued_at = 9223372036854775807", None),
        ("message SET free_at = -9223372036854775808", None),
        ("message SET grp = CAST(x'ff' AS TEXT)", Some("group")),
        ("message SET reason = CAST(x'ff' AS TEXT)", Some("reason")),
        ("body SET dedup_id = CAST(x'ff' AS TEXT)", Some("dedup id")),
        ("body SET attributes = '[1]'", Some("attributes")),
        (
            "body SET attributes = CAST(x'ff' AS TEXT)",
            Some("attributes"),
        ),
    ] {
        let (_scene, queue) = spoilt(change).await;
        let got = receive(&queue, 10).await;
        assert_eq!(texts(&got), ["spoilt", "sound"], "{change}");
        let reason = got[0].malformed.as_deref();
        assert_eq!(
            reason.is_some(),
            malformed.is_some(),
            "{change}: {reason:?}"
        );
        assert!(reason.is_none_or(|reason| reason.contains(malformed.unwrap())));
        applied(&queue, &got, Disposition::Ack).await;
        assert!(receive(&queue, 10).await.is_empty(), "{change}");
    }
    // Given up at once, as too old or delivered too often.
    for change in [
        "message SET attempts = 9223372036854775807",
        "message SET queued_at = -9223372036854775808",
    ] {
        let (_scene, queue) = spoilt(change).await;
        assert_eq!(texts(&receive(&queue, 10).await), ["sound"], "{change}");
    }
}

/// A queue whose first message was changed by this statement, and was the head of a group.
async fn spoilt(change: &str) -> (Scene, SqliteQueue) {
    let scene = Scene::new();
    let queue = open(&scene).await;
    publish(&queue, &messages(&["spoilt"], Some("g"))).await;
    publish(&queue, &messages(&["sound"], None)).await;
    // The queue's own connection guards its tables.
    let other = rusqlite::Connection::open(queue.database().path()).unwrap();
    let first = "(SELECT min(id) FROM onlyonce_message)";
    let sql = format!("UPDATE onlyonce_{change} WHERE id = {first}");
    assert_eq!(other.execute(&sql, []).unwrap(), 1);
    (scene, queue)
}

#[tokio::test]
async fn the_longest_times_are_times() {
    let scene = Scene::new();
    let mut config = scene.config();
    (config.lease, config.turn) = (Duration::MAX, Duration::MAX);
    config.retention = Some(Duration::MAX);
    let queue = SqliteQueue::open(config).await.unwrap();
    publish(&queue, &messages(&["x"], None)).await;
    let mut ever = limit(1);
    ever.wait = Duration::MAX;
    let got = queue.receive(ever).await.unwrap();
    let receipts = [got[0].receipt.clone()];
    assert!(queue.extend(&receipts, Duration::MAX).await[0].is_extended());
    applied(&queue, &got, nack(Duration::MAX)).await;
    assert!(receive(&queue, 1).await.is_empty());
}
