//! The same queue through onlyonce, with the same handler.

use std::path::Path;
use std::sync::Arc;

use onlyonce::driver::Transaction;
use onlyonce::handler::{Handler, NoTx};
use onlyonce::memory::MemoryStore;
use onlyonce::rabbitmq::RabbitSource;
use onlyonce::sqlite::{Config, SqliteStore, SqliteTx};
use onlyonce::{Batch, Builder, ConfigRisk, Message, Pipeline, Report};

use super::queue::Queue;
use crate::Error;
use crate::measure::{Done, StopAfter};

fn source(queue: &Queue) -> Result<RabbitSource, Error> {
    Ok(RabbitSource::new(queue.url().parse()?)?)
}

fn settings<Tx: Transaction>(builder: Builder<Tx>, stop: &StopAfter) -> Builder<Tx> {
    builder
        .allow(ConfigRisk::NoDeadLetter)
        .prefetch(1_000, 64 << 20)
        .shutdown(stop.stopped())
}

fn check(report: Report, count: usize) -> Result<(), Error> {
    match report.applied == count as u64 {
        true => Ok(()),
        false => Err(format!("{count} messages sent, {report:?}").into()),
    }
}

async fn run(builder: Builder<NoTx>, stop: Arc<StopAfter>, count: usize) -> Result<(), Error> {
    let report = settings(builder, &stop)
        .run(move |message: Arc<Message>| {
            stop.handled();
            async move { drop(message) }
        })
        .await?;
    check(report, count)
}

pub(crate) async fn at_least_once(queue: &Queue, count: usize) -> Result<Done, Error> {
    let builder = Pipeline::at_least_once(source(queue)?);
    run(builder, StopAfter::new(count), count).await?;
    Ok(Done::default())
}

pub(crate) async fn idempotent_memory(queue: &Queue, count: usize) -> Result<Done, Error> {
    let builder = Pipeline::idempotent(source(queue)?, MemoryStore::new());
    let builder = builder.allow(ConfigRisk::StoreForgets);
    run(builder, StopAfter::new(count), count).await?;
    Ok(Done::default())
}

async fn open(dir: &Path) -> Result<SqliteStore, Error> {
    Ok(SqliteStore::open(Config::new(dir.join("bench.db"))).await?)
}

pub(crate) async fn idempotent_sqlite(queue: &Queue, count: usize) -> Result<Done, Error> {
    let dir = tempfile::tempdir()?;
    let store = open(dir.path()).await?;
    let database = store.database().clone();
    let before = database.commits();
    let builder = Pipeline::idempotent(source(queue)?, store);
    run(builder, StopAfter::new(count), count).await?;
    Ok(Done::between(before, database.commits()))
}

pub(crate) async fn transactional_sqlite(queue: &Queue, count: usize) -> Result<Done, Error> {
    in_transactions(queue, count, no_effect).await
}

pub(crate) async fn batches_sqlite(queue: &Queue, count: usize) -> Result<Done, Error> {
    in_transactions(queue, count, no_effect_of_all).await
}

async fn in_transactions<Args: 'static>(
    queue: &Queue,
    count: usize,
    handler: impl Handler<SqliteTx, Args>,
) -> Result<Done, Error> {
    let dir = tempfile::tempdir()?;
    let store = open(dir.path()).await?;
    let database = store.database().clone();
    let before = database.commits();
    let stop = StopAfter::new(count);
    let builder = settings(Pipeline::transactional(source(queue)?, store), &stop).state(stop);
    check(builder.run(handler).await?, count)?;
    Ok(Done::between(before, database.commits()))
}

async fn no_effect_of_all(
    batch: Batch<Arc<Message>>,
    stop: onlyonce::State<Arc<StopAfter>>,
    _tx: &mut SqliteTx,
) {
    batch.iter().for_each(|_| stop.0.handled());
}

async fn no_effect(stop: onlyonce::State<Arc<StopAfter>>, _tx: &mut SqliteTx) {
    stop.0.handled();
}
