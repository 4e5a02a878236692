//! What is recorded.

use super::pipeline::Mode;

/// This number of records nearly fills the log.
const NEARLY_FULL: u32 = 32_500;

/// One recording.
#[derive(Clone, Copy)]
pub struct Scene {
    pub name: &'static str,
    pub mode: Mode,
    pub durable_acks: bool,
    /// How many records are there before the others start: enough that the store copies its log into the file by itself.
    /// Elsewhere another connection does that, far more often.
    pub ballast: u32,
    pub seed: u64,
}

pub fn transactional(seed: u64) -> Scene {
    Scene {
        name: "transactional",
        mode: Mode::Transactional,
        durable_acks: false,
        ballast: 0,
        seed,
    }
}

pub fn at_most_once(durable_acks: bool, seed: u64) -> Scene {
    Scene {
        name: "at most once",
        mode: Mode::AtMostOnce,
        durable_acks,
        ..transactional(seed)
    }
}

/// What is recorded, and its share of the cuts in percent.
pub fn all(seed: u64) -> [(Scene, usize); 5] {
    let transactional = transactional(seed);
    let idempotent = Scene {
        name: "idempotent",
        mode: Mode::Idempotent,
        ..transactional
    };
    let durable_acks = Scene {
        name: "durable acks",
        durable_acks: true,
        ..transactional
    };
    let sealing = Scene {
        name: "sealing",
        ballast: NEARLY_FULL,
        ..transactional
    };
    [
        (transactional, 32),
        (idempotent, 20),
        (durable_acks, 15),
        (at_most_once(true, seed), 15),
        // Large files, for which a cut takes longer.
        (sealing, 3),
    ]
}
