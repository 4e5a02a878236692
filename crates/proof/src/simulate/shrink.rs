//! Looks for a smaller run that breaks a promise too.

use super::cut::Cut;
use super::plan::Plan;
use super::world::{self, Outcome};

/// At most so many runs.
const TRIES: usize = 400;

/// The smallest version found of a seed that breaks a promise.
pub fn shrink(seed: u64, mut cut: Cut, mut outcome: Outcome) -> (Cut, Outcome) {
    let mut tries = 0;
    'smaller: while tries < TRIES {
        let plan = Plan::new(seed, &cut);
        let faults = outcome.faults.values().sum();
        for smaller in cut.smaller(&plan, faults) {
            tries += 1;
            let tried = world::run(Plan::new(seed, &smaller), false);
            if !tried.breaches.is_empty() {
                (cut, outcome) = (smaller, tried);
                continue 'smaller;
            }
        }
        break;
    }
    (cut, outcome)
}
