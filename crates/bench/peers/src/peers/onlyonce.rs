//! onlyonce itself.

use std::sync::Arc;
use std::time::Duration;

use onlyonce::driver::Transaction;
use onlyonce::handler::Handler;
use onlyonce::rabbitmq::RabbitSource;
use onlyonce::sqlite::{Config, SqliteStore, SqliteTx};
use onlyonce::{Batch, Builder, ConfigRisk, Counters, Failure, Json, Pipeline, State};

use super::Setup;
use crate::work::{Job, Work};
use crate::{BATCH, Error, PREFETCH, store};

fn source(setup: &Setup) -> Result<RabbitSource, Error> {
    let url = format!("{}?queue={}&prefetch={PREFETCH}", setup.url, setup.queue);
    Ok(RabbitSource::new(url.parse()?)?)
}

async fn settings<Tx: Transaction>(
    builder: Builder<Tx>,
    setup: &Setup,
) -> Result<Builder<Tx>, Error> {
    let builder = builder
        .prefetch(PREFETCH.into(), 64 << 20)
        .state(setup.work.clone())
        .shutdown(setup.work.all_done());
    Ok(match &setup.dead_letters {
        None => builder.allow(ConfigRisk::NoDeadLetter),
        Some(queue) => {
            let url = format!("{}?queue={queue}", setup.url);
            builder.dead_letter(onlyonce::sink(&url).await?)
        }
    })
}

/// Whatever kind of work it is, by hand.
pub(super) async fn at_least_once(setup: &Setup) -> Result<(), Error> {
    let builder = settings(Pipeline::at_least_once(source(setup)?), setup).await?;
    builder.run(handle).await?;
    setup.work.note_time();
    Ok(())
}

async fn handle(Json(job): Json<Job>, State(work): State<Arc<Work>>) -> Result<(), Failure> {
    Ok(work.one(&job).await?)
}

/// The row in the transaction that also has onlyonce's own record.
pub(super) async fn transactional(setup: &Setup) -> Result<(), Error> {
    in_transactions(setup, one).await
}

/// The rows of up to a hundred messages in a call, which are those that are there already.
pub(super) async fn transactional_batches(setup: &Setup) -> Result<(), Error> {
    in_transactions(setup, many).await
}

async fn in_transactions<Args: 'static>(
    setup: &Setup,
    handler: impl Handler<SqliteTx, Args>,
) -> Result<(), Error> {
    // The table is the application's.
    drop(store::open(&setup.work.database)?);
    let database = SqliteStore::open(Config::new(&setup.work.database)).await?;
    let builder = Pipeline::transactional(source(setup)?, database);
    let builder = settings(builder, setup).await?;
    if setup.alone {
        watch(builder.counters(), setup.work.clone());
    }
    builder
        .state(Calls {
            work: setup.work.clone(),
            counted: !setup.alone,
        })
        // What it is without being asked for, too.
        .batch(BATCH, 4 << 20, Duration::ZERO)
        .run(handler)
        .await?;
    // The last commits come after the last handler.
    setup.work.note_time();
    Ok(())
}

/// What the handlers in a transaction have to know.
#[derive(Clone)]
struct Calls {
    work: Arc<Work>,
    /// Whether the handler counts its messages. Otherwise their commits are counted.
    counted: bool,
}

impl Calls {
    fn handled(&self, count: usize) {
        if self.counted {
            self.work.handled(count);
        }
    }
}

async fn one(
    Json(job): Json<Job>,
    State(calls): State<Calls>,
    tx: &mut SqliteTx,
) -> Result<(), Failure> {
    let slow = calls.work.slow;
    tx.with(move |db| store::effect(db, &job.id, slow)).await?;
    calls.handled(1);
    Ok(())
}

async fn many(
    jobs: Batch<Json<Job>>,
    State(calls): State<Calls>,
    tx: &mut SqliteTx,
) -> Result<(), Failure> {
    let (slow, count) = (calls.work.slow, jobs.len());
    tx.with(move |db| {
        jobs.iter()
            .try_for_each(|job| store::effect(db, &job.0.id, slow))
    })
    .await?;
    calls.handled(count);
    Ok(())
}

/// Counts commits, which come after the handler has returned. It looks every few microseconds, on a thread that sleeps in
/// between: one that spins would take a processor from what it watches.
fn watch(counters: Arc<Counters>, work: Arc<Work>) {
    tokio::task::spawn_blocking(move || {
        while !work.is_done() {
            let applied = usize::try_from(counters.report().applied).unwrap_or(usize::MAX);
            let new = applied.saturating_sub(work.count());
            if new > 0 {
                work.handled(new);
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    });
}
