//! A model of the protocol, checked exhaustively: every interleaving of a few workers, messages, crashes and failures.
//!
//! `protocol` says what a configuration is made of, `step` who can do what, `broker`, `store` and `worker` what follows
//! from it, `promises` what must hold. A worker never trusts its clock unless a configuration says so: leases and claims
//! end whenever they like, and a worker that was taken over goes on as if nothing had happened.
#![expect(clippy::print_stdout, reason = "the command's output")]

mod broker;
mod calm;
mod cases;
mod check;
mod promises;
mod protocol;
mod state;
mod step;
mod store;
mod trace;
mod worker;

use std::time::Instant;

use crate::{Verdict, options};
use cases::Case;
use check::{Found, check};

pub fn run(options: &options::Model) -> Result<Verdict, String> {
    let began = Instant::now();
    heading();
    let (mut real, mut naive) = (cases::real(), cases::naive());
    real.retain(|case| case.name.contains(&options.only));
    naive.retain(|case| case.name.contains(&options.only));
    let kept: Vec<_> = real.iter().map(keeps).collect();
    println!("\nWhat others do; each must break a promise:\n");
    let broken: Vec<_> = naive.iter().map(breaks).collect();
    let states: usize = kept.iter().map(|(_, states)| states).sum();
    let good = |verdicts: &[(bool, usize)]| verdicts.iter().filter(|(good, _)| *good).count();
    println!(
        "\nmodel: {} of {} configurations keep their promises in {states} states, {} of {} naive protocols break one, {:.1} s",
        good(&kept),
        kept.len(),
        good(&broken),
        broken.len(),
        began.elapsed().as_secs_f64()
    );
    match kept.iter().chain(&broken).all(|(good, _)| *good) {
        true => Ok(Verdict::Kept),
        false => Ok(Verdict::Broken),
    }
}

fn heading() {
    println!(
        "{:<56}{:>7} {:>8} {:>7} {:>8} {:>9} {:>5} {:>6}",
        "configuration", "workers", "messages", "crashes", "failures", "states", "depth", "s"
    );
}

fn row(case: &Case, found: &Found, verdict: &str) {
    let protocol = &case.protocol;
    println!(
        "{:<56}{:>7} {:>8} {:>7} {:>8} {:>9} {:>5} {:>6.1}  {verdict}",
        case.name,
        protocol.workers,
        protocol.keys.len(),
        protocol.crashes,
        protocol.failures,
        found.states,
        found.depth,
        found.took.as_secs_f64()
    );
}

/// Whether the configuration keeps its promises, and in how many states.
fn keeps(case: &Case) -> (bool, usize) {
    let found = check(&case.protocol);
    let verdict = match (&found.broken, found.harmless) {
        (Some((promise, _)), _) => format!("BROKEN: {promise}"),
        (None, true) => "NOTHING SHOWN: no worker was ever taken over".into(),
        (None, false) => "ok".into(),
    };
    row(case, &found, &verdict);
    if let Some((promise, _)) = found.broken {
        tell_again(case, promise);
    }
    (verdict == "ok", found.states)
}

/// Tells the counterexample with workers that keep their numbers.
fn tell_again(case: &Case, promise: &'static str) {
    let mut protocol = case.protocol.clone();
    protocol.symmetric = false;
    protocol.breaks = Some(promise);
    if let Some((_, path)) = check(&protocol).broken {
        tell(&protocol, path);
    }
}

fn tell(protocol: &protocol::Protocol, path: stateright::Path<state::State, step::Step>) {
    for line in trace::lines(protocol, path) {
        println!("    {line}");
    }
}

/// Whether the naive protocol breaks its promise, as it must.
fn breaks(case: &Case) -> (bool, usize) {
    let found = check(&case.protocol);
    let promise = case.protocol.breaks.unwrap_or_default();
    match found.broken {
        Some((_, path)) => {
            println!("{}: broken is \"{promise}\"", case.name);
            tell(&case.protocol, path);
            (true, found.states)
        }
        None => {
            row(case, &found, "NOT BROKEN: the model misses it");
            (false, found.states)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_keeps_its_promises() {
        let found = check(&cases::tiny().protocol);
        assert!(found.broken.is_none() && !found.harmless);
    }

    #[test]
    fn every_naive_protocol_breaks_one() {
        for case in cases::naive() {
            assert!(check(&case.protocol).broken.is_some(), "{}", case.name);
        }
    }
}
