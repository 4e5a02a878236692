//! What a worker does with the answers it gets.

use super::broker::SettleResult;
use super::protocol::{Mistake, Mode, Protocol};
use super::state::{At, Dead, Disposition, LANE, Phase, State};
use super::step::{Exchange, Then};
use super::store::{ClaimResult, Verdict};

impl Protocol {
    pub fn claim(&self, state: &mut State, at: At, claimed: ClaimResult, call: Exchange) {
        match claimed {
            ClaimResult::Acquired { in_doubt } => {
                self.take(state, at);
                if call == Exchange::Answered
                    && let Some(in_flight) = state.in_flight_mut(at)
                {
                    in_flight.in_doubt = in_doubt && self.mode.quarantines();
                    in_flight.phase = Phase::Ready;
                }
            }
            ClaimResult::Completed => state.enter(at, Phase::Settling(Disposition::Ack)),
            ClaimResult::InProgress if self.mistake == Some(Mistake::AckWhileInProgress) => {
                state.enter(at, Phase::Settling(Disposition::Ack));
            }
            ClaimResult::InProgress => self.give_back(state, at),
        }
    }

    pub fn start(&self, state: &mut State, at: At, verdict: Verdict, call: Exchange) {
        if call != Exchange::CallLost && verdict == Verdict::Ok {
            self.mark_started(state, at);
        }
        match (call, verdict) {
            (Exchange::Answered, Verdict::Ok) => state.enter(at, Phase::Started),
            (Exchange::Answered, Verdict::Fenced) => self.fenced(state, at),
            _ => in_doubt(state, at),
        }
    }

    /// The handler succeeds. Outside a transaction its effect is there at once.
    pub fn run(&self, state: &mut State, at: At) {
        let Some(in_flight) = state.in_flight(at) else {
            return;
        };
        if !self.mode.is_transactional() {
            state.took_effect(self.keys[in_flight.message]);
        }
        match self.mode {
            Mode::AtMostOnce => state.drop_in_flight(at),
            Mode::AtLeastOnce => state.enter(at, Phase::Settling(Disposition::Ack)),
            _ if self.mistake == Some(Mistake::MarkBeforeProcessing) => {
                state.enter(at, Phase::Settling(Disposition::Ack));
            }
            _ => state.enter(at, Phase::Ran),
        }
    }

    pub fn fail(&self, state: &mut State, at: At, then: Then) {
        state.failures -= 1;
        match then {
            Then::RetryInPlace => state.enter(at, Phase::Ready),
            Then::GiveBack => self.give_back(state, at),
            Then::DeadLetter => self.dead_letter(state, at),
        }
    }

    /// With the lease still there it asks the store again whose the key is. A handler that had started leaves its doubt
    /// to the next owner.
    pub fn cancel(&self, state: &mut State, at: At) {
        let Some(in_flight) = state.in_flight_mut(at) else {
            return;
        };
        in_flight.in_doubt |= self.mode.quarantines() && in_flight.phase != Phase::Ready;
        let in_flight = *in_flight;
        match self.mode.has_store() && state.leased(in_flight) {
            true => in_doubt(state, at),
            false => self.give_back(state, at),
        }
    }

    pub fn completed(&self, state: &mut State, at: At, verdict: Verdict, call: Exchange) {
        if call != Exchange::CallLost && verdict == Verdict::Ok {
            self.complete(state, at);
        }
        match (call, verdict) {
            (Exchange::Answered, Verdict::Ok) => state.enter(at, Phase::Settling(Disposition::Ack)),
            (Exchange::Answered, Verdict::Fenced) => self.fenced(state, at),
            _ => in_doubt(state, at),
        }
    }

    /// Somebody has taken the key over, or an earlier call had recorded it: the store is asked again whose it is. The turn
    /// stays with it, so that nothing of its group overtakes it.
    fn fenced(&self, state: &mut State, at: At) {
        match self.mistake {
            Some(Mistake::GoOnWhenFenced) => state.drop_in_flight(at),
            _ => in_doubt(state, at),
        }
    }

    /// The doubt stays in the store, so that neither a redelivery nor a duplicate runs.
    pub fn quarantine(&self, state: &mut State, at: At) {
        if let Some(in_flight) = state.in_flight_mut(at) {
            in_flight.in_doubt = self.mistake != Some(Mistake::ForgetDoubt);
        }
        self.dead_letter(state, at);
    }

    pub fn dead_letter(&self, state: &mut State, at: At) {
        self.give_up(state, at);
        let phase = match self.sink {
            true => Phase::DeadLettering,
            false => self.then_settle(Disposition::DeadLetter),
        };
        state.enter(at, phase);
    }

    pub fn publish(&self, state: &mut State, at: At, call: Exchange) {
        let Some(in_flight) = state.in_flight(at) else {
            return;
        };
        if call != Exchange::CallLost {
            state.dead[self.keys[in_flight.message]] = Dead::Confirmed;
        }
        match self.mode {
            _ if call == Exchange::AnswerLost => {}
            Mode::AtMostOnce => state.drop_in_flight(at),
            _ => state.enter(at, self.then_settle(Disposition::Ack)),
        }
    }

    /// Gives a message back, and with it all that waits behind it: they must not overtake it.
    fn give_back(&self, state: &mut State, at: At) {
        let phase = self.then_settle(Disposition::Nack);
        state.enter(at, phase);
        if self.mistake == Some(Mistake::GiveBackAlone) {
            return;
        }
        for place in at.place + 1..LANE {
            let behind = At { place, ..at };
            if state
                .in_flight(behind)
                .is_some_and(|f| !f.phase.is_leaving())
            {
                state.enter(behind, phase);
            }
        }
    }

    pub fn released(&self, state: &mut State, at: At, verdict: Verdict, call: Exchange) {
        let Some(in_flight) = state.in_flight(at) else {
            return;
        };
        let Phase::Releasing(disposition) = in_flight.phase else {
            return;
        };
        // Releasing a claim in doubt would release the doubt.
        if call == Exchange::Answered && verdict == Verdict::Ok && !in_flight.in_doubt {
            self.release(state, at);
        }
        if let Some(in_flight) = state.in_flight_mut(at) {
            in_flight.newest_token = false;
            in_flight.phase = Phase::Settling(disposition);
        }
    }

    pub fn settled(&self, state: &mut State, at: At, answer: SettleResult, call: Exchange) {
        let Some(in_flight) = state.in_flight(at) else {
            return;
        };
        let confirming = in_flight.phase == Phase::Confirming;
        let disposition = match in_flight.phase {
            Phase::Settling(disposition) => disposition,
            _ => Disposition::Ack,
        };
        if call != Exchange::CallLost {
            self.settle(state, at, disposition, answer);
        }
        match call {
            Exchange::Answered if confirming && answer == SettleResult::Applied => {
                state.enter(at, Phase::Ready);
            }
            // Unknown: it asks again; but before a handler starts, an ack must be known.
            Exchange::AnswerLost if !confirming => {}
            _ => state.drop_in_flight(at),
        }
    }
}

/// It does not know whether the store did it: it claims the key again and sees.
fn in_doubt(state: &mut State, at: At) {
    if let Some(in_flight) = state.in_flight_mut(at) {
        in_flight.looked_up = false;
    }
    state.enter(at, Phase::Received);
}
