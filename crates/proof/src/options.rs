//! The command line.

use clap::{Args, Parser, Subcommand};

use crate::simulate::Cut;

/// Shows that the kernel keeps its promises.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check every interleaving of a model of the protocol.
    Model(Model),
    /// Run the real pipeline in virtual time, with everything going wrong that can.
    Simulate(Simulate),
    /// Kill real processes at every await boundary.
    Crash(Crash),
}

#[derive(Args, Clone, Debug)]
pub struct Model {
    /// Only the configurations whose names contain this.
    #[arg(long, default_value = "")]
    pub only: String,
}

#[derive(Args, Clone, Debug)]
pub struct Simulate {
    /// How many seeds.
    #[arg(long, default_value_t = 10_000)]
    pub seeds: u64,
    /// The first of them; otherwise one at random.
    #[arg(long)]
    pub first: Option<u64>,
    /// Run this seed alone, and print what happens.
    #[arg(long)]
    pub seed: Option<u64>,
    #[command(flatten)]
    pub cut: Cut,
}

#[derive(Args, Clone, Debug)]
pub struct Crash {
    /// How often a worker is killed, at least once at every point.
    #[arg(long, default_value_t = 200)]
    pub kills: u64,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
