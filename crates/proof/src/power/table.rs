//! What the command prints.
#![expect(clippy::print_stdout, reason = "the command's output")]

use std::path::Path;
use std::time::Duration;

use super::broken::{Broken, PROMISES};
use super::cuts::Outcome;
use super::planted::Fault;

pub fn heading(seed: u64) {
    println!("power failures on SQLite, seed {seed}\n");
}

pub fn outcomes(outcomes: &[(&str, Outcome)]) {
    promises(outcomes.iter().map(|(name, outcome)| (*name, outcome)));
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

/// Promise by promise, at how many cuts it does not hold.
fn promises<'a>(outcomes: impl Iterator<Item = (&'a str, &'a Outcome)> + Clone) {
    print!("{:<36}", "cuts at which it does not hold");
    outcomes.clone().for_each(|(name, _)| print!("{name:>18}"));
    println!();
    for promise in PROMISES {
        print!("{:<36}", promise.to_string());
        for (_, outcome) in outcomes.clone() {
            print!("{:>18}", outcome.times(promise));
        }
        println!();
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

/// What planted faults break; returns how many are noticed.
pub fn planted(outcomes: &[(Fault, Outcome)]) -> usize {
    println!("with planted faults:\n");
    promises(
        outcomes
            .iter()
            .map(|(fault, outcome)| (fault.name, outcome)),
    );
    let is_noticed = |(fault, outcome): &&(Fault, Outcome)| outcome.times(fault.breaks) > 0;
    for (fault, outcome) in outcomes.iter().filter(|planted| !is_noticed(planted)) {
        println!(
            "NOT NOTICED, at {} cuts: {}, so that not \"{}\"",
            outcome.cuts, fault.name, fault.breaks
        );
    }
    outcomes.iter().filter(is_noticed).count()
}

pub fn left_out() {
    println!("power: left out, since processes are watched by Linux's means");
}

pub fn summary(outcomes: &[(&str, Outcome)], (noticed, planted): (usize, usize), took: Duration) {
    let cuts: usize = outcomes.iter().map(|(_, outcome)| outcome.cuts).sum();
    let bad: usize = outcomes.iter().map(|(_, outcome)| outcome.bad).sum();
    println!(
        "power: {cuts} power failures, {bad} of them break a promise; {noticed} of {planted} planted faults \
         noticed, {:.1} s",
        took.as_secs_f64()
    );
}
