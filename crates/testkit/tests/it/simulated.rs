//! The simulated broker, where nothing goes wrong, passes every check, whatever kind of broker it is; and what is its own.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{
    Acks, Capabilities, Delivery, Disposition, Lease, Ordering, Receipt, ReceiveLimits,
    SettleResult, Settlement, Sink, SinkInfo, Source,
};
use onlyonce_core::{Error, ErrorKind, Message};
use onlyonce_testkit::simulated::{Broker, Consumer, Fault, Faults, Mix, SimulatedReceipt};
use onlyonce_testkit::source::{DeadLettered, SourceHarness};
use onlyonce_testkit::{Gap, source_suite};
use tokio::time::{Instant, sleep, timeout};

const LEASE: Duration = Duration::from_secs(2);

pub(crate) struct Simulated(pub(crate) Broker);

impl Simulated {
    fn new() -> Self {
        let faults = Faults::new(1, Mix::nothing(), Duration::ZERO);
        Self(Broker::new("orders", &faults).with_lease(LEASE))
    }

    fn with_sessions() -> Self {
        Self(Self::new().0.with_sessions())
    }

    pub(crate) fn with_replay() -> Self {
        Self(
            Self::new()
                .0
                .with_capabilities(confirmed_by_id())
                .with_replay(),
        )
    }

    fn with_connection_leases() -> Self {
        Self(Self::new().0.with_capabilities(connection_leases()))
    }
}

/// Of a subscription of Google Pub/Sub with exactly-once delivery, ordering keys and no dead-letter policy.
fn confirmed_by_id() -> Capabilities {
    let mut capabilities = Capabilities::default();
    capabilities.acks = Acks::Confirmed;
    capabilities.timed_lease = true;
    capabilities.extend = true;
    capabilities.delayed_nack = true;
    capabilities.ordering = Ordering::Group;
    capabilities
}

/// Of a broker whose deliveries are leased for as long as their connection lasts.
fn connection_leases() -> Capabilities {
    let mut capabilities = Capabilities::default();
    capabilities.acks = Acks::Confirmed;
    capabilities.dead_letter = true;
    capabilities.ordering = Ordering::Group;
    capabilities
}

/// A way to publish to the queue itself.
struct Publisher {
    broker: Broker,
    closed: AtomicBool,
}

impl Publisher {
    fn to(broker: &Broker) -> Arc<dyn Sink> {
        Arc::new(Self {
            broker: broker.clone(),
            closed: AtomicBool::new(false),
        })
    }
}

#[async_trait]
impl Sink for Publisher {
    fn name(&self) -> &str {
        "orders"
    }

    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        self.broker.dead_letters().connect(0).sink_info().await
    }

    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        if self.closed.load(Atomic::Acquire) {
            let error = || Error::new(ErrorKind::Closed, "it was closed");
            return batch.iter().map(|_| Err(error())).collect();
        }
        for message in batch {
            self.broker.publish(message.clone()).await;
        }
        batch.iter().map(|_| Ok(())).collect()
    }

    async fn close(&self) -> Result<(), Error> {
        self.closed.store(true, Atomic::Release);
        Ok(())
    }
}

#[async_trait]
impl SourceHarness for Simulated {
    async fn source(&self) -> Arc<dyn Source> {
        Arc::new(self.0.connect(1))
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        Publisher::to(&self.0)
    }

    async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>) {
        let other = Self::new().0;
        (Arc::new(other.connect(1)), Publisher::to(&other))
    }

    fn made_up(&self, receipt: &Receipt) -> Vec<Receipt> {
        let SimulatedReceipt { channel, tag } = *receipt.get().expect("it is of this broker");
        let other = |channel, tag| Receipt::new(SimulatedReceipt { channel, tag });
        vec![
            other(channel, tag + 1_000_000),
            other(channel + 1_000_000, tag),
        ]
    }

    fn lease(&self) -> Duration {
        LEASE
    }

    async fn dead_letters(&self) -> Vec<DeadLettered> {
        let dead = self.0.given_up().into_iter();
        dead.map(|dead| DeadLettered {
            body: dead.message.body.clone(),
            reason: dead.reason,
        })
        .collect()
    }

    fn gaps(&self) -> &'static [Gap] {
        &[Gap {
            check: "namesake_is_another_queue",
            why: "its identity is its name, so that a seed gives the same keys every time",
        }]
    }
}

source_suite!(
    #[tokio::test(start_paused = true)]
    Simulated::new()
);

mod with_sessions {
    use super::*;

    source_suite!(
        #[tokio::test(start_paused = true)]
        Simulated::with_sessions()
    );
}

mod with_replay {
    use super::*;

    source_suite!(
        #[tokio::test(start_paused = true)]
        Simulated::with_replay()
    );
}

mod with_connection_leases {
    use super::*;

    source_suite!(
        #[tokio::test(start_paused = true)]
        Simulated::with_connection_leases()
    );
}

fn all() -> ReceiveLimits {
    ReceiveLimits::new(10, Duration::from_secs(10))
        .with_bytes(1 << 20)
        .with_per_group(10)
}

fn ack(delivery: &Delivery) -> [Settlement; 1] {
    [Settlement::new(delivery.receipt.clone(), Disposition::Ack)]
}

#[tokio::test(start_paused = true)]
async fn who_extends_one_of_a_session_extends_all_of_it_and_no_other() {
    let broker = Simulated::with_sessions().0;
    for (body, group) in [("1", "a"), ("2", "a"), ("3", "b")] {
        broker.publish(Message::new(body).with_group(group)).await;
    }
    let source = broker.connect(1);
    let mut got = source.receive(all()).await.unwrap();
    got.sort_by_key(|delivery| delivery.message.body.clone());
    let numbers: Vec<_> = got.iter().map(|one| one.lease.shared.unwrap()).collect();
    assert_eq!(numbers[0], numbers[1]);
    assert_ne!(numbers[0], numbers[2]);
    sleep(LEASE / 2).await;
    let extended = source.extend(&[got[1].receipt.clone()], LEASE).await;
    assert!(extended[0].is_extended());
    sleep(LEASE * 3 / 4).await;
    assert!(source.settle(&ack(&got[0])).await[0].is_applied());
    // The session of a message that is settled lasts for as long as others of it are held.
    let extended = source.extend(&[got[0].receipt.clone()], LEASE).await;
    assert!(extended[0].is_extended());
    sleep(LEASE / 2).await;
    assert!(source.settle(&ack(&got[1])).await[0].is_applied());
    assert!(!source.settle(&ack(&got[2])).await[0].is_applied());
    let extended = source.extend(&[got[0].receipt.clone()], LEASE).await;
    assert!(!extended[0].is_extended());
}

fn bodies(deliveries: &[Delivery]) -> Vec<&[u8]> {
    let bodies = deliveries.iter().map(|one| &one.message.body[..]);
    bodies.collect()
}

/// A source that replays, and the three messages of one group that it has received.
async fn held_of_one_group() -> (Consumer, Vec<Delivery>) {
    let broker = Simulated::with_replay().0;
    for body in ["1", "2", "3"] {
        broker.publish(Message::new(body).with_group("a")).await;
    }
    let source = broker.connect(1);
    let held = source.receive(all()).await.unwrap();
    assert_eq!(bodies(&held), [b"1", b"2", b"3"]);
    (source, held)
}

#[tokio::test(start_paused = true)]
async fn a_message_that_is_given_back_takes_with_it_what_follows() {
    let (source, held) = held_of_one_group().await;
    let delay = LEASE / 4;
    let nack = Settlement::new(held[1].receipt.clone(), Disposition::Nack { delay });
    let begun = Instant::now();
    assert!(source.settle(&[nack]).await[0].is_applied());
    assert!(source.settle(&ack(&held[0])).await[0].is_applied());
    let again = source.receive(all()).await.unwrap();
    assert_eq!(bodies(&again), [b"2", b"3"]);
    assert!(begun.elapsed() >= delay);
    let late = source.settle(&ack(&held[2])).await;
    assert!(matches!(late[..], [SettleResult::LeaseLost]), "{late:?}");
    for delivery in &again {
        assert!(source.settle(&ack(delivery)).await[0].is_applied());
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_ends_takes_with_it_those_that_follow() {
    let (source, held) = held_of_one_group().await;
    sleep(LEASE / 2).await;
    let rest = [held[1].receipt.clone(), held[2].receipt.clone()];
    for answer in source.extend(&rest, LEASE).await {
        assert!(answer.is_extended());
    }
    sleep(LEASE / 2).await;
    let late = source.extend(&rest, LEASE).await;
    assert!(late.iter().all(|answer| !answer.is_extended()), "{late:?}");
    let again = source.receive(all()).await.unwrap();
    assert_eq!(bodies(&again), [b"1", b"2", b"3"]);
}

#[tokio::test(start_paused = true)]
async fn an_ack_waits_for_those_before_it() {
    let (source, held) = held_of_one_group().await;
    let early = source.settle(&ack(&held[1])).await;
    let is_refused = |error: &Error| error.is_retryable();
    assert!(matches!(&early[..], [SettleResult::Unknown(error)] if is_refused(error)));
    let both = [ack(&held[1]), ack(&held[0])].concat();
    for answer in source.settle(&both).await {
        assert!(answer.is_applied(), "{answer:?}");
    }
    // Its own lease counts now.
    sleep(LEASE / 2).await;
    let extended = source.extend(&[held[2].receipt.clone()], LEASE).await;
    assert!(extended[0].is_extended());
    sleep(LEASE * 3 / 4).await;
    assert!(source.settle(&ack(&held[2])).await[0].is_applied());
}

#[tokio::test(start_paused = true)]
async fn a_session_is_taken_away_with_notice_and_no_other_with_it() {
    let mix = Mix::nothing().with(Fault::Revoke, 1.0);
    let faults = Faults::new(1, mix, Duration::from_secs(3_600));
    faults.limit(0);
    let broker = Broker::new("orders", &faults).with_sessions();
    for group in ["a", "b"] {
        broker.publish(Message::new(group).with_group(group)).await;
    }
    let source = broker.connect(1);
    let got = source.receive(all()).await.unwrap();
    let tokens = |delivery: &Delivery| {
        let Lease { revoked, lost, .. } = delivery.lease.clone();
        (revoked.unwrap(), lost.unwrap())
    };
    let (notice, lost) = tokens(&got[0]);
    faults.limit(1);
    assert!(
        source
            .receive(ReceiveLimits::new(10, Duration::ZERO))
            .await
            .unwrap()
            .is_empty()
    );
    assert!(notice.is_cancelled() && !lost.is_cancelled());
    lost.cancelled().await;
    assert!(!source.settle(&ack(&got[0])).await[0].is_applied());
    let (notice, lost) = tokens(&got[1]);
    assert!(!notice.is_cancelled() && !lost.is_cancelled());
    assert!(source.settle(&ack(&got[1])).await[0].is_applied());
    let again = source.receive(all()).await.unwrap();
    assert_eq!(again.len(), 1);
    assert_eq!(&again[0].message.body[..], b"a");
}

#[tokio::test(start_paused = true)]
async fn a_consumer_is_told_before_its_deliveries_are_taken_away() {
    let mix = Mix::nothing().with(Fault::Revoke, 1.0);
    let faults = Faults::new(1, mix, Duration::from_secs(3_600));
    faults.limit(0);
    let broker = Broker::new("orders", &faults).with_capabilities(connection_leases());
    for body in ["1", "2"] {
        broker.publish(Message::new(body)).await;
    }
    let source = broker.connect(1);
    let first = source.receive(all()).await.unwrap();
    let (revoked, lost) = (&first[0].lease.revoked, &first[0].lease.lost);
    let (revoked, lost) = (revoked.clone().unwrap(), lost.clone().unwrap());
    let id = |delivery: &Delivery| delivery.message.broker_id.clone().unwrap();
    assert!(!broker.is_revoked(1, &id(&first[0])));

    faults.limit(1);
    broker.publish(Message::new("3")).await;
    let (asked, mut next) = (Instant::now(), pin!(source.receive(all())));
    assert!(timeout(Duration::ZERO, &mut next).await.is_err());
    assert!(revoked.is_cancelled() && broker.is_revoked(1, &id(&first[0])));
    assert!(source.settle(&ack(&first[0])).await[0].is_applied());
    assert!(!lost.is_cancelled());
    let next = next.await.unwrap();
    assert!(lost.is_cancelled());
    assert!(asked.elapsed() >= Duration::from_secs(1), "{asked:?}");
    assert_eq!(bodies(&next), [b"2", b"3"]);
    assert!(!broker.is_revoked(1, &id(&next[0])));
    assert!(!source.settle(&ack(&first[1])).await[0].is_applied());
}
