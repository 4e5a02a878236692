//! onlyonce beside other ways to consume from RabbitMQ and from Google Pub/Sub in Rust: the same messages, the same work, each
//! peer used as its authors advise.
//!
//! On RabbitMQ `throughput` runs all of them one after another in this process, every round again; `recover` runs each as a process
//! of its own that is killed and whose connections are cut, and counts what became of the messages. `pubsub` runs its
//! contestants like `throughput`, and counts their RPCs on the wire.

mod lone;
mod measure;
mod peers;
mod pubsub;
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

/// Compares onlyonce with other ways to consume from RabbitMQ and Pub/Sub.
#[derive(Parser)]
enum Args {
    /// Messages per second, CPU, and the time of a message that comes alone.
    Throughput(throughput::Args),
    /// Missing and doubled effects of workers that are killed and whose connections are cut.
    Recover(recover::Args),
    /// Messages per second and RPCs per message on Pub/Sub's emulator.
    Pubsub(pubsub::Args),
    /// One worker that runs until it is killed; `recover` starts it.
    Worker(worker::Args),
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    match Args::parse() {
        Args::Throughput(args) => throughput::compare(&args).await,
        Args::Recover(args) => recover::compare(&args).await,
        Args::Pubsub(args) => pubsub::compare(&args).await,
        Args::Worker(args) => worker::run(args).await,
    }
}
