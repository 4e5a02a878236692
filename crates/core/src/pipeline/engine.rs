use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{RwLock, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::driver::{
    Capabilities, Completion, Disposition, Owner, Scope, Sink, Source, Store, TransactionalStore,
};
use crate::handler::{Callable, States};
use crate::{Error, ErrorKind, Outcome};

use super::Mode;
use super::attempts::Attempts;
use super::batch::Limits;
use super::budget::Budget;
use super::counters::Counters;
use super::in_flight::InFlight;
use super::keys::Keys;
use super::lanes::Lanes;
use super::lease_renewer::LeaseRenewer;
use super::options::{InDoubt, Options};
use super::recent::Recent;
use super::setup::OnDuplicate;

/// From this many on, messages that cannot be told apart or read are no exceptions, if no other message came.
pub(crate) const FEW: usize = 10;

/// The ways out of a stage and into the next. The channels have no bound of their own: each item carries its share of
/// the [`Budget`].
pub(crate) struct Stages {
    /// A batch that has just come.
    pub(crate) arrived: UnboundedSender<Vec<Box<InFlight>>>,
    /// Ack now, and hand back what the broker confirmed.
    pub(crate) confirm: UnboundedSender<Confirm>,
    pub(crate) complete: UnboundedSender<(Box<InFlight>, Outcome)>,
    pub(crate) settle: UnboundedSender<ToSettle>,
    /// Release the claim, then nack with this delay; in the order given.
    pub(crate) give_back: UnboundedSender<Vec<(Box<InFlight>, Duration)>>,
    pub(crate) dead_letter: UnboundedSender<(Box<InFlight>, String)>,
}

/// A message in flight to be acked before it runs, and who waits for it.
pub(crate) type Confirm = (Box<InFlight>, oneshot::Sender<Box<InFlight>>);

/// What is to be told to the broker.
pub(crate) enum ToSettle {
    One(Box<InFlight>, Disposition),
    /// In one call: a source that can only give back everything from one message on then does so once, and nothing of a group
    /// comes again while those before it are still to be given back.
    Together(Vec<(Box<InFlight>, Disposition)>),
}

/// What all stages share.
pub(crate) struct Engine<Tx> {
    pub(crate) mode: Mode,
    pub(crate) options: Options,
    pub(crate) source: Arc<dyn Source>,
    pub(crate) capabilities: Capabilities,
    /// The source's lease, where it has one that ends by the clock.
    pub(crate) lease: Option<Duration>,
    pub(crate) store: Option<Arc<dyn Store>>,
    pub(crate) transactions: Option<Arc<dyn TransactionalStore<Tx = Tx>>>,
    pub(crate) sink: Option<Arc<dyn Sink>>,
    pub(crate) handler: Callable<Tx>,
    /// If the handler takes batches: how large ones.
    pub(crate) batches: Option<Limits>,
    /// For people.
    pub(crate) handler_name: &'static str,
    pub(crate) on_duplicate: Option<OnDuplicate>,
    pub(crate) states: States,
    pub(crate) owner: Owner,
    pub(crate) scope: Scope,
    pub(crate) queue: Arc<str>,
    pub(crate) consumer: Arc<str>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) keys: Arc<Keys<Box<InFlight>>>,
    pub(crate) renewer: Arc<LeaseRenewer>,
    pub(crate) attempts: Attempts,
    /// The messages of which a dead letter is confirmed and whose ack may have been lost, by the broker's own ids; a message that
    /// somebody puts back has another. Should one come again, it is acked and not run: it would only leave another dead letter,
    /// without end where the ack is lost each time.
    pub(crate) set_aside: Recent<()>,
    /// Held by all that run: by one alone, or by any number.
    pub(crate) running: RwLock<()>,
    pub(crate) lanes: Arc<Lanes>,
    pub(crate) stages: Stages,
    /// Stop receiving.
    pub(crate) stop: CancellationToken,
    /// Stop handlers too.
    pub(crate) cancel: CancellationToken,
    /// What made the pipeline stop, if something did.
    pub(crate) fatal: Mutex<Option<Error>>,
    pub(crate) arrivals: AtomicU64,
    /// Messages that the handler could not read.
    pub(crate) rejected: AtomicUsize,
    /// Whether it could read one.
    pub(crate) readable: AtomicBool,
    /// Mean duration of a handler, in nanoseconds; zero until one has ended.
    pub(crate) handler_nanos: AtomicU64,
}

impl<Tx: Send + 'static> Engine<Tx> {
    pub(crate) fn completion(&self, in_flight: &InFlight, outcome: Outcome) -> Option<Completion> {
        Some(Completion::new(
            in_flight.lease.precondition()?,
            in_flight.claim?.fingerprint,
            outcome.0,
            self.options.dedup_retention,
        ))
    }

    /// A call to the store, with an end: half a claim's lease.
    pub(crate) async fn within<T>(
        &self,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let limit = self.options.claim_lease / 2;
        timeout(limit, call).await.unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Timeout,
                format!("the store did not answer within {limit:?}"),
            ))
        })
    }

    /// Whether a handler that may have produced its effect keeps its message from being run again.
    pub(crate) fn quarantines(&self) -> bool {
        self.mode == Mode::Idempotent && self.options.on_in_doubt == InDoubt::Quarantine
    }

    /// Ends the pipeline with `error`, after a drain. The first error counts.
    pub(crate) fn fail(&self, error: Error) {
        tracing::error!(queue = &*self.queue, %error, "stopping");
        let mut fatal = self.fatal.lock().unwrap_or_else(PoisonError::into_inner);
        fatal.get_or_insert(error);
        drop(fatal);
        self.stop.cancel();
    }
}
