use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tower_layer::{Identity, Layer, Stack};
use tower_service::Service;

use crate::driver::{Sink, Source, Store, Transaction, TransactionalStore};
use crate::handler::{Handler, IntoOutcome, Request};
use crate::handler::{HandlerService, States, callable};
use crate::{BoxError, Context, KeyPolicy, Outcome};

use super::batch::Limits;
use super::options::Options;
use super::run::{About, run};
use super::setup::Setup;
use super::{ConfigRisk, Counters, InDoubt, Mode, Report, RetryPolicy, RunError};

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

const SHORTEST_CLAIM: Duration = Duration::from_millis(10);
const LONGEST_CLAIM: Duration = Duration::from_secs(86_400);

/// Settings of a pipeline; every one has a default.
#[must_use = "a pipeline does nothing until it is run"]
pub struct Builder<Tx, L = Identity> {
    setup: Setup<Tx>,
    shutdown: BoxFuture<()>,
    layers: L,
}

impl<Tx, L> fmt::Debug for Builder<Tx, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("mode", &self.setup.mode)
            .field("source", &self.setup.source.name())
            .field("consumer", &self.setup.options.consumer)
            .finish_non_exhaustive()
    }
}

impl<Tx: Transaction> Builder<Tx> {
    pub(crate) fn new(
        mode: Mode,
        source: Arc<dyn Source>,
        store: Option<Arc<dyn Store>>,
        transactions: Option<Arc<dyn TransactionalStore<Tx = Tx>>>,
    ) -> Self {
        Self {
            setup: Setup {
                mode,
                source,
                store,
                transactions,
                sink: None,
                options: Options::default(),
                states: States::default(),
                on_duplicate: None,
                counters: Arc::default(),
            },
            shutdown: Box::pin(std::future::pending()),
            layers: Identity::new(),
        }
    }
}

impl<Tx: Transaction, L> Builder<Tx, L> {
    /// The consumer's name. Two consumers of one queue keep separate dedup records; all workers of one consumer must use
    /// the same name, and go on using it: under another one, nothing has taken effect yet. Default: `default`.
    pub fn consumer(mut self, name: impl Into<String>) -> Self {
        self.setup.options.consumer = name.into();
        self
    }

    /// The identity of the queue, in place of [what the source tells](crate::driver::QueueInfo::identity): for a queue that was
    /// moved to another place and is to keep its dedup records. Give what it was there; the log says it at each start, and
    /// [`Source::queue_info`] at any time. All workers of one consumer must use the same.
    ///
    /// Two queues under one identity share their keys: of two messages with one key, only one takes effect.
    pub fn identity(mut self, identity: impl Into<String>) -> Self {
        self.setup.options.identity = Some(identity.into());
        self
    }

    /// Where messages go that cannot be processed. Without one, the source's own dead-letter queue takes them. It must exist
    /// when the pipeline starts, and be another queue than the one that is consumed.
    pub fn dead_letter(mut self, sink: impl Sink) -> Self {
        self.setup.sink = Some(Arc::new(sink));
        self
    }

    /// How the dedup key is chosen. Default: the attribute `idempotency-key`, else the producer's id.
    pub fn dedup_key(mut self, policy: KeyPolicy) -> Self {
        self.setup.options.dedup_key = policy;
        self
    }

    /// How many handlers run at the same time. Default: 64.
    pub fn concurrency(mut self, handlers: usize) -> Self {
        self.setup.options.concurrency = handlers.max(1);
        self
    }

    /// How many messages, and how many bytes of them, a handler that takes a [`Batch`](crate::Batch) gets in one call at the most;
    /// and how long the first of them waits for others, if fewer are there. One message larger than all the bytes is a batch of
    /// its own. Default: 100, 4 MiB, and no wait: a batch is what has come while the one before it was worked on.
    pub fn batch(mut self, messages: usize, bytes: usize, wait: Duration) -> Self {
        self.setup.options.batch = Limits {
            messages: messages.max(1),
            bytes: bytes.max(1),
            wait,
        };
        self
    }

    /// How many messages, and how many bytes of them, are held at most, those that run included. One message larger than
    /// all the bytes is still taken. Default: 1,000 and 64 MiB.
    ///
    /// Fewer are held where handlers are slow: as many as can start before their leases would have to be extended.
    pub fn prefetch(mut self, messages: usize, bytes: usize) -> Self {
        self.setup.options.prefetch_messages = messages.max(1);
        self.setup.options.prefetch_bytes = bytes.max(1);
        self
    }

    /// How long a claim in the store lasts without being renewed. After a crash its messages wait that long for the next
    /// worker. Default: 30 s, at least 10 ms, at most a day. It is renewed when a third has passed.
    ///
    /// In `transactional` mode only what may have killed its worker is claimed.
    pub fn claim_lease(mut self, lease: Duration) -> Self {
        self.setup.options.claim_lease = lease.clamp(SHORTEST_CLAIM, LONGEST_CLAIM);
        self
    }

    /// How long the record that a message took effect is kept. Longer than the broker can deliver it again, redrives
    /// from a dead-letter queue included. Default: 15 days, at least [`claim_lease`](Self::claim_lease). In `transactional` mode no
    /// handler runs for longer.
    pub fn dedup_retention(mut self, retention: Duration) -> Self {
        self.setup.options.dedup_retention = retention;
        self
    }

    /// When to try a message again whose handler failed.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.setup.options.retry = policy;
        self
    }

    /// What to do with a message that may have taken effect; `idempotent` mode only.
    pub fn on_in_doubt(mut self, what: InDoubt) -> Self {
        self.setup.options.on_in_doubt = what;
        self
    }

    /// A handler that takes longer, from when it is called, is cancelled and counts as failed. A layer before it may wait as
    /// it likes, and so may the handler for its turn in the store's transaction. The same goes for
    /// [`on_duplicate`](Self::on_duplicate). Default: no limit but the lease, which is extended.
    pub fn handler_timeout(mut self, limit: Duration) -> Self {
        self.setup.options.handler_timeout = Some(limit);
        self
    }

    /// How long a drain waits for running handlers before it cancels them. Default: 30 s.
    pub fn drain_timeout(mut self, limit: Duration) -> Self {
        self.setup.options.drain_timeout = limit;
        self
    }

    /// Stop, with a drain, when nothing has been received for this time.
    pub fn stop_when_idle(mut self, idle: Duration) -> Self {
        self.setup.options.stop_when_idle = Some(idle);
        self
    }

    /// Stop, with a drain, when this future resolves (a signal, say).
    pub fn shutdown(mut self, signal: impl Future<Output = ()> + Send + 'static) -> Self {
        self.shutdown = Box::pin(signal);
        self
    }

    /// Demand that the queue keeps the order within groups; checked at the start.
    pub fn require_ordering(mut self) -> Self {
        self.setup.options.require_ordering = true;
        self
    }

    /// Start in spite of a risk that the start-up checks find.
    pub fn allow(mut self, risk: ConfigRisk) -> Self {
        self.setup.options.allowed.push(risk);
        self
    }

    /// A value that handlers can ask for as [`State<T>`](crate::State).
    pub fn state<T: Clone + Send + Sync + 'static>(mut self, value: T) -> Self {
        self.setup.states.insert(value);
        self
    }

    /// Called for each delivery of a message that took effect before, with what its handler left, before the broker is
    /// told: to repeat a reply, for instance. If it fails, it is retried like a handler.
    pub fn on_duplicate<F, Fut>(mut self, replay: F) -> Self
    where
        F: Fn(Context, Outcome) -> Fut + Send + Sync + 'static,
        Fut: Future<Output: IntoOutcome> + Send + 'static,
    {
        self.setup.on_duplicate = Some(Arc::new(move |context, outcome| {
            let replayed = replay(context, outcome);
            Box::pin(async move { replayed.await.into_outcome().map(drop) })
        }));
        self
    }

    /// The live counts, to be kept and read while the pipeline runs.
    pub fn counters(&self) -> Arc<Counters> {
        self.setup.counters.clone()
    }

    /// Wraps a `tower` layer around the handler, outside those added before. A layer must call the handler on the task
    /// that calls it.
    pub fn layer<M>(self, layer: M) -> Builder<Tx, Stack<L, M>> {
        Builder {
            setup: self.setup,
            shutdown: self.shutdown,
            layers: Stack::new(self.layers, layer),
        }
    }

    /// Runs the pipeline until it is told to stop or cannot go on.
    ///
    /// Ends with a drain: running handlers finish, everything else is given back in order, the source is closed. That takes
    /// no longer than [`drain_timeout`](Self::drain_timeout) and a little over a minute, whatever hangs.
    /// Dropping the future loses no message: what is not settled comes again when its lease ends.
    ///
    /// # Errors
    /// [`Unsafe`](crate::ErrorKind::Unsafe) settings; a source or store that fails in a way that no retry can fix.
    /// What can be retried is retried here. The error has the report of what was done until then.
    pub async fn run<H, Args>(self, handler: H) -> Result<Report, RunError>
    where
        H: Handler<Tx, Args>,
        Args: 'static,
        L: Layer<HandlerService<H, Tx, Args>>,
        L::Service: Service<Request<Tx>, Response = Outcome> + Clone + Send + 'static,
        <L::Service as Service<Request<Tx>>>::Error: Into<BoxError>,
        <L::Service as Service<Request<Tx>>>::Future: Send,
    {
        let handler = callable(self.layers.layer(HandlerService::new(handler)));
        let about = About {
            name: std::any::type_name::<H>(),
            missing: H::missing,
            parameters: H::parameters,
        };
        let mut setup = self.setup;
        let options = &mut setup.options;
        options.dedup_retention = options.dedup_retention.max(options.claim_lease);
        let counters = setup.counters.clone();
        let ended = run(setup, (handler, about), self.shutdown).await;
        let report = counters.report();
        ended.map_err(|error| RunError { error, report })?;
        Ok(report)
    }
}
