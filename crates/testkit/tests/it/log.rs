//! The log in memory passes every check, and does what only a log does.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::Message;
use onlyonce_core::driver::{
    Delivery, Disposition, Receipt, ReceiveLimits, SettleResult, Settlement, Sink, Source,
};
use onlyonce_testkit::simulated::{Log, LogConsumer, LogReceipt};
use onlyonce_testkit::source::SourceHarness;
use onlyonce_testkit::source_suite;
use tokio::time::sleep;

const GRACE: Duration = Duration::from_secs(1);
const NACK: Disposition = Disposition::Nack {
    delay: Duration::ZERO,
};

pub(crate) struct Partitions(Log);

impl Partitions {
    pub(crate) fn new(count: usize) -> Self {
        Self(Log::new("orders").with_partitions(count).with_grace(GRACE))
    }
}

#[async_trait]
impl SourceHarness for Partitions {
    async fn source(&self) -> Arc<dyn Source> {
        Arc::new(self.0.connect())
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        Arc::new(self.0.producer())
    }

    async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>) {
        namesake()
    }

    fn made_up(&self, receipt: &Receipt) -> Vec<Receipt> {
        made_up(receipt)
    }

    fn lease(&self) -> Duration {
        GRACE
    }
}

pub(crate) fn namesake() -> (Arc<dyn Source>, Arc<dyn Sink>) {
    let other = Log::new("orders").with_identity("orders elsewhere");
    (Arc::new(other.connect()), Arc::new(other.producer()))
}

pub(crate) fn made_up(receipt: &Receipt) -> Vec<Receipt> {
    let real: LogReceipt = *receipt.get().expect("it is of a log");
    let with = |change: fn(&mut LogReceipt)| {
        let mut other = real;
        change(&mut other);
        Receipt::new(other)
    };
    vec![
        with(|it| it.partition += 1_000),
        with(|it| it.offset += 1_000_000),
        with(|it| it.generation += 1_000_000),
        with(|it| it.generation = 0),
    ]
}

source_suite!(
    #[tokio::test(start_paused = true)]
    Partitions::new(3)
);

/// The same where one consumer has everything, and where most have nothing.
mod one_partition {
    use super::*;

    source_suite!(
        #[tokio::test(start_paused = true)]
        Partitions::new(1)
    );
}

async fn publish(log: &Log, bodies: impl IntoIterator<Item = &'static str>) {
    // `a1`: the first of group a.
    let message = |body: &'static str| Message::new(body).with_group(&body[..1]);
    let batch: Vec<_> = bodies.into_iter().map(message).collect();
    for result in log.producer().publish(&batch).await {
        result.unwrap();
    }
}

async fn receive(consumer: &LogConsumer) -> Vec<Delivery> {
    let limit = ReceiveLimits::new(100, Duration::ZERO);
    consumer.receive(limit).await.unwrap()
}

fn bodies(deliveries: &[Delivery]) -> Vec<String> {
    let text = |one: &Delivery| String::from_utf8_lossy(&one.message.body).into_owned();
    deliveries.iter().map(text).collect()
}

async fn settle(consumer: &LogConsumer, one: &Delivery, disposition: Disposition) -> SettleResult {
    let receipt = one.receipt.clone();
    let settlement = Settlement::new(receipt, disposition);
    consumer.settle(&[settlement]).await.remove(0)
}

fn is_lost(one: &Delivery) -> bool {
    one.lease.lost.as_ref().unwrap().is_cancelled()
}

fn is_revoked(one: &Delivery) -> bool {
    one.lease.revoked.as_ref().unwrap().is_cancelled()
}

/// A log of one partition with these messages, and its consumer.
async fn one_partition(sent: [&'static str; 5]) -> (Log, LogConsumer, Vec<Delivery>) {
    let log = Log::new("orders").with_partitions(1).with_grace(GRACE);
    publish(&log, sent).await;
    let consumer = log.connect();
    let held = receive(&consumer).await;
    assert_eq!(bodies(&held), sent);
    (log, consumer, held)
}

#[tokio::test(start_paused = true)]
async fn giving_back_rewinds_and_repeats_all_that_is_not_acked() {
    let (log, consumer, held) = one_partition(["a1", "b1", "a2", "b2", "a3"]).await;
    assert!(
        settle(&consumer, &held[3], Disposition::Ack)
            .await
            .is_applied()
    );
    assert!(settle(&consumer, &held[1], NACK).await.is_applied());
    let lost: Vec<bool> = held.iter().map(is_lost).collect();
    assert_eq!(
        lost,
        [false, true, true, false, true],
        "b2 was settled before"
    );
    assert!(!held.iter().any(is_revoked));
    let late = settle(&consumer, &held[2], Disposition::Ack).await;
    assert!(matches!(late, SettleResult::LeaseLost), "{late:?}");

    let again = receive(&consumer).await;
    assert_eq!(bodies(&again), ["b1", "a2", "a3"]);
    assert!(
        settle(&consumer, &held[0], Disposition::Ack)
            .await
            .is_applied()
    );
    assert_eq!(log.uncommitted(), 4);
    for one in &again {
        assert!(settle(&consumer, one, Disposition::Ack).await.is_applied());
    }
    assert_eq!(log.uncommitted(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_goes_back_takes_no_lease_from_what_it_acks() {
    let (_log, consumer, held) = one_partition(["a1", "b1", "a2", "b2", "a3"]).await;
    let settlement = |n: usize, disposition: &Disposition| {
        Settlement::new(held[n].receipt.clone(), disposition.clone())
    };
    let ack = Disposition::Ack;
    let batch = [
        settlement(4, &NACK),
        settlement(2, &NACK),
        settlement(0, &NACK),
        settlement(1, &ack),
        settlement(3, &ack),
    ];
    let answers = consumer.settle(&batch).await;
    assert!(answers.iter().all(SettleResult::is_applied), "{answers:?}");
    assert_eq!(bodies(&receive(&consumer).await), ["a1", "a2", "a3"]);
}

#[tokio::test(start_paused = true)]
async fn who_is_dropped_loses_everything_at_once() {
    let (log, first, held) = one_partition(["a1", "b1", "a2", "b2", "a3"]).await;
    let second = log.connect();
    assert!(!held.iter().any(is_revoked), "who joined first keeps it");
    assert!(receive(&second).await.is_empty());
    drop(first);
    assert!(held.iter().all(is_lost));
    assert_eq!(receive(&second).await.len(), 5, "nothing was committed");
    assert_eq!(
        (log.reassigned(), log.cut_off()),
        (0, 0),
        "it was not there"
    );
}

/// Two partitions with three messages each, a consumer that holds them all, and one that joins: what the first keeps, and
/// what is to be taken from it.
async fn second_joins() -> (Log, [LogConsumer; 2], [Vec<Delivery>; 2]) {
    let log = Log::new("orders").with_partitions(2).with_grace(GRACE);
    let sent: Vec<_> = (0..6).map(|n: u8| Message::new(n.to_string())).collect();
    log.producer().publish(&sent).await;
    let first = log.connect();
    let held = receive(&first).await;
    let second = log.connect();
    let is_first = |one: &Delivery| one.receipt.get::<LogReceipt>().unwrap().partition == 0;
    let (kept, taken): (Vec<_>, Vec<_>) = held.into_iter().partition(is_first);
    assert_eq!((kept.len(), taken.len()), (3, 3));
    (log, [first, second], [kept, taken])
}

#[tokio::test(start_paused = true)]
async fn a_partition_is_revoked_with_notice_and_lost_after_its_grace() {
    let (log, [first, second], [kept, taken]) = second_joins().await;
    assert!(!kept.iter().any(is_revoked));
    assert!(taken.iter().all(|one| is_revoked(one) && !is_lost(one)));
    // It may finish what it has, and give back the rest.
    assert!(
        settle(&first, &taken[0], Disposition::Ack)
            .await
            .is_applied()
    );
    assert!(settle(&first, &taken[1], NACK).await.is_applied());
    assert!(!is_lost(&taken[2]), "nothing is rewound any more");
    sleep(GRACE / 2).await;
    assert!(receive(&first).await.is_empty() && receive(&second).await.is_empty());
    sleep(GRACE).await;
    assert!(is_lost(&taken[2]), "nobody asked for anything meanwhile");
    let late = settle(&first, &taken[2], Disposition::Ack).await;
    assert!(matches!(late, SettleResult::LeaseLost), "{late:?}");
    assert_eq!(receive(&second).await.len(), 2);
    assert!(!kept.iter().any(is_lost));
    assert_eq!((log.reassigned(), log.cut_off()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_partition_moves_at_once_when_nothing_of_it_is_in_hand() {
    let (log, [first, second], [_, taken]) = second_joins().await;
    for one in &taken[..2] {
        assert!(settle(&first, one, Disposition::Ack).await.is_applied());
        assert!(receive(&second).await.is_empty());
    }
    assert!(settle(&first, &taken[2], NACK).await.is_applied());
    assert_eq!(bodies(&receive(&second).await), bodies(&taken[2..]));
    assert_eq!((log.reassigned(), log.cut_off()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn what_was_acked_beyond_a_gap_comes_again_to_another_consumer() {
    let (log, first, held) = one_partition(["a1", "b1", "a2", "b2", "a3"]).await;
    for n in [0, 2, 3] {
        assert!(
            settle(&first, &held[n], Disposition::Ack)
                .await
                .is_applied()
        );
    }
    assert_eq!(log.uncommitted(), 4);
    first.close().await.unwrap();
    let second = log.connect();
    assert_eq!(bodies(&receive(&second).await), ["b1", "a2", "b2", "a3"]);
}
