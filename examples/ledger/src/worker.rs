//! The worker: a handler and the pipeline around it. This is the file to copy from.

#[cfg(feature = "postgres")]
use onlyonce::BoxError;
use onlyonce::driver::Transaction;
#[cfg(feature = "postgres")]
use onlyonce::postgres::{Config, PgStore, PgTx};
use onlyonce::sqlite::{SqliteStore, SqliteTx};
use onlyonce::{Builder, DedupKey, Error, Failure, Json, Pipeline, Report, State};
use serde::{Deserialize, Serialize};

use crate::bank::Bank;
#[cfg(feature = "postgres")]
use crate::book::postgres::Book;
use crate::book::sqlite;
use crate::events::{self, Events};
use crate::options::Work;

/// What a message asks for.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Transfer {
    pub transfer_id: String,
    pub from: String,
    pub to: String,
    pub amount: i64,
}

impl Transfer {
    /// No retry makes a wrong amount right, so such a message goes to the dead-letter queue at once.
    fn check(&self) -> Result<(), Failure> {
        match self.amount {
            1..=1_000_000_000_000 => Ok(()),
            _ => Err(Failure::dead_letter("the amount is not from 1 to 10^12")),
        }
    }
}

/// The handler in `transactional` mode: what it does through `tx` takes effect exactly once, because it commits together
/// with the record that this message was handled.
pub async fn transfer(
    Json(transfer): Json<Transfer>,
    State(events): State<Events>,
    tx: &mut SqliteTx,
) -> Result<(), Failure> {
    transfer.check()?;
    let booked = transfer.clone();
    let number = tx.with(move |db| sqlite::post(db, &booked)).await?;
    events.write(tx, &transfer, number).await?;
    Ok(())
}

/// The same on PostgreSQL, by way of sqlx.
#[cfg(feature = "postgres")]
pub async fn transfer_on_postgres(
    Json(transfer): Json<Transfer>,
    State(book): State<Book>,
    State(events): State<Events>,
    tx: &mut PgTx,
) -> Result<(), Failure> {
    transfer.check()?;
    let number = book.post(tx, &transfer).await?;
    events.write(tx, &transfer, number).await?;
    Ok(())
}

/// The handler in `idempotent` mode: it may run again for the same message, always with the same key, and the bank
/// honours the key.
pub async fn instruct(
    Json(transfer): Json<Transfer>,
    key: DedupKey,
    State(bank): State<Bank>,
) -> Result<(), Failure> {
    transfer.check()?;
    bank.transfer(key, transfer).await?;
    Ok(())
}

/// Runs [`transfer`] for every message of the queue, in transactions of the store's database.
pub async fn run_transactional(options: &Work) -> Result<Report, Error> {
    let source = onlyonce::source(&options.source).await?;
    let store = SqliteStore::open(options.store.parse()?).await?;
    let outbox = store.outbox();
    let pipeline = Pipeline::transactional(source, store).state(Events::new(options));
    let pipeline = settings(pipeline, options).await?.run(transfer);
    events::beside(pipeline, outbox, options).await
}

/// Runs [`transfer_on_postgres`] for every message of the queue; other machines may do so, too.
#[cfg(feature = "postgres")]
pub async fn run_on_postgres(options: &Work, config: Config) -> Result<Report, BoxError> {
    let source = onlyonce::source(&options.source).await?;
    let store = PgStore::open(config.clone()).await?;
    let book = Book::open(&config).await?;
    let outbox = store.outbox();
    let pipeline = Pipeline::transactional(source, store)
        .state(book)
        .state(Events::new(options));
    let pipeline = settings(pipeline, options).await?.run(transfer_on_postgres);
    Ok(events::beside(pipeline, outbox, options).await?)
}

/// Runs [`instruct`] for every message of the queue, with the store keeping nothing but the records.
pub async fn run_idempotent(options: &Work, bank: Bank) -> Result<Report, Error> {
    let source = onlyonce::source(&options.source).await?;
    let store = onlyonce::store(&options.store).await?;
    let pipeline = Pipeline::idempotent(source, store).state(bank);
    Ok(settings(pipeline, options).await?.run(instruct).await?)
}

/// What both modes have in common.
pub async fn settings<Tx: Transaction>(
    mut pipeline: Builder<Tx>,
    options: &Work,
) -> Result<Builder<Tx>, Error> {
    pipeline = pipeline
        .consumer("ledger")
        .concurrency(options.concurrency)
        .prefetch(options.prefetch, 64 << 20)
        .claim_lease(options.claim_lease)
        .shutdown(crate::signal::terminated());
    if let Some(identity) = &options.identity {
        pipeline = pipeline.identity(identity);
    }
    if let Some(url) = &options.dead_letter {
        pipeline = pipeline.dead_letter(onlyonce::sink(url).await?);
    }
    if let Some(seconds) = options.drain_when_empty {
        pipeline = pipeline.stop_when_idle(seconds);
    }
    if let Some(every) = options.report_every {
        crate::report::print_every(every, pipeline.counters());
    }
    Ok(pipeline)
}
