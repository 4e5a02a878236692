//! Messages per second and RPCs per message on Google's emulator of Pub/Sub, exactly-once subscriptions, all contestants
//! interleaved.

mod contestants;
mod subscription;
mod wire;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum as _;
use contestants::{Contestant, Setup};
use futures_util::future::try_join_all;
use gcloud_pubsub::client::Client;
use tokio::time::{sleep, timeout};
use wire::{Counts, Proxy};

use crate::Error;
use crate::measure::{Cpu, Sample, Summary};
use crate::work::{Effect, Work};

/// Compares clients of Pub/Sub on one emulator.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The emulator: http://HOST:PORT
    #[arg(long, env = "ONLYONCE_PUBSUB_URL")]
    url: String,
    /// Messages per run.
    #[arg(long, default_value_t = 5_000)]
    messages: usize,
    /// Rounds; each runs every contestant once with each number of keys.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Numbers of ordering keys; 0: a subscription without ordering.
    #[arg(long, value_delimiter = ',', default_value = "0,50,5000")]
    keys: Vec<usize>,
    /// After how many seconds a run has stalled.
    #[arg(long, default_value_t = 60)]
    limit: u64,
    /// For how many seconds idle consumers are watched.
    #[arg(long, default_value_t = 60)]
    idle: u64,
    /// Process id of the emulator, to count its CPU time too.
    #[arg(long, env = "ONLYONCE_PUBSUB_PID")]
    emulator_pid: Option<u32>,
    /// Only these contestants.
    #[arg(long, value_enum)]
    only: Vec<Contestant>,
}

impl Args {
    fn emulator(&self) -> String {
        self.url.trim_start_matches("http://").to_owned()
    }

    fn contestants(&self) -> Vec<Contestant> {
        let wanted = |it: &&Contestant| self.only.is_empty() || self.only.contains(it);
        let all = Contestant::value_variants().iter();
        all.filter(wanted).copied().collect()
    }
}

/// One run.
struct Run {
    sample: Sample,
    counts: Counts,
    acked: usize,
    /// Within its time. One that has not has no figures but how far it came.
    finished: bool,
}

pub(crate) async fn compare(args: &Args) -> Result<(), Error> {
    let contestants = args.contestants();
    // By number of keys, then by contestant.
    let mut runs: Vec<Vec<Vec<Run>>> = Vec::new();
    let none = || contestants.iter().map(|_| Vec::new()).collect();
    runs.resize_with(args.keys.len(), none);
    for round in 1..=args.rounds {
        for (keys, runs) in args.keys.iter().zip(&mut runs) {
            for (contestant, runs) in contestants.iter().zip(runs) {
                let run = run(*contestant, *keys, args).await?;
                eprintln!(
                    "{round}/{} {keys} keys, {}: {} acked in {:.1?}, {:?}",
                    args.rounds,
                    contestant.name(),
                    run.acked,
                    run.sample.elapsed,
                    run.counts
                );
                runs.push(run);
            }
        }
    }
    for (keys, runs) in args.keys.iter().zip(&runs) {
        print(*keys, &contestants, runs, args);
    }
    if args.idle > 0 {
        at_rest(&contestants, args).await?;
    }
    Ok(())
}

fn name_of(contestant: Contestant, keys: usize) -> String {
    let nanos = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    format!("{contestant:?}-{keys}-{}", nanos.as_millis())
}

/// A fresh subscription, and a proxy to it.
async fn prepare(
    client: &Client,
    contestant: Contestant,
    (count, keys): (usize, usize),
    args: &Args,
) -> Result<(Setup, Proxy), Error> {
    let name = name_of(contestant, keys);
    subscription::fill(client, &name, count, keys).await?;
    let proxy = Proxy::to(args.emulator()).await?;
    let wanted = count.max(1);
    let work = Work::new(Effect::Nothing, PathBuf::new(), Duration::ZERO, wanted)?;
    let setup = Setup {
        proxy: proxy.address,
        subscription: name,
        work: Arc::new(work),
    };
    Ok((setup, proxy))
}

async fn run(contestant: Contestant, keys: usize, args: &Args) -> Result<Run, Error> {
    let client = subscription::client(args.emulator()).await?;
    let (setup, proxy) = prepare(&client, contestant, (args.messages, keys), args).await?;
    let (cpu, began) = (Cpu::now(args.emulator_pid), Instant::now());
    let drained = timeout(Duration::from_secs(args.limit), contestant.drain(&setup)).await;
    let took = setup.work.last().saturating_duration_since(began);
    let run = Run {
        sample: cpu.sample(args.emulator_pid, took),
        counts: proxy.counts(),
        acked: setup.work.count().min(args.messages),
        finished: matches!(drained, Ok(Ok(()))),
    };
    if let Ok(Err(error)) = drained {
        eprintln!("{}: {error}", contestant.name());
    }
    drop(proxy);
    subscription::delete(&client, &setup.subscription).await?;
    Ok(run)
}

fn print(keys: usize, contestants: &[Contestant], all: &[Vec<Run>], args: &Args) {
    let messages = args.messages;
    println!(
        "\n{messages} messages of 256 bytes, {keys} keys, {} rounds: median (least–most)\n",
        args.rounds
    );
    println!(
        "| | messages/s | × google-cloud-pubsub | RPCs/message | gRPC messages/message, there + back | CPU µs/message, client + emulator | stalled |"
    );
    println!("|---|---|---|---|---|---|---|");
    let official = contestants.iter().zip(all);
    let official = official.filter(|(it, _)| **it == Contestant::Official);
    let official: Vec<&Run> = official.flat_map(|(_, runs)| runs).collect();
    for (contestant, runs) in contestants.iter().zip(all) {
        let finished: Vec<&Run> = runs.iter().filter(|run| run.finished).collect();
        let each =
            |of: fn(&Run) -> f64| Summary::of(finished.iter().map(|run| of(run) / messages as f64));
        let speeds = finished.iter().map(|run| run.sample.per_second(messages));
        println!(
            "| {} | {:.0} | {:.1} | {:.4} | {:.4} + {:.4} | {:.0} + {:.0} | {} |",
            contestant.name(),
            Summary::of(speeds),
            compared(runs, &official),
            each(|run| run.counts.rpcs as f64),
            each(|run| run.counts.there as f64).median,
            each(|run| run.counts.back as f64).median,
            each(|run| micros(run.sample.client_cpu)).median,
            each(|run| micros(run.sample.broker_cpu.unwrap_or_default())).median,
            stalled(runs),
        );
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// How many times as fast, of the rounds in which both have finished.
fn compared(runs: &[Run], official: &[&Run]) -> Summary {
    let pairs = runs.iter().zip(official);
    let finished = pairs.filter(|(run, official)| run.finished && official.finished);
    let seconds = |run: &Run| run.sample.elapsed.as_secs_f64();
    Summary::of(finished.map(|(run, official)| seconds(official) / seconds(run)))
}

/// How many have, and after how many messages.
fn stalled(runs: &[Run]) -> String {
    let short = runs.iter().filter(|run| !run.finished);
    let after: Vec<f64> = short.map(|run| run.acked as f64).collect();
    match after.len() {
        0 => "–".into(),
        count => format!("{count} of {}, after {:.0}", runs.len(), Summary::of(after)),
    }
}

/// RPCs and messages of consumers of empty subscriptions, all at the same time.
async fn at_rest(contestants: &[Contestant], args: &Args) -> Result<(), Error> {
    let watched = contestants.iter().map(|it| idle(*it, args));
    let watched = try_join_all(watched).await?;
    let each = |count: usize| count as f64 * 60.0 / args.idle as f64;
    println!("\nan empty subscription, watched for {} s:\n", args.idle);
    println!("| | RPCs/minute | gRPC messages/minute, there + back |");
    println!("|---|---|---|");
    for (contestant, counts) in contestants.iter().zip(watched) {
        println!(
            "| {} | {:.1} | {:.1} + {:.1} |",
            contestant.name(),
            each(counts.rpcs),
            each(counts.there),
            each(counts.back)
        );
    }
    Ok(())
}

/// What it takes to start is not counted.
async fn idle(contestant: Contestant, args: &Args) -> Result<Counts, Error> {
    const START: Duration = Duration::from_secs(5);
    let client = subscription::client(args.emulator()).await?;
    let (setup, proxy) = prepare(&client, contestant, (0, 50), args).await?;
    let watch = async {
        sleep(START).await;
        let before = proxy.counts();
        sleep(Duration::from_secs(args.idle)).await;
        let after = proxy.counts();
        Counts {
            rpcs: after.rpcs - before.rpcs,
            there: after.there - before.there,
            back: after.back - before.back,
        }
    };
    tokio::select! {
        counts = watch => Ok(counts),
        ended = contestant.drain(&setup) => Err(format!("the consumer ended: {ended:?}").into()),
    }
}
