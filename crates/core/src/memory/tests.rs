use std::time::Duration;

use super::*;
use crate::Message;
use crate::driver::{Disposition, ReceiveLimits, Settlement, Sink, Source};

fn limit(messages: usize) -> ReceiveLimits {
    ReceiveLimits::new(messages, Duration::ZERO)
}

fn bodies(deliveries: &[crate::driver::Delivery]) -> Vec<String> {
    let text = |d: &crate::driver::Delivery| String::from_utf8_lossy(&d.message.body).into_owned();
    deliveries.iter().map(text).collect()
}

fn all(deliveries: &[crate::driver::Delivery], disposition: &Disposition) -> Vec<Settlement> {
    deliveries
        .iter()
        .map(|d| Settlement::new(d.receipt.clone(), disposition.clone()))
        .collect()
}

fn grouped(group: &str, body: &str) -> Message {
    Message::new(body.to_owned()).with_group(group)
}

#[tokio::test(start_paused = true)]
async fn other_groups_come_before_followers_of_the_same() {
    let queue = MemoryQueue::new("q");
    queue
        .publish(&[
            grouped("a", "a1"),
            grouped("a", "a2"),
            grouped("a", "a3"),
            grouped("b", "b1"),
            Message::new("-"),
        ])
        .await;
    let first = queue.receive(limit(4)).await.unwrap();
    assert_eq!(bodies(&first), ["a1", "b1", "-", "a2"]);
    assert!(queue.receive(limit(9)).await.unwrap().is_empty());
    queue.settle(&all(&first[..1], &Disposition::Ack)).await;
    assert!(queue.receive(limit(9)).await.unwrap().is_empty());
    queue.settle(&all(&first[1..], &Disposition::Ack)).await;
    assert_eq!(bodies(&queue.receive(limit(9)).await.unwrap()), ["a3"]);
}

#[tokio::test(start_paused = true)]
async fn too_many_deliveries_become_a_dead_letter() {
    let queue = MemoryQueue::new("q").with_max_deliveries(2);
    queue.publish(&[Message::new("x")]).await;
    for attempt in 1..=2 {
        let got = queue.receive(limit(1)).await.unwrap();
        assert_eq!(got[0].attempt, Some(attempt));
        tokio::time::advance(Duration::from_secs(31)).await;
    }
    assert!(queue.receive(limit(1)).await.unwrap().is_empty());
    assert_eq!(queue.dead_letters().len(), 1);
    assert_eq!((queue.depth(), queue.in_flight()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn retention_drops_what_waits_and_what_comes_back_late() {
    let queue = MemoryQueue::new("q").with_retention(Duration::from_secs(10));
    queue
        .publish(&[Message::new("taken"), Message::new("waits")])
        .await;
    let taken = queue.receive(limit(1)).await.unwrap();
    tokio::time::advance(Duration::from_secs(10)).await;
    assert_eq!((queue.depth(), queue.in_flight()), (0, 1));
    let nack = Disposition::Nack {
        delay: Duration::ZERO,
    };
    assert!(queue.settle(&all(&taken, &nack)).await[0].is_applied());
    assert_eq!((queue.depth(), queue.in_flight()), (0, 0));
}

/// Enough messages in enough groups that a scan over either would take hours.
#[tokio::test]
async fn many_messages_in_many_groups_are_received_and_settled() {
    let queue = MemoryQueue::new("q");
    let messages: Vec<Message> = (0..200_000)
        .map(|n| grouped(&(n % 100_000).to_string(), "x"))
        .collect();
    queue.publish(&messages).await;
    let mut seen = 0;
    loop {
        let got = queue.receive(limit(100)).await.unwrap();
        if got.is_empty() {
            break;
        }
        seen += got.len();
        queue.settle(&all(&got, &Disposition::Ack)).await;
    }
    assert_eq!(seen, 200_000);
    assert_eq!((queue.depth(), queue.in_flight()), (0, 0));
}
