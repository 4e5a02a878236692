//! A message that comes alone must not wait for company.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use onlyonce::rabbitmq::RabbitSource;
use onlyonce::sqlite::{Config, SqliteStore, SqliteTx};
use onlyonce::{ConfigRisk, Counters, Pipeline, Report};
use tokio::time::sleep;

use super::by_hand;
use super::queue::Queue;
use crate::Error;
use crate::measure::Summary;

const TRIES: usize = 51;

/// Milliseconds: median (least–most).
pub(crate) struct Millis {
    pub(crate) median: f64,
    summary: Summary,
}

impl Millis {
    fn of(times: &[Duration]) -> Self {
        let summary = Summary::of(times.iter().map(|t| t.as_secs_f64() * 1e3));
        Self {
            median: summary.median,
            summary,
        }
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms", self.summary)
    }
}

pub(crate) struct Lone {
    pub(crate) committed: Millis,
    pub(crate) settled: Millis,
}

/// What one durable commit costs on this disk, by itself.
pub(crate) fn one_commit() -> Result<Millis, Error> {
    let dir = tempfile::tempdir()?;
    let connection = onlyonce::sqlite::rusqlite::Connection::open(dir.path().join("commit.db"))?;
    connection.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE t (n INTEGER);",
    )?;
    let mut times = Vec::new();
    for n in 0..TRIES as i64 {
        let began = Instant::now();
        connection.execute("INSERT INTO t VALUES (?1)", [n])?;
        times.push(began.elapsed());
    }
    Ok(Millis::of(&times))
}

/// Looks at the counts every few microseconds, on a thread that sleeps in between: one that spins would take a processor
/// from those it watches.
async fn until(
    counters: &Arc<Counters>,
    test: impl Fn(Report) -> bool + Send + 'static,
) -> Result<(), Error> {
    let counters = counters.clone();
    let watch = move || {
        while !test(counters.report()) {
            std::thread::sleep(Duration::from_micros(20));
        }
    };
    Ok(tokio::task::spawn_blocking(watch).await?)
}

/// From the publisher's confirm to the commit and to the ack, on a pipeline with nothing else to do.
pub(crate) async fn lone_message(queue: &Queue) -> Result<Lone, Error> {
    let dir = tempfile::tempdir()?;
    let store = SqliteStore::open(Config::new(dir.path().join("lone.db"))).await?;
    let source = RabbitSource::new(queue.url().parse()?)?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let builder = Pipeline::transactional(source, store)
        .allow(ConfigRisk::NoDeadLetter)
        .shutdown(async { drop(stopped.await) });
    let counters = builder.counters();
    let pipeline = tokio::spawn(builder.run(no_effect));
    let (mut committed, mut settled) = (Vec::new(), Vec::new());
    for n in 1..=TRIES as u64 {
        sleep(Duration::from_millis(20)).await;
        queue.publish(n as usize).await?;
        let began = Instant::now();
        until(&counters, move |report| report.applied >= n).await?;
        committed.push(began.elapsed());
        until(&counters, move |report| report.settled >= n).await?;
        settled.push(began.elapsed());
    }
    drop(stop);
    pipeline.await??;
    Ok(Lone {
        committed: Millis::of(&committed),
        settled: Millis::of(&settled),
    })
}

/// From the publisher's confirm to the delivery, by hand: what the broker alone takes.
pub(crate) async fn lone_delivery(queue: &Queue) -> Result<Millis, Error> {
    let (channel, mut consumer) = by_hand::consume(queue).await?;
    let mut times = Vec::new();
    for n in 1..=TRIES {
        sleep(Duration::from_millis(20)).await;
        queue.publish(n).await?;
        let began = Instant::now();
        let delivery = consumer.next().await.ok_or("the consumer ended")??;
        times.push(began.elapsed());
        delivery.ack(Default::default()).await?;
    }
    channel.close(200, "done".into()).await?;
    Ok(Millis::of(&times))
}

async fn no_effect(_tx: &mut SqliteTx) {}
