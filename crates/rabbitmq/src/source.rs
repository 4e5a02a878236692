use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::ReadyChunks;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use onlyonce_core::{
    Action, Answer, Capabilities, Delivery, Error, ErrorKind, Inspection, Lease, Limit, Ordering,
    Receipt, Settlement, Source,
};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::acks::{Acks, Frame, Verdict};
use crate::connection::{Backoff, Link, after, answer};
use crate::delay::{Delayer, Original};
use crate::error::Fault;
use crate::publisher::{finish, start};
use crate::{Config, config, headers};

/// How long a channel on which nothing was settled must have lived for the next reconnection to be quick again.
const STABLE: Duration = Duration::from_secs(10);
/// Deliveries taken from the client in one go.
const CHUNK: usize = 1_000;
/// So much sooner than the broker, a lease ends here: at most, and in parts of the lease.
const MARGIN: Duration = Duration::from_secs(1);
const MARGIN_PART: u32 = 10;

/// Consumes one queue with manual acks. See the [crate's page](crate).
///
/// The connection is made by the first [`receive`](Source::receive) and kept up by a task of its own from then on.
/// Dropping the source closes it in the background, as [`close`](Source::close) does.
pub struct RabbitSource {
    shared: Arc<Shared>,
    _stop: DropGuard,
}

struct Shared {
    queue: String,
    config: Config,
    capabilities: Capabilities,
    delayer: Option<Delayer>,
    state: Mutex<State>,
    /// Something in `state` changed that a `receive` may wait for.
    changed: Notify,
    stop: CancellationToken,
}

#[derive(Default)]
struct State {
    /// The channel that lives now.
    epoch: Option<Arc<Epoch>>,
    epochs: u64,
    ready: VecDeque<Delivery>,
    /// Why there is no channel; for the next `receive`.
    error: Option<Error>,
    driver: Option<JoinHandle<Result<(), Fault>>>,
    driving: bool,
    closed: bool,
}

/// The life of one channel. Delivery tags mean nothing outside it.
struct Epoch {
    number: u64,
    link: Link,
    lost: CancellationToken,
    acks: Mutex<Acks<Option<Box<Original>>>>,
    /// Tags of which copies are under way.
    moving: Mutex<BTreeSet<u64>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RabbitSource {
    /// A source that connects when it is first used. Does not block.
    ///
    /// # Errors
    /// The configuration names no queue, or cannot work.
    pub fn new(config: Config) -> Result<Self, Error> {
        let queue = config.source_queue()?.to_owned();
        config::name("queue", &queue)?;
        config.warn_of_plain_credentials();
        let grouped = config.group_header.is_some() || config.single_active_consumer;
        let mut capabilities = Capabilities::default();
        capabilities.timed_lease = !config.consumer_timeout.is_zero();
        capabilities.counts_attempts = config.quorum;
        capabilities.delayed_nack = config.delayed_retry && !grouped;
        if grouped {
            capabilities.ordering = Ordering::Delivery;
        }
        let delayer = capabilities
            .delayed_nack
            .then(|| Delayer::new(config.clone(), &queue));
        let stop = CancellationToken::new();
        Ok(Self {
            _stop: stop.clone().drop_guard(),
            shared: Arc::new(Shared {
                queue,
                config,
                capabilities,
                delayer,
                state: Mutex::default(),
                changed: Notify::new(),
                stop,
            }),
        })
    }
}

#[async_trait]
impl Source for RabbitSource {
    fn name(&self) -> &str {
        &self.shared.queue
    }

    fn capabilities(&self) -> Capabilities {
        self.shared.capabilities
    }

    async fn receive(&self, limit: Limit) -> Result<Vec<Delivery>, Error> {
        let deadline = after(limit.wait);
        loop {
            let changed = self.shared.changed.notified();
            if let Some(outcome) = Shared::poll(&self.shared, limit) {
                return outcome;
            }
            if timeout_at(deadline, changed).await.is_err() {
                return Ok(Vec::new());
            }
        }
    }

    /// `Applied`: the frame was written to the channel that the delivery came by. AMQP confirms no ack.
    async fn settle(&self, batch: &[Settlement]) -> Vec<Answer> {
        let mut answers: Vec<_> = batch.iter().map(|_| Answer::LeaseLost).collect();
        let Some(epoch) = lock(&self.shared.state).epoch.clone() else {
            return answers;
        };
        let mut now = Vec::with_capacity(batch.len());
        let mut later = Vec::new();
        for (at, settlement) in batch.iter().enumerate() {
            let Receipt::Tag { epoch: number, tag } = settlement.receipt else {
                continue;
            };
            if number != epoch.number {
                continue;
            }
            match &settlement.action {
                Action::Ack => now.push((at, tag, Verdict::Ack)),
                Action::Nack { delay } if delay.is_zero() => now.push((at, tag, Verdict::Requeue)),
                Action::Nack { delay } => later.push((at, tag, *delay)),
                Action::DeadLetter { .. } => {
                    answers[at] = Answer::Unknown(self.shared.cannot("dead-letter with a reason"))
                }
            }
        }
        self.shared.settle_now(&epoch, now, &mut answers).await;
        if !later.is_empty() {
            self.shared.settle_later(&epoch, later, &mut answers).await;
        }
        answers
    }

    async fn extend(&self, batch: &[Receipt], _lease: Duration) -> Vec<Answer> {
        let answer = |_| Answer::Unknown(self.shared.cannot("extend a lease"));
        batch.iter().map(answer).collect()
    }

    async fn inspect(&self) -> Result<Inspection, Error> {
        self.shared.inspect().await
    }

    /// Gives back what is not settled by closing the channel, and with it everything that was sent on it before: when
    /// this is `Ok`, the broker has read every ack.
    async fn close(&self) -> Result<(), Error> {
        let driver = {
            let mut state = lock(&self.shared.state);
            state.closed = true;
            self.shared.lose(&mut state);
            state.driver.take()
        };
        self.shared.stop.cancel();
        let outcome = match driver {
            Some(driver) => driver.await.unwrap_or(Ok(())),
            None => Ok(()),
        };
        if let Some(delayer) = &self.shared.delayer {
            delayer.close().await?;
        }
        outcome.map_err(|fault| fault.error("cannot close the channel", &self.shared.queue))
    }
}

impl Shared {
    /// What `receive` returns now, if anything.
    fn poll(shared: &Arc<Self>, limit: Limit) -> Option<Result<Vec<Delivery>, Error>> {
        let mut state = lock(&shared.state);
        if !state.ready.is_empty() {
            return Some(Ok(take(&mut state.ready, limit)));
        }
        if state.closed {
            let closed = Error::new(ErrorKind::Closed, "the source was closed");
            return Some(Err(closed.on_queue(&shared.queue)));
        }
        if let Some(error) = state.error.take() {
            return Some(Err(error));
        }
        if !state.driving {
            state.driving = true;
            state.driver = Some(tokio::spawn(drive(Arc::clone(shared))));
        }
        None
    }

    /// Ends the epoch, if there is one: its receipts are worthless, and what was not handed out comes again.
    fn lose(&self, state: &mut State) {
        if let Some(epoch) = state.epoch.take() {
            epoch.lost.cancel();
        }
        state.ready.clear();
        self.changed.notify_waiters();
    }

    /// A channel that consumes; `None` if the source was closed meanwhile.
    async fn open(&self) -> Result<Option<(Link, Consumer)>, Fault> {
        let role = format!("source {}", self.queue);
        let link = tokio::select! {
            () = self.stop.cancelled() => return Ok(None),
            link = Link::open(&self.config, &role) => link?,
        };
        // Not to be dropped half-way: lapin would keep connection and consumer open, with messages that nobody sees.
        let consumer = answer(self.config.timeout, async {
            let qos = BasicQosOptions { global: false };
            link.channel.basic_qos(self.config.prefetch, qos).await?;
            let queue = self.queue.as_str().into();
            let options = BasicConsumeOptions::default();
            let arguments = self.config.consumer_arguments();
            let consume = link
                .channel
                .basic_consume(queue, "".into(), options, arguments);
            consume.await
        })
        .await;
        match consumer {
            Ok(consumer) => Ok(Some((link, consumer))),
            Err(fault) => {
                // The fault tells more than whether this worked.
                let _ = link.close().await;
                Err(fault)
            }
        }
    }

    fn begin(&self, link: Link) -> Arc<Epoch> {
        let mut state = lock(&self.state);
        state.epochs += 1;
        let epoch = Arc::new(Epoch {
            number: state.epochs,
            link,
            lost: CancellationToken::new(),
            acks: Mutex::new(Acks::new()),
            moving: Mutex::default(),
        });
        if !state.closed {
            state.epoch = Some(Arc::clone(&epoch));
            state.error = None;
        }
        epoch
    }

    /// Tells the next `receive`; true when the driver is to end.
    fn report(&self, error: Error, go_on: bool) -> bool {
        let mut state = lock(&self.state);
        state.error = Some(error);
        state.driving = go_on;
        self.changed.notify_waiters();
        !go_on
    }

    /// The life of one channel: `Ok` when the source was closed and the channel with it, else why it ended. And whether
    /// anything was settled on it.
    async fn live(&self, link: Link, consumer: Consumer) -> (Result<(), Fault>, bool) {
        let epoch = self.begin(link);
        let mut deliveries = consumer.ready_chunks(CHUNK);
        let ended = self.read(&epoch, &mut deliveries).await;
        self.lose(&mut lock(&self.state));
        // Before the consumer is dropped, which would cancel it.
        let closed = epoch.link.close().await;
        drop(deliveries);
        let useful = lock(&epoch.acks).any_settled();
        (ended.and(closed), useful)
    }

    /// Reads deliveries until the source is closed.
    async fn read(&self, epoch: &Epoch, chunks: &mut ReadyChunks<Consumer>) -> Result<(), Fault> {
        loop {
            let chunk = tokio::select! {
                () = self.stop.cancelled() => return Ok(()),
                chunk = chunks.next() => chunk.ok_or(Fault::Cancelled)?,
            };
            let received = Instant::now();
            let deliveries: Vec<_> = chunk
                .into_iter()
                .map(|delivery| Ok(self.delivery(epoch, delivery?, received)))
                .collect::<Result<_, Fault>>()?;
            let mut state = lock(&self.state);
            if state
                .epoch
                .as_ref()
                .is_some_and(|live| live.number == epoch.number)
            {
                state.ready.extend(deliveries);
                self.changed.notify_waiters();
            }
        }
    }

    /// How long a delivery is held at most: the broker's clock runs from when it sent it.
    fn lease(&self) -> Duration {
        let timeout = self.config.consumer_timeout;
        timeout - MARGIN.min(timeout / MARGIN_PART)
    }

    fn delivery(
        &self,
        epoch: &Epoch,
        delivery: lapin::message::Delivery,
        received: Instant,
    ) -> Delivery {
        let tag = delivery.delivery_tag;
        let properties = delivery.properties;
        let body = Bytes::from(delivery.data);
        let (attempt, counted) = headers::attempt(&properties, &self.queue, delivery.redelivered);
        let group_header = self.config.group_header.as_deref();
        let (mut message, malformed) = headers::read(&properties, body.clone(), group_header);
        headers::read_origin(
            &mut message,
            delivery.exchange.as_str(),
            delivery.routing_key.as_str(),
        );
        headers::read_first_user(&mut message, &properties, self.config.user());
        if message.dedup_id.is_none() {
            message.broker_id = Some(format!("delivery {tag} of channel {}", epoch.number));
        }
        if group_header.is_none() && self.config.single_active_consumer {
            message.group = Some(self.queue.clone());
        }
        let original = self.delayer.is_some().then(|| {
            Box::new(Original {
                properties,
                body,
                attempt,
            })
        });
        lock(&epoch.acks).delivered(original);
        let mut lease = Lease::default().tied_to(epoch.lost.clone());
        if !self.config.consumer_timeout.is_zero() {
            lease.until = received.checked_add(self.lease());
        }
        let receipt = Receipt::Tag {
            epoch: epoch.number,
            tag,
        };
        let mut delivery = Delivery::new(message, receipt, lease);
        delivery.attempt = (counted || self.config.quorum).then_some(attempt);
        delivery.malformed = malformed;
        delivery
    }

    /// Marks and hands all frames to the connection before anything is awaited: so the frames of concurrent calls keep
    /// the order in which the calls marked, and a dropped future leaves nothing marked but unsent.
    async fn settle_now(
        &self,
        epoch: &Epoch,
        wanted: Vec<(usize, u64, Verdict)>,
        answers: &mut [Answer],
    ) {
        let (done, frames) = {
            let mut acks = lock(&epoch.acks);
            if epoch.lost.is_cancelled() {
                return;
            }
            let (done, frames) =
                acks.settle(wanted.iter().map(|(_, tag, verdict)| (*tag, *verdict)));
            let frames: Vec<_> = frames
                .into_iter()
                .map(|frame| start(send(&epoch.link.channel, frame)))
                .collect();
            (done, frames)
        };
        let mut failed = None;
        for frame in frames {
            failed = finish(frame).await.err().or(failed);
        }
        for ((at, ..), done) in wanted.into_iter().zip(done) {
            answers[at] = match (&failed, done) {
                (_, false) => Answer::LeaseLost,
                (None, true) => Answer::Applied,
                (Some(error), true) => {
                    let fault = Fault::Lapin(error.clone());
                    Answer::Unknown(fault.error("cannot settle", &self.queue).retryable(true))
                }
            };
        }
    }

    /// A copy is confirmed in a delay queue before the original is acked.
    async fn settle_later(
        self: &Arc<Self>,
        epoch: &Arc<Epoch>,
        wanted: Vec<(usize, u64, Duration)>,
        answers: &mut [Answer],
    ) {
        let Some(delayer) = &self.delayer else {
            for (at, ..) in wanted {
                answers[at] = Answer::Unknown(self.cannot("delay a delivery that is given back"));
            }
            return;
        };
        let mut originals = Vec::new();
        let mut copied = Vec::new();
        let mut gone = Vec::new();
        for (at, tag, delay) in wanted {
            if !lock(&epoch.moving).insert(tag) {
                let what = "a copy of it that comes back later is under way";
                let error = Error::new(ErrorKind::Throttled, what).on_queue(&self.queue);
                answers[at] = Answer::Unknown(error);
                continue;
            }
            match lock(&epoch.acks).kept(tag).and_then(Option::as_deref) {
                Some(original) => {
                    originals.push((original.clone(), delay));
                    copied.push((at, tag));
                }
                None => {
                    lock(&epoch.moving).remove(&tag);
                    gone.push((at, tag, Verdict::Moved));
                }
            }
        }
        let (answer, moved) = oneshot::channel();
        let tags = copied.iter().map(|(_, tag)| *tag).collect();
        let mover = Arc::clone(self).move_all(Arc::clone(epoch), tags, originals, answer);
        tokio::spawn(mover);
        self.settle_now(epoch, gone, answers).await;
        let moved = tokio::select! {
            biased;
            moved = moved => moved.ok(),
            () = delayer.blocked() => None,
        };
        let mut moved = moved.into_iter().flatten();
        for (at, _) in copied {
            let blocked = || Answer::Unknown(delayer.blocked_error());
            answers[at] = moved.next().unwrap_or_else(blocked);
        }
    }

    /// Copies to delay queues, then acks what was copied. In a task, since the copies come about once they are sent: while
    /// the broker blocks the connection, other settlements must not wait for that.
    async fn move_all(
        self: Arc<Self>,
        epoch: Arc<Epoch>,
        tags: Vec<u64>,
        originals: Vec<(Original, Duration)>,
        answer: oneshot::Sender<Vec<Answer>>,
    ) {
        let Some(delayer) = &self.delayer else { return };
        let results = tokio::select! {
            () = epoch.lost.cancelled() => Vec::new(),
            results = delayer.publish(&originals) => results,
        };
        let mut answers: Vec<_> = tags.iter().map(|_| Answer::LeaseLost).collect();
        let mut moved = Vec::new();
        for (at, result) in results.into_iter().enumerate() {
            match result {
                Ok(()) => moved.push((at, tags[at], Verdict::Moved)),
                // Nobody will ask again.
                Err(_) if answer.is_closed() => moved.push((at, tags[at], Verdict::Requeue)),
                Err(error) => answers[at] = Answer::Unknown(error),
            }
        }
        self.settle_now(&epoch, moved, &mut answers).await;
        lock(&epoch.moving).retain(|tag| !tags.contains(tag));
        let _ = answer.send(answers);
    }

    fn cannot(&self, what: &str) -> Error {
        Error::new(ErrorKind::Other, format!("RabbitMQ cannot {what}")).on_queue(&self.queue)
    }

    async fn inspect(&self) -> Result<Inspection, Error> {
        let fault = |fault: Fault| fault.error("cannot inspect the queue", &self.queue);
        let link = Link::open(&self.config, &format!("inspection {}", self.queue))
            .await
            .map_err(fault)?;
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let request =
            link.channel
                .queue_declare(self.queue.as_str().into(), passive, FieldTable::default());
        let queue = answer(self.config.timeout, request).await;
        let closed = link.close().await;
        let queue = queue.map_err(fault)?;
        closed.map_err(fault)?;
        let own = u32::from(lock(&self.state).epoch.is_some());
        Ok(self.inspection(queue.consumer_count().saturating_sub(own)))
    }

    fn inspection(&self, other_consumers: u32) -> Inspection {
        let mut inspection = Inspection::default();
        let config = &self.config;
        let unknown = &mut inspection.unknown;
        unknown.push(
            "max_deliveries: AMQP does not tell. A quorum queue of RabbitMQ 4 deletes a message after 20 failed deliveries unless it has a dead-letter exchange or a higher x-delivery-limit (-1, for none, is for RabbitMQ 4 alone: 3.x deletes every message that comes back)".into(),
        );
        unknown.push(
            "dead_letter, retention: AMQP does not tell a queue's arguments and policies".into(),
        );
        if !config.consumer_timeout.is_zero() {
            inspection.lease = Some(config.consumer_timeout);
            unknown.push(
                "lease: taken from the URL's consumer_timeout; AMQP does not tell the broker's"
                    .into(),
            );
        }
        if config.single_active_consumer {
            inspection.ordered = Some(true);
            unknown.push(
                "ordered: by the URL's single_active_consumer; AMQP does not tell the queue's"
                    .into(),
            );
        } else if config.group_header.is_some() {
            if other_consumers > 0 {
                inspection.ordered = Some(false);
            }
            unknown.push("ordered: only while this is the queue's one consumer, unless the queue has x-single-active-consumer".into());
        }
        inspection
    }
}

/// Takes what `limit` allows: at least one.
fn take(ready: &mut VecDeque<Delivery>, limit: Limit) -> Vec<Delivery> {
    let mut bytes = 0;
    let mut count = 0;
    for delivery in ready.iter() {
        if !limit.allows_more(count, bytes) {
            break;
        }
        bytes += delivery.message.size();
        count += 1;
    }
    ready.drain(..count).collect()
}

async fn send(channel: &Channel, frame: Frame) -> lapin::Result<()> {
    match frame {
        Frame::Ack { tag, multiple } => channel.basic_ack(tag, BasicAckOptions { multiple }).await,
        Frame::Requeue { tag } => {
            let options = BasicNackOptions {
                multiple: false,
                requeue: true,
            };
            channel.basic_nack(tag, options).await
        }
    }
}

/// Keeps a channel open until the source is closed, or until an error that trying again does not mend.
async fn drive(shared: Arc<Shared>) -> Result<(), Fault> {
    let mut backoff = Backoff::default();
    loop {
        match shared.open().await {
            Ok(None) => return Ok(()),
            Ok(Some((link, consumer))) => {
                let opened_at = Instant::now();
                let (ended, useful) = shared.live(link, consumer).await;
                if shared.stop.is_cancelled() {
                    return ended;
                }
                let Err(fault) = ended else { return Ok(()) };
                let error = fault.error("the channel ended", &shared.queue);
                tracing::warn!(queue = shared.queue, %error, "reconnecting");
                if fault.is_unreadable() && shared.report(error, false) {
                    return Ok(());
                }
                if useful || opened_at.elapsed() >= STABLE {
                    backoff.reset();
                }
            }
            Err(fault) => {
                let error = fault.error("cannot consume", &shared.queue);
                if shared.report(error, fault.is_passing()) {
                    return Ok(());
                }
            }
        }
        tokio::select! {
            () = shared.stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(backoff.pause()) => {}
        }
    }
}

impl fmt::Debug for RabbitSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitSource")
            .field("config", &self.shared.config)
            .finish_non_exhaustive()
    }
}
