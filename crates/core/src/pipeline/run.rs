use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::RwLock;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::driver::{
    Disposition, Owner, QueueInfo, Scope, Sink, Source, Store, Transaction, TransactionalStore,
};
use crate::handler::Parts;
use crate::handler::{Callable, States};
use crate::{Context, Error, ErrorKind, Outcome};

use super::Mode;
use super::attempts::Attempts;
use super::backoff::Backoff;
use super::budget::Budget;
use super::builder::OnDuplicate;
use super::checks::{Found, check};
use super::counters::Counters;
use super::engine::{Confirm, Engine, Stages};
use super::in_flight::InFlight;
use super::keys::Keys;
use super::lanes::{Exits, Lanes};
use super::lease_renewer::LeaseRenewer;
use super::options::Options;
use super::retry::LONGEST_DELAY;
use super::set_aside::SetAside;
use super::transaction::Commit;

/// The lease asked for where the source did not tell its own.
const DEFAULT_LEASE: Duration = Duration::from_secs(30);
/// Expired records are removed in steps of so many, so often; at once again while there are more.
const PRUNE: usize = 500;
const PRUNE_EVERY: Duration = Duration::from_secs(10);
const PRUNE_PAUSE: Duration = Duration::from_millis(50);
/// What is left of the work after handlers were cancelled gets so long, and so do stages that are told to end.
const GRACE: Duration = Duration::from_secs(2);
/// Closing the source and the dead-letter queue may take so long: more than any broker's longest poll.
const CLOSE: Duration = Duration::from_secs(30);

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

/// What is known of a handler besides how to call it.
pub(crate) struct About {
    /// Its type's name, for people.
    pub(crate) name: &'static str,
    /// Which state it asks for that is not there.
    pub(crate) missing: fn(&Parts) -> Option<&'static str>,
}

/// The stages' ends of their channels.
struct Receivers {
    arrived: UnboundedReceiver<Vec<Box<InFlight>>>,
    heads: UnboundedReceiver<Box<InFlight>>,
    confirm: UnboundedReceiver<Confirm>,
    complete: UnboundedReceiver<(Box<InFlight>, Outcome)>,
    settle: UnboundedReceiver<(Box<InFlight>, Disposition)>,
    give_back: UnboundedReceiver<Vec<(Box<InFlight>, Duration)>>,
    late: UnboundedReceiver<Box<InFlight>>,
    dead_letter: UnboundedReceiver<(Box<InFlight>, String)>,
}

pub(crate) async fn run<Tx: Transaction>(
    setup: Setup<Tx>,
    (handler, about): (Callable<Tx>, About),
    mut shutdown: Pin<Box<dyn Future<Output = ()> + Send>>,
) -> Result<(), Error> {
    let found = tokio::select! {
        biased;
        found = look(&setup) => found?,
        () = &mut shutdown => return Ok(()),
    };
    check(setup.mode, &setup.options, &found)?;
    let identity = identity(&setup, &found.queue)?;
    show(&setup, &identity, &found);
    let info = found.queue;
    let (engine, receivers) = build(setup, (handler, about.name), &info, identity);
    engine.check_states(about.missing)?;
    let _teardown = Teardown(&engine);
    let mut tasks = start(&engine, receivers);
    let stop = engine.stop.clone();
    tasks.spawn(async move {
        tokio::select! {
            biased;
            () = shutdown => stop.cancel(),
            () = stop.cancelled() => {}
        }
        std::future::pending().await
    });
    tokio::select! {
        biased;
        () = engine.intake() => {}
        Some(ended) = tasks.join_next() => engine.fail(stage_ended(ended)),
    }
    engine.stop.cancel();
    engine.drain().await;
    if timeout(GRACE, tasks.shutdown()).await.is_err() {
        tracing::error!(
            queue = &*engine.queue,
            "a handler or a call blocks its thread, and goes on without the pipeline"
        );
    }
    engine.close().await
}

/// Looks at the queue, at its dead-letter queue and at the store.
async fn look<Tx>(setup: &Setup<Tx>) -> Result<Found, Error> {
    let source = &setup.source;
    let queue = answered(source.name(), || source.queue_info()).await?;
    let sink = match &setup.sink {
        Some(sink) => Some(answered(sink.name(), || sink.sink_info()).await?),
        None => None,
    };
    let store = match &setup.store {
        Some(store) => Some(answered(source.name(), || store.store_info()).await?),
        None => None,
    };
    Ok(Found { queue, sink, store })
}

/// Asks until there is an answer, however long it takes until the broker is there.
async fn answered<T, F>(queue: &str, ask: impl Fn() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let mut backoff = Backoff::new();
    loop {
        let error = match ask().await {
            Err(error) if error.is_retryable() => error,
            other => return other,
        };
        let delay = backoff.next();
        tracing::warn!(queue, %error, ?delay, "cannot start yet; trying again");
        sleep(delay).await;
    }
}

/// Within what the dedup keys are unique, beside the consumer.
fn identity<Tx>(setup: &Setup<Tx>, info: &QueueInfo) -> Result<String, Error> {
    let given = setup.options.identity.clone();
    match given.or_else(|| info.identity.clone()) {
        Some(identity) if !identity.is_empty() => Ok(identity),
        _ if setup.store.is_none() => Ok(String::new()),
        _ => Err(Error::config(
            "the source does not tell the queue's identity, without which the dedup keys of two queues could not be told apart: give it to the builder with identity(…)",
        )
        .on_queue(setup.source.name())),
    }
}

/// Says in the log what was found. What could not be read could not be checked either.
fn show<Tx>(setup: &Setup<Tx>, identity: &str, found: &Found) {
    let queue = setup.source.name();
    let info = &found.queue;
    tracing::info!(queue, identity, capabilities = ?info.capabilities, settings = ?info.settings, "the queue");
    show_unknown(queue, &info.unknown);
    if let (Some(sink), Some(info)) = (&setup.sink, &found.sink) {
        show_unknown(sink.name(), &info.unknown);
    }
    if let Some(info) = &found.store {
        tracing::info!(queue, store = info.name, durability = ?info.durability, transactions = ?info.transactions, settings = ?info.settings, "the store");
        show_unknown(&info.name, &info.unknown);
    }
}

fn show_unknown(of: &str, unknown: &[String]) {
    for unknown in unknown {
        tracing::warn!(of, unknown, "a setting that was not checked");
    }
}

fn stage_ended(ended: Result<(), tokio::task::JoinError>) -> Error {
    let error = Error::new(ErrorKind::Other, "a stage of the pipeline ended by itself");
    match ended {
        Ok(()) => error,
        Err(cause) => error.caused_by(cause),
    }
}

/// The channels between the stages, with the lanes' two exits.
fn channels() -> (
    Stages,
    UnboundedSender<Box<InFlight>>,
    UnboundedSender<Box<InFlight>>,
    Receivers,
) {
    let (arrived, arrived_rx) = mpsc::unbounded_channel();
    let (heads, heads_rx) = mpsc::unbounded_channel();
    let (confirm, confirm_rx) = mpsc::unbounded_channel();
    let (complete, complete_rx) = mpsc::unbounded_channel();
    let (settle, settle_rx) = mpsc::unbounded_channel();
    let (give_back, give_back_rx) = mpsc::unbounded_channel();
    let (late, late_rx) = mpsc::unbounded_channel();
    let (dead_letter, dead_letter_rx) = mpsc::unbounded_channel();
    let stages = Stages {
        arrived,
        confirm,
        complete,
        settle,
        give_back,
        dead_letter,
    };
    let receivers = Receivers {
        arrived: arrived_rx,
        heads: heads_rx,
        confirm: confirm_rx,
        complete: complete_rx,
        settle: settle_rx,
        give_back: give_back_rx,
        late: late_rx,
        dead_letter: dead_letter_rx,
    };
    (stages, heads, late, receivers)
}

fn build<Tx: Transaction>(
    setup: Setup<Tx>,
    (handler, handler_name): (Callable<Tx>, &'static str),
    info: &QueueInfo,
    identity: String,
) -> (Arc<Engine<Tx>>, Receivers) {
    let (stages, heads, late, receivers) = channels();
    let options = setup.options;
    let capabilities = info.capabilities;
    let lease = info.lease.unwrap_or(DEFAULT_LEASE).min(LONGEST_DELAY);
    let engine = Engine {
        mode: setup.mode,
        capabilities,
        lease: capabilities.timed_lease.then_some(lease),
        transactions: setup.transactions,
        sink: setup.sink,
        handler,
        handler_name,
        on_duplicate: setup.on_duplicate,
        states: setup.states,
        owner: Owner::random(),
        queue: setup.source.name().into(),
        consumer: options.consumer.as_str().into(),
        scope: Scope {
            consumer: options.consumer.clone(),
            queue: identity,
        },
        counters: setup.counters,
        budget: Budget::new(options.prefetch_messages, options.prefetch_bytes),
        keys: Keys::new(heads.clone()),
        renewer: LeaseRenewer::new(),
        attempts: Attempts::default(),
        set_aside: SetAside::default(),
        running: RwLock::default(),
        lanes: Lanes::new(Exits {
            claim: setup.store.is_some().then_some(heads),
            give_back: late,
        }),
        source: setup.source,
        store: setup.store,
        stages,
        stop: CancellationToken::new(),
        cancel: CancellationToken::new(),
        fatal: Mutex::default(),
        arrivals: AtomicU64::new(0),
        rejected: AtomicUsize::new(0),
        readable: AtomicBool::new(false),
        handler_nanos: AtomicU64::new(0),
        options,
    };
    (Arc::new(engine), receivers)
}

/// Starts every stage as a task of its own; they end with the set.
fn start<Tx: Transaction>(engine: &Arc<Engine<Tx>>, receivers: Receivers) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let (commits, commits_rx) = mpsc::unbounded_channel::<Commit<Tx>>();
    macro_rules! stage {
        (|$engine:ident| $stage:expr) => {{
            let $engine = engine.clone();
            tasks.spawn(async move { $stage.await });
        }};
    }
    for _ in 0..engine.options.concurrency {
        let commits = commits.clone();
        stage!(|engine| engine.work(&commits));
    }
    stage!(|engine| engine.commit_stage(commits_rx));
    stage!(|engine| engine.lanes.run_timer());
    stage!(|engine| engine.settle_stage(receivers.settle));
    stage!(|engine| engine.give_back_stage(receivers.give_back));
    stage!(|engine| engine.late_stage(receivers.late));
    stage!(|engine| engine.dead_letter_stage(receivers.dead_letter));
    stage!(|engine| engine.confirm_stage(receivers.confirm));
    if let Some(lease) = engine.lease.filter(|_| engine.capabilities.extend) {
        stage!(|engine| engine.renewer.extend_leases(&*engine.source, lease));
    }
    if let Some(store) = engine.store.clone() {
        let (s, arrived, heads) = (store.clone(), receivers.arrived, receivers.heads);
        stage!(|engine| engine.claim_stage(&*s, arrived, heads));
        let s = store.clone();
        stage!(|engine| engine.complete_stage(&*s, receivers.complete));
        let s = store.clone();
        let lease = engine.options.claim_lease;
        stage!(|engine| engine.renewer.renew_claims(&*s, lease));
        tasks.spawn(prune(store));
    }
    tasks
}

/// Removes expired records in the background, in small steps.
async fn prune(store: Arc<dyn Store>) {
    let mut ticks = interval(PRUNE_EVERY);
    loop {
        ticks.tick().await;
        loop {
            match store.prune(PRUNE).await {
                Ok(removed) if removed >= PRUNE => sleep(PRUNE_PAUSE).await,
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, "expired records not removed; trying again later");
                    break;
                }
            }
        }
    }
}

impl<Tx: Transaction> Engine<Tx> {
    fn check_states(&self, missing: fn(&Parts) -> Option<&'static str>) -> Result<(), Error> {
        let probe = Parts {
            message: Arc::default(),
            context: Context {
                queue: self.queue.clone(),
                consumer: self.consumer.clone(),
                key: None,
                attempt: 1,
            },
            native: None,
            states: self.states.clone(),
        };
        match missing(&probe) {
            None => Ok(()),
            Some(state) => Err(Error::config(format!(
                "the handler asks for State<{state}>: give it to the builder with state(…)"
            ))),
        }
    }

    /// Gives back what comes too late to be run.
    async fn late_stage(&self, mut receiver: UnboundedReceiver<Box<InFlight>>) {
        while let Some(in_flight) = receiver.recv().await {
            self.give_back(in_flight, Duration::ZERO);
        }
    }

    /// Lets running handlers finish and gives the rest back, last first.
    async fn drain(&self) {
        let waiting = self.lanes.close();
        let parked = self.keys.drain();
        let mut rest: Vec<_> = waiting.into_iter().chain(parked).collect();
        rest.sort_by_key(|in_flight| in_flight.seq);
        for in_flight in rest.into_iter().rev() {
            self.give_back(in_flight, Duration::ZERO);
        }
        let empty = || self.budget.until(|budget| budget.held() == 0);
        if timeout(self.options.drain_timeout, empty()).await.is_err() {
            tracing::warn!(
                queue = &*self.queue,
                held = self.budget.held(),
                "drain timed out; cancelling handlers"
            );
            self.cancel.cancel();
            let _ = timeout(GRACE, empty()).await;
        }
    }

    async fn close(&self) -> Result<(), Error> {
        let closed = closed_in_time(self.source.name(), self.source.close()).await;
        if let Some(sink) = &self.sink {
            let _ = closed_in_time(sink.name(), sink.close()).await.inspect_err(
                |error| tracing::warn!(queue = sink.name(), %error, "dead-letter queue not closed"),
            );
        }
        let fatal = self
            .fatal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        fatal.map_or(closed, Err)
    }
}

/// Whatever does not answer must not keep the pipeline from ending.
async fn closed_in_time(
    queue: &str,
    close: impl Future<Output = Result<(), Error>>,
) -> Result<(), Error> {
    timeout(CLOSE, close).await.unwrap_or_else(|_| {
        Err(Error::new(
            ErrorKind::Timeout,
            format!(
                "it was not closed within {CLOSE:?}; what it held comes again when its leases end"
            ),
        )
        .on_queue(queue))
    })
}

/// Breaks the circle of lanes and turns when the pipeline ends, however it ends.
struct Teardown<'a, Tx>(&'a Arc<Engine<Tx>>);

impl<Tx> Drop for Teardown<'_, Tx> {
    fn drop(&mut self) {
        drop(self.0.lanes.close());
        drop(self.0.keys.drain());
    }
}
