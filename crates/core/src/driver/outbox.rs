use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use crate::driver::{Owner, Transaction, Verdicts};
use crate::{Error, Message};

/// Names one message in an [`Outbox`]. It is given when the message is written, and no other message ever has it. As text it
/// is a UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OutgoingId(pub u128);

impl OutgoingId {
    /// A new id, from the system's random numbers: 122 bits of them, so that no two processes ever give the same.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4().as_u128())
    }
}

impl fmt::Display for OutgoingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Uuid::from_u128(self.0).fmt(f)
    }
}

impl FromStr for OutgoingId {
    type Err = Error;

    /// Reads a UUID.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config): it is none.
    fn from_str(text: &str) -> Result<Self, Error> {
        Uuid::parse_str(text)
            .map(|id| Self(id.as_u128()))
            .map_err(|error| Error::config("not the id of an outgoing message").caused_by(error))
    }
}

/// A message in an [`Outbox`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outgoing {
    /// Its name, the same however often it is fetched.
    pub id: OutgoingId,
    /// What was written: payload, attributes, dedup id and group, as they were given.
    pub message: Message,
    /// How often it has [failed](OutboxDisposition::Failed) by itself.
    pub attempts: u32,
}

impl Outgoing {
    /// This message under this id, which has failed so often.
    #[must_use]
    pub fn new(id: OutgoingId, message: Message, attempts: u32) -> Self {
        Self {
            id,
            message,
            attempts,
        }
    }

    /// What is published: the message, whose dedup id is its own or else its [id](Self::id). So it is the same however often
    /// publishing is repeated, and the next consumer knows the repetition.
    #[must_use]
    pub fn to_publish(&self) -> Message {
        let mut message = self.message.clone();
        if message.dedup_id.is_none() {
            message.dedup_id = Some(self.id.to_string());
        }
        message
    }
}

/// What a relay asks of an [`Outbox`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Fetch {
    /// Who asks.
    pub relay: Owner,
    /// For how long it leases the destination, from when the store answers.
    pub lease: Duration,
    /// At most this many messages; at least 1.
    pub messages: usize,
    /// Stop adding messages once their sizes reach this; the first message is returned whatever its size.
    pub bytes: usize,
    /// Whether what stands behind a message that was set aside waits for it, within its group. Otherwise the group goes on.
    pub waits_for_set_aside: bool,
}

impl Fetch {
    /// By this relay, at most this many messages, under a lease of the destination.
    #[must_use]
    pub fn new(relay: Owner, messages: usize, lease: Duration) -> Self {
        Self {
            relay,
            lease,
            messages,
            bytes: usize::MAX,
            waits_for_set_aside: false,
        }
    }

    /// Sets [`bytes`](Self::bytes).
    #[must_use]
    pub fn with_bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }

    /// Sets [`waits_for_set_aside`](Self::waits_for_set_aside).
    #[must_use]
    pub fn waiting_for_set_aside(mut self, waits: bool) -> Self {
        self.waits_for_set_aside = waits;
        self
    }

    /// Whether one more message may be added to this many messages and bytes.
    #[must_use]
    pub fn allows_more(&self, messages: usize, bytes: usize) -> bool {
        messages == 0 || (messages < self.messages && bytes < self.bytes)
    }
}

/// The outbox's answer to a [`Fetch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FetchResult {
    /// The destination is leased to the relay that asked.
    Fetched {
        /// What may be published now, in the order in which it was written. May be empty.
        messages: Vec<Outgoing>,
        /// When the first of those that are delayed may be published; `None`: none is, or the store does not tell.
        ready_in: Option<Duration>,
        /// Stands for all that was committed before this answer: for [`Outbox::wait`].
        mark: u64,
    },
    /// Another relay has the destination.
    Busy {
        /// The rest of its lease, by the store's clock.
        retry_in: Duration,
    },
}

/// What became of a message that was fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutboxDisposition {
    /// The queue has confirmed it: it is removed.
    Sent,
    /// It was not taken, for reasons of its own. The failure is counted and the message delayed; until then, nothing of its
    /// group that stands behind it is fetched.
    Failed {
        /// Why, for people. A store that people can look into keeps it.
        reason: String,
        /// For how long it is delayed, from when the store answers.
        retry_in: Duration,
    },
    /// Nobody tries again: it stays in the outbox with its reason, until it is [requeued](Outbox::requeue).
    SetAside {
        /// Why, for people.
        reason: String,
    },
}

/// A message that was fetched, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OutboxSettlement {
    /// Which message.
    pub id: OutgoingId,
    /// What became of it.
    pub disposition: OutboxDisposition,
}

impl OutboxSettlement {
    /// This became of that message.
    #[must_use]
    pub fn new(id: OutgoingId, disposition: OutboxDisposition) -> Self {
        Self { id, disposition }
    }
}

/// A message that was set aside.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SetAside {
    /// The message.
    pub outgoing: Outgoing,
    /// Why.
    pub reason: String,
}

impl SetAside {
    /// This message, for this reason.
    #[must_use]
    pub fn new(outgoing: Outgoing, reason: impl Into<String>) -> Self {
        Self {
            outgoing,
            reason: reason.into(),
        }
    }
}

/// Messages that were committed together with an effect and are to be published: where they wait for a
/// [`Relay`](crate::Relay).
///
/// They are written through a transaction of the store ([`OutboxTransaction::publish`]), so they are here if and only if what was
/// done with it stayed. Each has a *destination*, a name of the user's choice that a relay maps to a
/// [`Sink`](crate::driver::Sink). Order is kept for messages of one destination and group.
///
/// # Order
///
/// Messages of a destination are ordered by a number that each is given when it is *written*, not when it is committed. So one may
/// become visible behind others with higher numbers. `fetch` looks for messages, not for numbers beyond the last one:
/// whenever a message becomes visible, it is found. What depends on an earlier message, because its transaction saw that one
/// committed before it wrote its own, must have the higher number (so no session takes numbers in advance) and must never be visible
/// without it, unless that one has been sent.
///
/// # Leases
///
/// One relay at a time publishes to a destination: `fetch` leases it. Leases end by the store's own clock. A lease that ended but
/// was not taken over is still held. What a relay is told by `fetch`, it may do only while its lease lasts, by its own
/// monotonic clock counted from before the call. It may still have a call to the queue under way when another takes over; then
/// both publish the same messages with the same dedup ids.
///
/// # All methods
///
/// may be called concurrently and by many processes. None blocks the thread. Each tries once: the relay retries what is
/// retryable, for as long as it takes, and ends with an error that is not. An error means that the call may or may not have been
/// applied. Each may be repeated: what was applied before is not applied twice, but for the count of a failure, and for what was
/// [requeued](Outbox::requeue) in between: that is delayed, or set aside, once more. Dropping a future leaves the call applied as a
/// whole or not at all.
#[async_trait]
pub trait Outbox: Send + Sync + 'static {
    /// The outbox's name, for logs and errors. It never changes and holds no secret.
    fn name(&self) -> &str;

    /// Leases a destination and returns the first of its messages that may be published now, in order. A relay that holds the
    /// lease already has it renewed. Nothing is changed of the messages.
    ///
    /// A message is not returned while it is delayed or set aside, nor while it stands behind one of its group that is delayed
    /// or, with [`Fetch::waits_for_set_aside`], set aside. What is blocked so takes no place among [`Fetch::messages`].
    ///
    /// All that had been committed when it was called is seen. A destination to which nothing was ever written is
    /// leased all the same, and is empty.
    ///
    /// # Errors
    /// The store cannot be reached or used.
    async fn fetch(&self, destination: &str, fetch: Fetch) -> Result<FetchResult, Error>;

    /// Says what became of messages; one verdict per entry, in the same order. The entries are treated as if they came one after
    /// another.
    ///
    /// `Sent` needs no lease: a message that the queue has confirmed is out, whoever published it, even if it was
    /// delayed or set aside meanwhile. `Failed` and `SetAside` do: they hold up a message, or give it up, which is for the one to
    /// say who publishes now. From any other relay they are [`Fenced`](crate::driver::Fenced) and change nothing. A message
    /// that is not there any more is settled, whatever is said of it.
    ///
    /// It need not be durable when it returns: what is forgotten is published again.
    ///
    /// # Errors
    /// The store cannot be reached or used.
    async fn settle(
        &self,
        relay: Owner,
        destination: &str,
        batch: &[OutboxSettlement],
    ) -> Result<Verdicts, Error>;

    /// Waits until something may have been committed for a destination, or requeued, since the [`fetch`](Self::fetch) that gave
    /// this mark began; at most for `longest`. At once if that is so already. It may return too early, and, where nobody tells of
    /// what another process commits, only after `longest`.
    ///
    /// # Errors
    /// The store cannot be reached. The relay waits by itself then.
    async fn wait(&self, destination: &str, mark: u64, longest: Duration) -> Result<(), Error>;

    /// Gives up the lease of a destination, if this relay holds it: another need not wait for its end.
    ///
    /// # Errors
    /// The store cannot be reached: the lease ends by itself.
    async fn release(&self, relay: Owner, destination: &str) -> Result<(), Error>;

    /// At most `limit` of the messages of a destination that were set aside, in order.
    ///
    /// # Errors
    /// The store cannot be reached or used.
    async fn set_aside(&self, destination: &str, limit: usize) -> Result<Vec<SetAside>, Error>;

    /// Lets messages that were set aside be published again, with no attempts made, in the place that they had; returns how
    /// many. What is not set aside is left alone.
    ///
    /// What stood behind them may have been published meanwhile, so they may come later than it.
    ///
    /// # Errors
    /// The store cannot be reached or used.
    async fn requeue(&self, destination: &str, ids: &[OutgoingId]) -> Result<usize, Error>;
}

/// A transaction whose store has an [`Outbox`].
#[async_trait]
pub trait OutboxTransaction: Transaction {
    /// Writes a message for a destination as part of the current savepoint: it is published some time after the transaction has
    /// committed, and never if it is rolled back.
    ///
    /// Of the message, payload, attributes, dedup id and group are kept. Messages that one transaction writes are ordered as they
    /// were written.
    ///
    /// # Errors
    /// Of kind [`Message`](crate::ErrorKind::Message): it is too large; nothing was written and the transaction goes on.
    /// Otherwise as anything that is done with the transaction.
    async fn publish(&mut self, destination: &str, message: Message) -> Result<OutgoingId, Error>;
}

#[async_trait]
impl<O: Outbox + ?Sized> Outbox for Arc<O> {
    fn name(&self) -> &str {
        (**self).name()
    }
    async fn fetch(&self, destination: &str, fetch: Fetch) -> Result<FetchResult, Error> {
        (**self).fetch(destination, fetch).await
    }
    async fn settle(
        &self,
        relay: Owner,
        destination: &str,
        batch: &[OutboxSettlement],
    ) -> Result<Verdicts, Error> {
        (**self).settle(relay, destination, batch).await
    }
    async fn wait(&self, destination: &str, mark: u64, longest: Duration) -> Result<(), Error> {
        (**self).wait(destination, mark, longest).await
    }
    async fn release(&self, relay: Owner, destination: &str) -> Result<(), Error> {
        (**self).release(relay, destination).await
    }
    async fn set_aside(&self, destination: &str, limit: usize) -> Result<Vec<SetAside>, Error> {
        (**self).set_aside(destination, limit).await
    }
    async fn requeue(&self, destination: &str, ids: &[OutgoingId]) -> Result<usize, Error> {
        (**self).requeue(destination, ids).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_from_its_text() {
        let id = OutgoingId::random();
        assert_eq!(id.to_string().parse::<OutgoingId>().ok(), Some(id));
        assert_ne!(OutgoingId::random(), id);
        assert!("order-1".parse::<OutgoingId>().is_err());
    }

    #[test]
    fn what_is_published_has_its_own_dedup_id_or_else_its_name() {
        let id = OutgoingId::random();
        let named = Outgoing::new(id, Message::new("x").with_dedup_id("order-1"), 0);
        assert_eq!(named.to_publish(), named.message);
        let unnamed = Outgoing::new(id, Message::new("x"), 3);
        assert_eq!(unnamed.to_publish().dedup_id, Some(id.to_string()));
    }
}
