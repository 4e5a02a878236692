//! onlyonce beside other ways to consume from RabbitMQ in Rust: the same messages, the same work, each peer used as its
//! authors advise.
//!
//! `throughput` runs all of them one after another in this process, every round again; `recover` runs each as a process
//! of its own that is killed and whose connections are cut, and counts what became of the messages.

mod lone;
mod measure;
mod peers;
mod queue;
mod recover;
mod store;
mod throughput;
mod work;
mod worker;

use clap::Parser;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// How many unacknowledged messages every peer may hold.
const PREFETCH: u16 = 1_000;

/// How many messages those that work on batches take at most.
const BATCH: usize = 100;

/// Compares onlyonce with other ways to consume from RabbitMQ.
#[derive(Parser)]
enum Args {
    /// Messages per second, CPU, and the time of a message that comes alone.
    Throughput(throughput::Args),
    /// Missing and doubled effects of workers that are killed and whose connections are cut.
    Recover(recover::Args),
    /// One worker that runs until it is killed; `recover` starts it.
    Worker(worker::Args),
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    match Args::parse() {
        Args::Throughput(args) => throughput::compare(&args).await,
        Args::Recover(args) => recover::compare(&args).await,
        Args::Worker(args) => worker::run(args).await,
    }
}
