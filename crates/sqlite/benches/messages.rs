//! What one message costs with a handler of one message and an effect on SQLite, beside the same by hand:
//! `cargo bench -p onlyonce-sqlite --bench messages`.
//!
//! - alone: one message after another, each published when the one before it was acked. Milliseconds from publishing to the
//!   ack, and how often a thread had to wait for another or for the disk.
//! - many: messages that wait in the queue when the time begins.
//!
//! The queue is in memory, the file syncs each commit. All variants run one after another in each of five rounds; printed are
//! the median, the least and the most. With a variant's name and a number of messages (`messages transactional 10000`) it
//! makes one run of many, for a profiler.

mod measure;

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use onlyonce_core::driver::{
    Delivery, Disposition, ExtendResult, QueueInfo, Receipt, ReceiveLimits, SettleResult,
    Settlement, Sink, Source,
};
use onlyonce_core::memory::MemoryQueue;
use onlyonce_core::{Batch, Error, Message, Pipeline};
use onlyonce_sqlite::rusqlite::{self, Connection, TransactionBehavior};
use onlyonce_sqlite::{Config, SqliteStore, SqliteTx};
use tokio::sync::{Notify, oneshot};

use measure::{cpu, spread};

const ROUNDS: usize = 5;
const TRIES: usize = 201;
const MANY: usize = 20_000;
const BATCH: usize = 100;
static BODY: [u8; 256] = [7; 256];

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS effects (id TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS inbox (id TEXT NOT NULL PRIMARY KEY) WITHOUT ROWID;
";
const EFFECT: &str = "INSERT INTO effects (id) VALUES (?1)";

#[derive(Clone, Copy, Debug, PartialEq)]
enum Variant {
    /// By hand, so many messages a transaction.
    ByHand(usize),
    Transactional,
    Batches,
}

impl Variant {
    const ALL: [(&str, Self); 4] = [
        ("by hand, one by one", Self::ByHand(1)),
        ("by hand, batches", Self::ByHand(BATCH)),
        ("transactional", Self::Transactional),
        ("transactional, batches", Self::Batches),
    ];

    /// Consumes the queue until it has been empty for a while.
    async fn consume(self, queue: Watched, file: &Path) -> Result<(), Error> {
        let queue = Arc::new(queue);
        let idle = Duration::from_millis(100);
        match self {
            Self::ByHand(batch) => by_hand(&queue, ByHand::open(file), batch).await,
            Self::Transactional => {
                let pipeline = Pipeline::transactional(queue, store(file).await?);
                pipeline.stop_when_idle(idle).run(one).await.map(drop)?;
                Ok(())
            }
            Self::Batches => {
                let pipeline = Pipeline::transactional(queue, store(file).await?);
                pipeline.stop_when_idle(idle).run(all).await.map(drop)?;
                Ok(())
            }
        }
    }
}

fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [variant, messages] = &args[..]
        && let Some((_, variant)) = Variant::ALL.iter().find(|(name, _)| name == variant)
        && let Ok(messages) = messages.parse()
    {
        return many(*variant, messages).map(drop);
    }
    print("alone, ms from publishing to the ack", Variant::ALL, alone)?;
    print("many, µs a message", Variant::ALL, |variant| {
        many(variant, MANY)
    })
}

/// What a message took.
#[derive(Clone, Copy)]
struct Cost {
    /// The median of messages that came alone, the mean of many.
    time: f64,
    /// Microseconds of processors.
    cpu: f64,
    /// How often a thread of this process has stopped to wait.
    waits: f64,
}

fn print(
    what: &str,
    variants: [(&str, Variant); 4],
    measure: impl Fn(Variant) -> Result<Cost, Error>,
) -> Result<(), Error> {
    let mut costs = variants.map(|_| Vec::new());
    for _ in 0..ROUNDS {
        for ((_, variant), costs) in variants.iter().zip(&mut costs) {
            costs.push(measure(*variant)?);
        }
    }
    println!("| {what} | time | × by hand, one by one | CPU µs | × | waits of threads |");
    println!("|---|---|---|---|---|---|");
    let by_hand = costs[0].clone();
    for ((name, _), costs) in variants.iter().zip(&costs) {
        let ratio = |of: fn(&Cost) -> f64| {
            let ratios = costs
                .iter()
                .zip(&by_hand)
                .map(|(one, other)| of(one) / of(other));
            spread(ratios.collect(), 2)
        };
        println!(
            "| {name} | {} | {} | {} | {} | {} |",
            spread(costs.iter().map(|cost| cost.time).collect(), 3),
            ratio(|cost| cost.time),
            spread(costs.iter().map(|cost| cost.cpu).collect(), 0),
            ratio(|cost| cost.cpu),
            spread(costs.iter().map(|cost| cost.waits).collect(), 1),
        );
    }
    println!();
    Ok(())
}

/// One message after another.
fn alone(variant: Variant) -> Result<Cost, Error> {
    let dir = tempfile::tempdir().expect("a directory");
    runtime().block_on(async {
        let queue = Watched::new();
        let (publish, acked) = (queue.queue.clone(), queue.acked.clone());
        let file = dir.path().join("alone.db");
        let consuming = tokio::spawn(async move { variant.consume(queue, &file).await });
        let mut times = Vec::new();
        let mut began = Spent::now();
        for n in 0..=TRIES {
            // The pipeline is idle, but does not stop.
            tokio::time::sleep(Duration::from_millis(2)).await;
            if n == 1 {
                began = Spent::now();
            }
            let published = Instant::now();
            publish_some(&publish, n..n + 1).await?;
            acked.notified().await;
            times.push(published.elapsed().as_secs_f64() * 1e3);
        }
        let spent = began.until_now();
        consuming.await.expect("no panic")?;
        let mut times = times.split_off(1);
        times.sort_by(f64::total_cmp);
        Ok(Cost {
            time: times[TRIES / 2],
            ..spent.per(TRIES)
        })
    })
}

/// Messages that are there already.
fn many(variant: Variant, messages: usize) -> Result<Cost, Error> {
    let dir = tempfile::tempdir().expect("a directory");
    runtime().block_on(async {
        let queue = Watched::new();
        let (inner, all) = (queue.queue.clone(), queue.acked.clone());
        publish_some(&inner, 0..messages).await?;
        let file = dir.path().join("many.db");
        let began = Spent::now();
        let consuming = tokio::spawn(async move { variant.consume(queue, &file).await });
        while inner.depth() + inner.in_flight() > 0 {
            all.notified().await;
        }
        let spent = began.until_now();
        consuming.await.expect("no panic")?;
        Ok(spent.per(messages))
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .expect("a runtime")
}

async fn publish_some(queue: &MemoryQueue, range: std::ops::Range<usize>) -> Result<(), Error> {
    let message = |n: usize| Message::new(&BODY[..]).with_dedup_id(n.to_string());
    let batch: Vec<_> = range.map(message).collect();
    for batch in batch.chunks(BATCH) {
        for published in queue.publish(batch).await {
            published?;
        }
    }
    Ok(())
}

async fn store(file: &Path) -> Result<SqliteStore, Error> {
    let store = SqliteStore::open(Config::new(file)).await?;
    let database = store.database();
    database.with(|conn| conn.execute_batch(TABLES)).await?;
    Ok(store)
}

async fn one(message: Arc<Message>, tx: &mut SqliteTx) -> Result<(), Error> {
    let id = message.dedup_id.clone();
    tx.execute(EFFECT, (id,)).await?;
    Ok(())
}

async fn all(batch: Batch<Arc<Message>>, tx: &mut SqliteTx) -> Result<(), Error> {
    let ids: Vec<_> = batch.iter().map(|one| one.dedup_id.clone()).collect();
    let insert = move |conn: &Connection| {
        let mut insert = conn.prepare_cached(EFFECT)?;
        ids.into_iter()
            .try_for_each(|id| insert.execute((id,)).map(drop))
    };
    tx.with(insert).await
}

async fn by_hand(queue: &Watched, database: ByHand, batch: usize) -> Result<(), Error> {
    let limits = ReceiveLimits::new(batch, Duration::from_millis(100));
    loop {
        let deliveries = queue.receive(limits).await?;
        if deliveries.is_empty() {
            return Ok(());
        }
        let ids = deliveries
            .iter()
            .filter_map(|one| one.message.dedup_id.clone());
        database
            .commit(ids.map(|id| id.to_string()).collect())
            .await;
        let ack = |delivery: Delivery| Settlement::new(delivery.receipt, Disposition::Ack);
        let acks: Vec<_> = deliveries.into_iter().map(ack).collect();
        queue.settle(&acks).await;
    }
}

/// A row and an inbox record of each message, as a careful user writes them: on a thread of their own, so that no sync of the
/// disk stops the runtime.
struct ByHand(mpsc::Sender<(Vec<String>, oneshot::Sender<()>)>);

impl ByHand {
    fn open(file: &Path) -> Self {
        let mut db = Connection::open(file).expect("a database");
        db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
            .and_then(|()| db.execute_batch(TABLES))
            .expect("tables");
        let (commits, asked) = mpsc::channel::<(Vec<String>, oneshot::Sender<()>)>();
        std::thread::spawn(move || {
            for (ids, done) in asked {
                commit(&mut db, &ids).expect("a commit");
                let _ = done.send(());
            }
        });
        Self(commits)
    }

    async fn commit(&self, ids: Vec<String>) {
        let (done, answer) = oneshot::channel();
        self.0.send((ids, done)).expect("the thread");
        answer.await.expect("an answer");
    }
}

fn commit(db: &mut Connection, ids: &[String]) -> rusqlite::Result<()> {
    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for id in ids {
        let mut insert = tx.prepare_cached("INSERT OR IGNORE INTO inbox (id) VALUES (?1)")?;
        if insert.execute([id])? == 1 {
            tx.prepare_cached(EFFECT)?.execute([id])?;
        }
    }
    tx.commit()
}

/// A queue that tells when it is acked.
struct Watched {
    queue: MemoryQueue,
    acked: Arc<Notify>,
}

impl Watched {
    fn new() -> Self {
        Self {
            queue: MemoryQueue::new("messages"),
            acked: Arc::default(),
        }
    }
}

#[async_trait]
impl Source for Watched {
    fn name(&self) -> &str {
        Source::name(&self.queue)
    }
    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        self.queue.receive(limits).await
    }
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let answers = self.queue.settle(batch).await;
        self.acked.notify_one();
        answers
    }
    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        self.queue.extend(batch, lease).await
    }
    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        self.queue.queue_info().await
    }
    async fn close(&self) -> Result<(), Error> {
        Source::close(&self.queue).await
    }
}

/// What this process has spent so far.
struct Spent {
    at: Instant,
    cpu: Duration,
    waits: i64,
}

impl Spent {
    fn now() -> Self {
        Self {
            at: Instant::now(),
            cpu: cpu(),
            waits: waits(),
        }
    }

    fn until_now(&self) -> Self {
        Self {
            at: self.at,
            cpu: cpu() - self.cpu,
            waits: waits() - self.waits,
        }
    }

    fn per(&self, messages: usize) -> Cost {
        let each = |total: f64| total / messages as f64;
        Cost {
            time: each(self.at.elapsed().as_secs_f64() * 1e6),
            cpu: each(self.cpu.as_secs_f64() * 1e6),
            waits: each(self.waits as f64),
        }
    }
}

/// How often the threads of this process have stopped to wait, where the system says so.
fn waits() -> i64 {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten();
    let status = tasks.flatten().filter_map(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        line.trim().parse::<i64>().ok()
    });
    status.sum()
}
