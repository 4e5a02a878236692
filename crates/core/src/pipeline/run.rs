use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::RwLock;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::driver::{Owner, QueueInfo, Scope, Source, Transaction};
use crate::handler::{Callable, MadeOf, Parts};
use crate::{Context, Error, ErrorKind, Outcome};

use super::attempts::Attempts;
use super::budget::Budget;
use super::checks::check;
use super::drain::GRACE;
use super::engine::{Confirm, Engine, Stages, ToSettle};
use super::in_flight::InFlight;
use super::keys::Keys;
use super::lanes::{Exits, Lanes};
use super::lease_renewer::LeaseRenewer;
use super::prune::prune;
use super::recent::Recent;
use super::retry::LONGEST_DELAY;
use super::setup::Setup;
use super::start_up::{identity, look, show};
use super::transaction::Commit;

/// The lease asked for where the source did not tell its own.
const DEFAULT_LEASE: Duration = Duration::from_secs(30);

/// What is known of a handler besides how to call it.
pub(crate) struct About {
    /// Its type's name, for people.
    pub(crate) name: &'static str,
    /// Which state it asks for that is not there.
    pub(crate) missing: fn(&Parts) -> Option<&'static str>,
    pub(crate) parameters: fn() -> Vec<MadeOf>,
}

impl About {
    /// Whether it is called for many messages at once.
    fn takes_batches(&self) -> Result<bool, Error> {
        let parameters = (self.parameters)();
        let is_batch = parameters.contains(&MadeOf::Batch);
        if is_batch && parameters.contains(&MadeOf::Message) {
            return Err(Error::config(format!(
                "the handler {} takes a batch, and a parameter that is made of one message: ask for that in the batch, as Batch<(A, B)>",
                self.name
            )));
        }
        Ok(is_batch)
    }
}

/// The stages' ends of their channels.
struct Receivers {
    arrived: UnboundedReceiver<Vec<Box<InFlight>>>,
    heads: UnboundedReceiver<Box<InFlight>>,
    confirm: UnboundedReceiver<Confirm>,
    complete: UnboundedReceiver<(Box<InFlight>, Outcome)>,
    settle: UnboundedReceiver<ToSettle>,
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
    let (engine, receivers) = build(setup, (handler, &about), &info, identity)?;
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
    (handler, about): (Callable<Tx>, &About),
    info: &QueueInfo,
    identity: String,
) -> Result<(Arc<Engine<Tx>>, Receivers), Error> {
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
        batches: about.takes_batches()?.then_some(options.batch),
        handler_name: about.name,
        on_duplicate: setup.on_duplicate,
        states: setup.states,
        owner: Owner::random(),
        queue: setup.source.name().into(),
        consumer: options.consumer.as_str().into(),
        scope: Scope::new(options.consumer.clone(), identity),
        counters: setup.counters,
        budget: Budget::new(options.prefetch_messages, options.prefetch_bytes),
        keys: Keys::new(heads.clone()),
        renewer: LeaseRenewer::new(),
        attempts: Attempts::default(),
        set_aside: Recent::default(),
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
    Ok((Arc::new(engine), receivers))
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
            together: None,
        };
        match missing(&probe) {
            None => Ok(()),
            Some(state) => Err(Error::config(format!(
                "the handler asks for State<{state}>: give it to the builder with state(…)"
            ))),
        }
    }
}

/// Ends the lanes and the queues for keys, which hold messages that hold them, when the pipeline ends, however it ends.
struct Teardown<'a, Tx>(&'a Arc<Engine<Tx>>);

impl<Tx> Drop for Teardown<'_, Tx> {
    fn drop(&mut self) {
        drop(self.0.lanes.close());
        drop(self.0.keys.drain());
    }
}
