use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::later;
use super::state::{DeadLetter, State, Taken};
use crate::driver::{
    Acks, Capabilities, Delivery, Durability, ExtendResult, Lease, Ordering, QueueInfo, Receipt,
    ReceiveLimits, SettleResult, Settlement, Sink, SinkInfo, Source,
};
use crate::{Error, ErrorKind, Message};

/// A queue in memory: a [`Source`] and a [`Sink`] with every [capability](Capabilities).
///
/// All clones share one queue. Each clone is a *consumer* of its own: closing it gives back what it received and leaves
/// the others alone. A consumer that is dropped without being closed has crashed: its messages come again when their
/// leases end.
///
/// Messages of one group are withheld while any of the group is leased, or an earlier one is delayed. One
/// [`receive`](Source::receive) may return several of a group, but prefers the heads of other groups.
///
/// ```
/// use std::time::Duration;
/// use onlyonce_core::driver::{ReceiveLimits, Sink, Source};
/// use onlyonce_core::{Message, memory::MemoryQueue};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), onlyonce_core::Error> {
/// let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(5));
/// queue.publish(&[Message::new("one order").with_dedup_id("order-1")]).await;
///
/// let limit = ReceiveLimits::new(10, Duration::from_secs(1)).with_bytes(1 << 20).with_per_group(10);
/// let deliveries = queue.receive(limit).await?;
/// assert_eq!(deliveries[0].message.body, "one order");
/// assert_eq!((queue.depth(), queue.in_flight()), (0, 1));
/// # Ok(()) }
/// ```
pub struct MemoryQueue {
    shared: Arc<Shared>,
    consumer: u64,
    /// Cancelled when this consumer closes.
    closed: CancellationToken,
    sink_closed: AtomicBool,
}

struct Shared {
    name: String,
    /// Another queue of this name has another.
    id: u64,
    state: Mutex<State>,
    /// Wakes all who wait in `receive`: something may be ready, or be ready sooner than they thought.
    changed: Notify,
}

impl MemoryQueue {
    /// What can be done with it: everything.
    pub const CAPABILITIES: Capabilities = Capabilities {
        acks: Acks::Confirmed,
        extend: true,
        timed_lease: true,
        delayed_nack: true,
        dead_letter: true,
        counts_attempts: true,
        ordering: Ordering::Group,
        close_gives_back: false,
        settle_batch: None,
    };

    /// An empty queue with leases of 30 seconds, any number of deliveries, and messages that are kept for ever.
    pub fn new(name: impl Into<String>) -> Self {
        Self::consumer_of(Arc::new(Shared {
            name: name.into(),
            id: fastrand::u64(..),
            state: Mutex::new(State::new()),
            changed: Notify::new(),
        }))
    }

    fn consumer_of(shared: Arc<Shared>) -> Self {
        let consumer = lock(&shared.state).new_consumer();
        Self {
            shared,
            consumer,
            closed: CancellationToken::new(),
            sink_closed: AtomicBool::new(false),
        }
    }

    /// Sets for how long a delivery is leased.
    #[must_use]
    pub fn with_lease(self, lease: Duration) -> Self {
        lock(&self.shared.state).options.lease = lease;
        self
    }

    /// Sets after how many deliveries a message that is given back, or whose lease ends, becomes a dead letter.
    #[must_use]
    pub fn with_max_deliveries(self, max: u32) -> Self {
        lock(&self.shared.state).options.max_deliveries = Some(max);
        self
    }

    /// Sets how long after its publication a message is dropped; it applies to what is published from now on.
    #[must_use]
    pub fn with_retention(self, retention: Duration) -> Self {
        lock(&self.shared.state).options.retention = Some(retention);
        self
    }

    /// The queue's name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// What became a dead letter, in that order.
    pub fn dead_letters(&self) -> Vec<DeadLetter> {
        self.now().1.dead_letters()
    }

    /// How many messages wait, delayed ones too.
    pub fn depth(&self) -> usize {
        self.now().1.depth()
    }

    /// How many messages are leased.
    pub fn in_flight(&self) -> usize {
        self.now().1.in_flight()
    }

    /// The queue as it is now.
    fn now(&self) -> (Instant, MutexGuard<'_, State>) {
        let mut state = lock(&self.shared.state);
        let now = Instant::now();
        state.advance(now);
        (now, state)
    }

    fn identity(&self) -> String {
        format!("memory:{:x}/{}", self.shared.id, self.shared.name)
    }

    fn check_open(&self, closed: bool) -> Result<(), Error> {
        if closed {
            let error = Error::new(ErrorKind::Closed, "it was closed");
            return Err(error.on_queue(self.name()));
        }
        Ok(())
    }

    fn delivery(&self, taken: Taken) -> Delivery {
        Delivery {
            message: taken.message,
            receipt: taken.receipt,
            lease: Lease::until(taken.until).tied_to(self.closed.clone()),
            attempt: Some(taken.attempt),
            is_first: taken.attempt == 1,
            malformed: None,
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Another consumer of the same queue, open even if this one is closed.
impl Clone for MemoryQueue {
    fn clone(&self) -> Self {
        Self::consumer_of(Arc::clone(&self.shared))
    }
}

impl fmt::Debug for MemoryQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryQueue")
            .field("name", &self.shared.name)
            .field("consumer", &self.consumer)
            .field("depth", &self.depth())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Source for MemoryQueue {
    fn name(&self) -> &str {
        &self.shared.name
    }

    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        let deadline = later(Instant::now(), limits.wait);
        loop {
            // Registered before looking, so that nothing that happens in between is missed.
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let wake = {
                let (now, mut state) = self.now();
                // Under the lock, as `close` is: nothing is leased to a consumer that has closed.
                self.check_open(self.closed.is_cancelled())?;
                let taken = state.take(now, self.consumer, limits);
                if !taken.is_empty() || now >= deadline {
                    drop(state);
                    return Ok(taken.into_iter().map(|one| self.delivery(one)).collect());
                }
                state.next_event().map_or(deadline, |at| at.min(deadline))
            };
            tokio::select! {
                biased;
                () = changed => {}
                () = sleep_until(wake) => {}
            }
        }
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let (now, mut state) = self.now();
        let answers = batch
            .iter()
            .map(|s| state.settle(now, &s.receipt, &s.disposition))
            .collect();
        drop(state);
        self.shared.changed.notify_waiters();
        answers
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        let (now, mut state) = self.now();
        let answers = batch
            .iter()
            .map(|receipt| state.extend(now, receipt, lease))
            .collect();
        drop(state);
        // An "extension" can also shorten a lease.
        self.shared.changed.notify_waiters();
        answers
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let (_, state) = self.now();
        Ok(QueueInfo {
            identity: Some(self.identity()),
            lease: Some(state.options.lease),
            retention: state.options.retention,
            max_deliveries: state.options.max_deliveries,
            gives_up: None,
            dead_letter: Some(format!("{}.dead-letters", self.shared.name)),
            dead_letters_of: Vec::new(),
            dedup_window: None,
            durability: Durability::Process,
            capabilities: Self::CAPABILITIES,
            settings: Vec::new(),
            unknown: Vec::new(),
        })
    }

    async fn close(&self) -> Result<(), Error> {
        let (now, mut state) = self.now();
        state.close(now, self.consumer);
        self.closed.cancel();
        drop(state);
        self.shared.changed.notify_waiters();
        Ok(())
    }
}

#[async_trait]
impl Sink for MemoryQueue {
    fn name(&self) -> &str {
        &self.shared.name
    }

    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        self.check_open(self.sink_closed.load(Atomic::Acquire))?;
        Ok(SinkInfo {
            identity: Some(self.identity()),
            // It takes all or nothing.
            stops_groups: true,
            unknown: Vec::new(),
        })
    }

    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        let (now, mut state) = self.now();
        let closed = self.sink_closed.load(Atomic::Acquire);
        let results = batch
            .iter()
            .map(|message| {
                self.check_open(closed)?;
                state.publish(now, message);
                Ok(())
            })
            .collect();
        drop(state);
        self.shared.changed.notify_waiters();
        results
    }

    async fn close(&self) -> Result<(), Error> {
        self.sink_closed.store(true, Atomic::Release);
        Ok(())
    }
}
