//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Transfers between accounts, each applied once.
///
/// Without a command: a demo that feeds transfers, duplicates and poison into an embedded queue, kills the worker again and
/// again, and audits what became of them.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub demo: Demo,
    /// What is logged to stderr: error, warn, info, debug or trace.
    #[arg(long, global = true, default_value = "warn")]
    pub log: tracing::Level,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Apply the transfers of a queue.
    Work(Work),
    /// Count what is in the tables.
    Audit(Audit),
    /// Publish transfers.
    Send(Send),
}

#[derive(Args, Clone, Debug)]
pub struct Demo {
    /// How many transfers.
    #[arg(long, default_value_t = 100_000)]
    pub transfers: u64,
    /// How often the worker is killed.
    #[arg(long, default_value_t = 5)]
    pub kills: u64,
    /// Repeats a run's traffic, faults and kills, as far as the machine's timing allows.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Keep queue, ledger and the workers' logs in this folder.
    #[arg(long)]
    pub keep: Option<PathBuf>,
}

/// How an effect is made.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Mode {
    /// In a transaction, with the record that it was.
    Transactional,
    /// By calling a service that honours the key.
    Idempotent,
}

#[derive(Args, Clone, Debug)]
pub struct Work {
    /// The queue's URL.
    #[arg(long)]
    pub source: String,
    /// The URL of the SQLite file, or the PostgreSQL database, with the records and the ledger.
    #[arg(long)]
    pub store: String,
    /// Where messages go that cannot be processed; needed where the queue has no place for them.
    #[arg(long)]
    pub dead_letter: Option<String>,
    /// Keep the queue's records under this identity. Queues under one identity have their records in common.
    #[arg(long)]
    pub identity: Option<String>,
    /// Publish an event for each transfer to the queue of this URL.
    #[arg(long, value_name = "URL")]
    pub events: Option<String>,
    /// Stop when the queue has been empty for this number of seconds.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub drain_when_empty: Option<Duration>,
    #[arg(long, value_enum, default_value_t = Mode::Transactional)]
    pub mode: Mode,
    /// How many handlers run at the same time.
    #[arg(long, default_value_t = 64)]
    pub concurrency: usize,
    /// How many messages are held at most.
    #[arg(long, default_value_t = 1_000)]
    pub prefetch: usize,
    /// How long a dead worker's messages, and the events it was to publish, wait for the next one.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub claim_lease: Duration,
    /// Print the counts at this interval, not only at the end.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub report_every: Option<Duration>,
    #[command(flatten)]
    pub faults: Faults,
}

/// For tests of this program.
#[derive(Args, Clone, Debug)]
pub struct Faults {
    /// Lose acks, fail commits and lose their answers, at random from this seed.
    #[arg(long, hide = true, value_name = "SEED")]
    pub faults: Option<u64>,
    /// Wait this long before the handler.
    #[arg(long, hide = true, value_name = "SECONDS", default_value = "0", value_parser = seconds)]
    pub delay_before: Duration,
    /// Wait this long between the handler's effect and its end.
    #[arg(long, hide = true, value_name = "SECONDS", default_value = "0", value_parser = seconds)]
    pub delay_after: Duration,
}

impl Faults {
    pub fn any(&self) -> bool {
        self.faults.is_some() || !(self.delay_before + self.delay_after).is_zero()
    }
}

#[derive(Args, Clone, Debug)]
pub struct Audit {
    /// The URL of the SQLite file, or the PostgreSQL database, with the ledger.
    #[arg(long)]
    pub store: String,
    /// How many different transfers there must be.
    #[arg(long)]
    pub transfers: Option<u64>,
}

#[derive(Args, Clone, Debug)]
pub struct Send {
    /// The URL of the queue.
    #[arg(long)]
    pub sink: String,
    /// How many different transfers.
    #[arg(long, default_value_t = 1_000)]
    pub count: u64,
    /// How many of them are sent twice, in percent; the second time with another id for the broker, and the same key.
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub duplicates: u8,
    /// How many messages that cannot be processed.
    #[arg(long, default_value_t = 0)]
    pub poison: u64,
    /// Into how many groups the transfers fall; 0: none has a group.
    #[arg(long, default_value_t = 0)]
    pub groups: u64,
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn seconds_may_have_a_fraction_and_no_sign() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        assert!(seconds("-1").is_err() && seconds("soon").is_err());
    }
}
