use std::collections::{BTreeSet, VecDeque};
use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::ReadyChunks;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions};
use lapin::{Channel, Consumer};
use onlyonce_core::driver::{
    Delivery, Disposition, ExtendResult, Lease, QueueInfo, Receipt, ReceiveLimits, SettleResult,
    Settlement, Source,
};
use onlyonce_core::{Error, ErrorKind};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::acks::{Acks, Frame, Verdict};
use crate::connection::{Backoff, Link, after, answer};
use crate::copies::{Copies, Original};
use crate::error::Fault;
use crate::headers::{self, Counts};
use crate::publisher::{finish, start};
use crate::queue_info::Queue;
use crate::{Config, config};

/// How long a channel on which nothing was settled must have lived for the next reconnection to be quick again.
const STABLE: Duration = Duration::from_secs(10);
/// A warning says when the prefetch is full and nothing was settled for this long.
const STUCK: Duration = Duration::from_secs(30);
/// Deliveries taken from the client in one go.
const CHUNK: usize = 1_000;
/// A lease ends here sooner than at the broker: by this at most, and by this part of the lease.
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
    copies: Copies,
    state: Mutex<State>,
    /// How often all that may be held was held, and nothing was settled.
    stalls: AtomicU64,
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

impl State {
    /// Whether this channel is the one that lives now.
    fn is_live(&self, epoch: &Epoch) -> bool {
        let live = self.epoch.as_ref();
        live.is_some_and(|live| live.number == epoch.number)
    }
}

/// The life of one channel. Delivery tags mean nothing outside it.
struct Epoch {
    number: u64,
    link: Link,
    terms: Terms,
    lost: CancellationToken,
    /// Something was given back that only the channel's end gives back in its place.
    returning: CancellationToken,
    acks: Mutex<Acks<Unsettled>>,
    /// Tags of which copies are under way.
    moving: Mutex<BTreeSet<u64>>,
}

/// What holds for the queue while a channel lives.
#[derive(Clone, Copy, Debug)]
struct Terms {
    /// Which headers count what the queue delivers again.
    counts: Counts,
    /// From how many returns on a message is renewed.
    renews_from: Option<u32>,
}

/// What belongs to a delivery that is out.
#[derive(Debug)]
struct Unsettled {
    /// To make a copy of.
    original: Option<Box<Original>>,
    in_group: bool,
    until: Option<Instant>,
}

/// RabbitMQ's own view of a delivery: what its receipt holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct RabbitReceipt {
    /// The number of the source's channel, from 1.
    pub channel: u64,
    /// The delivery tag within the channel.
    pub tag: u64,
    /// Whether the broker has delivered it before.
    pub redelivered: bool,
    /// The exchange that it was published to; of a message that was delayed or renewed by this crate, the last one.
    pub exchange: String,
    /// The routing key that it was published with; likewise.
    pub routing_key: String,
}

/// A delivery on its way to the first `receive`.
struct Arrived {
    delivery: Delivery,
    tag: u64,
    /// What the broker would soon give up on.
    worn: Option<Original>,
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
        let stop = CancellationToken::new();
        Ok(Self {
            _stop: stop.clone().drop_guard(),
            shared: Arc::new(Shared {
                copies: Copies::new(config.clone(), &queue),
                queue,
                config,
                state: Mutex::default(),
                stalls: AtomicU64::new(0),
                changed: Notify::new(),
                stop,
            }),
        })
    }
}

impl RabbitSource {
    /// For how many half minutes so far the source has held all that it may without one settlement, so that the rest of the
    /// queue waited: a group that fails has filled the prefetch, or handlers are slow. Each is also a warning in the log.
    #[must_use]
    pub fn stalls(&self) -> u64 {
        self.shared.stalls.load(Relaxed)
    }
}

#[async_trait]
impl Source for RabbitSource {
    fn name(&self) -> &str {
        &self.shared.queue
    }

    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        let deadline = after(limits.wait);
        loop {
            let changed = self.shared.changed.notified();
            if let Some(outcome) = Shared::poll(&self.shared, limits) {
                return outcome;
            }
            if timeout_at(deadline, changed).await.is_err() {
                return Ok(Vec::new());
            }
        }
    }

    /// `Applied`: the frame was written to the channel that the delivery came by. AMQP confirms no ack.
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let mut answers: Vec<_> = batch.iter().map(|_| SettleResult::LeaseLost).collect();
        let Some(epoch) = lock(&self.shared.state).epoch.clone() else {
            return answers;
        };
        let mut now = Vec::with_capacity(batch.len());
        let mut later = Vec::new();
        for (at, settlement) in batch.iter().enumerate() {
            let Some(&RabbitReceipt { channel, tag, .. }) = settlement.receipt.get() else {
                continue;
            };
            if channel != epoch.number {
                continue;
            }
            match &settlement.disposition {
                Disposition::Ack => now.push((at, tag, Verdict::Ack)),
                Disposition::Nack { delay } if delay.is_zero() => {
                    now.push((at, tag, epoch.give_back(tag)));
                }
                Disposition::Nack { delay } => later.push((at, tag, *delay)),
                Disposition::DeadLetter { .. } => {
                    answers[at] =
                        SettleResult::Unknown(self.shared.cannot("dead-letter with a reason"))
                }
            }
        }
        self.shared.settle_now(&epoch, now, &mut answers).await;
        if !later.is_empty() {
            self.shared.settle_later(&epoch, later, &mut answers).await;
        }
        answers
    }

    async fn extend(&self, batch: &[Receipt], _lease: Duration) -> Vec<ExtendResult> {
        let answer = |_| ExtendResult::Unknown(self.shared.cannot("extend a lease"));
        batch.iter().map(answer).collect()
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        self.shared.queue_info().await
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
        self.shared.copies.close().await?;
        outcome.map_err(|fault| fault.error("cannot close the channel", &self.shared.queue))
    }
}

impl Shared {
    /// What `receive` returns now, if anything.
    fn poll(shared: &Arc<Self>, limits: ReceiveLimits) -> Option<Result<Vec<Delivery>, Error>> {
        let mut state = lock(&shared.state);
        if !state.ready.is_empty() {
            return Some(Ok(take(&mut state.ready, limits)));
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
    async fn open(&self) -> Result<Option<(Link, Terms, Consumer)>, Fault> {
        let role = format!("source {}", self.queue);
        let link = tokio::select! {
            () = self.stop.cancelled() => return Ok(None),
            link = Link::open(&self.config, &role) => link?,
        };
        // Not to be dropped half-way: lapin would keep connection and consumer open, with messages that nobody sees.
        match self.consume(&link).await {
            Ok((terms, consumer)) => Ok(Some((link, terms, consumer))),
            Err(fault) => {
                // The fault tells more than whether this worked.
                let _ = link.close().await;
                Err(fault)
            }
        }
    }

    async fn consume(&self, link: &Link) -> Result<(Terms, Consumer), Fault> {
        let queue = Queue::look(&self.config, &self.queue, link).await?;
        let terms = Terms {
            counts: queue.counts(),
            renews_from: queue.renews_from(),
        };
        let consumer = answer(self.config.timeout, async {
            let qos = BasicQosOptions { global: false };
            link.channel.basic_qos(self.config.prefetch, qos).await?;
            let queue = self.queue.as_str().into();
            let options = BasicConsumeOptions::default();
            let arguments = self.config.consume_arguments();
            let consume = link
                .channel
                .basic_consume(queue, "".into(), options, arguments);
            consume.await
        })
        .await?;
        Ok((terms, consumer))
    }

    fn begin(&self, link: Link, terms: Terms) -> Arc<Epoch> {
        let mut state = lock(&self.state);
        state.epochs += 1;
        let epoch = Arc::new(Epoch {
            number: state.epochs,
            link,
            terms,
            lost: CancellationToken::new(),
            returning: CancellationToken::new(),
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
    async fn live(
        &self,
        link: Link,
        terms: Terms,
        consumer: Consumer,
    ) -> (Result<(), Fault>, bool) {
        let epoch = self.begin(link, terms);
        let mut deliveries = consumer.ready_chunks(CHUNK);
        let ended = self.read(&epoch, &mut deliveries).await;
        self.lose(&mut lock(&self.state));
        // Before the consumer is dropped, which would cancel it.
        let closed = epoch.link.close().await;
        drop(deliveries);
        let useful = lock(&epoch.acks).any_settled();
        (ended.and(closed), useful)
    }

    /// Reads deliveries until the source is closed, or the channel has to be.
    async fn read(&self, epoch: &Epoch, chunks: &mut ReadyChunks<Consumer>) -> Result<(), Fault> {
        let until_overdue = epoch.overdue(self.lease());
        let stuck = self.warn_when_stuck(epoch);
        tokio::pin!(until_overdue, stuck);
        loop {
            let next = async {
                let chunk = chunks.next().await.ok_or(Fault::Cancelled)?;
                self.arrived(epoch, chunk).await
            };
            let deliveries = tokio::select! {
                () = self.stop.cancelled() => return Ok(()),
                () = epoch.returning.cancelled() => return Err(Fault::Returned),
                never = &mut stuck => match never {},
                () = &mut until_overdue => return Err(Fault::Overdue(self.config.consumer_timeout)),
                deliveries = next => deliveries?,
            };
            let mut state = lock(&self.state);
            if state.is_live(epoch) {
                state.ready.extend(deliveries);
                self.changed.notify_waiters();
            }
        }
    }

    async fn warn_when_stuck(&self, epoch: &Epoch) -> Infallible {
        let mut before = None;
        loop {
            tokio::time::sleep(STUCK).await;
            let acks = lock(&epoch.acks);
            let unsettled = acks.unsettled();
            let now = Some((acks.last(), unsettled));
            drop(acks);
            if unsettled == u64::from(self.config.prefetch) && now == before {
                self.stalls.fetch_add(1, Relaxed);
                tracing::warn!(
                    queue = self.queue,
                    prefetch = self.config.prefetch,
                    "all that may be held is held, and nothing was settled for {STUCK:?}: the rest of the queue waits. A group that fails holds what follows it: raise prefetch above what piles up, or lower the retries"
                );
            }
            before = now;
        }
    }

    /// Reads what came, and renews of it what the broker would soon give up on: before anything of it runs, so that a
    /// handler that ends the process cannot keep the others from being renewed.
    async fn arrived(
        &self,
        epoch: &Epoch,
        chunk: Vec<lapin::Result<lapin::message::Delivery>>,
    ) -> Result<Vec<Delivery>, Fault> {
        let received = Instant::now();
        let arrived: Vec<_> = chunk
            .into_iter()
            .map(|delivery| Ok(self.delivery(epoch, delivery?, received)))
            .collect::<Result<_, Fault>>()?;
        let worn: Vec<_> = arrived.iter().filter_map(|it| it.worn.clone()).collect();
        if worn.is_empty() {
            return Ok(arrived.into_iter().map(|it| it.delivery).collect());
        }
        let mut renewed = self.copies.renew(&worn).await.into_iter();
        let mut moved = Vec::new();
        let mut kept = Vec::new();
        for Arrived {
            delivery,
            tag,
            worn,
        } in arrived
        {
            match worn.and_then(|_| renewed.next()) {
                Some(Ok(())) => moved.push((moved.len(), tag, Verdict::Moved)),
                Some(Err(error)) => {
                    tracing::warn!(queue = self.queue, message_id = %delivery.message.label(), %error, "the broker will soon give up on this message, and no copy could take its place");
                    kept.push(delivery);
                }
                None => kept.push(delivery),
            }
        }
        tracing::info!(
            queue = self.queue,
            messages = moved.len(),
            "renewed, since workers that stop or crash count towards the queue's delivery limit"
        );
        let mut answers: Vec<_> = moved.iter().map(|_| SettleResult::LeaseLost).collect();
        self.settle_now(epoch, moved, &mut answers).await;
        Ok(kept)
    }

    /// How long a delivery is held at most: the broker's clock runs from when it sent it.
    fn lease(&self) -> Option<Duration> {
        let timeout = self.config.consumer_timeout;
        (!timeout.is_zero()).then(|| timeout - MARGIN.min(timeout / MARGIN_PART))
    }

    fn delivery(
        &self,
        epoch: &Epoch,
        delivery: lapin::message::Delivery,
        received: Instant,
    ) -> Arrived {
        let (tag, redelivered) = (delivery.delivery_tag, delivery.redelivered);
        let properties = delivery.properties;
        let body = Bytes::from(delivery.data);
        let counts = match delivery.redelivered {
            true => epoch.terms.counts,
            false => Counts::None,
        };
        let (attempt, counted) =
            headers::attempt(&properties, &self.queue, delivery.redelivered, counts);
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
        let mut lease = Lease::default().tied_to(epoch.lost.clone());
        lease.until = self.lease().and_then(|lease| received.checked_add(lease));
        let renews_from = epoch.terms.renews_from;
        let is_worn =
            renews_from.is_some_and(|from| headers::returned(&properties, counts) >= from);
        let is_copied = is_worn || self.config.delays();
        let original = is_copied.then(|| Original {
            properties: headers::Packed::of(properties),
            body,
            attempt,
        });
        let worn = original.clone().filter(|_| is_worn);
        lock(&epoch.acks).delivered(Unsettled {
            original: original.map(Box::new),
            in_group: message.group.is_some(),
            until: lease.until,
        });
        let receipt = Receipt::new(RabbitReceipt {
            channel: epoch.number,
            tag,
            redelivered: delivery.redelivered,
            exchange: delivery.exchange.into(),
            routing_key: delivery.routing_key.into(),
        });
        let mut delivery = Delivery::new(message, receipt, lease);
        delivery.is_first = !redelivered;
        delivery.attempt = (counted || epoch.terms.counts != Counts::None).then_some(attempt);
        delivery.malformed = malformed;
        Arrived {
            delivery,
            tag,
            worn,
        }
    }

    /// Marks and hands all frames to the connection before anything is awaited: so the frames of concurrent calls keep
    /// the order in which the calls marked, and a dropped future leaves nothing marked but unsent.
    async fn settle_now(
        &self,
        epoch: &Epoch,
        wanted: Vec<(usize, u64, Verdict)>,
        answers: &mut [SettleResult],
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
        if wanted
            .iter()
            .any(|(_, _, verdict)| *verdict == Verdict::Return)
        {
            // At once: what waits to be handed out comes after it.
            let mut state = lock(&self.state);
            if state.is_live(epoch) {
                self.lose(&mut state);
            }
            epoch.returning.cancel();
        }
        let mut failed = None;
        for frame in frames {
            failed = finish(frame).await.err().or(failed);
        }
        for ((at, ..), done) in wanted.into_iter().zip(done) {
            answers[at] = match (&failed, done) {
                (_, false) => SettleResult::LeaseLost,
                (None, true) => SettleResult::Applied,
                (Some(error), true) => {
                    let fault = Fault::Lapin(error.clone());
                    SettleResult::Unknown(fault.error("cannot settle", &self.queue).retryable(true))
                }
            };
        }
    }

    /// A copy is confirmed in a delay queue before the original is acked.
    async fn settle_later(
        self: &Arc<Self>,
        epoch: &Arc<Epoch>,
        wanted: Vec<(usize, u64, Duration)>,
        answers: &mut [SettleResult],
    ) {
        if !self.config.delays() {
            for (at, ..) in wanted {
                answers[at] =
                    SettleResult::Unknown(self.cannot("delay a delivery that is given back"));
            }
            return;
        }
        let mut originals = Vec::new();
        let mut copied = Vec::new();
        let mut gone = Vec::new();
        for (at, tag, delay) in wanted {
            if !lock(&epoch.moving).insert(tag) {
                let what = "a copy of it that comes back later is under way";
                let error = Error::new(ErrorKind::Throttled, what).on_queue(&self.queue);
                answers[at] = SettleResult::Unknown(error);
                continue;
            }
            let acks = lock(&epoch.acks);
            match acks.kept(tag).and_then(|held| held.original.as_deref()) {
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
            () = self.copies.blocked() => None,
        };
        let mut moved = moved.into_iter().flatten();
        for (at, _) in copied {
            let blocked = || SettleResult::Unknown(self.copies.blocked_error());
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
        answer: oneshot::Sender<Vec<SettleResult>>,
    ) {
        let results = tokio::select! {
            () = epoch.lost.cancelled() => Vec::new(),
            results = self.copies.delay(&originals) => results,
        };
        let mut answers: Vec<_> = tags.iter().map(|_| SettleResult::LeaseLost).collect();
        let mut moved = Vec::new();
        for (at, result) in results.into_iter().enumerate() {
            match result {
                Ok(()) => moved.push((at, tags[at], Verdict::Moved)),
                // Nobody will ask again.
                Err(_) if answer.is_closed() => moved.push((at, tags[at], Verdict::Requeue)),
                Err(error) => answers[at] = SettleResult::Unknown(error),
            }
        }
        self.settle_now(&epoch, moved, &mut answers).await;
        lock(&epoch.moving).retain(|tag| !tags.contains(tag));
        let _ = answer.send(answers);
    }

    fn cannot(&self, what: &str) -> Error {
        Error::new(ErrorKind::Other, format!("RabbitMQ cannot {what}")).on_queue(&self.queue)
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let error = |fault: Fault| self.error(&fault, "cannot look at the queue");
        let link = Link::open(&self.config, &format!("queue info {}", self.queue))
            .await
            .map_err(error)?;
        let own = u32::from(lock(&self.state).epoch.is_some());
        let queue = Queue::look(&self.config, &self.queue, &link).await;
        let info = queue.map(|queue| queue.queue_info(own));
        let closed = link.close().await;
        let info = info.map_err(error)?;
        closed.map_err(error)?;
        Ok(info)
    }

    /// The error of failing to do `what`; a queue that does not exist is waited for where the URL says so.
    fn error(&self, fault: &Fault, what: &str) -> Error {
        let error = fault.error(what, &self.queue);
        match error.kind() {
            ErrorKind::NotFound if self.config.wait_for_queue => error.retryable(true),
            _ => error,
        }
    }
}

impl Epoch {
    /// How a delivery goes back at once. One of a group has to come before its successors: only the channel's end puts it
    /// there on every kind of queue, and with it all that is unsettled.
    fn give_back(&self, tag: u64) -> Verdict {
        match lock(&self.acks).kept(tag) {
            Some(held) if held.in_group => Verdict::Return,
            _ => Verdict::Requeue,
        }
    }

    /// Waits until the lease of the oldest delivery that is not settled has ended. Nobody may settle it any more, so only
    /// the channel's end gives it back; not every broker ends the channel by itself.
    async fn overdue(&self, lease: Option<Duration>) {
        let Some(lease) = lease else {
            return std::future::pending().await;
        };
        loop {
            let oldest = lock(&self.acks).oldest().and_then(|held| held.until);
            match oldest {
                Some(until) if until <= Instant::now() => return,
                Some(until) => sleep_until(until).await,
                None => tokio::time::sleep(lease).await,
            }
        }
    }
}

/// Takes what `limit` allows: at least one.
fn take(ready: &mut VecDeque<Delivery>, limits: ReceiveLimits) -> Vec<Delivery> {
    let mut bytes = 0;
    let mut count = 0;
    for delivery in ready.iter() {
        if !limits.allows_more(count, bytes) {
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

/// Keeps a channel open until the source is closed, or until an error that trying again does not fix.
async fn drive(shared: Arc<Shared>) -> Result<(), Fault> {
    let mut backoff = Backoff::default();
    loop {
        match shared.open().await {
            Ok(None) => return Ok(()),
            Ok(Some((link, terms, consumer))) => {
                let opened_at = Instant::now();
                let (ended, useful) = shared.live(link, terms, consumer).await;
                if shared.stop.is_cancelled() {
                    // What was to be closed anyway is closed.
                    return match ended {
                        Err(Fault::Returned | Fault::Overdue(_)) => Ok(()),
                        ended => ended,
                    };
                }
                let Err(fault) = ended else { return Ok(()) };
                let error = fault.error("the channel ended", &shared.queue);
                match fault {
                    Fault::Returned => {
                        tracing::info!(queue = shared.queue, %error, "consuming anew");
                    }
                    _ => tracing::warn!(queue = shared.queue, %error, "reconnecting"),
                }
                if useful || opened_at.elapsed() >= STABLE {
                    backoff.reset();
                }
            }
            Err(fault) => {
                let error = shared.error(&fault, "cannot consume");
                let go_on = error.is_retryable();
                if shared.report(error, go_on) {
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
