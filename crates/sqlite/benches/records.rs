//! Prints how many records and messages a second the store and the queue take:
//! `cargo bench -p onlyonce-sqlite [-- KEYS]`, one million keys unless told otherwise.

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

#[tokio::main]
async fn main() -> Result<(), Error> {
    let keys = std::env::args().find_map(|arg| arg.parse().ok());
    let keys: usize = keys.unwrap_or(1_000_000);
    let dir = tempfile::tempdir().expect("a directory for the bench");
    let config = Config::new(dir.path().join("bench.db")).queue("bench");

    println!("random keys, claim and complete, 4 callers with batches of 128:");
    let store = SqliteStore::open(config.clone()).await?;
    for _ in 0..5 {
        records(&store, keys / 5, 4, 128).await?;
    }
    println!("the same, 512 callers with one key each:");
    records(&store, (keys / 10).max(512), 512, 1).await?;
    println!("transactions with one effect each, 64 callers:");
    transactions(&store, (keys / 20).max(64), 64).await?;
    println!("{} bytes of disk in all", size(dir.path()));
    drop(store);
    for groups in [0, 200] {
        println!("queue, {QUEUED} messages ready in {groups} groups (0: none), batches of 256:");
        queue(&config, groups).await?;
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
                let verdict = tx.complete_and_commit(&done).await?;
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
    commits: Commits,
}

impl Meter {
    fn start(database: &Database) -> Self {
        Self {
            commits: database.commits(),
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
        let slowest = slowest.map_or(String::new(), |s| format!(", slowest call pair {s:.0?}"));
        println!(
            "  {n} {what} in {took:.2?}: {:.0}/s, {full} synced commits ({:.1} per sync), {normal} others{slowest}",
            n as f64 / took.as_secs_f64(),
            n as f64 / full.max(1) as f64,
        );
    }
}

fn size(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files
        .filter_map(|f| f.metadata().ok())
        .map(|m| m.len())
        .sum()
}
