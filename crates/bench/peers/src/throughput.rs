//! Messages per second, CPU and the time of a message that comes alone, all peers interleaved.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::measure::{Cpu, Sample, Summary, ratio};
use crate::peers::{Peer, Setup};
use crate::queue::{Kind, Queue};
use crate::work::{Effect, Work};
use crate::{Error, PREFETCH, lone};

/// Compares throughput, CPU and latency on one RabbitMQ node.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The broker, with its vhost: amqp://user:password@host:port/vhost
    #[arg(long, env = "ONLYONCE_RABBITMQ_URL")]
    url: String,
    /// The type of the queues. mq-bridge declares its queue without a type: for quorum queues that has to be the vhost's default.
    #[arg(long, value_enum)]
    kind: Kind,
    /// Messages per peer and round.
    #[arg(long, default_value_t = 20_000)]
    messages: usize,
    /// Rounds; each runs every peer once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Process id of the broker, to count its CPU time too.
    #[arg(long)]
    broker_pid: Option<u32>,
    /// Only these peers.
    #[arg(long, value_enum)]
    only: Vec<Peer>,
    /// Within how many seconds a run must have ended.
    #[arg(long, default_value_t = 300)]
    limit: u64,
}

/// Who does which kind of work, in the order of a round. All are compared with the first two.
const NO_EFFECT: [Peer; 9] = [
    Peer::OneByOne,
    Peer::Hundreds,
    Peer::Apalis,
    Peer::RuststreamWorkers,
    Peer::RuststreamBatches,
    Peer::MqBridge,
    Peer::OmniqueueReceive,
    Peer::OmniqueueReceiveAll,
    Peer::AtLeastOnce,
];
const ROW_AND_INBOX: [Peer; 10] = [
    Peer::OneByOne,
    Peer::Hundreds,
    Peer::Apalis,
    Peer::RuststreamWorkers,
    Peer::RuststreamBatches,
    Peer::MqBridge,
    Peer::OmniqueueReceive,
    Peer::OmniqueueReceiveAll,
    Peer::Transactional,
    Peer::TransactionalBatches,
];

/// One peer with all that it did.
struct Row {
    peer: Peer,
    samples: Vec<Sample>,
    lone: Summary,
}

pub(crate) async fn compare(args: &Args) -> Result<(), Error> {
    println!(
        "one durable commit on this disk: {} ms",
        lone::one_commit()?
    );
    compare_with(Effect::Nothing, &chosen(&NO_EFFECT, args), args).await?;
    compare_with(Effect::RowAndInbox, &chosen(&ROW_AND_INBOX, args), args).await
}

fn chosen(all: &[Peer], args: &Args) -> Vec<Peer> {
    let wanted = |peer: &&Peer| args.only.is_empty() || args.only.contains(peer);
    all.iter().filter(wanted).copied().collect()
}

async fn compare_with(effect: Effect, peers: &[Peer], args: &Args) -> Result<(), Error> {
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); peers.len()];
    for round in 1..=args.rounds {
        for (peer, samples) in peers.iter().zip(&mut samples) {
            let sample = run(*peer, effect, args).await?;
            eprintln!(
                "{:?} {effect:?} {round}/{} {}: {:.0}/s",
                args.kind,
                args.rounds,
                peer.name(),
                sample.per_second(args.messages)
            );
            samples.push(sample);
        }
    }
    let mut rows = Vec::new();
    for (peer, samples) in peers.iter().copied().zip(samples) {
        let lone = lone::measure(peer, effect, args.kind, &args.url).await?;
        rows.push(Row {
            peer,
            samples,
            lone,
        });
    }
    print(effect, &rows, args);
    Ok(())
}

async fn run(peer: Peer, effect: Effect, args: &Args) -> Result<Sample, Error> {
    let dir = tempfile::tempdir()?;
    let name = format!("peers-{}", std::process::id());
    let queue = Queue::declare(&args.url, args.kind, name).await?;
    queue.fill(args.messages).await?;
    let database = dir.path().join("effects.db");
    let work = Arc::new(Work::new(effect, database, Duration::ZERO, args.messages)?);
    let setup = Setup {
        url: args.url.clone(),
        queue: queue.name.clone(),
        kind: args.kind,
        dead_letters: None,
        alone: false,
        work: work.clone(),
    };
    let (cpu, began) = (Cpu::now(args.broker_pid), Instant::now());
    let consumed = timeout(Duration::from_secs(args.limit), peer.consume(&setup)).await;
    let sample = cpu.sample(
        args.broker_pid,
        work.last().saturating_duration_since(began),
    );
    let name = peer.name();
    let done = work.count();
    consumed.map_err(|_| format!("{name}: {done} messages within {} s", args.limit))??;
    let waiting = queue.left().await?;
    if waiting > 0 {
        eprintln!("{name}: {waiting} messages were not acknowledged");
    }
    queue.delete().await?;
    Ok(sample)
}

fn print(effect: Effect, rows: &[Row], args: &Args) {
    let speed = |row: &Row| -> Vec<f64> {
        let each = row.samples.iter();
        each.map(|s| s.per_second(args.messages)).collect()
    };
    let speeds: Vec<Vec<f64>> = rows.iter().map(speed).collect();
    let compared = |with: Peer, speed: &[f64]| {
        let found = rows.iter().position(|row| row.peer == with);
        found.map_or("–".into(), |i| ratio(speed, &speeds[i]).to_string())
    };
    let micros = |time: Duration| time.as_secs_f64() * 1e6 / args.messages as f64;
    println!(
        "\n{:?} queue, {effect:?}, {} messages of 256 bytes, persistent, prefetch {PREFETCH}, {} rounds: median (least–most)\n",
        args.kind, args.messages, args.rounds
    );
    println!(
        "| | messages/s | × one by one | × up to 100 | CPU µs/message, client + broker | lone message, ms |"
    );
    println!("|---|---|---|---|---|---|");
    for (row, speed) in rows.iter().zip(&speeds) {
        let client = Summary::of(row.samples.iter().map(|s| micros(s.client_cpu)));
        let broker = Summary::of(row.samples.iter().filter_map(|s| s.broker_cpu.map(micros)));
        println!(
            "| {} | {:.0} | {} | {} | {:.0} + {:.0} | {} |",
            row.peer.name(),
            Summary::of(speed.iter().copied()).median,
            compared(Peer::OneByOne, speed),
            compared(Peer::Hundreds, speed),
            client.median,
            broker.median,
            row.lone,
        );
    }
}
