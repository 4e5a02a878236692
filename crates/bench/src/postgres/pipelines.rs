//! The same with onlyonce.

use std::sync::Arc;
use std::time::Duration;

use onlyonce::driver::Source;
use onlyonce::memory::MemoryQueue;
use onlyonce::postgres::sqlx::{self, AssertSqlSafe};
use onlyonce::postgres::{Config, PgStore, PgTx};
use onlyonce::{Batch, Builder, Failure, Pipeline, State};

use super::by_hand::update_all;
use super::{Args, Bench, Told, account};
use crate::Error;

#[derive(Clone)]
struct Work {
    update: Arc<str>,
    accounts: usize,
}

async fn pipeline(
    bench: &Bench,
    queue: impl Source,
    args: &Args,
    update: String,
) -> Result<Builder<PgTx>, Error> {
    let mut config: Config = bench.url.parse()?;
    config.schema.clone_from(&bench.schema);
    let store = PgStore::open(config).await?;
    let work = Work {
        update: update.into(),
        accounts: bench.accounts,
    };
    Ok(Pipeline::transactional(queue, store)
        .consumer("bench")
        .concurrency(args.concurrency)
        .state(work))
}

async fn add(State(work): State<Work>, body: String, tx: &mut PgTx) -> Result<(), Failure> {
    sqlx::query(AssertSqlSafe(&*work.update))
        .bind(account(&body, work.accounts))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

async fn add_all(
    State(work): State<Work>,
    bodies: Batch<String>,
    tx: &mut PgTx,
) -> Result<(), Failure> {
    let accounts: Vec<i32> = bodies
        .iter()
        .map(|body| account(body, work.accounts))
        .collect();
    sqlx::query(AssertSqlSafe(&*work.update))
        .bind(accounts)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// The effect: one more on an account.
pub(crate) fn update(bench: &Bench) -> String {
    format!(
        "UPDATE {}.account SET cents = cents + 1 WHERE id = $1",
        bench.schema
    )
}

/// The end of the queue, as short as in the loops by hand.
const EMPTY: Duration = Duration::from_millis(50);

pub(crate) async fn one_by_one(
    bench: &Bench,
    queue: MemoryQueue,
    args: &Args,
) -> Result<(), Error> {
    let pipeline = pipeline(bench, queue, args, update(bench)).await?;
    pipeline.stop_when_idle(EMPTY).run(add).await?;
    Ok(())
}

pub(crate) async fn batches(bench: &Bench, queue: MemoryQueue, args: &Args) -> Result<(), Error> {
    let pipeline = pipeline(bench, queue, args, update_all(&bench.schema)).await?;
    let pipeline = pipeline
        .batch(100, 1 << 20, Duration::ZERO)
        .stop_when_idle(EMPTY);
    pipeline.run(add_all).await?;
    Ok(())
}

pub(crate) async fn alone(bench: &Bench, told: Told, args: &Args) -> Result<(), Error> {
    let pipeline = pipeline(bench, told, args, update(bench)).await?;
    pipeline
        .stop_when_idle(Duration::from_secs(1))
        .run(add)
        .await?;
    Ok(())
}
