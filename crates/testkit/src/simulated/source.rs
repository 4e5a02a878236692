use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use fastrand::Rng;
use onlyonce_core::driver::{
    Capabilities, Delivery, Disposition, Durability, ExtendResult, Lease, Ordering, QueueInfo,
    Receipt, ReceiveLimits, SettleResult, Settlement, Source,
};
use onlyonce_core::memory::MemoryQueue;
use onlyonce_core::{Error, ErrorKind, Message};
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::broker::{Broker, GROUP, MALFORMED};
use super::faults::Call;
use super::network::{lost, refused, send};
use super::sink::repeat;

/// How long after a crash the broker notices that a connection is gone.
const NOTICED_AFTER: Duration = Duration::from_secs(1);
/// Timers are as fine as this.
const TICK: Duration = Duration::from_millis(2);

/// One worker's connection to a [`Broker`].
#[derive(Debug)]
pub struct Consumer {
    broker: Broker,
    worker: u64,
    second: f64,
    channel: Arc<Mutex<Channel>>,
}

/// What lasts until the connection breaks.
#[derive(Debug)]
struct Channel {
    id: u64,
    queue: Arc<MemoryQueue>,
    epoch: u64,
    last_tag: u64,
    out: BTreeMap<(u64, u64), Out>,
    /// Received for a call that was dropped.
    received: Vec<Delivery>,
    lost: CancellationToken,
    /// What was delivered will soon be taken away.
    notice: CancellationToken,
    /// Until when each session was extended, as this worker was told.
    extended: HashMap<u64, Instant>,
    /// What ends each session before its time.
    sessions: BTreeMap<u64, Session>,
    closed: bool,
}

/// How a worker learns that a session is taken away, before and when it happens.
#[derive(Clone, Debug, Default)]
struct Session {
    notice: CancellationToken,
    lost: CancellationToken,
}

/// A delivery of the simulated broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SimulatedReceipt {
    /// Which of the consumer's channels it came by.
    pub channel: u64,
    /// Its number within the channel.
    pub tag: u64,
}

/// A delivery that was handed out.
#[derive(Clone, Debug)]
struct Out {
    receipt: Receipt,
    message: Arc<Message>,
    handed: Weak<Message>,
}

impl Consumer {
    pub(super) fn new(broker: Broker, worker: u64) -> Self {
        let channel = Arc::new(Mutex::new(Channel {
            id: broker.new_channel(),
            queue: Arc::new(broker.queue.clone()),
            epoch: 1,
            last_tag: 0,
            out: BTreeMap::new(),
            received: Vec::new(),
            lost: CancellationToken::new(),
            notice: CancellationToken::new(),
            extended: HashMap::new(),
            sessions: BTreeMap::new(),
            closed: false,
        }));
        Self {
            broker,
            worker,
            second: 1.0,
            channel,
        }
    }

    /// How many seconds a second by this worker's clock is: with more than one it takes leases for longer than they are.
    #[must_use]
    pub fn with_second(mut self, second: f64) -> Self {
        self.second = second;
        self
    }

    fn channel(&self) -> MutexGuard<'_, Channel> {
        lock(&self.channel)
    }

    fn able(&self) -> Capabilities {
        self.broker.settings.capabilities
    }

    /// The connection breaks, and a new one takes its place. Leases by the clock outlive it, and so do their receipts.
    fn cut(&self) {
        if !self.able().timed_lease {
            replace(&self.broker, &self.channel);
        }
    }

    /// The broker tells that it will take away what it has delivered, delivers nothing more by this connection, and ends it
    /// after `grace`.
    fn revoke(&self, grace: Duration) {
        if self.able().timed_lease {
            return self.revoke_session(grace);
        }
        let (id, notice) = {
            let channel = self.channel();
            let all = channel.out.values();
            all.for_each(|out| self.broker.revoked(&out.receipt));
            (channel.id, channel.notice.clone())
        };
        notice.cancel();
        let (broker, channel) = (self.broker.clone(), Arc::downgrade(&self.channel));
        tokio::spawn(async move {
            sleep(grace).await;
            if let Some(channel) = channel.upgrade() {
                end_revoked(&broker, &channel, id);
            }
        });
    }

    /// The same for one session of which something is held. Its lease ends by then, whatever was extended.
    fn revoke_session(&self, grace: Duration) {
        let (shared, session) = {
            let channel = self.channel();
            let mut held = channel.out.values().map(|out| &out.receipt);
            let found = held.find_map(|receipt| {
                let number = self.broker.session(receipt)?;
                let session = channel.sessions.get(&number)?;
                let is_held = self.broker.sharing(receipt).contains(receipt);
                is_held.then(|| (receipt.clone(), session.clone()))
            });
            match found {
                Some(found) => found,
                None => return,
            }
        };
        for receipt in self.broker.sharing(&shared) {
            self.broker.revoked(&receipt);
        }
        session.notice.cancel();
        let broker = self.broker.clone();
        tokio::spawn(async move {
            sleep(grace).await;
            session.lost.cancel();
            broker.end_session(&shared).await;
        });
    }

    /// Passes a delivery on as this kind of broker would.
    fn hand_out(&self, delivery: Delivery) -> Delivery {
        let mut message = Message::clone(&delivery.message);
        let group = message.attributes.remove(GROUP);
        if self.able().ordering == Ordering::Delivery {
            message.group = group;
        }
        let message = Arc::new(message);
        let id = message.broker_id.as_deref().unwrap_or_default();
        self.broker.delivered(self.worker, id, &delivery.receipt);
        let session = self.broker.session(&delivery.receipt);
        let mut channel = self.channel();
        channel.last_tag += 1;
        let place = (channel.epoch, channel.last_tag);
        let out = Out {
            receipt: delivery.receipt,
            message: delivery.message,
            handed: Arc::downgrade(&message),
        };
        channel.out.insert(place, out);
        let mut lease = match delivery.lease.until {
            Some(until) if self.able().timed_lease => {
                let lease = self.broker.settings.lease;
                let until = until - lease + lease.mul_f64(self.second);
                // It may have been extended for the others meanwhile.
                let known = session.and_then(|number| channel.extended.get(&number));
                let lease = Lease::until(known.map_or(until, |known| until.max(*known)));
                match session {
                    Some(number) => {
                        let Session { notice, lost } =
                            channel.sessions.entry(number).or_default().clone();
                        lease.tied_to(lost).revoked_by(notice)
                    }
                    None => lease,
                }
            }
            _ => Lease::default()
                .tied_to(channel.lost.clone())
                .revoked_by(channel.notice.clone()),
        };
        lease.shared = session;
        let (channel, tag) = place;
        let receipt = Receipt::new(SimulatedReceipt { channel, tag });
        let mut handed = Delivery::new(Message::default(), receipt, lease);
        handed.malformed = message.attributes.get(MALFORMED).map(str::to_owned);
        handed.message = message;
        // Where a group comes back from one message on, the count alone tells.
        let tells = self.able().counts_attempts || !self.broker.replays();
        handed.is_first = delivery.is_first && tells;
        handed.attempt = delivery.attempt.filter(|_| self.able().counts_attempts);
        handed
    }

    /// How many deliveries somebody still has.
    fn held(&self) -> usize {
        let mut channel = self.channel();
        channel.out.retain(|_, out| out.handed.strong_count() > 0);
        channel.out.len()
    }

    fn find(&self, receipt: &Receipt) -> Option<Out> {
        let SimulatedReceipt {
            channel: number,
            tag,
        } = *receipt.get()?;
        let channel = self.channel();
        let out = channel.out.get(&(number, tag)).cloned();
        out.filter(|_| !channel.closed)
    }

    fn too_late(&self, out: &Out) -> bool {
        let end = self.broker.lease_end(&out.receipt);
        end.is_some_and(|end| Instant::now() >= end + TICK)
    }

    fn is_able(&self, disposition: &Disposition) -> bool {
        match disposition {
            Disposition::Ack => true,
            Disposition::Nack { delay } => delay.is_zero() || self.able().delayed_nack,
            Disposition::DeadLetter { .. } => self.able().dead_letter,
        }
    }

    /// Waits until this consumer may receive.
    async fn active(&self) {
        loop {
            let (id, revoked) = {
                let channel = self.channel();
                let revoked = channel.notice.is_cancelled() && !channel.closed;
                (channel.id, revoked.then(|| channel.lost.clone()))
            };
            if let Some(lost) = revoked {
                lost.cancelled().await;
                continue;
            }
            self.broker.activate(id).await;
            if self.channel().id == id {
                return;
            }
            self.broker.deactivate(id);
        }
    }

    /// Whether the channel with this number still delivers.
    fn delivers(&self, id: u64) -> bool {
        let channel = self.channel();
        channel.id == id && !channel.notice.is_cancelled()
    }

    async fn fetch(&self, limits: ReceiveLimits) -> Result<(), Error> {
        let disturbance = self.broker.faults.on(self.worker, Call::Receive);
        if disturbance.cut {
            self.cut();
        }
        if let Some(grace) = disturbance.revoked {
            self.revoke(grace);
        }
        if disturbance.cut || disturbance.revoked.is_some() {
            self.active().await;
        }
        disturbance.before().await;
        if disturbance.lost || disturbance.refused {
            sleep(disturbance.before).await;
            return Err(if disturbance.lost { lost() } else { refused() });
        }
        let (id, queue) = {
            let channel = self.channel();
            (channel.id, channel.queue.clone())
        };
        let mut deliveries = match queue.receive(limits).await {
            Ok(deliveries) if self.delivers(id) => deliveries,
            // What the broken connection still got is given back with the rest of it.
            Ok(_) => return Err(Error::new(ErrorKind::Connection, "simulated: cut")),
            Err(_) if !self.channel().closed => {
                return Err(Error::new(ErrorKind::Connection, "simulated: cut"));
            }
            Err(closed) => return Err(closed),
        };
        if self.broker.replays() {
            self.broker.outstanding().deliver(&deliveries);
        }
        for delivery in &mut deliveries {
            if let Some(until) = &mut delivery.lease.until {
                let (message, receipt) = (&delivery.message, &delivery.receipt);
                *until = self.broker.begin_lease(id, message, receipt, *until);
            }
        }
        disturbance.after().await;
        if disturbance.unanswered && !deliveries.is_empty() {
            // On a connection that delivers by itself a reply is lost only together with the connection.
            self.cut();
            return Err(lost());
        }
        self.channel().received.extend(deliveries);
        sleep(disturbance.after).await;
        Ok(())
    }

    /// Where each entry of a request has an outcome of its own, the broker may fail for one after it took effect.
    fn doubted(&self, partial: &mut Option<Rng>, answer: SettleResult) -> SettleResult {
        let fails = self.broker.replays() && partial.as_mut().is_some_and(Rng::bool);
        match fails {
            true => SettleResult::Unknown(lost()),
            false => answer,
        }
    }

    /// Notes it as a breach when a shared lease is asked for more than once: in one request, or again although it was extended.
    fn check_shared(&self, batch: &[Receipt], lease: Duration) {
        let mut asked = HashSet::new();
        for number in batch.iter().filter_map(|receipt| self.session(receipt)) {
            let known = self.channel().extended.get(&number).copied();
            // The renewer asks after a third.
            let again = known.is_some_and(|end| end > Instant::now() + lease * 2 / 3 + TICK);
            if !asked.insert(number) || again {
                let worker = self.worker;
                self.broker.breach(format!(
                    "worker {worker} extended session {number} more than once"
                ));
            }
        }
    }

    fn note_extended(&self, batch: &[Receipt], answers: &[ExtendResult]) {
        for (receipt, answer) in batch.iter().zip(answers) {
            if let (Some(number), ExtendResult::Extended(until)) = (self.session(receipt), answer) {
                self.channel().extended.insert(number, *until);
            }
        }
    }

    /// The session of what was handed out.
    fn session(&self, receipt: &Receipt) -> Option<u64> {
        self.broker.session(&self.find(receipt)?.receipt)
    }

    /// What the server does with settlements.
    fn settling(
        &self,
        batch: Vec<(Settlement, Arc<Message>)>,
    ) -> impl Future<Output = Vec<SettleResult>> + Send + 'static {
        let (queue, broker) = (self.channel().queue.clone(), self.broker.clone());
        async move {
            let (settlements, messages): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
            let answers = match broker.replays() {
                true => broker.settle_replaying(&queue, &settlements).await,
                false => queue.settle(&settlements).await,
            };
            let acked = settlements.iter().zip(messages).zip(&answers);
            for ((settlement, message), answer) in acked {
                if answer.is_applied() {
                    broker.settled(&settlement.receipt);
                }
                if settlement.disposition == Disposition::Ack && answer.is_applied() {
                    broker.dead_letters().acked(message.broker_id.as_deref());
                    broker.acked(message);
                }
            }
            answers
        }
    }
}

fn lock(channel: &Mutex<Channel>) -> MutexGuard<'_, Channel> {
    channel.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A channel ends with all leases of its deliveries, and a new one takes its place.
fn replace(broker: &Broker, channel: &Mutex<Channel>) {
    let (id, new) = (broker.new_channel(), Arc::new(broker.queue.clone()));
    let mut channel = lock(channel);
    let old = (
        std::mem::replace(&mut channel.id, id),
        std::mem::replace(&mut channel.queue, new),
    );
    let lost = std::mem::take(&mut channel.lost);
    channel.notice = CancellationToken::new();
    channel.epoch += 1;
    channel.last_tag = 0;
    channel.received.clear();
    let ended = std::mem::take(&mut channel.out);
    drop(channel);
    for out in ended.values() {
        broker.lease(&out.receipt, Instant::now());
    }
    lost.cancel();
    end_channel(broker.clone(), old, Duration::ZERO);
}

/// The time after a notice is over. A channel that was closed meanwhile needs no other in its place.
fn end_revoked(broker: &Broker, channel: &Mutex<Channel>, id: u64) {
    let (is_same, closed, lost) = {
        let channel = lock(channel);
        (channel.id == id, channel.closed, channel.lost.clone())
    };
    match closed {
        true => lost.cancel(),
        false if is_same => replace(broker, channel),
        false => {}
    }
}

/// Ends a channel at the server, which gives back in order what it held, and only then lets another become active.
fn end_channel(broker: Broker, (id, queue): (u64, Arc<MemoryQueue>), after: Duration) {
    let Ok(runtime) = Handle::try_current() else {
        return;
    };
    runtime.spawn(async move {
        sleep(after).await;
        let _ = Source::close(&*queue).await;
        broker.deactivate(id);
    });
}

#[async_trait]
impl Source for Consumer {
    fn name(&self) -> &str {
        self.broker.queue.name()
    }

    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        self.active().await;
        if self.channel().received.is_empty() {
            self.fetch(limits).await?;
        }
        let received = std::mem::take(&mut self.channel().received);
        let handed: Vec<_> = received.into_iter().map(|one| self.hand_out(one)).collect();
        for one in &handed {
            let message = one.message.label();
            (self.broker.faults).log(|| format!("worker {} received {message}", self.worker));
        }
        self.broker.holds(self.held());
        Ok(handed)
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let mut disturbance = self.broker.faults.on(self.worker, Call::Settle);
        if disturbance.cut {
            self.cut();
        }
        if !self.able().timed_lease {
            // It waits to be written, perhaps for a new connection.
            sleep(std::mem::take(&mut disturbance.before)).await;
        }
        let mut partial = disturbance.partial.take();
        let mut answers: Vec<Option<SettleResult>> = Vec::with_capacity(batch.len());
        let mut sent = Vec::new();
        for settlement in batch {
            let answer = match self.find(&settlement.receipt) {
                None => Some(SettleResult::LeaseLost),
                Some(_) if !self.is_able(&settlement.disposition) => {
                    Some(SettleResult::Unknown(refused()))
                }
                Some(_) if partial.as_mut().is_some_and(Rng::bool) => {
                    Some(SettleResult::Unknown(lost()))
                }
                Some(out) => {
                    // With a slow clock it cannot know.
                    if self.too_late(&out) && self.second <= 1.0 {
                        self.broker.late(self.worker, &out.message);
                    }
                    let (receipt, disposition) = (out.receipt, settlement.disposition.clone());
                    let label = out.message.label();
                    (self.broker.faults)
                        .log(|| format!("worker {} settles {label}: {disposition:?}", self.worker));
                    sent.push((Settlement::new(receipt, disposition), out.message));
                    None
                }
            };
            answers.push(answer);
        }
        let request = self.settling(sent);
        let breaks = disturbance.lost || disturbance.unanswered;
        let replies = if self.able().acks.confirms() {
            send(&disturbance, request).await
        } else {
            // Written to the socket: nobody will ever say whether it arrived.
            let batch = batch.len();
            tokio::spawn(async move { send(&disturbance, request).await });
            Ok((0..batch).map(|_| SettleResult::Applied).collect())
        };
        if breaks {
            // TCP loses nothing but connections.
            self.cut();
        }
        let answered = merge(answers, replies).into_iter();
        answered
            .map(|answer| self.doubted(&mut partial, answer))
            .collect()
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        if !self.able().extend {
            return batch
                .iter()
                .map(|_| ExtendResult::Unknown(refused()))
                .collect();
        }
        self.check_shared(batch, lease);
        let asked = Instant::now();
        let mut disturbance = self.broker.faults.on(self.worker, Call::Extend);
        let mut partial = disturbance.partial.take();
        let mut answers = Vec::with_capacity(batch.len());
        let mut sent = Vec::new();
        for receipt in batch {
            answers.push(match self.find(receipt) {
                None => Some(SettleResult::LeaseLost),
                Some(_) if partial.as_mut().is_some_and(Rng::bool) => {
                    Some(SettleResult::Unknown(lost()))
                }
                Some(out) => {
                    sent.push(out.receipt);
                    None
                }
            });
        }
        let (queue, broker) = (self.channel().queue.clone(), self.broker.clone());
        let granted = lease.div_f64(self.second);
        let replies = send(&disturbance, async move {
            extend_all(&broker, &queue, &sent, granted).await
        })
        .await;
        let answers = merge(answers, replies).into_iter();
        let answers: Vec<_> = answers
            .map(|answer| self.doubted(&mut partial, answer))
            .map(|answer| answer.extended(asked + lease))
            .collect();
        self.note_extended(batch, &answers);
        answers
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let queue = self.channel().queue.clone();
        let mut info = queue.queue_info().await?;
        let able = self.able();
        // One queue, whose keys a seed gives again.
        info.identity = Some(self.name().into());
        info.lease = able.timed_lease.then_some(self.broker.settings.lease);
        info.dead_letter = info.dead_letter.filter(|_| able.dead_letter);
        info.durability = Durability::Disk;
        info.capabilities = able;
        Ok(info)
    }

    async fn close(&self) -> Result<(), Error> {
        let disturbance = self.broker.faults.on(self.worker, Call::Settle);
        let (id, queue) = {
            let mut channel = self.channel();
            channel.closed = true;
            (channel.id, channel.queue.clone())
        };
        if disturbance.lost {
            end_channel(self.broker.clone(), (id, queue), NOTICED_AFTER);
            return Err(lost());
        }
        let closed = Source::close(&*queue).await;
        self.broker.deactivate(id);
        closed
    }
}

/// What the server does with extensions: each is for all that share the lease.
async fn extend_all(
    broker: &Broker,
    queue: &MemoryQueue,
    receipts: &[Receipt],
    granted: Duration,
) -> Vec<SettleResult> {
    if broker.replays() {
        return broker.extend_replaying(queue, receipts, granted).await;
    }
    let until = Instant::now() + granted;
    let leases: Vec<_> = receipts.iter().map(|one| broker.sharing(one)).collect();
    let answers = queue.extend(&leases.concat(), granted).await;
    let mut answers = answers.into_iter();
    let extend = |same: &Vec<Receipt>| {
        let extended = answers.by_ref().take(same.len());
        // What was settled meanwhile has no lease any more, and the others have.
        match extended.filter(ExtendResult::is_extended).count() {
            0 => SettleResult::LeaseLost,
            _ => {
                broker.lease(&same[0], until);
                SettleResult::Applied
            }
        }
    };
    leases.iter().map(extend).collect()
}

/// Fills in, in order, what the server answered.
fn merge(
    answers: Vec<Option<SettleResult>>,
    replies: Result<Vec<SettleResult>, Error>,
) -> Vec<SettleResult> {
    let (mut replies, error) = match replies {
        Ok(replies) => (replies.into_iter(), lost()),
        Err(error) => (Vec::new().into_iter(), error),
    };
    let mut reply = || {
        let reply = replies.next();
        reply.unwrap_or_else(|| SettleResult::Unknown(repeat(&error)))
    };
    let filled = answers
        .into_iter()
        .map(|answer| answer.unwrap_or_else(&mut reply));
    filled.collect()
}

/// A worker that crashed.
impl Drop for Consumer {
    fn drop(&mut self) {
        let channel = self.channel();
        if channel.closed {
            return;
        }
        let (id, queue) = (channel.id, channel.queue.clone());
        drop(channel);
        if self.able().timed_lease {
            self.broker.deactivate(id);
        } else {
            end_channel(self.broker.clone(), (id, queue), NOTICED_AFTER);
        }
    }
}
