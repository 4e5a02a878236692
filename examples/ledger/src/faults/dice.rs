use std::sync::{Arc, Mutex, PoisonError};

use fastrand::Rng;
use onlyonce::{Error, ErrorKind};

/// Decides what goes wrong. Clones roll from one sequence; without a seed nothing ever goes wrong.
#[derive(Clone, Debug)]
pub struct Dice(Option<Arc<Mutex<Rng>>>);

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Works,
    /// It is never made.
    NotMade,
    /// It is made, and its answer is lost.
    AnswerLost,
}

impl Dice {
    pub fn new(seed: Option<u64>) -> Self {
        Self(seed.map(|seed| Arc::new(Mutex::new(Rng::with_seed(seed)))))
    }

    /// True `per_mille` times in a thousand.
    pub fn hits(&self, per_mille: u32) -> bool {
        self.0.as_ref().is_some_and(|rng| {
            let mut rng = rng.lock().unwrap_or_else(PoisonError::into_inner);
            rng.u32(0..1_000) < per_mille
        })
    }

    /// How often in a thousand each of the two faults comes.
    pub fn fate(&self, per_mille: u32) -> Fate {
        if self.hits(per_mille) {
            Fate::NotMade
        } else if self.hits(per_mille) {
            Fate::AnswerLost
        } else {
            Fate::Works
        }
    }
}

/// What the caller of a call hears that was not made, or whose answer was lost.
pub fn no_answer(fate: Fate) -> Error {
    Error::new(ErrorKind::Connection, format!("made to fail: {fate:?}"))
}
