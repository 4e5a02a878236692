//! Prints how many records and messages a second the store and the queue take, and what a record costs:
//! `cargo bench -p onlyonce-sqlite [-- [KEYS] [--in DIR]]`.
//!
//! One million keys unless told otherwise; ten million take four minutes and 0.6 GB. With `--in`, only records are
//! measured, and the file is kept in that directory for the next run to go on with.

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

const LEASE: Duration = Duration::from_secs(600);
const DAY: Duration = Duration::from_secs(86_400);
const QUEUED: usize = 100_000;

/// How many records each figure is about, and how many are in the file by then.
const SAMPLE: usize = 500_000;
const DECADES: [usize; 3] = [1_000_000, 10_000_000, 100_000_000];

#[tokio::main]
async fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().collect();
    let keys = args.iter().find_map(|arg| arg.parse().ok());
    let keys: usize = keys.unwrap_or(1_000_000);
    let temporary = tempfile::tempdir().expect("a directory for the bench");
    let kept = args.windows(2).find(|pair| pair[0] == "--in");
    let dir = kept.map_or(temporary.path(), |pair| Path::new(&pair[1]));
    let config = Config::new(dir.join("bench.db")).queue("bench");

    let began = Instant::now();
    let store = SqliteStore::open(config.clone()).await?;
    println!(
        "{} bytes of disk, opened in {:.1?}",
        size(dir),
        began.elapsed()
    );
    println!("random keys, claim and complete, 4 callers with batches of 128:");
    grow(&store, keys).await?;
    println!("{} bytes of disk, {} of memory", size(dir), memory());
    if kept.is_some() {
        return Ok(());
    }
    println!("the same, 512 callers with one key each:");
    records(&store, (keys / 10).clamp(512, 100_000), 512, 1).await?;
    println!("transactions with one effect each, 64 callers:");
    transactions(&store, (keys / 20).clamp(64, 50_000), 64).await?;
    drop(store);
    for groups in [0, 200] {
        println!("queue, {QUEUED} messages ready in {groups} groups (0: none), batches of 256:");
        queue(&config, groups).await?;
    }
    Ok(())
}

/// Adds records until there are `keys` more, with a sample at the beginning and before each power of ten.
async fn grow(store: &SqliteStore, keys: usize) -> Result<(), Error> {
    let steps = DECADES.into_iter().filter(|step| *step < keys);
    let mut there = SAMPLE.min(keys);
    records(store, there, 4, 128).await?;
    for step in steps.chain([keys]) {
        for total in [
            step.saturating_sub(SAMPLE + there),
            SAMPLE.min(step - there),
        ] {
            if total > 0 {
                records(store, total, 4, 128).await?;
                there += total;
            }
        }
        println!("  {there} more by now");
    }
    Ok(())
}

/// Claims and completes new keys until there are `total` more.
async fn records(
    store: &SqliteStore,
    total: usize,
    callers: usize,
    batch: usize,
) -> Result<(), Error> {
    let meter = Meter::start(store.database());
    let mut tasks = Vec::new();
    for _ in 0..callers {
        let store = store.clone();
        let rounds = total / callers / batch;
        tasks.push(tokio::spawn(async move {
            let owner = Owner::random();
            let mut slowest = Duration::ZERO;
            for _ in 0..rounds {
                let began = Instant::now();
                claim_and_complete(&store, owner, batch).await?;
                slowest = slowest.max(began.elapsed());
            }
            Ok::<_, Error>(slowest)
        }));
    }
    let mut slowest = Duration::ZERO;
    for task in tasks {
        slowest = slowest.max(task.await.expect("no panic")?);
    }
    meter.print(store.database(), total, "records", Some(slowest));
    Ok(())
}

async fn claim_and_complete(store: &SqliteStore, owner: Owner, n: usize) -> Result<(), Error> {
    let batch: Vec<Claim> = (0..n).map(|_| random_claim()).collect();
    let claimed = store.claim(owner, &batch, LEASE).await?;
    let done: Vec<Completion> = batch
        .iter()
        .zip(&claimed)
        .map(|(claim, claimed)| completion(*claim, token(claimed)))
        .collect();
    for verdict in store.complete(&done).await? {
        verdict.expect("nobody else has it");
    }
    Ok(())
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
    meter.print(database, total, "transactions", None);
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
    meter.print(queue.database(), QUEUED, "published", None);
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
    meter.print(queue.database(), QUEUED, "received and acked", None);
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

    fn print(&self, database: &Database, n: usize, what: &str, slowest: Option<Duration>) {
        let took = self.began.elapsed();
        let now = database.commits();
        let (full, normal) = (
            now.full - self.commits.full,
            now.normal - self.commits.normal,
        );
        let each = |total: f64| total / n as f64;
        let cpu = each((cpu() - self.cpu).as_secs_f64() * 1e6);
        let written = written().zip(self.written).map(|(now, then)| now - then);
        let written = written.map_or(String::new(), |w| {
            format!(", {:.0} bytes written each", each(w as f64))
        });
        let slowest = slowest.map_or(String::new(), |s| format!(", slowest call pair {s:.0?}"));
        println!(
            "  {n} {what} in {took:.2?}: {:.0}/s, {cpu:.2} µs of CPU{written}, {full} synced commits ({:.1} per sync), \
             {normal} others{slowest}",
            n as f64 / took.as_secs_f64(),
            n as f64 / full.max(1) as f64,
        );
    }
}

/// How long processors have worked for this process.
#[cfg(unix)]
fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

#[cfg(not(unix))]
fn cpu() -> Duration {
    Duration::ZERO
}

/// How many bytes this process has written to files, where the system says so.
fn written() -> Option<u64> {
    let io = std::fs::read_to_string("/proc/self/io").ok()?;
    let line = io.lines().find_map(|line| line.strip_prefix("wchar: "))?;
    line.parse().ok()
}

/// How much memory this process has in use, where the system says so.
fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.map_or("unknown", str::trim).to_owned()
}

fn size(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files
        .filter_map(|f| f.metadata().ok())
        .map(|m| m.len())
        .sum()
}
