//! The pipeline: receive → claim → lanes → handler → complete → settle.
//!
//! The way of a message, file by file:
//!
//! 1. `intake` receives deliveries and gives each its dedup key and its share of the `budget`: from here on it is `in_flight`.
//! 2. `claim` asks the store whose each key is, or in `transactional` mode whether it is recorded; deliveries of one key wait for
//!    each other in `keys`. Modes without a store go past.
//! 3. `lanes` decides what runs next: messages of one group one after another. What waits for a retry waits there.
//! 4. `worker` takes what is ready, looks once more whether it may run (`suspects`, `doubt`), and lets `invoke` call the handler;
//!    in `transactional` mode by way of `transaction`. `batch` adds what a handler of batches gets with it. In `at_most_once` mode
//!    `confirm` acks it first.
//! 5. `complete` records the effect where the transaction has not.
//! 6. `settle` tells the broker. `give_back` and `dead_letter` come before it for what has not succeeded.
//!
//! Each of these is a stage: one task that takes whatever waits as its batch. No stage calls another. What becomes of a
//! message is in `transitions`, with a table; it sends the message to the stage that is next. What all share is the `engine`.
//! Meanwhile `lease_renewer` extends leases and renews claims (`lease_state`), `runs` and `attempts` count, and `recent` remembers
//! single messages.
//!
//! Before and after: `builder` takes the `options` and makes the `setup`, `start_up` looks at queue and store, `checks` refuses
//! what is not safe, `run` wires the stages and starts them, `drain` ends them.

mod attempts;
mod backoff;
mod batch;
mod budget;
mod builder;
mod checks;
mod claim;
mod complete;
mod confirm;
mod counters;
mod dead_letter;
mod doubt;
mod drain;
mod engine;
mod give_back;
mod in_flight;
mod intake;
mod invoke;
mod keys;
mod lanes;
mod lease_renewer;
mod lease_state;
mod options;
mod prune;
mod recent;
mod retry;
mod run;
mod run_error;
mod runs;
mod settle;
mod setup;
mod start_up;
mod suspects;
mod transaction;
mod transitions;
mod worker;

use std::sync::Arc;

pub(crate) use backoff::Backoff;
pub use builder::Builder;
pub use checks::ConfigRisk;
pub use counters::{Counters, Report};
pub(crate) use drain::closed_in_time;
pub use options::InDoubt;
pub use retry::RetryPolicy;
pub use run_error::RunError;
pub(crate) use start_up::answered;

use crate::driver::{Source, Store, TransactionalStore};
use crate::handler::NoTx;

/// What is promised of a message's effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Transactional,
    Idempotent,
    AtLeastOnce,
    AtMostOnce,
}

/// Takes messages from a source and runs a handler for each, under one of four promises.
#[derive(Debug)]
pub struct Pipeline;

impl Pipeline {
    /// Every message's effect happens **exactly once**, as far as it is made through the handler's `&mut Tx`: the dedup
    /// record commits in the same transaction, under a fencing token, and the broker is told afterwards.
    ///
    /// Assumes that the store keeps what it has committed, and records for longer than the broker can deliver again.
    pub fn transactional<S: TransactionalStore>(source: impl Source, store: S) -> Builder<S::Tx> {
        let store = Arc::new(store);
        Builder::new(
            Mode::Transactional,
            Arc::new(source),
            Some(store.clone()),
            Some(store),
        )
    }

    /// Every message's effect happens **at least once, with a stable key** ([`DedupKey`](crate::DedupKey)) to hand to the
    /// downstream; exactly once if the downstream honours the key. A message that was recorded as done is not run again.
    ///
    /// Assumes the same of the store. A worker that dies between effect and record leaves the outcome
    /// [in doubt](InDoubt).
    pub fn idempotent(source: impl Source, store: impl Store) -> Builder<NoTx> {
        Builder::new(
            Mode::Idempotent,
            Arc::new(source),
            Some(Arc::new(store)),
            None,
        )
    }

    /// Every message's effect happens **at least once**: it is acked after the handler.
    pub fn at_least_once(source: impl Source) -> Builder<NoTx> {
        Builder::new(Mode::AtLeastOnce, Arc::new(source), None, None)
    }

    /// Every message's effect happens **at most once**: the broker confirms the ack before the handler starts. The one
    /// mode that can lose a message: when the worker dies or the handler fails after the ack.
    pub fn at_most_once(source: impl Source) -> Builder<NoTx> {
        Builder::new(Mode::AtMostOnce, Arc::new(source), None, None)
    }
}
