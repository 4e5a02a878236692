//! The store: one record per key, claims under a token, a verdict for each call.

use super::protocol::{Mistake, Protocol};
use super::state::{At, Flight, Record, State};

/// What the store says to a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claimed {
    New { uncertain: bool },
    Done,
    Busy,
}

/// What it says to calls that carry a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    Fenced,
}

impl Protocol {
    pub fn claimed(&self, state: &State, flight: Flight) -> Claimed {
        match state.records[self.keys[flight.message]] {
            Record::Done => Claimed::Done,
            // A live claim of the same owner is one whose answer was lost.
            Record::Claimed { live: true, .. } if !flight.newest_token => Claimed::Busy,
            Record::Claimed { started, .. } => Claimed::New { uncertain: started },
            Record::Absent => Claimed::New { uncertain: false },
        }
    }

    /// Gives the key to this flight, under a token newer than every other.
    pub fn take(&self, state: &mut State, at: At) {
        let Some(flight) = state.flight(at) else {
            return;
        };
        let key = self.keys[flight.message];
        match self.mistake {
            Some(Mistake::MarkBeforeProcessing) => state.records[key] = Record::Done,
            Some(Mistake::MarkAfterProcessing) => {}
            _ => {
                let started = matches!(state.records[key], Record::Claimed { started: true, .. });
                state.records[key] = Record::Claimed {
                    live: true,
                    started,
                };
            }
        }
        self.fence_all(state, key);
        if let Some(flight) = state.flight_mut(at) {
            flight.newest_token = true;
        }
    }

    /// Whether the flight's token is still the newest.
    pub fn verdict(&self, flight: Flight) -> Verdict {
        match flight.newest_token {
            true => Verdict::Ok,
            false => Verdict::Fenced,
        }
    }

    /// Whether the store records a completion: under the newest token, expired or not.
    pub fn completion(&self, flight: Flight) -> Verdict {
        match self.mistake {
            Some(Mistake::ClaimWithoutToken | Mistake::MarkAfterProcessing) => Verdict::Ok,
            _ => self.verdict(flight),
        }
    }

    /// Turns the claim into a record; in a transaction, together with the effect.
    pub fn complete(&self, state: &mut State, at: At) {
        let Some(flight) = state.flight(at) else {
            return;
        };
        let key = self.keys[flight.message];
        state.fenced_commit |= !flight.newest_token;
        state.records[key] = Record::Done;
        self.fence_all(state, key);
        if self.mode.is_transactional() {
            state.took_effect(key);
        }
    }

    pub fn mark_started(&self, state: &mut State, at: At) {
        let Some(flight) = state.flight(at) else {
            return;
        };
        if let Record::Claimed { started, .. } = &mut state.records[self.keys[flight.message]] {
            *started = true;
        }
    }

    pub fn release(&self, state: &mut State, at: At) {
        let Some(flight) = state.flight(at).filter(|f| f.newest_token) else {
            return;
        };
        let key = self.keys[flight.message];
        state.records[key] = Record::Absent;
        self.fence_all(state, key);
    }

    /// The claim has expired, or lasts again.
    pub fn set_live(&self, state: &mut State, key: usize, now: bool) {
        if let Record::Claimed { live, .. } = &mut state.records[key] {
            *live = now;
        }
    }

    /// Removes the record, a claim or not; tokens stay monotonic.
    pub fn forget(&self, state: &mut State, key: usize) {
        state.records[key] = Record::Absent;
        self.fence_all(state, key);
    }

    /// Whether lease and claim last, as far as there are any.
    pub fn lasts(&self, state: &State, flight: Flight) -> bool {
        let key = self.keys[flight.message];
        let claimed =
            flight.newest_token && matches!(state.records[key], Record::Claimed { live: true, .. });
        state.leased(flight) && (claimed || !self.claims())
    }

    fn fence_all(&self, state: &mut State, key: usize) {
        for flight in state.all_flights_mut() {
            if self.keys[flight.message] == key {
                flight.newest_token = false;
            }
        }
    }

    /// Whether a live claim has nobody left who could renew it.
    pub fn is_orphan(&self, state: &State, key: usize) -> bool {
        let owns = |f: Flight| self.keys[f.message] == key && f.newest_token;
        let live = matches!(state.records[key], Record::Claimed { live: true, .. });
        live && !state.flights().any(|(_, f)| owns(f))
    }
}
