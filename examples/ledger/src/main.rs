//! A worker that applies transfers to a ledger, each once, whatever happens to it; and what is needed to see that it does.
//!
//! `cargo run -p ledger` shows it. [`worker`] is the part to copy from.
#![allow(missing_docs, unreachable_pub, reason = "a program, not a library")]

mod audit;
mod bank;
mod book;
mod demo;
mod events;
mod faults;
mod fleet;
mod options;
mod report;
mod send;
mod signal;
mod table;
mod traffic;
mod verdict;
mod worker;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser as _;
use onlyonce::{BoxError, Report};

use book::Place;
use options::{Cli, Command, Mode, Work};

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_max_level(cli.log)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match run(cli).await {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "the program's output")]
async fn run(cli: Cli) -> Result<ExitCode, BoxError> {
    let fine = match cli.command {
        None => demo::run(cli.demo).await?,
        Some(Command::Work(options)) => {
            report::print(work(&options).await?);
            true
        }
        Some(Command::Audit(options)) => {
            let audit = options.store.parse::<Place>()?.audit().await?;
            println!("{}", serde_json::to_string(&audit)?);
            audit.is_sound() && audit.has(options.transfers)
        }
        Some(Command::Send(options)) => {
            let sent = send::run(&options).await?;
            println!("{}", serde_json::to_string(&sent)?);
            true
        }
    };
    Ok(if fine {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn work(options: &Work) -> Result<Report, BoxError> {
    match options.store.parse()? {
        Place::Sqlite(config) => on_sqlite(options, config).await,
        #[cfg(feature = "postgres")]
        Place::Postgres(config) => on_postgres(options, *config).await,
    }
}

async fn on_sqlite(options: &Work, config: onlyonce::sqlite::Config) -> Result<Report, BoxError> {
    let bank = bank::open(config.path).await?;
    let report = match options.mode {
        Mode::Idempotent if options.events.is_some() => {
            return Err("events are written in transactions: leave out `--mode idempotent`".into());
        }
        _ if options.faults.any() => faults::run(options, bank).await?,
        Mode::Transactional => worker::run_transactional(options).await?,
        Mode::Idempotent => worker::run_idempotent(options, bank).await?,
    };
    Ok(report)
}

#[cfg(feature = "postgres")]
async fn on_postgres(
    options: &Work,
    config: onlyonce::postgres::Config,
) -> Result<Report, BoxError> {
    match options.mode {
        Mode::Idempotent => Err(
            "the bank of the idempotent mode has a SQLite file: write `--store sqlite:PATH`".into(),
        ),
        Mode::Transactional if options.faults.any() => {
            faults::run_on_postgres(options, config).await
        }
        Mode::Transactional => worker::run_on_postgres(options, config).await,
    }
}
