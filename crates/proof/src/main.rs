//! Shows that the kernel keeps its promises, to whoever does not believe it.
//!
//! - `model`: every interleaving of a small model of the protocol, and the naive protocols that it rules out.
//! - `simulate`: the real pipeline in virtual time, with the relays of its outbox, one seed deciding everything that goes wrong.
//! - `mutants`: bugs planted in the pipeline and the relay, each of which the simulation must notice.
//! - `crash`: real processes, killed at every await boundary, on SQLite, RabbitMQ and PostgreSQL.
//! - `power`: power failures at thousands of points, on what real processes wrote and did not sync.
//!
//! Each prints a summary line last and exits 1 when a promise breaks.
#![allow(missing_docs, unreachable_pub, reason = "a program, not a library")]

mod crash;
mod error;
mod model;
mod mutants;
mod options;
mod power;
mod simulate;

use std::process::ExitCode;

use clap::Parser as _;

use options::{Cli, Command};

/// What a command found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Kept,
    Broken,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Model(options) => model::run(&options),
        Command::Simulate(options) => simulate::run(&options),
        Command::Mutants(options) => mutants::run(&options),
        Command::Crash(options) => crash::run(&options),
        Command::Power(options) => power::run(&options),
    };
    match result {
        Ok(Verdict::Kept) => ExitCode::SUCCESS,
        Ok(Verdict::Broken) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
