//! What the handlers of a run publish through their transactions, and who relays it.

use std::time::Duration;

use fastrand::Rng;
use onlyonce_core::{Error, ErrorKind};

use super::plan::{Mode, Plan, moments};

/// The outbox of a run.
#[derive(Clone, Debug)]
pub struct Outbox {
    pub destinations: usize,
    pub relays: u64,
    pub lease: Duration,
    pub poll: Duration,
    /// How many messages are fetched at once.
    pub batch: usize,
    pub max_attempts: u32,
    /// Whether groups wait for what was set aside.
    pub waits: bool,
    /// Whether the queues stop a group at its first failure.
    pub stops_groups: bool,
    /// When what was set aside is put back, in the midst of it all.
    pub requeues: Vec<Duration>,
    /// Whether in the end the queues take everything, and what was set aside is put back.
    pub is_repaired: bool,
}

/// One message that a handler publishes.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub destination: usize,
    pub group: Option<u64>,
    /// Whether it has a dedup id of its own.
    pub is_named: bool,
    pub taken: Taken,
}

/// Whether its queue takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    AtOnce,
    /// It is refused this many times first.
    Refused(u32),
    /// So many times the queue is busy.
    Busy(u32),
    Never,
}

impl Outgoing {
    /// Why its queue does not take it, which has refused it so often.
    pub fn refusal(&self, before: u32) -> Option<Error> {
        match self.taken {
            Taken::Never => Some(refused()),
            Taken::Refused(times) if before < times => Some(refused()),
            Taken::Busy(times) if before < times => {
                Some(Error::new(ErrorKind::Throttled, "simulated: busy"))
            }
            _ => None,
        }
    }
}

fn refused() -> Error {
    Error::new(ErrorKind::Message, "simulated: it cannot be taken")
}

/// Two of five transactional runs have one, unless handlers have a time-out: on a bad network they would not publish in time.
pub fn draw(rng: &mut Rng, plan: &mut Plan) {
    let can = plan.mode == Mode::Transactional && plan.handler_timeout.is_none();
    if !can || rng.u32(..5) >= 2 {
        return;
    }
    let waits = rng.u32(..3) == 0;
    let requeues = rng.usize(..3);
    let outbox = Outbox {
        destinations: rng.usize(1..=2),
        relays: rng.u64(1..=3),
        lease: Duration::from_millis(rng.u64(1_000..12_000)),
        poll: Duration::from_millis(rng.u64(1_000..30_000)),
        batch: rng.usize(1..=6),
        max_attempts: rng.u32(2..5),
        waits,
        stops_groups: rng.bool(),
        requeues: moments(rng, plan.calm, requeues),
        // Otherwise what waits behind them is never published.
        is_repaired: waits || rng.bool(),
    };
    let groups = rng.u64(1..=3);
    for message in &mut plan.messages {
        let many = [0, 1, 1, 2, 3][rng.usize(..5)];
        message.publishes = (0..many)
            .map(|_| outgoing(rng, outbox.destinations, groups))
            .collect();
    }
    plan.outbox = Some(outbox);
}

fn outgoing(rng: &mut Rng, destinations: usize, groups: u64) -> Outgoing {
    Outgoing {
        destination: rng.usize(..destinations),
        group: (rng.u32(..4) > 0).then(|| rng.u64(..groups)),
        is_named: rng.u32(..3) == 0,
        taken: match rng.u32(..16) {
            0 => Taken::Never,
            1..3 => Taken::Refused(rng.u32(1..7)),
            3..5 => Taken::Busy(rng.u32(1..7)),
            _ => Taken::AtOnce,
        },
    }
}
