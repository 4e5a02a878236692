//! Which run of a message is which attempt.

use super::engine::Engine;
use super::in_flight::InFlight;

impl<Tx> Engine<Tx> {
    /// Settles which attempt the next run is. Only when it is about to begin: an earlier delivery may have ended after this
    /// one came.
    pub(crate) fn number(&self, in_flight: &mut InFlight) {
        let delivery = (in_flight.seq, in_flight.delivery.attempt);
        let before = in_flight.id().map(|id| self.attempts.before(id, delivery));
        in_flight.before = before.unwrap_or_default();
    }

    /// A run begins.
    pub(crate) fn begin(&self, in_flight: &mut InFlight) {
        self.number(in_flight);
        in_flight.begun = true;
        // The first run counts as its delivery, whatever becomes of it.
        if in_flight.retries > 0 {
            self.record(in_flight);
        }
    }

    /// Records the runs for a later delivery. A lease can end, and the message be delivered again, long before this
    /// delivery is at its end here; so they are recorded as they are made, and not again when another has followed.
    pub(crate) fn record(&self, in_flight: &mut InFlight) {
        let runs = in_flight.runs();
        if let Some(id) = in_flight.id()
            && in_flight.recorded != Some(runs)
        {
            let delivery = (in_flight.seq, in_flight.delivery.attempt);
            self.attempts.record(id, delivery, runs);
            in_flight.recorded = Some(runs);
        }
    }
}
