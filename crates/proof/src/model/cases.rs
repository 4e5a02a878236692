//! The configurations that are checked.

use super::broker::Broker;
use super::calm::Calm;
use super::promises::{IN_ORDER, NOT_LOST, ONCE};
use super::protocol::{InDoubt, Mistake, Mode, Protocol};

/// A configuration with its name.
pub struct Case {
    pub name: &'static str,
    pub protocol: Protocol,
}

fn protocol(mode: Mode, workers: usize, keys: &'static [usize], crashes: u8) -> Protocol {
    Protocol {
        mode,
        workers,
        keys,
        grouped: false,
        crashes,
        failures: 1,
        lossy: true,
        broker: Broker::Strict,
        sink: true,
        clocks: false,
        looks_up: false,
        prune: false,
        mistake: None,
        breaks: None,
        symmetric: true,
        calm: Calm::default(),
    }
}

const QUARANTINE: Mode = Mode::Idempotent(InDoubt::Quarantine);
const RUN_AGAIN: Mode = Mode::Idempotent(InDoubt::RunAgain);

/// The protocol as it is: every promise must hold.
pub fn real() -> Vec<Case> {
    let others = [
        ("idempotent, run again", protocol(RUN_AGAIN, 3, &[0, 0], 2)),
        ("idempotent, quarantine", protocol(QUARANTINE, 3, &[0], 2)),
        ("at least once", protocol(Mode::AtLeastOnce, 3, &[0, 1], 2)),
        ("at most once", protocol(Mode::AtMostOnce, 3, &[0, 1], 2)),
    ];
    let others = others.map(|(name, protocol)| Case { name, protocol });
    claimed()
        .into_iter()
        .chain(looked_up())
        .chain(others)
        .collect()
}

/// Transactions of what is claimed.
fn claimed() -> Vec<Case> {
    use Mode::Transactional;
    let case = |name, protocol| Case { name, protocol };
    vec![
        case(
            "transactional",
            Protocol {
                failures: 0,
                ..protocol(Transactional, 3, &[0, 1], 2)
            },
        ),
        case(
            "transactional, a producer's duplicate",
            protocol(Transactional, 3, &[0, 0], 2),
        ),
        case(
            "transactional, one message, its own dead-letter queue",
            Protocol {
                failures: 2,
                sink: false,
                ..protocol(Transactional, 3, &[0], 2)
            },
        ),
        case(
            "transactional, a broker that honours old receipts",
            Protocol {
                broker: Broker::Lenient,
                ..protocol(Transactional, 3, &[0, 0], 2)
            },
        ),
        case(
            "transactional, records are pruned",
            Protocol {
                clocks: true,
                prune: true,
                ..protocol(Transactional, 3, &[0, 0], 2)
            },
        ),
        case(
            "transactional, a group",
            Protocol {
                grouped: true,
                clocks: true,
                lossy: false,
                ..protocol(Transactional, 2, &[0, 1], 0)
            },
        ),
    ]
}

/// Transactions of what is only looked up.
fn looked_up() -> Vec<Case> {
    use Mode::Transactional;
    let case = |name, protocol| Case { name, protocol };
    vec![
        case(
            "transactional, looked up",
            Protocol {
                failures: 0,
                looks_up: true,
                ..protocol(Transactional, 2, &[0, 1], 1)
            },
        ),
        case(
            "transactional, looked up, a producer's duplicate",
            Protocol {
                looks_up: true,
                ..protocol(Transactional, 2, &[0, 0], 1)
            },
        ),
        case(
            "transactional, looked up, honours old receipts",
            Protocol {
                looks_up: true,
                broker: Broker::Lenient,
                ..protocol(Transactional, 3, &[0], 2)
            },
        ),
        case(
            "transactional, looked up, records are pruned",
            Protocol {
                looks_up: true,
                prune: true,
                clocks: true,
                ..protocol(Transactional, 2, &[0, 0], 1)
            },
        ),
        case(
            "transactional, looked up, a group",
            Protocol {
                looks_up: true,
                grouped: true,
                clocks: true,
                lossy: false,
                failures: 0,
                ..protocol(Transactional, 2, &[0, 1], 0)
            },
        ),
    ]
}

/// A configuration small enough for a debug build.
#[cfg(test)]
pub fn tiny() -> Case {
    Case {
        name: "transactional, tiny",
        protocol: protocol(Mode::Transactional, 2, &[0], 1),
    }
}

/// What others do: each must break its promise.
pub fn naive() -> Vec<Case> {
    NAIVE.into_iter().map(naive_case).collect()
}

type Naive = (&'static str, Mistake, Mode, &'static str);

const NAIVE: [Naive; 11] = {
    use Mistake::*;
    use Mode::{AtLeastOnce, Transactional};
    [
        (
            "mark before processing",
            MarkBeforeProcessing,
            RUN_AGAIN,
            NOT_LOST,
        ),
        (
            "mark after processing, without a claim",
            MarkAfterProcessing,
            RUN_AGAIN,
            ONCE,
        ),
        (
            "claim without a token",
            ClaimWithoutToken,
            Transactional,
            ONCE,
        ),
        ("look up once, and commit", LookOnce, Transactional, ONCE),
        (
            "a look-up that lasts for ever",
            LookUpLasts,
            Transactional,
            ONCE,
        ),
        (
            "ack while another is in progress on it",
            AckWhileInProgress,
            Transactional,
            NOT_LOST,
        ),
        (
            "prune while the message can come again",
            PruneTooEarly,
            Transactional,
            ONCE,
        ),
        (
            "quarantine, and forget the doubt",
            ForgetDoubt,
            QUARANTINE,
            ONCE,
        ),
        (
            "ack before the dead letter is confirmed",
            AckBeforeDeadLetter,
            AtLeastOnce,
            NOT_LOST,
        ),
        (
            "give back without those behind",
            GiveBackAlone,
            Transactional,
            IN_ORDER,
        ),
        (
            "taken over, go on with those behind",
            GoOnWhenFenced,
            Transactional,
            IN_ORDER,
        ),
    ]
};

fn naive_case((name, mistake, mode, breaks): Naive) -> Case {
    let grouped = breaks == IN_ORDER;
    let keys: &[usize] = if grouped { &[0, 1] } else { &[0] };
    let protocol = Protocol {
        mistake: Some(mistake),
        breaks: Some(breaks),
        grouped,
        clocks: grouped,
        looks_up: matches!(mistake, Mistake::LookOnce | Mistake::LookUpLasts),
        prune: mistake == Mistake::LookUpLasts,
        // The crash of a worker makes the clearer story.
        lossy: mistake == Mistake::AckBeforeDeadLetter,
        symmetric: false,
        ..protocol(mode, 2, keys, 1)
    };
    Case { name, protocol }
}
