//! onlyonce itself.

use std::sync::Arc;
use std::time::Duration;

use onlyonce::driver::Transaction;
use onlyonce::rabbitmq::RabbitSource;
use onlyonce::sqlite::{Config, SqliteStore, SqliteTx};
use onlyonce::{Builder, ConfigRisk, Counters, Failure, Json, Pipeline, State};

use super::Setup;
use crate::work::{Job, Work};
use crate::{Error, PREFETCH, store};

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
    // The table is the application's.
    drop(store::open(&setup.work.database)?);
    let database = SqliteStore::open(Config::new(&setup.work.database)).await?;
    let builder = Pipeline::transactional(source(setup)?, database);
    let builder = settings(builder, setup).await?;
    if setup.alone {
        watch(builder.counters(), setup.work.clone());
        builder.run(effect).await?;
    } else {
        builder.run(counted_effect).await?;
    }
    // The last commits come after the last handler.
    setup.work.note_time();
    Ok(())
}

async fn effect(
    Json(job): Json<Job>,
    State(work): State<Arc<Work>>,
    tx: &mut SqliteTx,
) -> Result<(), Failure> {
    let slow = work.slow;
    tx.with(move |db| store::effect(db, &job.id, slow)).await?;
    Ok(())
}

async fn counted_effect(
    job: Json<Job>,
    State(work): State<Arc<Work>>,
    tx: &mut SqliteTx,
) -> Result<(), Failure> {
    effect(job, State(work.clone()), tx).await?;
    work.handled(1);
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
