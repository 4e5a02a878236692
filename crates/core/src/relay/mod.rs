//! The relay: fetch → publish → settle, for each destination of an outbox.
//!
//! `round` decides what one call to a sink carries and what its answers mean, `destination` does that until it is told to stop,
//! and here destinations are put side by side.

mod destination;
mod round;

use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::driver::{Outbox, Owner, Sink};
use crate::pipeline::closed_in_time;
use crate::{Error, ErrorKind, RetryPolicy};

use destination::Destination;

const SHORTEST_LEASE: Duration = Duration::from_millis(10);
const LONGEST_LEASE: Duration = Duration::from_secs(86_400);
/// Giving up a lease may take this time.
const RELEASE: Duration = Duration::from_secs(5);

/// Publishes what an [`Outbox`] has: whatever was committed there leaves at least once, under a dedup id that is the same
/// each time, and in order within its group.
///
/// Many relays may run beside each other; each destination has one at a time. If it dies, another goes on when its lease has ended,
/// and repeats what was under way.
///
/// ```
/// use std::sync::Arc;
/// use std::time::Duration;
///
/// use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
/// use onlyonce_core::{Error, Message, Pipeline, Relay};
///
/// async fn handle(order: Arc<Message>, tx: &mut MemoryTx) -> Result<(), Error> {
///     tx.push(order.body.clone());
///     tx.publish("mails", Message::new("one mail").with_group("customer-7")).await?;
///     Ok(())
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Error> {
/// # use onlyonce_core::driver::Sink as _;
/// let (orders, mails) = (MemoryQueue::new("orders"), MemoryQueue::new("mails"));
/// # orders.publish(&[Message::new("one order").with_dedup_id("order-1")]).await;
/// let store = MemoryStore::new();
///
/// let relay = Relay::new(store.outbox()).to("mails", mails.clone());
/// # let relay = {
/// #     let mails = mails.clone();
/// #     relay.shutdown(async move {
/// #         while mails.depth() == 0 { tokio::time::sleep(Duration::from_millis(1)).await; }
/// #     })
/// # };
/// let pipeline = Pipeline::transactional(orders, store);
/// # let pipeline = pipeline.stop_when_idle(Duration::from_millis(10));
/// let (relayed, handled) = tokio::join!(relay.run(), pipeline.run(handle));
///
/// assert_eq!((handled?.applied, relayed?.sent), (1, 1));
/// assert_eq!(mails.depth(), 1);
/// # Ok(()) }
/// ```
#[must_use = "a relay does nothing until it is run"]
pub struct Relay {
    outbox: Arc<dyn Outbox>,
    destinations: Vec<(String, Arc<dyn Sink>)>,
    options: Options,
    shutdown: Pin<Box<dyn Future<Output = ()> + Send>>,
}

#[derive(Clone, Copy, Debug)]
struct Options {
    messages: usize,
    bytes: usize,
    lease: Duration,
    poll: Duration,
    retry: RetryPolicy,
    waits_for_set_aside: bool,
    drain_timeout: Duration,
}

/// What a relay has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RelayReport {
    /// Messages that their queues have confirmed, repetitions included.
    pub sent: u64,
    /// Failures of single messages that were counted.
    pub failed: u64,
    /// Messages that were set aside.
    pub set_aside: u64,
}

#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    failed: AtomicU64,
    set_aside: AtomicU64,
}

impl Counters {
    fn report(&self) -> RelayReport {
        RelayReport {
            sent: self.sent.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            set_aside: self.set_aside.load(Ordering::Relaxed),
        }
    }
}

impl Relay {
    /// A relay of this outbox. It needs at least one destination.
    pub fn new(outbox: impl Outbox) -> Self {
        Self {
            outbox: Arc::new(outbox),
            destinations: Vec::new(),
            options: Options {
                messages: 256,
                bytes: 4 << 20,
                lease: Duration::from_secs(30),
                poll: Duration::from_secs(5),
                retry: RetryPolicy::default(),
                waits_for_set_aside: false,
                drain_timeout: Duration::from_secs(30),
            },
            shutdown: Box::pin(std::future::pending()),
        }
    }

    /// Where messages go that were published for `destination`. Those for a destination that no relay has wait in the
    /// outbox.
    pub fn to(mut self, destination: impl Into<String>, sink: impl Sink) -> Self {
        self.destinations.push((destination.into(), Arc::new(sink)));
        self
    }

    /// How many messages, and how many bytes of them, are fetched at once for each destination. One message larger than all the
    /// bytes is still fetched. Default: 256 and 4 MiB.
    pub fn batch(mut self, messages: usize, bytes: usize) -> Self {
        self.options.messages = messages.max(1);
        self.options.bytes = bytes.max(1);
        self
    }

    /// How long a destination is leased. After a crash its messages wait that long for the next relay, and no call to a queue
    /// takes longer. Default: 30 s, at least 10 ms, at most a day.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.options.lease = lease.clamp(SHORTEST_LEASE, LONGEST_LEASE);
        self
    }

    /// How often an idle relay looks by itself, and one that waits for another's lease looks whether it was given up. What is
    /// committed usually wakes it at once. Default: 5 s.
    pub fn poll(mut self, every: Duration) -> Self {
        self.options.poll = every.max(Duration::from_millis(1));
        self
    }

    /// When a message that was not taken is tried again, and after how many attempts it is set aside. [`RetryPolicy::in_place`]
    /// means nothing here.
    ///
    /// Only what the queue refuses for good ([`Error::is_retryable`] is `false`) is ever set aside, and only if the queue
    /// takes others or the error speaks of the message itself. While a queue is away, nothing is counted: the relay tries again, at
    /// most 10 s later, for as long as it takes.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.options.retry = policy;
        self
    }

    /// Whether messages that stand behind one that was set aside wait for it, within its group, until somebody
    /// [requeues](Outbox::requeue) it. Default: no, the group goes on without it.
    pub fn wait_behind_set_aside(mut self, waits: bool) -> Self {
        self.options.waits_for_set_aside = waits;
        self
    }

    /// How long a relay that is told to stop waits for calls that are under way. Default: 30 s.
    pub fn drain_timeout(mut self, limit: Duration) -> Self {
        self.options.drain_timeout = limit;
        self
    }

    /// Stop when this future resolves (a signal, say).
    pub fn shutdown(mut self, signal: impl Future<Output = ()> + Send + 'static) -> Self {
        self.shutdown = Box::pin(signal);
        self
    }

    /// Publishes until it is told to stop or cannot go on. Destinations do not wait for each other.
    ///
    /// At the end it settles what was published, gives up its leases and closes the sinks. That takes no longer than
    /// [`drain_timeout`](Self::drain_timeout) and a little over half a minute, whatever hangs. Dropping the future loses nothing: what
    /// was not settled is published again when the leases end.
    ///
    /// # Errors
    /// No destination, or one that is given twice; a queue that is not there at the start; an outbox that fails in a way that no
    /// retry can fix. What can be retried is retried here.
    pub async fn run(self) -> Result<RelayReport, Error> {
        self.check()?;
        let counters = Arc::new(Counters::default());
        let (relay, stop) = (Owner::random(), CancellationToken::new());
        let mut tasks = JoinSet::new();
        for (name, sink) in &self.destinations {
            let destination = Destination {
                name: name.clone(),
                sink: sink.clone(),
                outbox: self.outbox.clone(),
                relay,
                options: self.options,
                counters: counters.clone(),
                stop: stop.clone(),
            };
            tasks.spawn(async move { destination.run().await });
        }
        let mut ended = tokio::select! {
            biased;
            Some(ended) = tasks.join_next() => result(ended),
            () = self.shutdown => Ok(()),
        };
        stop.cancel();
        let drained = timeout(self.options.drain_timeout, async {
            while let Some(next) = tasks.join_next().await {
                let next = result(next);
                ended = std::mem::replace(&mut ended, Ok(())).and(next);
            }
        });
        if drained.await.is_err() {
            tracing::warn!(
                outbox = self.outbox.name(),
                "drain timed out; what was not settled is published again"
            );
            tasks.abort_all();
        }
        close(&self.outbox, relay, &self.destinations).await;
        ended.map(|()| counters.report())
    }

    fn check(&self) -> Result<(), Error> {
        if self.destinations.is_empty() {
            return Err(Error::config(
                "the relay has no destination: give it one with to(…)",
            ));
        }
        let mut known = HashSet::new();
        match self
            .destinations
            .iter()
            .find(|(name, _)| !known.insert(name))
        {
            Some((twice, _)) => Err(Error::config(format!(
                "the relay has two sinks for the destination {twice}"
            ))),
            None => Ok(()),
        }
    }
}

fn result(ended: Result<Result<(), Error>, tokio::task::JoinError>) -> Result<(), Error> {
    ended.unwrap_or_else(|cause| {
        let error = Error::new(ErrorKind::Other, "a sink or the outbox panicked");
        Err(error.caused_by(cause))
    })
}

/// Gives up all leases and closes all sinks, side by side.
async fn close(outbox: &Arc<dyn Outbox>, relay: Owner, destinations: &[(String, Arc<dyn Sink>)]) {
    let mut tasks = JoinSet::new();
    for (name, sink) in destinations {
        let (name, sink, outbox) = (name.clone(), sink.clone(), outbox.clone());
        tasks.spawn(async move {
            // If it fails, the lease ends by itself.
            let _ = timeout(RELEASE, outbox.release(relay, &name)).await;
            if let Err(error) = closed_in_time(sink.name(), sink.close()).await {
                tracing::warn!(destination = name, %error, "not closed");
            }
        });
    }
    while tasks.join_next().await.is_some() {}
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.destinations.iter().map(|(name, _)| name);
        f.debug_struct("Relay")
            .field("outbox", &self.outbox.name())
            .field("destinations", &names.collect::<Vec<_>>())
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
