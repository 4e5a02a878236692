//! Every step that somebody can take.

use super::broker::{SettleResult, lease};
use super::protocol::{Mistake, Mode, Protocol};
use super::state::{At, Dead, Disposition, InFlight, Phase, Queued, Record, State};
use super::store::{ClaimResult, Verdict};

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    Answered,
    /// It was done, but the caller does not know.
    AnswerLost,
    /// It was not done, and the caller does not know.
    CallLost,
}

/// What a worker does after a handler failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    RetryInPlace,
    GiveBack,
    DeadLetter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A batch: these messages, from the first to the last.
    Receive {
        worker: usize,
        first: usize,
        last: usize,
    },
    Claim(At, ClaimResult, Exchange),
    /// There is no record, and nobody has claimed the key. What a look-up says of a record, a claim says too.
    LookUp(At),
    Renew(At),
    Start(At, Verdict, Exchange),
    Quarantine(At),
    Run(At),
    Fail(At, Then),
    /// Lease or claim has ended: the handler is dropped.
    Cancel(At),
    Complete(At, Verdict, Exchange),
    Publish(At, Exchange),
    Release(At, Verdict, Exchange),
    Settle(At, SettleResult, Exchange),
    Crash {
        worker: usize,
    },
    /// A message is leased to nobody: the delivery was lost on its way.
    LoseDelivery {
        message: usize,
    },
    ExpireLease {
        message: usize,
    },
    ExpireClaim {
        key: usize,
    },
    Prune {
        key: usize,
    },
    /// The store crashed and lost a claim, which need not be durable.
    LoseClaim {
        key: usize,
    },
}

impl Step {
    fn loses_something(self) -> bool {
        match self {
            Self::Claim(_, _, call)
            | Self::Start(_, _, call)
            | Self::Complete(_, _, call)
            | Self::Publish(_, call)
            | Self::Release(_, _, call)
            | Self::Settle(_, _, call) => call != Exchange::Answered,
            _ => false,
        }
    }
}

impl Protocol {
    pub fn steps(&self, state: &State, steps: &mut Vec<Step>) {
        for (at, in_flight) in state.all_in_flight() {
            self.in_flight_steps(state, at, in_flight, steps);
        }
        for worker in 0..self.workers {
            let batches = self.deliverable(state, worker).into_iter();
            steps.extend(batches.map(|batch| {
                let (first, last) = batch.into_inner();
                Step::Receive {
                    worker,
                    first,
                    last,
                }
            }));
            if state.crashes > 0 && state.workers[worker][0].is_some() {
                steps.push(Step::Crash { worker });
            }
        }
        self.steps_of_time(state, steps);
        steps.retain(|step| self.lossy || !step.loses_something());
    }

    /// What happens without any worker.
    fn steps_of_time(&self, state: &State, steps: &mut Vec<Step>) {
        for message in 0..self.keys.len() {
            match state.queue[message] {
                Queued::Waiting if !self.grouped => steps.push(Step::LoseDelivery { message }),
                Queued::Leased => steps.push(Step::ExpireLease { message }),
                _ => {}
            }
        }
        for key in 0..self.keys.len() {
            match state.records[key] {
                Record::Claimed { live, .. } => {
                    if live {
                        steps.push(Step::ExpireClaim { key });
                    }
                    if state.crashes > 0 && !self.mode.quarantines() {
                        steps.push(Step::LoseClaim { key });
                    }
                }
                Record::Done if self.may_prune(state, key) => steps.push(Step::Prune { key }),
                _ => {}
            }
        }
    }

    fn may_prune(&self, state: &State, key: usize) -> bool {
        let gone = |(&k, queued): (&usize, _)| k != key || queued == Queued::Gone;
        let cannot_come_again = self.keys.iter().zip(state.queue).all(gone);
        self.mistake == Some(Mistake::PruneTooEarly) || self.prune && cannot_come_again
    }

    fn in_flight_steps(&self, state: &State, at: At, in_flight: InFlight, steps: &mut Vec<Step>) {
        use Exchange::{AnswerLost, Answered, CallLost};
        let head = state.is_head(at);
        let expired = state.records[self.keys[in_flight.message]];
        if in_flight.newest_token && matches!(expired, Record::Claimed { live: false, .. }) {
            steps.push(Step::Renew(at));
        }
        match in_flight.phase {
            Phase::Received => self.claim_steps(state, at, in_flight, steps),
            Phase::Ready | Phase::Started if head => self.run_steps(state, at, in_flight, steps),
            Phase::Ready | Phase::Started => {}
            Phase::Ran => {
                let verdict = self.completion(state, in_flight);
                let calls = [Answered, AnswerLost, CallLost];
                steps.extend(calls.map(|call| Step::Complete(at, verdict, call)));
                if !self.lasts(state, in_flight) {
                    steps.push(Step::Cancel(at));
                }
            }
            Phase::DeadLettering => {
                steps.extend([Answered, AnswerLost].map(|call| Step::Publish(at, call)));
                if self.mistake == Some(Mistake::AckBeforeDeadLetter) {
                    steps.push(Step::Publish(at, CallLost));
                }
            }
            Phase::Releasing(_) => {
                let verdict = self.verdict(in_flight);
                steps.extend([Answered, CallLost].map(|call| Step::Release(at, verdict, call)));
            }
            Phase::Confirming | Phase::Settling(_) if self.may_settle(state, at) => {
                let answer = self.settlement(state, in_flight);
                let calls = [Answered, AnswerLost, CallLost];
                steps.extend(calls.map(|call| Step::Settle(at, answer, call)));
            }
            Phase::Confirming | Phase::Settling(_) => {}
        }
    }

    fn claim_steps(&self, state: &State, at: At, in_flight: InFlight, steps: &mut Vec<Step>) {
        match self.claimed(state, in_flight) {
            // Behind the head it asks again when its turn comes.
            ClaimResult::InProgress if !state.is_head(at) => {}
            new @ ClaimResult::Acquired { .. } => {
                steps.push(Step::Claim(at, new, Exchange::Answered));
                steps.push(Step::Claim(at, new, Exchange::AnswerLost));
            }
            claimed => steps.push(Step::Claim(at, claimed, Exchange::Answered)),
        }
        if self.looks_up && state.records[self.keys[in_flight.message]] == Record::Absent {
            steps.push(Step::LookUp(at));
        }
    }

    fn run_steps(&self, state: &State, at: At, in_flight: InFlight, steps: &mut Vec<Step>) {
        let lasts = self.mode == Mode::AtMostOnce || self.lasts(state, in_flight);
        if !lasts {
            steps.push(Step::Cancel(at));
        }
        if self.clocks && !lasts {
            return;
        }
        if in_flight.in_doubt && self.mode.quarantines() {
            return steps.push(Step::Quarantine(at));
        }
        if self.mode.quarantines() && in_flight.phase == Phase::Ready {
            let verdict = self.verdict(in_flight);
            let calls = [Exchange::Answered, Exchange::AnswerLost, Exchange::CallLost];
            return steps.extend(calls.map(|call| Step::Start(at, verdict, call)));
        }
        steps.push(Step::Run(at));
        if state.failures > 0 {
            steps.push(Step::Fail(at, Then::DeadLetter));
            if self.mode != Mode::AtMostOnce {
                steps.push(Step::Fail(at, Then::RetryInPlace));
                steps.push(Step::Fail(at, Then::GiveBack));
            }
        }
    }

    /// Makes the step.
    pub fn apply(&self, state: &mut State, step: Step) {
        match step {
            Step::Receive {
                worker,
                first,
                last,
            } => self.receive(state, worker, first..=last),
            Step::Claim(at, claimed, call) => self.claim(state, at, claimed, call),
            Step::LookUp(at) => self.look_up(state, at),
            Step::Renew(at) => {
                if let Some(in_flight) = state.in_flight(at) {
                    self.set_live(state, self.keys[in_flight.message], true);
                }
            }
            Step::Start(at, verdict, call) => self.start(state, at, verdict, call),
            Step::Quarantine(at) => self.quarantine(state, at),
            Step::Run(at) => self.run(state, at),
            Step::Fail(at, then) => self.fail(state, at, then),
            Step::Cancel(at) => self.cancel(state, at),
            Step::Complete(at, verdict, call) => self.completed(state, at, verdict, call),
            Step::Publish(at, call) => self.publish(state, at, call),
            Step::Release(at, verdict, call) => self.released(state, at, verdict, call),
            Step::Settle(at, answer, call) => self.settled(state, at, answer, call),
            Step::Crash { worker } => {
                state.crashes -= 1;
                state.workers[worker] = Default::default();
            }
            Step::LoseDelivery { message } => lease(state, message),
            Step::ExpireLease { message } => state.queue[message] = Queued::Waiting,
            Step::ExpireClaim { key } => self.set_live(state, key, false),
            Step::Prune { key } => self.forget(state, key),
            Step::LoseClaim { key } => {
                state.crashes -= 1;
                self.forget(state, key);
            }
        }
    }
}

impl Protocol {
    /// Marks a message as a dead letter in the making.
    pub fn give_up(&self, state: &mut State, at: At) {
        if let Some(in_flight) = state.in_flight(at) {
            let dead = &mut state.dead[self.keys[in_flight.message]];
            *dead = (*dead).max(Dead::GivenUp);
        }
    }

    /// What a settlement is preceded by: giving the claim up, where there is one.
    pub fn then_settle(&self, disposition: Disposition) -> Phase {
        match self.mode.has_store() {
            true => Phase::Releasing(disposition),
            false => Phase::Settling(disposition),
        }
    }
}
