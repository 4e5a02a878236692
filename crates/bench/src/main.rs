//! What onlyonce costs, beside the loops that people write by hand on the same client.
//!
//! On a shared machine absolute figures drift, ratios of one interleaved run hardly do, and counts not at all.
//! `tests/run bench` starts the brokers too.

mod measure;
mod postgres;
mod rabbitmq;
mod sqs;

use clap::Parser;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Benchmarks onlyonce against loops written by hand.
#[derive(Parser)]
enum Args {
    /// Messages per second, CPU, commits and latency on one RabbitMQ node.
    Rabbitmq(rabbitmq::Args),
    /// Messages per second, commits, round trips and WAL on one PostgreSQL server; a message that comes alone.
    Postgres(postgres::Args),
    /// Requests per message on SQS: at full load, with few groups, at rest and with slow handlers.
    Sqs(sqs::Args),
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    match Args::parse() {
        Args::Rabbitmq(args) => rabbitmq::compare_all(&args).await,
        Args::Postgres(args) => postgres::compare_all(&args).await,
        Args::Sqs(args) => sqs::count_all(&args).await,
    }
}
