//! The store: one record per key, claims under a token, a verdict for each call.

use super::protocol::{Mistake, Protocol};
use super::state::{At, InFlight, Phase, Record, State};

/// What the store says to a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimResult {
    Acquired { in_doubt: bool },
    Completed,
    InProgress,
}

/// What it says to calls that carry a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    Fenced,
}

impl Protocol {
    pub fn claimed(&self, state: &State, in_flight: InFlight) -> ClaimResult {
        match state.records[self.keys[in_flight.message]] {
            Record::Done => ClaimResult::Completed,
            // A live claim of the same owner is one whose answer was lost.
            Record::Claimed { live: true, .. } if !in_flight.newest_token => {
                ClaimResult::InProgress
            }
            Record::Claimed { started, .. } => ClaimResult::Acquired { in_doubt: started },
            Record::Absent => ClaimResult::Acquired { in_doubt: false },
        }
    }

    /// Gives the key to this message, under a token newer than every other.
    pub fn take(&self, state: &mut State, at: At) {
        let Some(in_flight) = state.in_flight(at) else {
            return;
        };
        let key = self.keys[in_flight.message];
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
        if let Some(in_flight) = state.in_flight_mut(at) {
            in_flight.newest_token = true;
        }
    }

    /// There is no record, and no claim.
    pub fn look_up(&self, state: &mut State, at: At) {
        if let Some(in_flight) = state.in_flight_mut(at) {
            in_flight.looked_up = true;
            in_flight.phase = Phase::Ready;
        }
    }

    /// Whether the message's token is still the newest.
    pub fn verdict(&self, in_flight: InFlight) -> Verdict {
        match in_flight.newest_token {
            true => Verdict::Ok,
            false => Verdict::Fenced,
        }
    }

    /// Whether the store records a completion: under the newest token, expired or not; or after a look-up, if there is no
    /// record yet and none can have been pruned since. Somebody else's claim does not count then: its owner finds the record.
    pub fn completion(&self, state: &State, in_flight: InFlight) -> Verdict {
        let done = state.records[self.keys[in_flight.message]] == Record::Done;
        match self.mistake {
            Some(Mistake::ClaimWithoutToken | Mistake::MarkAfterProcessing) => Verdict::Ok,
            Some(Mistake::LookOnce) if in_flight.looked_up => Verdict::Ok,
            _ if in_flight.looked_up && !done => Verdict::Ok,
            _ => self.verdict(in_flight),
        }
    }

    /// Turns the claim into a record; in a transaction, together with the effect.
    pub fn complete(&self, state: &mut State, at: At) {
        let Some(in_flight) = state.in_flight(at) else {
            return;
        };
        let key = self.keys[in_flight.message];
        let first = in_flight.looked_up && state.records[key] != Record::Done;
        state.fenced_commit |= !in_flight.newest_token && !first;
        state.records[key] = Record::Done;
        self.fence_all(state, key);
        if self.mode.is_transactional() {
            state.took_effect(key);
        }
    }

    pub fn mark_started(&self, state: &mut State, at: At) {
        let Some(in_flight) = state.in_flight(at) else {
            return;
        };
        if let Record::Claimed { started, .. } = &mut state.records[self.keys[in_flight.message]] {
            *started = true;
        }
    }

    pub fn release(&self, state: &mut State, at: At) {
        let Some(in_flight) = state.in_flight(at).filter(|f| f.newest_token) else {
            return;
        };
        let key = self.keys[in_flight.message];
        state.records[key] = Record::Absent;
        self.fence_all(state, key);
    }

    /// The claim has expired, or lasts again.
    pub fn set_live(&self, state: &mut State, key: usize, now: bool) {
        if let Record::Claimed { live, .. } = &mut state.records[key] {
            *live = now;
        }
    }

    /// Removes the record, a claim or not; tokens stay monotonic. A look-up counts for less long than any record is kept.
    pub fn forget(&self, state: &mut State, key: usize) {
        let was_done = state.records[key] == Record::Done;
        state.records[key] = Record::Absent;
        self.fence_all(state, key);
        if was_done && self.mistake != Some(Mistake::LookUpLasts) {
            let of_key = |f: &&mut InFlight| self.keys[f.message] == key;
            state
                .all_in_flight_mut()
                .filter(of_key)
                .for_each(|f| f.looked_up = false);
        }
    }

    /// Whether lease and claim last, as far as there are any.
    pub fn lasts(&self, state: &State, in_flight: InFlight) -> bool {
        let key = self.keys[in_flight.message];
        let claimed = in_flight.newest_token
            && matches!(state.records[key], Record::Claimed { live: true, .. });
        state.leased(in_flight) && (claimed || in_flight.looked_up || !self.claims())
    }

    fn fence_all(&self, state: &mut State, key: usize) {
        for in_flight in state.all_in_flight_mut() {
            if self.keys[in_flight.message] == key {
                in_flight.newest_token = false;
            }
        }
    }

    /// Whether a live claim has nobody left who could renew it.
    pub fn is_orphan(&self, state: &State, key: usize) -> bool {
        let owns = |f: InFlight| self.keys[f.message] == key && f.newest_token;
        let live = matches!(state.records[key], Record::Claimed { live: true, .. });
        live && !state.all_in_flight().any(|(_, f)| owns(f))
    }
}
