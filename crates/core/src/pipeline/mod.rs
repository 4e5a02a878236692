//! The pipeline: receive → claim → lanes → handler → complete → settle.
//!
//! Each stage is one file and one task that takes whatever waits as its batch; what they share is the engine.

mod attempts;
mod backoff;
mod budget;
mod builder;
mod checks;
mod claim;
mod complete;
mod counters;
mod dead_letter;
mod doubt;
mod engine;
mod in_flight;
mod intake;
mod keys;
mod lanes;
mod lease_renewer;
mod options;
mod retry;
mod run;
mod run_error;
mod set_aside;
mod settle;
mod suspects;
mod transaction;
mod worker;

use std::sync::Arc;

pub use builder::Builder;
pub use checks::ConfigRisk;
pub use counters::{Counters, Report};
pub use options::InDoubt;
pub use retry::RetryPolicy;
pub use run_error::RunError;

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
