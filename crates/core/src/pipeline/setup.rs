use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use crate::driver::{Sink, Source, Store, TransactionalStore};
use crate::handler::States;
use crate::{Context, Failure, Outcome};

use super::Mode;
use super::counters::Counters;
use super::options::Options;

/// What is called for a message that took effect before, with its outcome.
pub(crate) type OnDuplicate = Arc<
    dyn Fn(Context, Outcome) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>
        + Send
        + Sync,
>;

/// Everything a pipeline is made of, but its handler.
pub(crate) struct Setup<Tx> {
    pub(crate) mode: Mode,
    pub(crate) source: Arc<dyn Source>,
    pub(crate) store: Option<Arc<dyn Store>>,
    pub(crate) transactions: Option<Arc<dyn TransactionalStore<Tx = Tx>>>,
    pub(crate) sink: Option<Arc<dyn Sink>>,
    pub(crate) options: Options,
    pub(crate) states: States,
    pub(crate) on_duplicate: Option<OnDuplicate>,
    pub(crate) counters: Arc<Counters>,
}
