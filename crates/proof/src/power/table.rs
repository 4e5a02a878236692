//! What the command prints.
#![expect(clippy::print_stdout, reason = "the command's output")]

use std::path::Path;
use std::time::Duration;

use super::audit::{Broken, PROMISES};
use super::cuts::Outcome;

pub fn promises(outcomes: &[(&str, Outcome)]) {
    print!("{:<36}", "cuts at which it does not hold");
    outcomes.iter().for_each(|(name, _)| print!("{name:>18}"));
    println!();
    for promise in PROMISES {
        print!("{:<36}", promise.to_string());
        for (_, outcome) in outcomes {
            let broken = outcome.broken.get(&promise).copied().unwrap_or_default();
            print!("{broken:>18}");
        }
        println!();
    }
    println!();
    for (name, outcome) in outcomes {
        println!(
            "{name}: {} cuts, {} with something unsynced, {} that took back an ack, {} after a seal, {} worked off, in {:.1} s",
            outcome.cuts,
            outcome.unsynced,
            outcome.taken_back,
            outcome.sealed,
            outcome.ended,
            outcome.took.as_secs_f64()
        );
    }
    println!();
}

pub fn broken(name: &str, at: usize, broken: &[Broken], folder: &Path) {
    let broken: Vec<_> = broken.iter().map(Broken::to_string).collect();
    println!(
        "{name}: NOT so after {at} events: {}; what was left is in {}",
        broken.join("; "),
        folder.display()
    );
}

/// Says whether it was noticed.
pub fn planted(name: &str, breaks: Broken, outcome: &Outcome) -> bool {
    let times = outcome.broken.get(&breaks).copied().unwrap_or_default();
    let verdict = match times {
        0 => "NOT NOTICED",
        _ => "noticed",
    };
    println!(
        "{verdict}, at {times} of {} cuts: {name} (\"{breaks}\" does not hold)",
        outcome.cuts
    );
    times > 0
}

pub fn heading(seed: u64) {
    println!("power failures on SQLite, seed {seed}\n");
}

pub fn left_out() {
    println!("power: left out, since processes are watched by Linux's means");
}

pub fn summary(outcomes: &[(&str, Outcome)], (noticed, planted): (usize, usize), took: Duration) {
    let cuts: usize = outcomes.iter().map(|(_, outcome)| outcome.cuts).sum();
    let bad: usize = outcomes.iter().map(|(_, outcome)| outcome.bad).sum();
    println!(
        "\npower: {cuts} power failures, {bad} of them break a promise; {noticed} of {planted} planted faults \
         noticed, {:.1} s",
        took.as_secs_f64()
    );
}
