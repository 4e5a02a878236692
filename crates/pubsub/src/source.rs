use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::{PullRequest, ReceivedMessage};
use onlyonce_core::driver::{
    Delivery, ExtendResult, Lease, QueueInfo, Receipt, ReceiveLimits, SettleResult, Settlement,
    Source,
};
use onlyonce_core::{Error, ErrorKind};
use tokio::sync::{Notify, OnceCell};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::connection::{Connection, PULL};
use crate::leases::{Leases, PubSubReceipt};
use crate::pulls::{Pull, Pulls};
use crate::subscription::{self, Settings, Traits};
use crate::{Config, PubSubSink, message};

/// A pull waits for messages for this long at most. One that brings nothing is no error.
const PULL_TIMEOUT: Duration = Duration::from_secs(90);
/// A pull that nobody waits for is cancelled after this or twice as long: it would take messages from other consumers. Not
/// sooner: between two receives a worker settles, or waits for a handler.
const UNAWAITED: Duration = Duration::from_secs(5);
/// Between pulls of a service that answers at once that there is nothing.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes messages from a subscription. See the [crate's page](crate).
///
/// Dropping it without [`close`](Source::close) cancels its pulls, and leaves what it holds to the end of the ack deadline.
pub struct PubSubSource {
    shared: Arc<Shared>,
    _dropped: DropGuard,
}

/// What the source and its pulls share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) resource: String,
    pub(crate) connection: Connection,
    state: Mutex<State>,
    pub(crate) changed: Notify,
    /// One ack at a time, so that those of a key stay in order.
    pub(crate) acking: tokio::sync::Mutex<()>,
    pulling: TaskTracker,
    /// The source was closed or dropped.
    ended: CancellationToken,
    traits: OnceCell<Traits>,
    pub(crate) dead_letters: OnceCell<PubSubSink>,
}

pub(crate) struct State {
    pub(crate) pulls: Pulls,
    pub(crate) leases: Leases,
    closed: bool,
}

impl PubSubSource {
    /// A source that connects when it is first used. Does not block.
    ///
    /// # Errors
    /// The configuration cannot work.
    pub fn new(config: Config) -> Result<Self, Error> {
        Self::open(config, None)
    }

    /// The same, by a channel of your own: through a proxy, with another TLS stack, with interceptors. It has to bring its own
    /// credentials, and to take headers of 4 MiB, in which the service tells which acks failed.
    ///
    /// # Errors
    /// The configuration cannot work.
    pub fn with_channel(config: Config, channel: Channel) -> Result<Self, Error> {
        Self::open(config, Some(channel))
    }

    fn open(config: Config, channel: Option<Channel>) -> Result<Self, Error> {
        config.check()?;
        if config.address.is_topic() {
            let text = "a topic cannot be received from: name one of its subscriptions";
            return Err(Error::config(text).on_queue(config.name()));
        }
        let ended = CancellationToken::new();
        let shared = Shared {
            state: Mutex::new(State {
                pulls: Pulls::new(config.pulls),
                leases: Leases::default(),
                closed: false,
            }),
            resource: config.resource(),
            connection: Connection::new(config.clone(), channel),
            config,
            changed: Notify::new(),
            acking: tokio::sync::Mutex::default(),
            pulling: TaskTracker::new(),
            ended: ended.clone(),
            traits: OnceCell::new(),
            dead_letters: OnceCell::new(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            _dropped: ended.drop_guard(),
        })
    }
}

#[async_trait]
impl Source for PubSubSource {
    fn name(&self) -> &str {
        self.shared.config.name()
    }

    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        let _awaited = Awaited::begin(&self.shared);
        let deadline = limits.deadline();
        loop {
            let changed = self.shared.changed.notified();
            if let Some(received) = self.shared.receive_now(limits)? {
                return Ok(received);
            }
            tokio::select! {
                () = changed => {}
                () = sleep_until(deadline) => return Ok(Vec::new()),
            }
        }
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        self.shared.settle(batch).await
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        self.shared.extend(batch, lease).await
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        subscription::inspect(&self.shared.connection, &self.shared.config).await
    }

    /// Cancels the pulls under way, then gives back what is held. What the service gives to a pull in the moment in which it is
    /// cancelled comes again when its ack deadline ends.
    async fn close(&self) -> Result<(), Error> {
        self.shared.close().await
    }
}

/// Somebody waits for messages.
struct Awaited<'a>(&'a Shared);

impl<'a> Awaited<'a> {
    fn begin(shared: &'a Shared) -> Self {
        shared.state().pulls.receive_began();
        Self(shared)
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.0.state().pulls.receive_ended();
    }
}

impl Shared {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is, while enough pulls are kept under way; `None` if it has to be waited for.
    fn receive_now(
        self: &Arc<Self>,
        limits: ReceiveLimits,
    ) -> Result<Option<Vec<Delivery>>, Error> {
        let mut state = self.state();
        if state.closed {
            return Err(self.closed());
        }
        while let Some(pull) = state.pulls.next(limits) {
            self.pulling.spawn(self.clone().pull(pull));
        }
        let State { pulls, leases, .. } = &mut *state;
        let groups_out = match self.keeps_order() && !pulls.ready.is_empty() {
            true => leases.groups_out(),
            false => HashSet::new(),
        };
        let gone = |delivery: &Delivery| leases.is_gone(&delivery.receipt);
        let ready = pulls.ready.take(limits, &groups_out, gone);
        if !ready.is_empty() {
            leases.are_out(&ready);
            return Ok(Some(ready));
        }
        state.pulls.error.take().map_or(Ok(None), Err)
    }

    fn closed(&self) -> Error {
        Error::new(ErrorKind::Closed, "the source was closed").on_queue(self.config.name())
    }

    /// A task of its own, so that whoever stops waiting loses nothing. It may be cancelled until the answer is there.
    async fn pull(self: Arc<Self>, pull: Pull) {
        let answer = tokio::select! {
            biased;
            answer = self.ask(&pull) => Some(answer),
            () = self.ended.cancelled() => None,
            () = self.is_unawaited() => None,
        };
        let answer = match answer {
            Some(Ok(answer)) => Some(Ok(self.leased(answer).await)),
            Some(Err(error)) => Some(Err(error)),
            None => None,
        };
        let mut state = self.state();
        match answer {
            Some(Ok(mut deliveries)) => {
                state.leases.begin(&mut deliveries);
                state.pulls.came_back(&pull, deliveries);
            }
            Some(Err(error)) => state.pulls.failed(&pull, error),
            None => state.pulls.ended(&pull),
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Returns when nobody has waited for a while.
    async fn is_unawaited(&self) {
        let mut awaited = true;
        loop {
            sleep(UNAWAITED).await;
            let now = self.state().pulls.are_awaited();
            if !now && !awaited {
                return;
            }
            awaited = now;
        }
    }

    /// One request, and what it brought.
    async fn ask(&self, pull: &Pull) -> Result<Answer, Error> {
        let traits = self.traits().await?;
        let sent = Instant::now();
        let request = PullRequest {
            subscription: self.resource.clone(),
            max_messages: i32::try_from(pull.messages).unwrap_or(i32::MAX),
            ..PullRequest::default()
        };
        let call = self
            .connection
            .call(&PULL, &self.resource, request, PULL_TIMEOUT);
        let received = match call.await {
            Ok(answer) => answer.received_messages,
            Err(status) if is_empty(&status) => Vec::new(),
            Err(status) => return Err(self.connection.error("cannot pull", &status)),
        };
        if received.is_empty() && sent.elapsed() < PAUSE {
            sleep(PAUSE).await;
        }
        Ok(Answer {
            traits,
            sent,
            received,
        })
    }

    /// Leases are counted from when the pull was sent: the service began to count no earlier. Where that leaves too little,
    /// because the pull had to wait or a longer lease is wanted, all are extended.
    async fn leased(&self, answer: Answer) -> Vec<Delivery> {
        let traits = answer.traits;
        let until = answer.sent + traits.deadline;
        let delivery = |received| delivery(received, traits, until);
        let deliveries = answer.received.into_iter().map(delivery).collect();
        let wanted = self.config.lease.unwrap_or(traits.deadline);
        match until >= Instant::now() + wanted.mul_f64(2.0 / 3.0) {
            true => deliveries,
            false => self.lease_anew(deliveries, wanted, traits).await,
        }
    }

    pub(crate) async fn traits(&self) -> Result<Traits, Error> {
        let read = || async {
            let settings = Settings::read(&self.connection, &self.config).await?;
            Ok(settings.traits())
        };
        self.traits.get_or_try_init(read).await.copied()
    }

    /// Whether the subscription keeps the order of keys, as far as is known: before anything was received, nothing has to.
    pub(crate) fn keeps_order(&self) -> bool {
        self.traits.get().is_some_and(|traits| traits.ordered)
    }

    async fn close(&self) -> Result<(), Error> {
        self.state().closed = true;
        self.ended.cancel();
        self.changed.notify_waiters();
        self.pulling.close();
        self.pulling.wait().await;
        let held = {
            let mut state = self.state();
            state.pulls.ready.clear();
            state.leases.all()
        };
        let given_back = self.give_back_all(held).await;
        self.state().leases.lose_all();
        given_back
    }
}

/// What a pull brought.
struct Answer {
    traits: Traits,
    sent: Instant,
    received: Vec<ReceivedMessage>,
}

/// A service that has nothing may say that the time is over, and so do we when the pull's own time has passed.
fn is_empty(status: &Status) -> bool {
    status.code() == Code::DeadlineExceeded
}

fn delivery(received: ReceivedMessage, traits: Traits, until: Instant) -> Delivery {
    let message = message::read(received.message.unwrap_or_default());
    let receipt = Receipt::new(PubSubReceipt {
        ack_id: received.ack_id.into(),
    });
    let delivery = Delivery::new(message, receipt, Lease::until(until));
    match u32::try_from(received.delivery_attempt) {
        Ok(attempt) if traits.counts_attempts && attempt > 0 => delivery.with_attempt(attempt),
        _ => delivery,
    }
}

impl fmt::Debug for PubSubSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PubSubSource")
            .field("config", &self.shared.config)
            .finish_non_exhaustive()
    }
}
