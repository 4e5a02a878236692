//! Prints how many records and messages a second the store and the queue take, and what a record costs:
//! `cargo bench -p onlyonce-sqlite [-- KEYS]`, one million keys unless told otherwise.
//!
//! `cargo bench -p onlyonce-sqlite -- --growth DIR [SIZE …]` fills a file for each size (10 and 100 million records unless
//! told otherwise: 8 GB) and compares what records cost there with an empty file.

mod growth;
#[path = "../measure/mod.rs"]
mod measure;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use onlyonce_core::Error;
use onlyonce_core::Message;
use onlyonce_core::driver::ClaimResult;
use onlyonce_core::driver::{
    Claim, Completion, Disposition, Fingerprint, HeldClaim, KeyDigest, Owner, ReceiveLimits,
    Settlement, Sink, Source, Store, Token, Transaction, TransactionalStore,
};
use onlyonce_sqlite::{Commits, Config, Database, SqliteQueue, SqliteStore};

use measure::cpu;

const LEASE: Duration = Duration::from_secs(600);
const DAY: Duration = Duration::from_secs(86_400);
const QUEUED: usize = 100_000;

const SIZES: [usize; 2] = [10_000_000, 100_000_000];

#[tokio::main]
async fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().collect();
    let mut numbers: Vec<usize> = args.iter().filter_map(|arg| arg.parse().ok()).collect();
    let after = |flag: &str| args.windows(2).find(|pair| pair[0] == flag);
    if let Some(path) = after("--measure") {
        return growth::measure_here(Path::new(&path[1])).await;
    }
    if let Some(dir) = after("--growth") {
        if numbers.is_empty() {
            numbers.extend(SIZES);
        }
        return growth::compare(Path::new(&dir[1]), &numbers).await;
    }
    everything(numbers.first().copied().unwrap_or(1_000_000)).await
}

async fn everything(keys: usize) -> Result<(), Error> {
    let dir = tempfile::tempdir().expect("a directory for the bench");
    let config = Config::new(dir.path().join("bench.db")).queue("bench");
    let store = SqliteStore::open(config.clone()).await?;
    println!("random keys, claim and complete, 4 callers with batches of 128:");
    print_records(&store, keys, 4, 128).await?;
    println!("the same, 512 callers with one key each:");
    print_records(&store, (keys / 10).clamp(512, 100_000), 512, 1).await?;
    println!("transactions with one effect each, 64 callers:");
    transactions(&store, (keys / 20).clamp(64, 50_000), 64).await?;
    drop(store);
    for groups in [0, 200] {
        println!("queue, {QUEUED} messages ready in {groups} groups (0: none), batches of 256:");
        queue(&config, groups).await?;
    }
    Ok(())
}

async fn print_records(
    store: &SqliteStore,
    total: usize,
    callers: usize,
    batch: usize,
) -> Result<(), Error> {
    let (cost, slowest) = records(store, total, callers, batch).await?;
    cost.print(total, "records");
    println!("  slowest call {slowest:.0?}");
    Ok(())
}

/// Claims and completes new keys until there are `total` more; also says how long the slowest call took.
async fn records(
    store: &SqliteStore,
    total: usize,
    callers: usize,
    batch: usize,
) -> Result<(Cost, Duration), Error> {
    let meter = Meter::start(store.database());
    let mut tasks = Vec::new();
    for _ in 0..callers {
        let store = store.clone();
        let rounds = total / callers / batch;
        tasks.push(tokio::spawn(async move {
            let owner = Owner::random();
            let mut slowest = Duration::ZERO;
            for _ in 0..rounds {
                slowest = slowest.max(claim_and_complete(&store, owner, batch).await?);
            }
            Ok::<_, Error>(slowest)
        }));
    }
    let mut slowest = Duration::ZERO;
    for task in tasks {
        slowest = slowest.max(task.await.expect("no panic")?);
    }
    Ok((meter.stop(store.database()), slowest))
}

/// Returns how long the slower of the two calls took.
async fn claim_and_complete(
    store: &SqliteStore,
    owner: Owner,
    n: usize,
) -> Result<Duration, Error> {
    let batch: Vec<Claim> = (0..n).map(|_| random_claim()).collect();
    let began = Instant::now();
    let claimed = store.claim(owner, &batch, LEASE).await?;
    let claiming = began.elapsed();
    let done: Vec<Completion> = batch
        .iter()
        .zip(&claimed)
        .map(|(claim, claimed)| completion(*claim, token(claimed)))
        .collect();
    let began = Instant::now();
    let verdicts = store.complete(&done).await?;
    let completing = began.elapsed();
    for verdict in verdicts {
        verdict.expect("nobody else has it");
    }
    Ok(claiming.max(completing))
}

fn random_claim() -> Claim {
    Claim::new(
        KeyDigest(fastrand::u128(..).to_le_bytes()),
        Fingerprint(fastrand::u128(..).to_le_bytes()),
    )
}

fn token(claimed: &ClaimResult) -> Token {
    match claimed {
        ClaimResult::Acquired { token, .. } => *token,
        other => panic!("a random key is not new: {other:?}"),
    }
}

fn completion(claim: Claim, token: Token) -> Completion {
    Completion::new(
        HeldClaim::new(claim.key, token),
        claim.fingerprint,
        None,
        DAY,
    )
}

/// Claims, writes an effect and completes it in one transaction per message.
async fn transactions(store: &SqliteStore, total: usize, callers: usize) -> Result<(), Error> {
    let database = store.database();
    database
        .with(|conn| conn.execute_batch("CREATE TABLE effect (n INTEGER PRIMARY KEY, text)"))
        .await?;
    let meter = Meter::start(database);
    let mut tasks = Vec::new();
    for _ in 0..callers {
        let store = store.clone();
        tasks.push(tokio::spawn(async move {
            let owner = Owner::random();
            for _ in 0..total / callers {
                let claim = random_claim();
                let claimed = store.claim(owner, &[claim], LEASE).await?;
                let mut tx = store.begin().await?;
                tx.execute("INSERT INTO effect (text) VALUES (?1)", ["an effect"])
                    .await?;
                let done = completion(claim, token(&claimed[0]));
                let verdict = tx.complete_and_commit(std::slice::from_ref(&done)).await?;
                verdict.expect("nobody else has it");
            }
            Ok::<_, Error>(())
        }));
    }
    for task in tasks {
        task.await.expect("no panic")?;
    }
    meter.stop(database).print(total, "transactions");
    Ok(())
}

async fn queue(config: &Config, groups: usize) -> Result<(), Error> {
    let queue = Arc::new(SqliteQueue::open(config.clone()).await?);
    let meter = Meter::start(queue.database());
    for start in (0..QUEUED).step_by(1_000) {
        let message = |n: usize| {
            let message = Message::new(vec![7; 200]).with_dedup_id(format!("message-{n}"));
            match n.checked_rem(groups) {
                Some(group) => message.with_group(format!("group-{group}")),
                None => message,
            }
        };
        let batch: Vec<Message> = (start..start + 1_000).map(message).collect();
        for result in queue.publish(&batch).await {
            result?;
        }
    }
    meter.stop(queue.database()).print(QUEUED, "published");
    let meter = Meter::start(queue.database());
    let limit = ReceiveLimits::new(256, Duration::ZERO);
    let mut settling = VecDeque::new();
    let mut received = 0;
    while received < QUEUED {
        let deliveries = queue.receive(limit).await?;
        received += deliveries.len();
        let queue = Arc::clone(&queue);
        settling.push_back(tokio::spawn(async move {
            let ack =
                |d: onlyonce_core::driver::Delivery| Settlement::new(d.receipt, Disposition::Ack);
            let batch: Vec<Settlement> = deliveries.into_iter().map(ack).collect();
            let answers = queue.settle(&batch).await;
            assert!(answers.iter().all(|answer| answer.is_applied()));
        }));
        // With groups, what is out has to come back before the next of its group.
        while settling.len() > if groups == 0 { 4 } else { 0 } {
            let settled = settling.pop_front().expect("there is one");
            settled.await.expect("no panic");
        }
    }
    for settled in settling {
        settled.await.expect("no panic");
    }
    meter
        .stop(queue.database())
        .print(QUEUED, "received and acked");
    Ok(())
}

struct Meter {
    began: Instant,
    cpu: Duration,
    written: Option<u64>,
    commits: Commits,
}

impl Meter {
    fn start(database: &Database) -> Self {
        Self {
            commits: database.commits(),
            cpu: cpu(),
            written: written(),
            began: Instant::now(),
        }
    }

    fn stop(&self, database: &Database) -> Cost {
        let now = database.commits();
        Cost {
            took: self.began.elapsed(),
            cpu: cpu() - self.cpu,
            written: written().zip(self.written).map(|(now, then)| now - then),
            full: now.full - self.commits.full,
            normal: now.normal - self.commits.normal,
        }
    }
}

/// What some work took.
struct Cost {
    took: Duration,
    cpu: Duration,
    written: Option<u64>,
    /// Commits, synced and not.
    full: u64,
    normal: u64,
}

impl Cost {
    fn print(&self, n: usize, what: &str) {
        let Self {
            took, full, normal, ..
        } = self;
        let each = |total: f64| total / n as f64;
        let cpu = each(self.cpu.as_secs_f64() * 1e6);
        let written = self.written.map_or(String::new(), |bytes| {
            format!(", {:.0} bytes written each", each(bytes as f64))
        });
        println!(
            "  {n} {what} in {took:.2?}: {:.0}/s, {cpu:.2} µs of CPU{written}, {full} synced commits ({:.1} per sync), \
             {normal} others",
            n as f64 / took.as_secs_f64(),
            n as f64 / (*full).max(1) as f64,
        );
    }
}

/// How many bytes this process has written to files, where the system says so.
fn written() -> Option<u64> {
    let io = std::fs::read_to_string("/proc/self/io").ok()?;
    let line = io.lines().find_map(|line| line.strip_prefix("wchar: "))?;
    line.parse().ok()
}

/// How many bytes of memory this process has in use, where the system says so.
fn memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: f64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes * 1024.0)
}
