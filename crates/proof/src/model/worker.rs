//! What a worker does with the answers it gets.

use super::broker::Answer;
use super::protocol::{Mistake, Mode, Protocol};
use super::state::{Action, At, Dead, LANE, Phase, State};
use super::step::{Exchange, Then};
use super::store::{Claimed, Verdict};

impl Protocol {
    pub fn claim(&self, state: &mut State, at: At, claimed: Claimed, call: Exchange) {
        match claimed {
            Claimed::New { uncertain } => {
                self.take(state, at);
                if call == Exchange::Answered
                    && let Some(flight) = state.flight_mut(at)
                {
                    flight.uncertain = uncertain && self.mode.quarantines();
                    flight.phase = Phase::Ready;
                }
            }
            Claimed::Done => state.enter(at, Phase::Settling(Action::Ack)),
            Claimed::Busy if self.mistake == Some(Mistake::AckWhileBusy) => {
                state.enter(at, Phase::Settling(Action::Ack));
            }
            Claimed::Busy => self.give_back(state, at),
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
        let Some(flight) = state.flight(at) else {
            return;
        };
        if !self.mode.is_transactional() {
            state.took_effect(self.keys[flight.message]);
        }
        match self.mode {
            Mode::AtMostOnce => state.drop_flight(at),
            Mode::AtLeastOnce => state.enter(at, Phase::Settling(Action::Ack)),
            _ if self.mistake == Some(Mistake::MarkBeforeProcessing) => {
                state.enter(at, Phase::Settling(Action::Ack));
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
        let Some(flight) = state.flight_mut(at) else {
            return;
        };
        flight.uncertain |= self.mode.quarantines() && flight.phase != Phase::Ready;
        let flight = *flight;
        match self.mode.has_store() && state.leased(flight) {
            true => in_doubt(state, at),
            false => self.give_back(state, at),
        }
    }

    pub fn completed(&self, state: &mut State, at: At, verdict: Verdict, call: Exchange) {
        if call != Exchange::CallLost && verdict == Verdict::Ok {
            self.complete(state, at);
        }
        match (call, verdict) {
            (Exchange::Answered, Verdict::Ok) => state.enter(at, Phase::Settling(Action::Ack)),
            (Exchange::Answered, Verdict::Fenced) => self.fenced(state, at),
            _ => in_doubt(state, at),
        }
    }

    /// Somebody has taken the key over, or an earlier call had recorded it: the store is asked again whose it is. The turn
    /// stays with it, so that nothing of its group overtakes it.
    fn fenced(&self, state: &mut State, at: At) {
        match self.mistake {
            Some(Mistake::GoOnWhenFenced) => state.drop_flight(at),
            _ => in_doubt(state, at),
        }
    }

    /// The doubt stays in the store, so that neither a redelivery nor a duplicate runs.
    pub fn quarantine(&self, state: &mut State, at: At) {
        if let Some(flight) = state.flight_mut(at) {
            flight.uncertain = self.mistake != Some(Mistake::ForgetDoubt);
        }
        self.dead_letter(state, at);
    }

    pub fn dead_letter(&self, state: &mut State, at: At) {
        self.give_up(state, at);
        let phase = match self.sink {
            true => Phase::DeadLettering,
            false => self.then_settle(Action::DeadLetter),
        };
        state.enter(at, phase);
    }

    pub fn publish(&self, state: &mut State, at: At, call: Exchange) {
        let Some(flight) = state.flight(at) else {
            return;
        };
        if call != Exchange::CallLost {
            state.dead[self.keys[flight.message]] = Dead::Confirmed;
        }
        match self.mode {
            _ if call == Exchange::AnswerLost => {}
            Mode::AtMostOnce => state.drop_flight(at),
            _ => state.enter(at, self.then_settle(Action::Ack)),
        }
    }

    /// Gives a message back, and with it all that waits behind it: they must not overtake it.
    fn give_back(&self, state: &mut State, at: At) {
        let phase = self.then_settle(Action::Nack);
        state.enter(at, phase);
        if self.mistake == Some(Mistake::GiveBackAlone) {
            return;
        }
        for place in at.place + 1..LANE {
            let behind = At { place, ..at };
            if state.flight(behind).is_some_and(|f| !f.phase.is_leaving()) {
                state.enter(behind, phase);
            }
        }
    }

    pub fn released(&self, state: &mut State, at: At, verdict: Verdict, call: Exchange) {
        let Some(flight) = state.flight(at) else {
            return;
        };
        let Phase::Releasing(action) = flight.phase else {
            return;
        };
        // Releasing a claim in doubt would release the doubt.
        if call == Exchange::Answered && verdict == Verdict::Ok && !flight.uncertain {
            self.release(state, at);
        }
        if let Some(flight) = state.flight_mut(at) {
            flight.newest_token = false;
            flight.phase = Phase::Settling(action);
        }
    }

    pub fn settled(&self, state: &mut State, at: At, answer: Answer, call: Exchange) {
        let Some(flight) = state.flight(at) else {
            return;
        };
        let confirming = flight.phase == Phase::Confirming;
        let action = match flight.phase {
            Phase::Settling(action) => action,
            _ => Action::Ack,
        };
        if call != Exchange::CallLost {
            self.settle(state, at, action, answer);
        }
        match call {
            Exchange::Answered if confirming && answer == Answer::Applied => {
                state.enter(at, Phase::Ready);
            }
            // Unknown: it asks again; but before a handler starts, an ack must be known.
            Exchange::AnswerLost if !confirming => {}
            _ => state.drop_flight(at),
        }
    }
}

/// It does not know whether the store did it: it claims the key again and sees.
fn in_doubt(state: &mut State, at: At) {
    state.enter(at, Phase::Received);
}
