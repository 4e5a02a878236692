//! Messages per second, CPU, commits and latency on one RabbitMQ node, all variants interleaved.

mod by_hand;
mod latency;
mod pipelines;
mod queue;

use std::time::Duration;

use queue::{Kind, Queue};

use crate::Error;
use crate::measure::{self, Sample, Summary, ratio};

/// Benchmarks onlyonce against raw lapin on one RabbitMQ node.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The broker, with its vhost: amqp://user:password@host:port/vhost
    #[arg(long, env = "ONLYONCE_RABBITMQ_URL")]
    url: String,
    /// Messages per variant and round.
    #[arg(long, default_value_t = 30_000)]
    messages: usize,
    /// Rounds; each runs every variant once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Process id of the broker, to count its CPU time too.
    #[arg(long)]
    broker_pid: Option<u32>,
}

/// What is compared, in the order of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    ByHandAwaited,
    ByHandNotAwaited,
    ByHandMultiple,
    AtLeastOnce,
    IdempotentMemory,
    IdempotentSqlite,
    TransactionalSqlite,
    BatchesSqlite,
}

const VARIANTS: [(Variant, &str); 8] = [
    (Variant::ByHandAwaited, "lapin, ack awaited one by one"),
    (
        Variant::ByHandNotAwaited,
        "lapin, ack one by one, not awaited",
    ),
    (Variant::ByHandMultiple, "lapin, ack `multiple` every 100"),
    (Variant::AtLeastOnce, "onlyonce at_least_once"),
    (Variant::IdempotentMemory, "onlyonce idempotent, memory"),
    (Variant::IdempotentSqlite, "onlyonce idempotent, SQLite"),
    (
        Variant::TransactionalSqlite,
        "onlyonce transactional, SQLite",
    ),
    (
        Variant::BatchesSqlite,
        "onlyonce transactional, SQLite, batches of 100",
    ),
];

async fn run(variant: Variant, queue: &Queue, args: &Args) -> Result<Sample, Error> {
    queue.fill(args.messages).await?;
    let (count, pid) = (args.messages, args.broker_pid);
    match variant {
        Variant::ByHandAwaited => measure::of(pid, by_hand::awaited(queue, count)).await,
        Variant::ByHandNotAwaited => measure::of(pid, by_hand::not_awaited(queue, count)).await,
        Variant::ByHandMultiple => measure::of(pid, by_hand::multiple(queue, count)).await,
        Variant::AtLeastOnce => measure::of(pid, pipelines::at_least_once(queue, count)).await,
        Variant::IdempotentMemory => {
            measure::of(pid, pipelines::idempotent_memory(queue, count)).await
        }
        Variant::IdempotentSqlite => {
            measure::of(pid, pipelines::idempotent_sqlite(queue, count)).await
        }
        Variant::TransactionalSqlite => {
            measure::of(pid, pipelines::transactional_sqlite(queue, count)).await
        }
        Variant::BatchesSqlite => measure::of(pid, pipelines::batches_sqlite(queue, count)).await,
    }
}

async fn compare(kind: Kind, args: &Args) -> Result<(), Error> {
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); VARIANTS.len()];
    for round in 0..args.rounds {
        for (i, (variant, name)) in VARIANTS.iter().enumerate() {
            let queue = Queue::declare(&args.url, kind).await?;
            let sample = run(*variant, &queue, args).await?;
            queue.delete().await?;
            eprintln!(
                "{kind:?} {}/{} {name}: {:.0}/s",
                round + 1,
                args.rounds,
                sample.per_second(args.messages)
            );
            samples[i].push(sample);
        }
    }
    print(kind, args, &samples);
    Ok(())
}

pub(crate) async fn compare_all(args: &Args) -> Result<(), Error> {
    for kind in [Kind::Classic, Kind::Quorum] {
        compare(kind, args).await?;
    }
    let commit = latency::one_commit()?;
    println!("\none durable commit on this disk: {commit}");
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare(&args.url, kind).await?;
        let by_hand = latency::lone_delivery(&queue).await?;
        let lone = latency::lone_message(&queue).await?;
        queue.delete().await?;
        println!(
            "lone message, {kind:?}, from the publisher's confirm: delivered to a loop by hand {by_hand}; transactional on SQLite committed {} ({:.1} commits), ack written {}",
            lone.committed,
            lone.committed.median / commit.median,
            lone.settled,
        );
    }
    Ok(())
}

fn print(kind: Kind, args: &Args, samples: &[Vec<Sample>]) {
    let speed = |i: usize| -> Vec<f64> {
        let each = samples[i].iter();
        each.map(|s| s.per_second(args.messages)).collect()
    };
    let micros = |time: Duration| time.as_secs_f64() * 1e6 / args.messages as f64;
    let (awaited, multiple) = (speed(0), speed(2));
    println!(
        "\n{kind:?} queue, {} messages of 256 bytes, persistent, prefetch 1000, {} rounds: median (least–most)",
        args.messages, args.rounds
    );
    println!(
        "| | messages/s | × awaited | × `multiple` | CPU µs/message, client + broker | fsynced / other commits per message |"
    );
    println!("|---|---|---|---|---|---|");
    for (i, (_, name)) in VARIANTS.iter().enumerate() {
        let of = &samples[i];
        let client = Summary::of(of.iter().map(|s| micros(s.client_cpu)));
        let broker = Summary::of(of.iter().filter_map(|s| s.broker_cpu.map(micros)));
        let per_message = |n: u64| n as f64 / args.messages as f64;
        let full = Summary::of(of.iter().map(|s| per_message(s.done.full_commits)));
        let normal = Summary::of(of.iter().map(|s| per_message(s.done.normal_commits)));
        println!(
            "| {name} | {:.0} | {} | {} | {:.0} + {:.0} | {:.4} / {:.4} |",
            Summary::of(speed(i)).median,
            ratio(&speed(i), &awaited),
            ratio(&speed(i), &multiple),
            client.median,
            broker.median,
            full.median,
            normal.median,
        );
    }
}
