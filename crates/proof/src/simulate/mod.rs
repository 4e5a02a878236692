//! The real pipeline and relay on a simulated broker and store, in virtual time; one seed decides everything that goes wrong.
//!
//! Why tokio's paused clock and faults of our own, and not one of the tools: `crates/core/docs/decisions/simulation.md`.

mod batch;
mod campaign;
mod cut;
mod handler;
mod history;
mod letters;
mod outbox;
mod plan;
mod promises;
mod relay;
mod relayed;
mod shrink;
mod worker;
mod world;

pub use cut::Cut;

use campaign::Totals;
use plan::Plan;
use world::Outcome;

use crate::options::Simulate;
use crate::{Verdict, options};

/// Seeds that once broke a promise, each with what it was.
const REGRESSIONS: &str = include_str!("../../regressions.txt");

pub fn run(options: &options::Simulate) -> Result<Verdict, String> {
    quiet_handlers();
    if let Some(seed) = options.seed {
        return Ok(replay(seed, &options.cut));
    }
    // Before any run, which seeds what chance there is on this thread.
    let first = options.first.unwrap_or_else(|| fastrand::u64(..) >> 16);
    // Whoever names the first one wants to see those alone.
    let known = match options.first {
        Some(_) => Vec::new(),
        None => regressions()?,
    };
    for &seed in &known {
        let outcome = campaign::run_seed(seed, &Cut::default());
        if !outcome.breaches.is_empty() {
            return Ok(explain(seed, outcome, !options.no_shrink));
        }
    }
    let (totals, failure) = campaign::run(first, options.seeds);
    print(&totals);
    let Simulate { seeds, .. } = options;
    match failure {
        None => {
            println!(
                "simulate: ok; {seeds} seeds from {first}, and {} known ones; {:.0} seeds/s",
                known.len(),
                totals.seeds as f64 / totals.took.as_secs_f64()
            );
            Ok(Verdict::Kept)
        }
        Some((seed, outcome)) => Ok(explain(seed, outcome, !options.no_shrink)),
    }
}

fn regressions() -> Result<Vec<u64>, String> {
    let lines = REGRESSIONS
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim());
    let seeds = lines.filter(|line| !line.is_empty());
    seeds
        .map(|seed| {
            seed.parse()
                .map_err(|_| format!("regressions.txt: `{seed}` is no seed"))
        })
        .collect()
}

/// Handlers that panic on purpose say nothing.
fn quiet_handlers() {
    let loud = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if panic.payload().downcast_ref::<&str>() != Some(&handler::PANIC) {
            loud(panic);
        }
    }));
}

/// Runs one seed and prints what happened.
fn replay(seed: u64, cut: &Cut) -> Verdict {
    let plan = Plan::new(seed, cut);
    println!("{plan:#?}");
    // What the pipeline itself has to say comes in between.
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
        .without_time()
        .init();
    let outcome = world::run(plan, Some(Box::new(|line| println!("{line}"))));
    for breach in &outcome.breaches {
        println!("BROKEN: {breach}");
    }
    let verdict = if outcome.breaches.is_empty() {
        "ok"
    } else {
        "broken"
    };
    println!(
        "simulate: {verdict}; seed {seed}, {:.0} s of virtual time",
        outcome.lasted.as_secs_f64()
    );
    if outcome.breaches.is_empty() {
        Verdict::Kept
    } else {
        Verdict::Broken
    }
}

/// Says which promise a seed breaks, and with which smaller run that can be seen.
fn explain(seed: u64, outcome: Outcome, shrink: bool) -> Verdict {
    for breach in &outcome.breaches {
        println!("BROKEN by seed {seed}: {breach}");
    }
    let mut smaller = Cut::default();
    if shrink {
        let (cut, outcome) = shrink::shrink(seed, smaller, outcome);
        for breach in &outcome.breaches {
            println!("still broken when smaller: {breach}");
        }
        smaller = cut;
    }
    println!("to see it: cargo run --bin proof -- simulate --seed {seed}{smaller}");
    println!("simulate: broken by seed {seed}");
    Verdict::Broken
}

fn print(totals: &Totals) {
    let Totals {
        seeds,
        lives,
        report,
        relayed,
        faults,
        lasted,
        took,
    } = totals;
    println!(
        "{seeds} runs, {lives} lives of workers and relays, {:.1} days of virtual time in {:.0} s",
        lasted.as_secs_f64() / 86_400.0,
        took.as_secs_f64()
    );
    println!("{report:#?}");
    println!("{relayed:?}");
    println!("{faults:?}");
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Everything that happens in a run.
    fn history(seed: u64) -> Vec<String> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = lines.clone();
        let log = Box::new(move |line| kept.lock().unwrap().push(line));
        world::run(Plan::new(seed, &Cut::default()), Some(log));
        lines.lock().unwrap().clone()
    }

    #[test]
    fn a_seed_gives_the_same_history_every_time() {
        quiet_handlers();
        for seed in 1..=40 {
            let first = history(seed);
            assert!(!first.is_empty());
            assert_eq!(first, history(seed), "seed {seed}");
        }
    }

    #[test]
    fn no_promise_is_broken() {
        quiet_handlers();
        for seed in regressions().unwrap().into_iter().chain(1..=200) {
            let outcome = campaign::run_seed(seed, &Cut::default());
            assert!(
                outcome.breaches.is_empty(),
                "seed {seed}: {:?}",
                outcome.breaches
            );
        }
    }

    #[test]
    fn a_smaller_run_is_written_as_the_command_line_reads_it() {
        use clap::Parser as _;
        let cut = Cut {
            messages: Some(3),
            faults: Some(2),
            without: vec![onlyonce_testkit::simulated::Fault::Cut],
            plain: true,
            ..Cut::default()
        };
        let line = format!("proof simulate --seed 1{cut}");
        let parsed = crate::options::Cli::try_parse_from(line.split(' ')).unwrap();
        assert!(
            matches!(parsed.command, crate::options::Command::Simulate(read) if read.cut == cut)
        );
    }
}
