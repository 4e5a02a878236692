//! Everything that can go wrong around a worker, made to happen: lost acks, lost answers, failed commits, handlers that fail
//! after their effect, slow handlers. What is rolled comes from a seed.

mod delay;
mod dice;
mod source;
mod store;

use onlyonce::sqlite::{SqliteStore, SqliteTx};
use onlyonce::{Error, Failure, Json, Pipeline, Report, RetryPolicy, State};
use std::time::Duration;

use crate::bank::Bank;
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
    // Faults must not use up the attempts: a dead letter would be right then, and hide what is wrong.
    let retry = RetryPolicy::default()
        .max_attempts(100)
        .delays(Duration::from_millis(20), Duration::from_secs(1));
    match options.mode {
        Mode::Transactional => {
            let store = SqliteStore::open(options.store.parse()?).await?;
            let pipeline = Pipeline::transactional(source, FaultyStore::new(store, dice.clone()));
            let pipeline = settings(pipeline, options).await?.retry(retry);
            Ok(pipeline.state(dice).layer(delay).run(transfer).await?)
        }
        Mode::Idempotent => {
            let store = onlyonce::store(&options.store).await?;
            let pipeline = Pipeline::idempotent(source, FaultyStore::new(store, dice));
            let pipeline = settings(pipeline, options).await?.retry(retry);
            Ok(pipeline.state(bank).layer(delay).run(instruct).await?)
        }
    }
}

/// [`worker::transfer`] that at times fails or panics when it has written everything.
async fn transfer(
    transfer: Json<Transfer>,
    State(dice): State<Dice>,
    tx: &mut FaultyTx<SqliteTx>,
) -> Result<(), Failure> {
    worker::transfer(transfer, tx.inner()).await?;
    if dice.hits(3) {
        return Err(Failure::retry("made to fail after its effect"));
    }
    assert!(!dice.hits(1), "made to panic after its effect");
    Ok(())
}
