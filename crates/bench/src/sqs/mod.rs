//! Requests per message on SQS, which is what its users pay for and are throttled by.

mod by_hand;
mod calls;
mod pipelines;
mod queue;

use std::future::Future;
use std::time::Duration;

use calls::{Calls, Counts};
use queue::Queue;
use tokio::time::sleep;

use crate::Error;
use crate::measure::Summary;

/// Counts requests on one SQS endpoint.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where SQS is: an emulator's http://HOST:PORT.
    #[arg(long, env = "ONLYONCE_MINISTACK_URL")]
    endpoint: String,
    /// Messages per variant and round.
    #[arg(long, default_value_t = 5_000)]
    messages: usize,
    /// Rounds; each runs every variant once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// For how many seconds an idle consumer is watched.
    #[arg(long, default_value_t = 120)]
    idle: u64,
}

#[derive(Clone, Copy)]
enum Variant {
    Example,
    Batches,
    AtLeastOnce,
    Transactional,
}

/// What is in the queue: how many messages of a group in a row, and in how many groups; none: a standard queue.
#[derive(Clone, Copy)]
struct Load {
    groups: usize,
    run: usize,
    name: &'static str,
}

const MANY: Load = Load {
    groups: 200,
    run: 10,
    name: "200",
};
const FEW: Load = Load {
    groups: 10,
    run: 10,
    name: "10, ten of each in a row",
};
const MIXED: Load = Load {
    groups: 10,
    run: 1,
    name: "10, taking turns",
};
const STANDARD: Load = Load {
    groups: 0,
    run: 1,
    name: "standard queue",
};

const VARIANTS: [(Variant, Load, &str); 9] = [
    (Variant::Example, MANY, "AWS's example: one by one"),
    (Variant::Batches, MANY, "by hand, batches of ten"),
    (Variant::AtLeastOnce, MANY, "onlyonce at_least_once"),
    (
        Variant::Transactional,
        MANY,
        "onlyonce transactional, SQLite",
    ),
    (Variant::Batches, FEW, "by hand, batches of ten"),
    (Variant::AtLeastOnce, FEW, "onlyonce at_least_once"),
    (
        Variant::Transactional,
        FEW,
        "onlyonce transactional, SQLite",
    ),
    (
        Variant::Transactional,
        MIXED,
        "onlyonce transactional, SQLite",
    ),
    (Variant::AtLeastOnce, STANDARD, "onlyonce at_least_once"),
];

struct Sample {
    seconds: f64,
    counts: Counts,
}

pub(crate) async fn count_all(args: &Args) -> Result<(), Error> {
    let mut samples: Vec<Vec<Sample>> = VARIANTS.iter().map(|_| Vec::new()).collect();
    for round in 1..=args.rounds {
        for ((variant, load, name), samples) in VARIANTS.iter().zip(&mut samples) {
            let sample = at_full_load(*variant, *load, args).await?;
            let each = sample.counts.total() as f64 / args.messages as f64;
            eprintln!("{round}/{} {name}, {}: {each:.3}", args.rounds, load.name);
            samples.push(sample);
        }
    }
    print(args, &samples);
    at_rest(args).await?;
    slow_handlers(args).await
}

async fn at_full_load(variant: Variant, load: Load, args: &Args) -> Result<Sample, Error> {
    let calls = Calls::default();
    let queue = Queue::create(&args.endpoint, load.groups > 0, 30, &calls).await?;
    queue.fill(args.messages, load.groups, load.run).await?;
    calls.reset();
    let count = args.messages;
    let took = match variant {
        Variant::Example => by_hand::one_by_one(&queue, count).await?,
        Variant::Batches => by_hand::batches(&queue, count).await?,
        Variant::AtLeastOnce => pipelines::at_least_once(&queue, count).await?,
        Variant::Transactional => pipelines::transactional(&queue, count).await?,
    };
    let sample = Sample {
        seconds: took.as_secs_f64(),
        counts: calls.counts(),
    };
    queue.delete().await?;
    Ok(sample)
}

fn print(args: &Args, samples: &[Vec<Sample>]) {
    let each = |count: usize| count as f64 / args.messages as f64;
    println!(
        "\n{} messages of 256 bytes, {} rounds: median (least–most)\n",
        args.messages, args.rounds
    );
    println!("| | groups | requests/message | receive | delete | change visibility | messages/s |");
    println!("|---|---|---|---|---|---|---|");
    for ((_, load, name), samples) in VARIANTS.iter().zip(samples) {
        let of = |count: fn(&Counts) -> usize| {
            Summary::of(samples.iter().map(|s| each(count(&s.counts))))
        };
        println!(
            "| {name} | {} | {:.3} | {:.3} | {:.3} | {:.3} | {:.0} |",
            load.name,
            of(Counts::total),
            of(|counts| counts.receive),
            of(|counts| counts.delete),
            of(|counts| counts.change_visibility),
            Summary::of(samples.iter().map(|s| args.messages as f64 / s.seconds)).median,
        );
    }
}

/// Requests a minute of a consumer of an empty queue.
async fn at_rest(args: &Args) -> Result<(), Error> {
    println!("\nan empty queue, watched for {} s:\n", args.idle);
    println!("| | requests/minute |");
    println!("|---|---|");
    let example = idle(
        args,
        |queue| async move { by_hand::one_by_one(&queue, 1).await },
    );
    println!("| AWS's example: no long poll | {:.1} |", example.await?);
    let batches = idle(
        args,
        |queue| async move { by_hand::batches(&queue, 1).await },
    );
    println!("| by hand, long polls | {:.1} |", batches.await?);
    let pipeline = idle(args, |queue| async move {
        pipelines::at_least_once(&queue, 1).await
    });
    println!("| onlyonce | {:.1} |", pipeline.await?);
    Ok(())
}

async fn idle<F>(args: &Args, consume: impl FnOnce(Queue) -> F) -> Result<f64, Error>
where
    F: Future<Output = Result<Duration, Error>>,
{
    let calls = Calls::default();
    let queue = Queue::create(&args.endpoint, true, 30, &calls).await?;
    let watch = async {
        while calls.counts().receive == 0 {
            sleep(Duration::from_millis(10)).await;
        }
        calls.reset();
        sleep(Duration::from_secs(args.idle)).await;
        calls.counts().total() as f64 * 60.0 / args.idle as f64
    };
    tokio::select! {
        rate = watch => Ok(rate),
        ended = consume(queue) => Err(format!("the consumer ended: {ended:?}").into()),
    }
}

/// Handlers that take three times the visibility timeout.
async fn slow_handlers(args: &Args) -> Result<(), Error> {
    const MESSAGES: usize = 20;
    let calls = Calls::default();
    let queue = Queue::create(&args.endpoint, true, 4, &calls).await?;
    queue.fill(MESSAGES, MESSAGES, 1).await?;
    calls.reset();
    let runs = pipelines::slow(&queue, MESSAGES, Duration::from_secs(12)).await?;
    let counts = calls.counts();
    println!(
        "\n{MESSAGES} handlers of 12 s side by side, visibility timeout 4 s: {runs} runs, {} requests to receive, {} to extend, {} to delete",
        counts.receive, counts.change_visibility, counts.delete
    );
    Ok(())
}
