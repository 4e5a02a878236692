//! The protocol as a model: what it is made of, and which steps are possible in a state.

use stateright::{Model, Property};

use super::broker::Broker;
use super::calm::Calm;
use super::promises;
use super::state::{Phase, State};
use super::step::Step;

/// What is promised of an effect, as in the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Transactional,
    Idempotent(InDoubt),
    AtLeastOnce,
    AtMostOnce,
}

/// What to do with a message that may have taken effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InDoubt {
    RunAgain,
    Quarantine,
}

impl Mode {
    pub fn is_transactional(self) -> bool {
        self == Self::Transactional
    }

    pub fn has_store(self) -> bool {
        matches!(self, Self::Transactional | Self::Idempotent(_))
    }

    pub fn quarantines(self) -> bool {
        self == Self::Idempotent(InDoubt::Quarantine)
    }
}

/// How others do it; each breaks a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// The key is recorded as done, then the handler runs.
    MarkBeforeProcessing,
    /// The handler runs, then the key is recorded; nothing is claimed.
    MarkAfterProcessing,
    /// A look-up counts for ever, although the record of whoever came first may be pruned.
    LookUpLasts,
    /// The effect of what was looked up commits without a second look for a record.
    LookOnce,
    /// Keys are claimed for a while, but the commit does not ask whose the claim is.
    ClaimWithoutToken,
    /// A delivery whose key somebody else is busy with is acked as a duplicate.
    AckWhileInProgress,
    /// The record goes while its message can still be delivered again.
    PruneTooEarly,
    /// A dead letter is acked although the dead-letter queue has not confirmed it.
    AckBeforeDeadLetter,
    /// A failed message is given back without those of its group that wait behind it.
    GiveBackAlone,
    /// A worker that finds a message of a group taken over goes on with those behind it.
    GoOnWhenFenced,
    /// A message whose outcome is in doubt gives its claim up, and the doubt with it, before its ack is confirmed.
    ForgetDoubt,
}

/// One configuration of the model.
#[derive(Clone, Debug)]
pub struct Protocol {
    pub mode: Mode,
    pub workers: usize,
    /// The dedup key of each message in the queue; a key that is there twice is a producer's duplicate.
    pub keys: &'static [usize],
    /// All messages belong to one group.
    pub grouped: bool,
    pub crashes: u8,
    pub failures: u8,
    /// Calls and answers can be lost.
    pub lossy: bool,
    pub broker: Broker,
    /// Dead letters go to a sink; otherwise into the queue's own dead-letter queue.
    pub sink: bool,
    /// Workers notice that a lease has ended *before they start a handler*, as the pipeline's do, by the local monotonic
    /// clock. Without it a worker never notices anything: safety must not rest on clocks.
    pub clocks: bool,
    /// Workers may look a key up instead of claiming it; the commit finds out whether somebody else was first.
    pub looks_up: bool,
    /// Records are pruned once their messages cannot come again.
    pub prune: bool,
    pub mistake: Option<Mistake>,
    /// The one promise that is looked at; all of them where there is none.
    pub breaks: Option<&'static str>,
    /// States that differ only in the order of the workers count as one.
    pub symmetric: bool,
    pub calm: Calm,
}

impl Protocol {
    pub fn first_phase(&self) -> Phase {
        match self.mode {
            Mode::Transactional | Mode::Idempotent(_) => Phase::Received,
            Mode::AtLeastOnce => Phase::Ready,
            Mode::AtMostOnce => Phase::Confirming,
        }
    }

    /// Whether a handler starts only under a claim.
    pub fn claims(&self) -> bool {
        let marks = Some(Mistake::MarkBeforeProcessing) == self.mistake
            || Some(Mistake::MarkAfterProcessing) == self.mistake;
        self.mode.has_store() && !marks
    }

    /// Whether an effect must not happen twice.
    pub fn promises_once(&self) -> bool {
        matches!(self.mode, Mode::Transactional | Mode::AtMostOnce) || self.mode.quarantines()
    }

    /// What follows from a step.
    pub fn after(&self, state: &State, step: Step) -> State {
        let mut next = state.clone();
        self.apply(&mut next, step);
        match self.symmetric {
            true => next.normal(),
            false => next,
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let start = State::new(self.keys.len(), self.crashes, self.failures);
        vec![start]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        self.steps(state, steps);
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        Some(self.after(state, step))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = promises::of(self);
        if let Some(name) = self.breaks {
            properties.retain(|property| property.name == name);
        }
        properties
    }
}
