//! Runs that may have had their effect, and what somebody decided about them.
//!
//! A dead letter whose doubt stays in the store has the doubt's claim at the end of its reason. Whoever puts it back as it is
//! has decided that the message runs in spite of that doubt. A later doubt has another claim, so it is not decided with it.

use crate::Message;
use crate::attributes::DEAD_LETTER_REASON;
use crate::driver::Starts;

use super::engine::Engine;
use super::in_flight::InFlight;

impl<Tx: Send + 'static> Engine<Tx> {
    /// Whether the store is to remember the runs that have not ended, when the message is given back.
    pub(crate) fn keeps_doubt(&self, in_flight: &InFlight) -> bool {
        in_flight.in_doubt.is_some() && (self.quarantines() || self.is_suspect(in_flight))
    }

    /// Out of its queue, only quarantine still asks whether it may have had its effect. Otherwise a redrive begins anew.
    pub(crate) fn drop_doubt(&self, in_flight: &mut InFlight) {
        if !self.quarantines() {
            in_flight.in_doubt = None;
        }
    }

    /// The reason of a dead letter, with the doubt that stays.
    pub(crate) fn with_doubt(&self, in_flight: &InFlight, reason: String) -> String {
        match in_flight.in_doubt {
            Some(starts) if self.quarantines() && !reason.ends_with(&mark(starts)) => {
                reason + &mark(starts)
            }
            _ => reason,
        }
    }
}

impl InFlight {
    /// Its present run may have had its effect.
    pub(crate) fn doubt(&mut self) {
        if let Some(held) = self.lease.held() {
            self.in_doubt = Some(Starts::with(self.in_doubt, held.token));
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
