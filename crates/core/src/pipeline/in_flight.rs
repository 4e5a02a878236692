use std::sync::Arc;

use crate::driver::{Claim, Delivery, HeldClaim, Printable, Starts, Token};
use crate::{DedupKey, Error, Outcome};

use super::attempts::Before;
use super::budget::Permit;
use super::keys::KeyPlace;
use super::lanes::LaneLock;
use super::lease_renewer::Renewal;
use super::lease_state::LeaseState;

/// What a worker is to do with a message.
pub(crate) enum Next {
    /// Run it. There may have been runs before, of this worker or another, that had the effect.
    Run { in_doubt: Option<Starts> },
    /// It took effect before: hand its outcome to `on_duplicate`.
    Replay(Outcome),
    /// Put it into the dead-letter queue, for this reason. That may have been tried before.
    DeadLetter {
        reason: String,
        in_doubt: Option<Starts>,
    },
}

/// A delivery on its way through the pipeline. Whatever it holds is given up when it is dropped: its share of the
/// budget, its lane, its key, its place with the lease renewer.
pub(crate) struct InFlight {
    /// Its place in the order of arrival.
    pub(crate) seq: u64,
    pub(crate) delivery: Delivery,
    pub(crate) key: Option<DedupKey>,
    pub(crate) claim: Option<Claim>,
    /// To look its key up is not enough: somebody has claimed it.
    pub(crate) must_claim: bool,
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
    /// How often another transaction was in its way.
    pub(crate) conflicts: u32,
    /// Claims that the store may have marked as started, and under which no run of it was cut off here.
    pub(crate) marked_in_vain: Vec<Token>,
    /// The claim that is marked so in vain, to be released if another worker may get the message.
    pub(crate) marked: Option<HeldClaim>,
    pub(crate) next: Next,
    pub(crate) lease: Arc<LeaseState>,
    pub(crate) lane: Option<LaneLock>,
    pub(crate) key_place: Option<KeyPlace<Box<InFlight>>>,
    pub(crate) _renewal: Option<Renewal>,
    pub(crate) permit: Permit,
}

/// How often a settlement whose result stays unknown is sent, at most.
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

    /// Whether its key has to be claimed or looked up before a worker can take it. A worker gives back what has no lease any
    /// more.
    pub(crate) fn needs_claim(&self) -> bool {
        self.is_to_run() && self.lease.precondition().is_none() && self.lease.leased()
    }

    pub(crate) fn is_to_run(&self) -> bool {
        matches!(self.next, Next::Run { .. })
    }

    /// The runs that may have had the effect, of this worker or another.
    pub(crate) fn in_doubt(&self) -> Option<Starts> {
        match self.next {
            Next::Run { in_doubt } | Next::DeadLetter { in_doubt, .. } => in_doubt,
            Next::Replay(_) => None,
        }
    }

    /// What is to be done now; from here on it is to be run, if nothing else is said.
    pub(crate) fn take_next(&mut self) -> Next {
        let in_doubt = self.in_doubt();
        std::mem::replace(&mut self.next, Next::Run { in_doubt })
    }

    /// It belongs into the dead-letter queue.
    pub(crate) fn set_dead_letter(&mut self, reason: impl Into<String>) {
        self.next = Next::DeadLetter {
            reason: reason.into(),
            in_doubt: self.in_doubt(),
        };
    }

    /// Its present run may have had its effect.
    pub(crate) fn doubt(&mut self) {
        if let Some(held) = self.lease.held() {
            let in_doubt = Some(Starts::with(self.in_doubt(), held.token));
            self.next = Next::Run { in_doubt };
        }
    }

    /// It is no longer the one of its group that goes on: the next is.
    pub(crate) fn leave_lane(&mut self) {
        self.lane = None;
    }

    /// The next delivery of its key may claim it.
    pub(crate) fn leave_key(&mut self) {
        self.key_place = None;
    }

    pub(crate) fn label(&self) -> Printable<&str> {
        self.delivery.message.label()
    }
}
