use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Receipt;
use crate::Message;

/// The broker's promise not to give a delivery to anyone else for now.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Lease {
    /// When it ends, on the local monotonic clock, counted from *before* the request that began it.
    /// `None`: it has no end of its own.
    pub until: Option<Instant>,
    /// Cancelled when the source learns that the lease is gone (a channel that died, a session lock that was lost,
    /// a log that goes back and will deliver the message again).
    pub lost: Option<CancellationToken>,
    /// Cancelled when the lease will soon be taken away: a partition that is assigned to another consumer, a session that must
    /// close. What runs may finish and be settled until then; nothing else starts, and the rest is given back. The
    /// source delivers nothing more under this lease.
    pub revoked: Option<CancellationToken>,
    /// Deliveries with the same number here have one lease: all messages of a session, of a partition. It is extended once for
    /// all of them, by the receipt of any.
    pub shared: Option<u64>,
}

impl Lease {
    /// A lease that ends at `until` and no sooner.
    #[must_use]
    pub fn until(until: Instant) -> Self {
        Self {
            until: Some(until),
            ..Self::default()
        }
    }

    /// Ties the lease to something that can die earlier.
    #[must_use]
    pub fn tied_to(mut self, lost: CancellationToken) -> Self {
        self.lost = Some(lost);
        self
    }

    /// Tells by `notice` that the lease will soon be taken away.
    #[must_use]
    pub fn revoked_by(mut self, notice: CancellationToken) -> Self {
        self.revoked = Some(notice);
        self
    }

    /// Shares it with all deliveries of this number.
    #[must_use]
    pub fn shared_as(mut self, number: u64) -> Self {
        self.shared = Some(number);
        self
    }
}

/// One delivery of a message, under a lease.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Delivery {
    /// What was delivered.
    pub message: Arc<Message>,
    /// How to settle it.
    pub receipt: Receipt,
    /// How long it is ours.
    pub lease: Lease,
    /// Which delivery of this message this is, from 1, where the broker counts.
    pub attempt: Option<u32>,
    /// Whether the broker knows that it has not delivered it before.
    pub is_first: bool,
    /// Why the adapter could not read it whole (a header of an unknown form, say). The pipeline dead-letters such a
    /// delivery with this reason.
    pub malformed: Option<String>,
}

impl Delivery {
    /// A delivery with no count.
    pub fn new(message: Message, receipt: Receipt, lease: Lease) -> Self {
        Self {
            message: Arc::new(message),
            receipt,
            lease,
            attempt: None,
            is_first: false,
            malformed: None,
        }
    }

    /// Sets [`attempt`](Self::attempt), and with it [`is_first`](Self::is_first).
    #[must_use]
    pub fn with_attempt(mut self, attempt: u32) -> Self {
        self.attempt = Some(attempt);
        self.is_first = attempt <= 1;
        self
    }

    /// Sets [`malformed`](Self::malformed).
    #[must_use]
    pub fn with_malformed(mut self, reason: impl Into<String>) -> Self {
        self.malformed = Some(reason.into());
        self
    }
}
