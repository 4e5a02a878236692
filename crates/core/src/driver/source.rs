use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use crate::Error;
use crate::driver::{Delivery, Durability, Receipt};

/// How much one [`Source::receive`] may return, and how long it may wait for the first.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ReceiveLimits {
    /// At most this many messages; at least 1.
    pub messages: usize,
    /// At most this many messages of one group: as many as can run one after another before their leases would have to be
    /// extended; at least 1, and `usize::MAX` where leases have no end. A source whose broker fills a request from one
    /// group asks for no more at once; others may ignore it.
    pub per_group: usize,
    /// Stop adding messages once their sizes reach this; the first message is returned whatever its size.
    pub bytes: usize,
    /// Return empty-handed after this long.
    pub wait: Duration,
}

impl ReceiveLimits {
    /// At most this many messages, within this time.
    #[must_use]
    pub fn new(messages: usize, wait: Duration) -> Self {
        Self {
            messages,
            per_group: usize::MAX,
            bytes: usize::MAX,
            wait,
        }
    }

    /// Sets [`bytes`](Self::bytes).
    #[must_use]
    pub fn with_bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }

    /// Sets [`per_group`](Self::per_group).
    #[must_use]
    pub fn with_per_group(mut self, per_group: usize) -> Self {
        self.per_group = per_group;
        self
    }

    /// The end of its wait, if it begins now. No wait is too long to be added.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        const CENTURY: Duration = Duration::from_secs(36_500 * 86_400);
        let now = Instant::now();
        now.checked_add(self.wait).unwrap_or(now + CENTURY)
    }

    /// Whether one more message may be added to this many messages and bytes.
    #[must_use]
    pub fn allows_more(&self, messages: usize, bytes: usize) -> bool {
        messages == 0 || (messages < self.messages && bytes < self.bytes)
    }
}

/// What to do with one delivery. A disposition that needs a capability which the source lacks is answered with a
/// non-retryable [`SettleResult::Unknown`], and nothing is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// It took effect: never deliver it again.
    Ack,
    /// Give it back; it may be delivered again once `delay` has passed.
    Nack {
        /// Zero: at once. Anything else needs [`Capabilities::delayed_nack`].
        delay: Duration,
    },
    /// Move it to the queue's own dead-letter queue; needs [`Capabilities::dead_letter`].
    DeadLetter {
        /// Why, for whoever reads the dead-letter queue.
        reason: String,
    },
}

/// One delivery and what to do with it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settlement {
    /// Which delivery.
    pub receipt: Receipt,
    /// What to do with it.
    pub disposition: Disposition,
}

impl Settlement {
    /// This is to be done with that delivery.
    #[must_use]
    pub fn new(receipt: Receipt, disposition: Disposition) -> Self {
        Self {
            receipt,
            disposition,
        }
    }
}

/// A source's answer to one settlement.
#[derive(Debug)]
pub enum SettleResult {
    /// It was done. What that means for an ack, [`Capabilities::acks`] says.
    Applied,
    /// The lease had ended; nothing was done and the message is or will be delivered again.
    LeaseLost,
    /// It may or may not have been done. Asking again is harmless while the lease lasts.
    Unknown(Error),
}

impl SettleResult {
    /// Whether it was done.
    #[must_use]
    pub fn is_applied(&self) -> bool {
        matches!(self, Self::Applied)
    }

    /// The same answer to an extension until `until`.
    #[must_use]
    pub fn extended(self, until: Instant) -> ExtendResult {
        match self {
            Self::Applied => ExtendResult::Extended(until),
            Self::LeaseLost => ExtendResult::LeaseLost,
            Self::Unknown(error) => ExtendResult::Unknown(error),
        }
    }
}

/// A source's answer to one wish to extend a lease.
#[derive(Debug)]
pub enum ExtendResult {
    /// It lasts until then, on the local monotonic clock, counted from *before* the request. The broker may have granted less
    /// than was asked for.
    Extended(Instant),
    /// It had ended; nothing was done and the message is or will be delivered again.
    LeaseLost,
    /// It may or may not have been extended. Asking again is harmless.
    Unknown(Error),
}

impl ExtendResult {
    /// Whether the lease lasts longer now.
    #[must_use]
    pub fn is_extended(&self) -> bool {
        matches!(self, Self::Extended(_))
    }
}

/// What it says, without until when.
impl From<ExtendResult> for SettleResult {
    fn from(result: ExtendResult) -> Self {
        match result {
            ExtendResult::Extended(_) => Self::Applied,
            ExtendResult::LeaseLost => Self::LeaseLost,
            ExtendResult::Unknown(error) => Self::Unknown(error),
        }
    }
}

/// Who keeps the messages of one group in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ordering {
    /// Nobody: messages have no group, or it is only a hint.
    #[default]
    None,
    /// The source delivers in order to *one* consumer at a time, but does not hold back the rest of a group while its
    /// head is out. A head that is given back with all that follows it comes back in order, but at a price: a source whose
    /// broker can do that only with everything at once gives back all that it holds. So the pipeline retries in place
    /// while the lease lasts.
    Delivery,
    /// The broker withholds a group while an earlier message of it is leased or delayed, so a head that is given back
    /// with all that follows it comes back in order.
    Group,
}

/// What is known of an ack that was [`Applied`](SettleResult::Applied).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Acks {
    /// It was handed to the connection in full, and nobody says whether it arrived.
    #[default]
    Unconfirmed,
    /// The source has noted it. The broker keeps one position for each partition (each group is in one), and everything
    /// before it counts as acked: the source moves it once all before are settled ([`AckWindow`](super::AckWindow)). What was
    /// acked beyond a gap comes again to another consumer.
    Cumulative,
    /// The broker has answered this ack by itself: it knows that this message took effect.
    Confirmed,
}

impl Acks {
    /// Whether a message whose ack was applied never comes again, as far as the broker keeps its word.
    #[must_use]
    pub fn confirms(self) -> bool {
        matches!(self, Self::Confirmed)
    }
}

/// What can and cannot be done with a queue, as the live one is. The conformance suite proves each claim, and asserts that what
/// is not claimed is missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// What an ack that is [`Applied`](SettleResult::Applied) has reached.
    pub acks: Acks,
    /// [`Source::extend`] works.
    pub extend: bool,
    /// Leases end by the clock (otherwise with the connection alone).
    pub timed_lease: bool,
    /// [`Disposition::Nack`] takes a delay.
    pub delayed_nack: bool,
    /// [`Disposition::DeadLetter`] works, with its reason: into [`QueueInfo::dead_letter`].
    pub dead_letter: bool,
    /// [`Delivery::attempt`] is filled in.
    pub counts_attempts: bool,
    /// Order within a group.
    pub ordering: Ordering,
    /// Giving back one by one costs more than giving back everything: the broker counts it twice, or loses the order. A
    /// pipeline that stops then leaves what it has not begun to [`Source::close`].
    pub close_gives_back: bool,
    /// How many settlements one request to the broker carries: the pipeline waits a moment, where others may follow, and
    /// passes on whole requests. `None`: any number.
    pub settle_batch: Option<usize>,
}

/// The live queue: what it is, what it can do and how it is set, as far as the broker lets that be read. What cannot be read is
/// believed from the configuration, and named in [`unknown`](Self::unknown).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueInfo {
    /// Which queue it is, wherever it is looked at from: the same after restarts, through every client and endpoint of one
    /// queue, different for two queues, those of one name included. Dedup keys are unique within it, so a pipeline with a
    /// store does not start without it. It never changes and holds no secret.
    pub identity: Option<String>,
    /// How long a delivery is leased.
    pub lease: Option<Duration>,
    /// How long after its publication a message can still be delivered again, a redrive from
    /// [`dead_letter`](Self::dead_letter) included, where dead letters are not kept for ever.
    pub retention: Option<Duration>,
    /// After how many deliveries the broker gives up on a message by itself.
    pub max_deliveries: Option<u32>,
    /// Why the broker can give up on a message that no handler failed, and what to set so that it does not, for people;
    /// `None` where it does not, as far as is known.
    pub gives_up: Option<String>,
    /// Where the broker puts what it gives up on; `None` where it has no such place.
    pub dead_letter: Option<String>,
    /// The queues whose dead-letter queue this is, as far as the broker tells.
    pub dead_letters_of: Vec<String>,
    /// How long the broker itself suppresses duplicates.
    pub dedup_window: Option<Duration>,
    /// What is kept of the messages whose publication was confirmed.
    pub durability: Durability,
    /// What can be done with it.
    pub capabilities: Capabilities,
    /// Other settings that decide how the queue behaves, under the broker's own names, for people.
    pub settings: Vec<(String, String)>,
    /// Settings that could not be read, each with the reason, for people.
    pub unknown: Vec<String>,
}

/// A queue to take messages from: one per broker, thin. It has no retry, dedup or batching policy of its own; the
/// pipeline has.
///
/// All methods may be called concurrently. None blocks the thread. Each tries once: the caller retries.
#[async_trait]
pub trait Source: Send + Sync + 'static {
    /// The queue's name, for logs and errors. It never changes and holds no secret.
    fn name(&self) -> &str;

    /// Waits for at least one delivery and returns what is there, within `limits`; empty after [`ReceiveLimits::wait`].
    ///
    /// Cancel safe: a delivery that was fetched for a dropped call is returned by a later call, or comes again when its
    /// lease ends. Repeating an idempotent wait after a retryable error is the caller's part.
    ///
    /// # Errors
    /// [`Closed`](crate::ErrorKind::Closed) after [`close`](Self::close); connection errors are retryable, a queue that
    /// does not exist is not. The pipeline ends with one that is not retryable, and asks again after the others.
    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error>;

    /// Settles each delivery; one answer per settlement, in the same order, whatever happens to the others. Within one
    /// group the settlements take effect as if made in the order given.
    ///
    /// What the pipeline gives back together is in one batch, last first: the head of a group with all that waits behind it.
    /// With [`Capabilities::settle_batch`] it may be in several.
    ///
    /// Idempotent. Dropping the future leaves each settlement either made or not made.
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult>;

    /// Extends leases by `lease` from now, or by what the broker grants; one answer per receipt, in the same order, each of which
    /// says until when. Without [`Capabilities::extend`] every answer is a non-retryable [`ExtendResult::Unknown`].
    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult>;

    /// Looks at the live queue. The pipeline asks once, before it receives.
    ///
    /// # Errors
    /// The queue does not exist, or may not be looked at: this ends the pipeline. Connection errors are retryable, and the
    /// pipeline asks again.
    async fn queue_info(&self) -> Result<QueueInfo, Error>;

    /// Stops receiving and gives back, in order, whatever is not settled. Every receipt is `LeaseLost` afterwards.
    /// Closing twice is harmless.
    ///
    /// # Errors
    /// The broker could not be told; the leases then end by themselves.
    async fn close(&self) -> Result<(), Error>;
}

#[async_trait]
impl<S: Source + ?Sized> Source for Arc<S> {
    fn name(&self) -> &str {
        (**self).name()
    }
    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        (**self).receive(limits).await
    }
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        (**self).settle(batch).await
    }
    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        (**self).extend(batch, lease).await
    }
    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        (**self).queue_info().await
    }
    async fn close(&self) -> Result<(), Error> {
        (**self).close().await
    }
}
