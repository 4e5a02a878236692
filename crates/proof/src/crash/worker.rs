//! The process that is killed: an ordinary worker, watched.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::driver::Transaction;
use onlyonce_core::{
    Builder, Context, DedupKey, Error, Failure, Json, Pipeline, Report, RetryPolicy, State,
};
use onlyonce_sqlite::{Config, SqliteStore, SqliteTx};
use serde::{Deserialize, Serialize};

use super::book::{self, Bank};
use super::broker::Broker;
use super::instrument::{Instrument, LastWords, Trap};
use super::postgres;
use super::traffic::{Obstacle, POISONED, Transfer};
use super::watched::Watched;
use crate::error::failed;

/// How long claims last; leases of the embedded queue last as long.
pub const LEASE: Duration = Duration::from_secs(1);
/// Longer than a third of the lease, when it is renewed.
const SLOW: Duration = Duration::from_millis(450);

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum Mode {
    Transactional,
    Idempotent,
}

/// What a worker is told by its parent.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Work {
    pub mode: Mode,
    pub broker: Broker,
    /// The file of store and ledger.
    pub file: PathBuf,
    /// The database that has them instead, and an outbox.
    pub postgres: Option<String>,
    pub trap: Option<Trap>,
    /// Stop after this time without a message.
    pub idle: Duration,
}

/// Works until it is killed or nothing is left.
pub async fn run(work: &Work) -> Result<(), Error> {
    let instrument = Instrument::new(work.trap.clone());
    let source = Watched::new(work.broker.source().await?, &instrument);
    if let Some(url) = &work.postgres {
        postgres::run(work, url, source, &instrument).await?;
        LastWords::Idle(instrument.passes()).say();
        return Ok(());
    }
    let store = SqliteStore::open(Config::new(&work.file)).await?;
    let store = Watched::new(store, &instrument);
    let ended = match work.mode {
        Mode::Transactional => {
            let builder = Pipeline::transactional(source, store);
            settings(builder, work, &instrument)?.run(transfer).await
        }
        Mode::Idempotent => {
            let bank = Bank::open(&work.file).map_err(|error| failed("the bank", error))?;
            let builder = Pipeline::idempotent(source, store).state(bank);
            settings(builder, work, &instrument)?.run(instruct).await
        }
    };
    let _: Report = ended?;
    LastWords::Idle(instrument.passes()).say();
    Ok(())
}

pub fn settings<Tx: Transaction>(
    builder: Builder<Tx>,
    work: &Work,
    instrument: &Arc<Instrument>,
) -> Result<Builder<Tx>, Error> {
    // Each kill counts against all that its worker held, and these come from outside: more of them than a message has
    // attempts by default, after which the first of a queue would soon be given up, killed in three runs alone.
    let delays = RetryPolicy::default()
        .max_attempts(100)
        .delays(Duration::from_millis(50), LEASE);
    let builder = builder
        .consumer("crash")
        .concurrency(32)
        .prefetch(32, 1 << 20)
        .claim_lease(LEASE)
        // So that what fails is given back, where the broker can delay it.
        .retry(delays.in_place(Duration::from_millis(1)))
        .stop_when_idle(work.idle)
        .state(instrument.clone());
    Ok(match work.broker.dead_letters()? {
        Some(sink) => builder.dead_letter(Watched::new(sink, instrument)),
        None => builder,
    })
}

/// What stands between a message and its effect.
pub async fn overcome(
    transfer: &Transfer,
    context: &Context,
    instrument: &Instrument,
) -> Result<(), Failure> {
    match transfer.obstacle {
        Obstacle::None => Ok(()),
        Obstacle::Slow => {
            let nap = tokio::time::sleep(SLOW);
            instrument.watch("handler sleeps", nap).await;
            Ok(())
        }
        Obstacle::FailsOnce if context.attempt == 1 => Err(Failure::retry("it fails once")),
        Obstacle::FailsOnce => Ok(()),
        Obstacle::Poison => Err(Failure::dead_letter(POISONED)),
    }
}

/// The handler in `transactional` mode.
async fn transfer(
    Json(transfer): Json<Transfer>,
    context: Context,
    State(instrument): State<Arc<Instrument>>,
    tx: &mut Watched<SqliteTx>,
) -> Result<(), Failure> {
    let handled = async {
        overcome(&transfer, &context, &instrument).await?;
        let booking = tx.inner.with(move |db| book::post(db, &transfer));
        instrument.watch("handler books", booking).await?;
        Ok(())
    };
    instrument.watch("handler", handled).await
}

/// The handler in `idempotent` mode.
async fn instruct(
    Json(transfer): Json<Transfer>,
    context: Context,
    key: DedupKey,
    State(bank): State<Bank>,
    State(instrument): State<Arc<Instrument>>,
) -> Result<(), Failure> {
    let handled = async {
        overcome(&transfer, &context, &instrument).await?;
        let call = bank.transfer(key, transfer);
        let called = instrument.watch("handler calls the bank", call).await;
        called.map_err(Failure::retry)
    };
    instrument.watch("handler", handled).await
}
