//! Looks for a smaller run that breaks a promise too.

use std::collections::BTreeSet;

use super::cut::Cut;
use super::plan::Plan;
use super::world::{self, Outcome};

/// At most this many runs.
const TRIES: usize = 400;

/// What was broken, whatever the messages and workers concerned.
fn kinds(outcome: &Outcome) -> BTreeSet<String> {
    let letters = |breach: &String| breach.replace(|c: char| c.is_ascii_digit(), "");
    outcome.breaches.iter().map(letters).collect()
}

/// The smallest version found of a seed that breaks a promise.
pub fn shrink(seed: u64, mut cut: Cut, mut outcome: Outcome) -> (Cut, Outcome) {
    let mut tries = 0;
    let broken = kinds(&outcome);
    'smaller: while tries < TRIES {
        let plan = Plan::new(seed, &cut);
        let faults = outcome.faults.values().sum();
        for smaller in cut.smaller(&plan, faults) {
            tries += 1;
            let tried = world::run(Plan::new(seed, &smaller), None);
            if kinds(&tried).intersection(&broken).next().is_some() {
                (cut, outcome) = (smaller, tried);
                continue 'smaller;
            }
        }
        break;
    }
    (cut, outcome)
}
