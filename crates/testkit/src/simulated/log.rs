mod partition;

use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{
    Acks, Capabilities, Delivery, Durability, ExtendResult, Ordering, QueueInfo, Receipt,
    ReceiveLimits, SettleResult, Settlement, Sink, SinkInfo, Source,
};
use onlyonce_core::{Error, ErrorKind, Message};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout_at};

use partition::Partition;

const A_YEAR: Duration = Duration::from_secs(365 * 86_400);

/// A partitioned log in memory, with one group of consumers: what Kafka is like.
///
/// Messages of one group are in one partition, the others go round. Each partition belongs to one consumer at a time, and is
/// assigned anew when a consumer joins, closes or is dropped. Its old owner is told first, may finish and settle for a
/// while, then loses it; sooner, when it has nothing of it in hand. The new one begins behind the last commit.
///
/// - An ack is noted, and the partition is committed up to the first message that is not acked ([`Acks::Cumulative`]).
/// - Giving back rewinds: everything from that message on is delivered again by the same consumer, in order, except what
///   it has acked. What of it is still in hand has lost its lease.
/// - Nothing else: no delay, no dead letter, no count of attempts, no lease by the clock, and no faults.
///
/// ```
/// use std::time::Duration;
/// use onlyonce_core::driver::{Disposition, ReceiveLimits, Settlement, Sink, Source};
/// use onlyonce_core::Message;
/// use onlyonce_testkit::simulated::Log;
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), onlyonce_core::Error> {
/// let log = Log::new("orders").with_partitions(1);
/// log.producer().publish(&["first", "second"].map(Message::new)).await;
/// let consumer = log.connect();
/// let limit = ReceiveLimits::new(10, Duration::ZERO).with_bytes(1 << 20).with_per_group(10);
/// let held = consumer.receive(limit).await?;
///
/// let ack = |n: usize| Settlement::new(held[n].receipt.clone(), Disposition::Ack);
/// consumer.settle(&[ack(1)]).await;
/// assert_eq!(log.uncommitted(), 2, "the first is still out");
/// consumer.settle(&[ack(0)]).await;
/// assert_eq!(log.uncommitted(), 0);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Log(Arc<Shared>);

/// A consumer of a [`Log`]. One that is dropped leaves at once, as if it had been closed.
#[derive(Debug)]
pub struct LogConsumer {
    shared: Arc<Shared>,
    member: u64,
}

/// A publisher to a [`Log`].
#[derive(Debug)]
pub struct LogProducer {
    shared: Arc<Shared>,
    closed: AtomicBool,
}

/// A delivery of a [`Log`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LogReceipt {
    /// The partition, from 0.
    pub partition: usize,
    /// Its place there, from 0.
    pub offset: u64,
    /// How often the partition had been assigned or rewound.
    pub generation: u64,
}

#[derive(Debug)]
struct Shared {
    name: String,
    state: Mutex<State>,
    /// Something may be there to receive.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    identity: String,
    grace: Duration,
    partitions: Vec<Partition>,
    /// Who is there, in the order in which they joined.
    members: Vec<u64>,
    last_member: u64,
    /// The partition that is next to take a message without a group.
    next_published: usize,
    /// The partition that is next to be delivered from.
    next_taken: usize,
    reassigned: u64,
    cut_off: u64,
}

impl Log {
    /// An empty log with 3 partitions, which takes a partition away a second after its notice. Its identity is its name.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        let state = State {
            identity: name.clone(),
            grace: Duration::from_secs(1),
            partitions: partitions(3),
            members: Vec::new(),
            last_member: 0,
            next_published: 0,
            next_taken: 0,
            reassigned: 0,
            cut_off: 0,
        };
        Self(Arc::new(Shared {
            name,
            state: Mutex::new(state),
            changed: Notify::new(),
        }))
    }

    /// Makes it of this many partitions, at least one, all empty.
    #[must_use]
    pub fn with_partitions(self, count: usize) -> Self {
        self.0.look(|state| state.partitions = partitions(count));
        self
    }

    /// Sets which queue it is: two of one name may be different ones.
    #[must_use]
    pub fn with_identity(self, identity: impl Into<String>) -> Self {
        self.0.look(|state| state.identity = identity.into());
        self
    }

    /// Sets how long after its notice a partition is taken away.
    #[must_use]
    pub fn with_grace(self, grace: Duration) -> Self {
        self.0.look(|state| state.grace = grace);
        self
    }

    /// A new consumer, which has joined.
    #[must_use]
    pub fn connect(&self) -> LogConsumer {
        let member = self.0.change(|state| {
            state.last_member += 1;
            state.members.push(state.last_member);
            state.last_member
        });
        LogConsumer {
            shared: self.0.clone(),
            member,
        }
    }

    /// A new publisher.
    #[must_use]
    pub fn producer(&self) -> LogProducer {
        LogProducer {
            shared: self.0.clone(),
            closed: AtomicBool::new(false),
        }
    }

    /// How many messages are behind the last commit of their partition.
    #[must_use]
    pub fn uncommitted(&self) -> u64 {
        let behind = |partition: &Partition| partition.end() - partition.committed();
        self.0
            .look(|state| state.partitions.iter().map(behind).sum())
    }

    /// How often a partition was taken from a consumer that was there.
    #[must_use]
    pub fn reassigned(&self) -> u64 {
        self.0.look(|state| state.reassigned)
    }

    /// How often that happened while its consumer still had messages in hand.
    #[must_use]
    pub fn cut_off(&self) -> u64 {
        self.0.look(|state| state.cut_off)
    }
}

impl State {
    /// Where a message goes: those of a group all to one partition.
    fn partition_for(&mut self, group: Option<&str>) -> &mut Partition {
        let count = self.partitions.len();
        let at = match group {
            Some(group) => hash(group) as usize % count,
            None => {
                self.next_published += 1;
                (self.next_published - 1) % count
            }
        };
        &mut self.partitions[at]
    }

    fn leave(&mut self, member: u64) {
        self.members.retain(|other| *other != member);
        let own = self.partitions.iter_mut();
        own.filter(|partition| partition.owner() == Some(member))
            .for_each(Partition::release);
    }

    /// Assigns partitions to who is there: revokes first, and takes away what was revoked once its time has come or its
    /// owner is done with it. Says whether something was assigned or revoked.
    fn assign(&mut self, now: Instant) -> bool {
        let mut changed = false;
        for (at, partition) in self.partitions.iter_mut().enumerate() {
            let wanted = match self.members.len() {
                0 => None,
                many => Some(self.members[at % many]),
            };
            let is_mistaken = partition.owner().is_some() && partition.owner() != wanted;
            if is_mistaken && partition.until().is_none() {
                partition.revoke(now + self.grace);
                changed = true;
            }
            if let Some(until) = partition.until()
                && (until <= now || partition.is_idle())
            {
                self.reassigned += 1;
                self.cut_off += u64::from(!partition.is_idle());
                partition.release();
            }
            if let (None, Some(member)) = (partition.owner(), wanted) {
                partition.assign(member);
                changed = true;
            }
        }
        changed
    }

    /// One message of each partition after another.
    fn take(&mut self, member: u64, limits: ReceiveLimits) -> Vec<Delivery> {
        let (mut taken, mut bytes, mut empty) = (Vec::new(), 0, 0);
        while empty < self.partitions.len() && limits.allows_more(taken.len(), bytes) {
            let at = self.next_taken % self.partitions.len();
            self.next_taken = at + 1;
            match self.partitions[at].take(member) {
                Some(delivery) => {
                    bytes += delivery.message.size();
                    taken.push(delivery);
                    empty = 0;
                }
                None => empty += 1,
            }
        }
        taken
    }

    fn settle(&mut self, member: u64, batch: &[Settlement]) -> Vec<SettleResult> {
        let answers = batch
            .iter()
            .map(|settlement| {
                let receipt = settlement.receipt.get::<LogReceipt>().copied();
                let partition =
                    receipt.and_then(|receipt| self.partitions.get_mut(receipt.partition));
                match (receipt, partition) {
                    (Some(receipt), Some(partition)) => {
                        partition.note(member, receipt, &settlement.disposition)
                    }
                    _ => SettleResult::LeaseLost,
                }
            })
            .collect();
        for partition in &mut self.partitions {
            partition.commit();
            partition.rewind();
        }
        answers
    }

    /// When the next partition is to be taken away.
    fn next_end(&self) -> Option<Instant> {
        self.partitions.iter().filter_map(Partition::until).min()
    }
}

fn partitions(count: usize) -> Vec<Partition> {
    (0..count.max(1)).map(Partition::new).collect()
}

/// FNV-1a: the same partition in every run.
fn hash(group: &str) -> u64 {
    group.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

impl Shared {
    fn look<R>(&self, look: impl FnOnce(&mut State) -> R) -> R {
        look(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes something that others may wait for.
    fn change<R>(self: &Arc<Self>, change: impl FnOnce(&mut State) -> R) -> R {
        let result = self.look(change);
        self.assign();
        self.changed.notify_waiters();
        result
    }

    /// Brings assignments up to date. Consumers must lose what is taken away even if nobody asks for anything then.
    fn assign(self: &Arc<Self>) {
        let now = Instant::now();
        let (changed, end) = self.look(|state| (state.assign(now), state.next_end()));
        if !changed {
            return;
        }
        self.changed.notify_waiters();
        if let (Some(end), Ok(runtime)) = (end, Handle::try_current()) {
            let shared = Arc::downgrade(self);
            runtime.spawn(async move {
                sleep_until(end).await;
                if let Some(shared) = shared.upgrade() {
                    shared.assign();
                }
            });
        }
    }

    fn closed(&self) -> Error {
        Error::new(ErrorKind::Closed, "it was closed").on_queue(&self.name)
    }
}

#[async_trait]
impl Source for LogConsumer {
    fn name(&self) -> &str {
        &self.shared.name
    }

    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        let now = Instant::now();
        let deadline = now.checked_add(limits.wait).unwrap_or(now + A_YEAR);
        loop {
            // Registered before looking, so that nothing that happens in between is missed.
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            self.shared.assign();
            let taken = self.shared.look(|state| {
                let is_there = state.members.contains(&self.member);
                is_there.then(|| state.take(self.member, limits))
            });
            let taken = taken.ok_or_else(|| self.shared.closed())?;
            if !taken.is_empty() || timeout_at(deadline, changed).await.is_err() {
                return Ok(taken);
            }
        }
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        self.shared.assign();
        self.shared.change(|state| state.settle(self.member, batch))
    }

    async fn extend(&self, batch: &[Receipt], _lease: Duration) -> Vec<ExtendResult> {
        let cannot = |_| {
            let error = Error::new(ErrorKind::Other, "simulated: a log's leases have no end");
            ExtendResult::Unknown(error)
        };
        batch.iter().map(cannot).collect()
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let mut capabilities = Capabilities::default();
        capabilities.acks = Acks::Cumulative;
        capabilities.ordering = Ordering::Delivery;
        // Each rewind takes from the handlers that still run what is behind it.
        capabilities.close_gives_back = true;
        let mut info = QueueInfo::default();
        info.identity = Some(self.shared.look(|state| state.identity.clone()));
        info.durability = Durability::Process;
        info.capabilities = capabilities;
        info.settings = self.shared.look(|state| {
            let text = |name: &str, value: String| (name.to_owned(), value);
            vec![
                text("partitions", state.partitions.len().to_string()),
                text("grace", format!("{:?}", state.grace)),
            ]
        });
        Ok(info)
    }

    async fn close(&self) -> Result<(), Error> {
        self.shared.change(|state| state.leave(self.member));
        Ok(())
    }
}

impl Drop for LogConsumer {
    fn drop(&mut self) {
        self.shared.change(|state| state.leave(self.member));
    }
}

#[async_trait]
impl Sink for LogProducer {
    fn name(&self) -> &str {
        &self.shared.name
    }

    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        let mut info = SinkInfo::default();
        info.identity = Some(self.shared.look(|state| state.identity.clone()));
        Ok(info)
    }

    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        if self.closed.load(Atomic::Acquire) {
            return batch.iter().map(|_| Err(self.shared.closed())).collect();
        }
        self.shared.change(|state| {
            for message in batch {
                let partition = state.partition_for(message.group.as_deref());
                partition.append(message);
            }
        });
        batch.iter().map(|_| Ok(())).collect()
    }

    async fn close(&self) -> Result<(), Error> {
        self.closed.store(true, Atomic::Release);
        Ok(())
    }
}
