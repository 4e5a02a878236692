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
    /// Plant bugs, one after another, and see whether the simulation notices.
    Mutants(Mutants),
    /// Kill real processes at every await boundary.
    Crash(Crash),
    /// Let the power fail at thousands of points of what real processes write.
    Power(Power),
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
    /// Do not look for a smaller run that breaks the same promise.
    #[arg(long, hide = true)]
    pub no_shrink: bool,
    #[command(flatten)]
    pub cut: Cut,
}

#[derive(Args, Clone, Debug)]
pub struct Mutants {
    /// The most seeds for each bug.
    #[arg(long, default_value_t = 100_000)]
    pub seeds: u64,
    /// Only the bugs whose names contain this.
    #[arg(long, default_value = "", conflicts_with = "write")]
    pub only: String,
    /// Only if the code is not the one for which the table in the docs was written.
    #[arg(long)]
    pub unless_known: bool,
    /// Write the table into the docs.
    #[arg(long)]
    pub write: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Crash {
    /// How often a worker is killed, at least once at every point.
    #[arg(long, default_value_t = 200)]
    pub kills: u64,
    /// Of the traffic, and of where is killed; otherwise one at random.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Kill workers of this RabbitMQ, for example amqp://guest:guest@127.0.0.1:5672; otherwise those of queues in SQLite.
    #[arg(long, value_name = "URL")]
    pub rabbitmq: Option<String>,
    /// Kill workers whose store, ledger and outbox are in this PostgreSQL database, for example
    /// postgres://worker:password@127.0.0.1/test.
    #[arg(long, value_name = "URL", conflicts_with = "rabbitmq")]
    pub postgres: Option<String>,
    /// Be the worker that is killed.
    #[arg(long, hide = true)]
    pub worker: Option<String>,
}

#[derive(Args, Clone, Debug)]
pub struct Power {
    /// How often the power fails.
    #[arg(long, default_value_t = 2_000)]
    pub cuts: usize,
    /// Of the traffic, and of where the power fails; otherwise one at random.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Be the worker that writes.
    #[arg(long, hide = true)]
    pub worker: Option<String>,
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
