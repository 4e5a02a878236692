//! The same queue through onlyonce.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use onlyonce::driver::Transaction;
use onlyonce::sqlite::{Config, SqliteStore, SqliteTx};
use onlyonce::{Builder, ConfigRisk, Message, Pipeline, State};
use tokio::time::sleep;

use super::queue::Queue;
use crate::Error;
use crate::measure::StopAfter;

fn settings<Tx: Transaction>(builder: Builder<Tx>, stop: &StopAfter) -> Builder<Tx> {
    builder
        .allow(ConfigRisk::NoDeadLetter)
        .shutdown(stop.stopped())
}

/// Returns how long it took until the last message, as the others.
pub(crate) async fn at_least_once(queue: &Queue, count: usize) -> Result<Duration, Error> {
    let stop = StopAfter::new(count);
    let builder = settings(Pipeline::at_least_once(queue.source()?), &stop);
    let last = stop.clone();
    let handler = move |message: Arc<Message>| {
        stop.handled();
        async move { drop(message) }
    };
    builder.run(handler).await?;
    Ok(last.took())
}

pub(crate) async fn transactional(queue: &Queue, count: usize) -> Result<Duration, Error> {
    let dir = tempfile::tempdir()?;
    let store = SqliteStore::open(Config::new(dir.path().join("bench.db"))).await?;
    let stop = StopAfter::new(count);
    let builder =
        settings(Pipeline::transactional(queue.source()?, store), &stop).state(stop.clone());
    builder.run(no_effect).await?;
    Ok(stop.took())
}

async fn no_effect(stop: State<Arc<StopAfter>>, _tx: &mut SqliteTx) {
    stop.0.handled();
}

/// Returns how often handlers ran.
pub(crate) async fn slow(queue: &Queue, count: usize, each: Duration) -> Result<usize, Error> {
    let stop = StopAfter::new(count);
    let runs = Arc::new(AtomicUsize::new(0));
    let builder = settings(Pipeline::at_least_once(queue.source()?), &stop).concurrency(count);
    let counted = runs.clone();
    let handler = move |_: Arc<Message>| {
        counted.fetch_add(1, Ordering::Relaxed);
        let stop = stop.clone();
        async move {
            sleep(each).await;
            stop.handled();
        }
    };
    builder.run(handler).await?;
    Ok(runs.load(Ordering::Relaxed))
}
