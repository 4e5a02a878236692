use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::driver::{Claim, Delivery, HeldClaim, Printable, Receipt, Starts, Token};
use crate::{DedupKey, Error, Outcome};

use super::attempts::Before;
use super::budget::Permit;
use super::keys::KeyPlace;
use super::lanes::LaneLock;
use super::lease_renewer::Renewal;

/// A delivery on its way through the pipeline. Whatever it holds is given up when it is dropped: its share of the
/// budget, its lane, its key, its place with the lease renewer.
pub(crate) struct InFlight {
    /// Its place in the order of arrival.
    pub(crate) seq: u64,
    pub(crate) delivery: Delivery,
    pub(crate) key: Option<DedupKey>,
    pub(crate) claim: Option<Claim>,
    /// Retries in place so far.
    pub(crate) retries: u32,
    /// The present attempt has begun to run: it is used up, even if it is cut off.
    pub(crate) begun: bool,
    /// What is known of the deliveries before this one.
    pub(crate) before: Before,
    /// The runs that are recorded there.
    pub(crate) recorded: Option<u32>,
    /// Settlements of it whose result is not known.
    pub(crate) unsettled: u32,
    /// The broker has confirmed its ack.
    pub(crate) acked: bool,
    /// How many claims before its own have expired.
    pub(crate) takeovers: u32,
    /// It shares no transaction and no commit: it has failed before, or a commit that it shared was refused.
    pub(crate) alone: bool,
    /// The runs that may have produced the effect, of this worker or another.
    pub(crate) in_doubt: Option<Starts>,
    /// Claims that the store may have marked as started, and under which no run of it was cut off here.
    pub(crate) marked_in_vain: Vec<Token>,
    /// The claim that is marked so in vain, to be released if another worker may get the message.
    pub(crate) marked: Option<HeldClaim>,
    /// It took effect before, with this outcome.
    pub(crate) replay: Option<Outcome>,
    /// It belongs into the dead-letter queue, for this reason, and could not be put there yet.
    pub(crate) doomed: Option<String>,
    pub(crate) lease: Arc<LeaseState>,
    pub(crate) lane: Option<LaneLock>,
    pub(crate) key_place: Option<KeyPlace>,
    pub(crate) _renewal: Option<Renewal>,
    pub(crate) permit: Permit,
}

/// A settlement whose result stays unknown is sent at most so many times.
const TRIES: u32 = 5;

impl InFlight {
    /// Which attempt the present run is, or the next, from 1.
    pub(crate) fn attempt(&self) -> u32 {
        let deliveries = i64::from(self.count()).saturating_add(self.before.more);
        let attempt = deliveries.saturating_add(i64::from(self.retries)).max(1);
        u32::try_from(attempt).unwrap_or(u32::MAX)
    }

    /// How many deliveries the broker has counted. Where it does not count, the store knows from how many workers the message
    /// was taken over.
    pub(crate) fn count(&self) -> u32 {
        let counted = self.delivery.attempt;
        counted.unwrap_or_else(|| self.takeovers.saturating_add(1))
    }

    /// The attempts that were made in this delivery.
    pub(crate) fn runs(&self) -> u32 {
        self.retries.saturating_add(u32::from(self.begun))
    }

    /// The runs before the present one that this worker knows of.
    pub(crate) fn known_runs(&self) -> u32 {
        self.before.runs.saturating_add(self.retries)
    }

    /// What a later delivery of this message is known by: the broker's id, or where it gives none the producer's, which
    /// other messages may have too.
    pub(crate) fn id(&self) -> Option<&str> {
        let message = &self.delivery.message;
        message.broker_id.as_deref().or(message.dedup_id.as_deref())
    }

    pub(crate) fn broker_id(&self) -> Option<&str> {
        self.delivery.message.broker_id.as_deref()
    }

    /// Whether it stands in a lane behind others, or will.
    pub(crate) fn in_lane(&self) -> bool {
        self.delivery.message.group.is_some() && self.lane.is_none()
    }

    /// Whether to settle again what may not have been settled. A lease that ends by the clock brings the message back, so
    /// a few tries are enough; one that lasts as long as its connection does not.
    pub(crate) fn may_settle_again(&mut self, error: &Error) -> bool {
        self.unsettled += 1;
        error.is_retryable() && (self.unsettled < TRIES || self.delivery.lease.until.is_none())
    }

    /// Whether it needs a claim of its own before a worker can take it. A worker gives back what has no lease any more.
    pub(crate) fn needs_claim(&self) -> bool {
        let claimed = self.lease.held().is_some() || self.replay.is_some();
        !claimed && self.doomed.is_none() && self.lease.leased()
    }

    pub(crate) fn label(&self) -> Printable<&str> {
        self.delivery.message.label()
    }
}

/// How long a delivery and its claim are ours, on the local monotonic clock.
pub(crate) struct LeaseState {
    pub(crate) receipt: Receipt,
    lost: Option<CancellationToken>,
    revoked: Option<CancellationToken>,
    /// Which others have the same lease.
    pub(crate) shared: Option<u64>,
    deadlines: Mutex<Deadlines>,
    changed: Notify,
}

#[derive(Clone, Copy)]
struct Deadlines {
    source: Option<Instant>,
    /// For how long the lease was given, when the delivery came or by its last extension.
    length: Option<Duration>,
    claim: Option<(HeldClaim, Instant)>,
}

impl LeaseState {
    pub(crate) fn of(delivery: &Delivery) -> Arc<Self> {
        let until = delivery.lease.until;
        Arc::new(Self {
            receipt: delivery.receipt.clone(),
            lost: delivery.lease.lost.clone(),
            revoked: delivery.lease.revoked.clone(),
            shared: delivery.lease.shared,
            deadlines: Mutex::new(Deadlines {
                source: until,
                length: until.map(|until| until.saturating_duration_since(Instant::now())),
                claim: None,
            }),
            changed: Notify::new(),
        })
    }

    fn deadlines(&self) -> MutexGuard<'_, Deadlines> {
        self.deadlines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn held(&self) -> Option<HeldClaim> {
        self.deadlines().claim.map(|(held, _)| held)
    }

    pub(crate) fn claimed(&self, held: HeldClaim, until: Instant) {
        self.deadlines().claim = Some((held, until));
    }

    /// Forgets the claim and returns it.
    pub(crate) fn unclaim(&self) -> Option<HeldClaim> {
        self.deadlines().claim.take().map(|(held, _)| held)
    }

    /// The lease at the broker now ends at `until`, or has ended.
    pub(crate) fn extended(&self, until: Instant) {
        let mut deadlines = self.deadlines();
        deadlines.source = Some(until);
        deadlines.length = Some(until.saturating_duration_since(Instant::now()));
        drop(deadlines);
        self.changed.notify_waiters();
    }

    /// The claim `held` now ends at `until`, or has ended.
    pub(crate) fn renewed(&self, held: HeldClaim, until: Instant) {
        let mut deadlines = self.deadlines();
        if let Some((current, deadline)) = &mut deadlines.claim
            && *current == held
        {
            *deadline = until;
        }
        drop(deadlines);
        self.changed.notify_waiters();
    }

    /// When the lease at the broker ends and for how long it was given, for the lease renewer.
    pub(crate) fn source_deadline(&self) -> Option<(Instant, Duration)> {
        let Deadlines { source, length, .. } = *self.deadlines();
        source.zip(length)
    }

    /// The claim and when it ends, for the renewer.
    pub(crate) fn claim_deadline(&self) -> Option<(HeldClaim, Instant)> {
        self.deadlines().claim
    }

    /// Whether what the lease was tied to has died.
    pub(crate) fn connection_is_lost(&self) -> bool {
        is_cancelled(self.lost.as_ref())
    }

    /// Whether the broker may still be told anything about this delivery.
    pub(crate) fn leased(&self) -> bool {
        !self.connection_is_lost() && self.deadlines().source.is_none_or(|d| d > Instant::now())
    }

    fn deadline(&self) -> Option<Instant> {
        let Deadlines { source, claim, .. } = *self.deadlines();
        match (source, claim.map(|(_, until)| until)) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Whether lease and claim are both still ours.
    pub(crate) fn lasts(&self) -> bool {
        self.leased() && self.claim_lasts(Duration::ZERO)
    }

    fn length(&self) -> Duration {
        self.deadlines().length.unwrap_or_default()
    }

    /// Whether the lease lasts for `more`.
    pub(crate) fn lease_lasts(&self, more: Duration) -> bool {
        let until = self.deadlines().source;
        self.leased() && until.is_none_or(|d| d > Instant::now() + more)
    }

    /// For how long it can wait and still be run and settled in time, by a clock that is slow too: until half of the lease is left.
    pub(crate) fn spare(&self) -> Duration {
        let Some((until, length)) = self.source_deadline().filter(|_| self.leased()) else {
            return Duration::ZERO;
        };
        let left = until.saturating_duration_since(Instant::now());
        left.saturating_sub(length / 2)
    }

    fn claim_lasts(&self, more: Duration) -> bool {
        let claim = self.deadlines().claim;
        claim.is_none_or(|(_, until)| until > Instant::now() + more)
    }

    /// Whether there is enough left to start a handler: an eighth of the lease, and of the claim.
    pub(crate) fn can_start(&self, claim_lease: Duration) -> bool {
        self.can_start_again() && self.claim_lasts(claim_lease / 8)
    }

    /// Whether there will be, once it is claimed again.
    pub(crate) fn can_start_again(&self) -> bool {
        !is_cancelled(self.revoked.as_ref()) && self.lease_lasts(self.length() / 8)
    }

    /// Resolves when lease or claim has ended without having been renewed.
    pub(crate) async fn ended(&self) {
        loop {
            let changed = self.changed.notified();
            let deadline = self.deadline();
            if deadline.is_some_and(|d| d <= Instant::now()) {
                return;
            }
            tokio::select! {
                biased;
                () = changed => {}
                () = sleep_until_some(deadline) => {}
                () = cancelled(self.lost.as_ref()) => return,
            }
        }
    }
}

fn is_cancelled(token: Option<&CancellationToken>) -> bool {
    token.is_some_and(CancellationToken::is_cancelled)
}

async fn sleep_until_some(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn cancelled(token: Option<&CancellationToken>) {
    match token {
        Some(token) => token.cancelled().await,
        None => std::future::pending().await,
    }
}
