//! Runs that may have had their effect, and what somebody decided about them.
//!
//! A dead letter whose doubt stays in the store has the doubt's claim at the end of its reason. Whoever puts it back as it is
//! has decided that the message runs in spite of that doubt. A later doubt has another claim, so it is not decided with it.

use crate::Message;
use crate::attributes::DEAD_LETTER_REASON;
use crate::driver::{HeldClaim, Starts};

use super::engine::Engine;
use super::in_flight::{InFlight, Next};

impl<Tx: Send + 'static> Engine<Tx> {
    /// Whether the store is to remember the runs that have not ended, when the message is given back.
    pub(crate) fn keeps_doubt(&self, in_flight: &InFlight) -> bool {
        in_flight.in_doubt().is_some() && (self.quarantines() || self.is_suspect(in_flight))
    }

    /// Out of its queue, only quarantine still asks whether it may have had its effect. Otherwise a redrive begins anew.
    pub(crate) fn drop_doubt(&self, in_flight: &mut InFlight) {
        if !self.quarantines() {
            in_flight.next = Next::Run { in_doubt: None };
        }
    }

    /// The reason of a dead letter, with the doubt that stays.
    pub(crate) fn with_doubt(&self, in_flight: &InFlight, reason: String) -> String {
        match in_flight.in_doubt() {
            Some(starts) if self.quarantines() && !reason.ends_with(&mark(starts)) => {
                reason + &mark(starts)
            }
            _ => reason,
        }
    }

    /// Gives claims up. A claim that cannot be released ends by itself, and one in doubt is left to: releasing it would
    /// release the doubt.
    pub(crate) async fn release(&self, messages: impl Iterator<Item = &Box<InFlight>>) {
        let held: Vec<HeldClaim> = messages
            .filter_map(|in_flight| {
                let held = in_flight.lease.forget_claim().or(in_flight.marked);
                held.filter(|_| !self.keeps_doubt(in_flight))
            })
            .collect();
        if let Some(store) = self.store.as_ref().filter(|_| !held.is_empty())
            && let Err(error) = self.within(store.release(&held)).await
        {
            tracing::warn!(queue = &*self.queue, %error, "claims not released; they end by themselves");
        }
    }
}

/// Whether the message was set aside for this doubt, and put back.
pub(crate) fn is_decided(message: &Message, starts: Starts) -> bool {
    let reason = message.attributes.get(DEAD_LETTER_REASON);
    reason.is_some_and(|reason| reason.ends_with(&mark(starts)))
}

fn mark(starts: Starts) -> String {
    format!(" (claim {})", starts.last.0)
}
