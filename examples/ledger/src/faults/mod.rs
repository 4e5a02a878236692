//! Everything that can go wrong around a worker, made to happen: lost acks, lost answers, failed commits, handlers that fail
//! after their effect, slow handlers. What is rolled comes from a seed.

mod delay;
mod dice;
mod source;
mod store;

#[cfg(feature = "postgres")]
use onlyonce::BoxError;
#[cfg(feature = "postgres")]
use onlyonce::postgres::{Config, PgStore, PgTx};
use onlyonce::sqlite::{SqliteStore, SqliteTx};
use onlyonce::{Error, Failure, Json, Pipeline, Report, RetryPolicy, State};
use std::time::Duration;

use crate::bank::Bank;
#[cfg(feature = "postgres")]
use crate::book::postgres::Book;
use crate::events::{self, Events};
use crate::options::{Mode, Work};
use crate::worker::{self, Transfer, instruct, settings};

use delay::Delay;
use dice::Dice;
use source::FaultySource;
use store::{FaultyStore, FaultyTx};

/// The same worker as in [`worker`], with faults all around it.
pub async fn run(options: &Work, bank: Bank) -> Result<Report, Error> {
    let dice = Dice::new(options.faults.faults);
    let delay = Delay::new(&options.faults);
    let source = FaultySource::new(onlyonce::source(&options.source).await?, dice.clone());
    match options.mode {
        Mode::Transactional => {
            let store = SqliteStore::open(options.store.parse()?).await?;
            let outbox = store.outbox();
            let pipeline = Pipeline::transactional(source, FaultyStore::new(store, dice.clone()));
            let pipeline = settings(pipeline, options).await?.retry(retry());
            let pipeline = pipeline.state(dice).state(Events::new(options));
            events::beside(pipeline.layer(delay).run(transfer), outbox, options).await
        }
        Mode::Idempotent => {
            let store = onlyonce::store(&options.store).await?;
            let pipeline = Pipeline::idempotent(source, FaultyStore::new(store, dice));
            let pipeline = settings(pipeline, options).await?.retry(retry());
            Ok(pipeline.state(bank).layer(delay).run(instruct).await?)
        }
    }
}

/// The same as [`worker::run_on_postgres`].
#[cfg(feature = "postgres")]
pub async fn run_on_postgres(options: &Work, config: Config) -> Result<Report, BoxError> {
    let dice = Dice::new(options.faults.faults);
    let delay = Delay::new(&options.faults);
    let source = FaultySource::new(onlyonce::source(&options.source).await?, dice.clone());
    let store = PgStore::open(config.clone()).await?;
    let book = Book::open(&config).await?;
    let outbox = store.outbox();
    let pipeline = Pipeline::transactional(source, FaultyStore::new(store, dice.clone()));
    let pipeline = settings(pipeline, options).await?.retry(retry());
    let pipeline = pipeline.state(dice).state(book).state(Events::new(options));
    let pipeline = pipeline.layer(delay).run(transfer_on_postgres);
    Ok(events::beside(pipeline, outbox, options).await?)
}

/// Faults must not use up the attempts: a dead letter would be right then, and hide what is wrong.
fn retry() -> RetryPolicy {
    RetryPolicy::default()
        .max_attempts(100)
        .delays(Duration::from_millis(20), Duration::from_secs(1))
}

/// [`worker::transfer`] that at times fails or panics when it has written everything.
async fn transfer(
    transfer: Json<Transfer>,
    events: State<Events>,
    State(dice): State<Dice>,
    tx: &mut FaultyTx<SqliteTx>,
) -> Result<(), Failure> {
    worker::transfer(transfer, events, tx.inner()).await?;
    fail_at_times(&dice)
}

/// The same as [`worker::transfer_on_postgres`].
#[cfg(feature = "postgres")]
async fn transfer_on_postgres(
    transfer: Json<Transfer>,
    book: State<Book>,
    events: State<Events>,
    State(dice): State<Dice>,
    tx: &mut FaultyTx<PgTx>,
) -> Result<(), Failure> {
    worker::transfer_on_postgres(transfer, book, events, tx.inner()).await?;
    fail_at_times(&dice)
}

fn fail_at_times(dice: &Dice) -> Result<(), Failure> {
    if dice.hits(3) {
        return Err(Failure::retry("made to fail after its effect"));
    }
    assert!(!dice.hits(1), "made to panic after its effect");
    Ok(())
}
