//! How long messages take while a partition is emptied and the next one is opened, and how long when not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use onlyonce::driver::Store as _;
use onlyonce::postgres::sqlx::{self, AssertSqlSafe};

use super::{Args, FULL, Server, Stored, millis, quantile};
use crate::Error;
use crate::measure::{Summary, ratio};

/// Messages at the same time.
const WORKERS: usize = 4;
/// Between two prunes, in which messages are measured, too.
const BETWEEN: Duration = Duration::from_secs(2);

const SECOND: Duration = Duration::from_secs(1);

/// From when to when something lasted.
type Span = (Instant, Instant);

/// What was measured in one round, in milliseconds.
struct Round {
    quiet: Vec<f64>,
    pruning: Vec<f64>,
    /// Within a second from the begin of a prune, those above included.
    around: Vec<f64>,
    prunes: Vec<f64>,
}

pub(super) async fn compare(server: &Server, args: &Args) -> Result<(), Error> {
    let stored = Arc::new(Stored::new(server).await?);
    stored
        .fill_slot(FULL.len() - 1, args.records / FULL.len())
        .await?;
    let next = Arc::new(AtomicU64::new(0));
    let mut rounds = Vec::new();
    for _ in 0..args.prunings {
        refill(&stored, args).await?;
        rounds.push(round(&stored, &next).await?);
    }
    tell(args, &rounds);
    Arc::into_inner(stored)
        .ok_or("somebody still uses the store")?
        .end()
        .await
}

/// All but the last partition are as they were before they were emptied.
async fn refill(stored: &Stored, args: &Args) -> Result<(), Error> {
    let beyond = FULL.len()..8;
    let beyond: Vec<String> = beyond.map(|slot| format!("{{}}record_{slot}")).collect();
    stored
        .run(&format!("TRUNCATE {}", beyond.join(", ")))
        .await?;
    for slot in &FULL[..FULL.len() - 1] {
        stored.fill_slot(*slot, args.records / FULL.len()).await?;
    }
    stored.stand_at_the_last().await
}

async fn round(stored: &Arc<Stored>, next: &Arc<AtomicU64>) -> Result<Round, Error> {
    let done = Arc::new(AtomicBool::new(false));
    let workers = (0..WORKERS).map(|_| {
        let (stored, next, done) = (Arc::clone(stored), Arc::clone(next), Arc::clone(&done));
        tokio::spawn(async move { work(&stored, &next, &done).await })
    });
    let workers: Vec<_> = workers.collect();
    tokio::time::sleep(BETWEEN).await;
    let began = Instant::now();
    let mut prunes = Vec::new();
    for slot in &FULL[..FULL.len() - 1] {
        tokio::time::sleep(BETWEEN).await;
        prunes.extend(prune(stored, *slot).await?);
    }
    tokio::time::sleep(BETWEEN).await;
    done.store(true, Relaxed);
    let mut messages = Vec::new();
    for worker in workers {
        messages.extend(worker.await??);
    }
    // The first ones open connections.
    messages.retain(|(begin, _)| *begin >= began);
    Ok(Round::of(messages, &prunes))
}

impl Round {
    fn of(mut messages: Vec<Span>, prunes: &[Span]) -> Self {
        let during = |spans: &[Span]| -> Vec<Span> {
            let overlaps =
                |(begin, end): &Span| spans.iter().any(|(from, to)| begin < to && from < end);
            messages.iter().copied().filter(overlaps).collect()
        };
        let seconds: Vec<Span> = prunes
            .iter()
            .map(|(from, _)| (*from, *from + SECOND))
            .collect();
        let (pruning, around) = (during(prunes), during(&seconds));
        messages.retain(|message| !around.contains(message));
        Self {
            quiet: lengths(&messages),
            pruning: lengths(&pruning),
            around: lengths(&around),
            prunes: lengths(prunes),
        }
    }
}

fn lengths(spans: &[Span]) -> Vec<f64> {
    spans.iter().map(|(from, to)| millis(*to - *from)).collect()
}

/// The records of this partition have expired, and the present one has had its time: prunes until both are dealt with.
async fn prune(stored: &Stored, slot: usize) -> Result<Vec<Span>, Error> {
    let age = "UPDATE {}slot SET closed_at = '-infinity' WHERE id = SLOT;
        UPDATE {}slot SET opened_at = '-infinity' WHERE opened_at IS NOT NULL AND closed_at IS NULL";
    stored.run(&age.replace("SLOT", &slot.to_string())).await?;
    let is_left = format!(
        "SELECT EXISTS (SELECT FROM {0}.onlyonce_slot WHERE closed_at = '-infinity' OR (opened_at = '-infinity' AND closed_at IS NULL))",
        stored.bench.schema
    );
    let mut conn = stored.connect().await?;
    let mut spans = Vec::new();
    loop {
        let began = Instant::now();
        stored.store.prune(1_000).await?;
        spans.push((began, Instant::now()));
        let is_left: bool = sqlx::query_scalar(AssertSqlSafe(is_left.as_str()))
            .fetch_one(&mut conn)
            .await?;
        if !is_left {
            return Ok(spans);
        }
    }
}

/// Takes one message after another.
async fn work(stored: &Stored, next: &AtomicU64, done: &AtomicBool) -> Result<Vec<Span>, Error> {
    let mut spans = Vec::new();
    while !done.load(Relaxed) {
        let n = next.fetch_add(1, Relaxed);
        let began = Instant::now();
        stored.message(n).await?;
        spans.push((began, Instant::now()));
    }
    Ok(spans)
}

#[expect(clippy::print_stdout, reason = "the benchmark's output")]
fn tell(args: &Args, rounds: &[Round]) {
    println!(
        "\n{WORKERS} messages at the same time, {} prunes of {} records each per round, {} rounds: milliseconds, median (least–most) of the rounds\n",
        FULL.len() - 1,
        args.records / FULL.len(),
        args.prunings
    );
    println!(
        "| | no prune within a second | in the second from a prune's begin | × | while a prune runs | × |\n|---|---|---|---|---|---|"
    );
    for (name, share) in [("median", 0.5), ("99th percentile", 0.99), ("most", 1.0)] {
        let of = |part: fn(&Round) -> &Vec<f64>| -> Vec<f64> {
            rounds
                .iter()
                .map(|round| quantile(part(round), share))
                .collect()
        };
        let (quiet, around, pruning) = (of(|r| &r.quiet), of(|r| &r.around), of(|r| &r.pruning));
        let summary = |values: &[f64]| Summary::of(values.iter().copied());
        println!(
            "| {name} | {:.2} | {:.2} | {} | {:.2} | {} |",
            summary(&quiet),
            summary(&around),
            ratio(&around, &quiet),
            summary(&pruning),
            ratio(&pruning, &quiet)
        );
    }
    let of_all =
        |part: fn(&Round) -> &Vec<f64>| rounds.iter().flat_map(part).copied().collect::<Vec<_>>();
    let (quiet, pruning, prunes) = (
        of_all(|r| &r.quiet),
        of_all(|r| &r.pruning),
        of_all(|r| &r.prunes),
    );
    println!(
        "\n{} messages with no prune within a second, {} while one of {} calls of `prune` ran, which took {:.1} ms",
        quiet.len(),
        pruning.len(),
        prunes.len(),
        Summary::of(prunes)
    );
}
