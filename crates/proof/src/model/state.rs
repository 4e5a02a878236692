//! What the model remembers: queue, store, workers, and what has happened to the world.
//!
//! Tokens and receipts are kept as "is it still the newest?", so that the number of states is finite; that bit also says
//! who owns what, so nothing in a state names a worker, and workers can be put into any order.

pub const WORKERS: usize = 3;
pub const MESSAGES: usize = 3;
pub const LANE: usize = 2;

/// What a worker tells the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Disposition {
    Ack,
    Nack,
    DeadLetter,
}

/// How far a worker is with one delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// It has no claim that it knows of.
    Received,
    /// `at_most_once`: the ack is sent before the handler starts.
    Confirming,
    /// The handler may start.
    Ready,
    /// The store knows that the handler may have started.
    Started,
    /// The handler has succeeded; in a transaction, nothing of it is visible yet.
    Ran,
    DeadLettering,
    /// The claim is given up before the broker is told.
    Releasing(Disposition),
    Settling(Disposition),
}

impl Phase {
    /// Whether the turn goes to the next of the lane: what is a dead letter, or only has to be settled, holds up nobody.
    pub fn is_leaving(self) -> bool {
        !matches!(
            self,
            Self::Received | Self::Ready | Self::Started | Self::Ran | Self::Confirming
        )
    }
}

/// One delivery that a worker holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InFlight {
    pub message: usize,
    pub phase: Phase,
    /// No later delivery of the message has been made.
    pub newest_receipt: bool,
    /// The key's newest token was given to this message, whether the answer was heard or not, and still counts.
    pub newest_token: bool,
    /// It was looked up, and not claimed: there was no record, and none has been pruned since.
    pub looked_up: bool,
    /// A former owner, or this one, may have produced the effect.
    pub in_doubt: bool,
}

/// A worker's messages: the head, and those of its group that wait behind it.
pub type Lane = [Option<InFlight>; LANE];

/// Where a message stands at the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Queued {
    Waiting,
    Leased,
    Gone,
}

/// What the store has under one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Record {
    Absent,
    Claimed { live: bool, started: bool },
    Done,
}

/// Whether a key's message is a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dead {
    No,
    /// A worker has decided so; from then on it holds up nobody of its group.
    GivenUp,
    /// The dead-letter queue has it.
    Confirmed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub queue: [Queued; MESSAGES],
    /// By key; so are `effects` and `dead`.
    pub records: [Record; MESSAGES],
    pub workers: [Lane; WORKERS],
    /// How often the effect happened; two stands for more.
    pub effects: [u8; MESSAGES],
    pub dead: [Dead; MESSAGES],
    /// A worker whose token was not the newest has committed.
    pub fenced_commit: bool,
    /// How many more workers, or stores, may crash.
    pub crashes: u8,
    /// How many more times a handler may fail.
    pub failures: u8,
}

/// One place in one worker's lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    pub worker: usize,
    pub place: usize,
}

impl State {
    pub fn new(messages: usize, crashes: u8, failures: u8) -> Self {
        let mut queue = [Queued::Gone; MESSAGES];
        queue[..messages].fill(Queued::Waiting);
        Self {
            queue,
            records: [Record::Absent; MESSAGES],
            workers: [[None; LANE]; WORKERS],
            effects: [0; MESSAGES],
            dead: [Dead::No; MESSAGES],
            fenced_commit: false,
            crashes,
            failures,
        }
    }

    /// Every message, with its place.
    pub fn all_in_flight(&self) -> impl Iterator<Item = (At, InFlight)> {
        self.workers.iter().enumerate().flat_map(|(worker, lane)| {
            let at = move |place| At { worker, place };
            lane.iter()
                .enumerate()
                .filter_map(move |(place, in_flight)| {
                    in_flight.map(|in_flight| (at(place), in_flight))
                })
        })
    }

    pub fn in_flight(&self, at: At) -> Option<InFlight> {
        self.workers[at.worker][at.place]
    }

    pub fn in_flight_mut(&mut self, at: At) -> Option<&mut InFlight> {
        self.workers[at.worker][at.place].as_mut()
    }

    pub fn all_in_flight_mut(&mut self) -> impl Iterator<Item = &mut InFlight> {
        self.workers.iter_mut().flatten().flatten()
    }

    pub fn enter(&mut self, at: At, phase: Phase) {
        if let Some(in_flight) = self.in_flight_mut(at) {
            in_flight.phase = phase;
        }
    }

    /// Takes a message in flight out of its lane; those behind it move up.
    pub fn drop_in_flight(&mut self, at: At) {
        self.workers[at.worker][at.place..].rotate_left(1);
        self.workers[at.worker][LANE - 1] = None;
    }

    /// Whether everything before it in its lane has passed its turn on.
    pub fn is_head(&self, at: At) -> bool {
        let before = self.workers[at.worker][..at.place].iter();
        before
            .flatten()
            .all(|in_flight| in_flight.phase.is_leaving())
    }

    /// Whether its lease lasts.
    pub fn leased(&self, in_flight: InFlight) -> bool {
        in_flight.newest_receipt && self.queue[in_flight.message] == Queued::Leased
    }

    pub fn took_effect(&mut self, key: usize) {
        self.effects[key] = (self.effects[key] + 1).min(2);
    }

    /// The same state with the workers in a fixed order: which of them is which makes no difference.
    #[must_use]
    pub fn normal(mut self) -> Self {
        self.workers.sort_unstable();
        self
    }
}
