use std::cmp::Reverse;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{
    ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry,
    MessageSystemAttributeName as System,
};
use futures_util::future::join3;
use onlyonce_core::{
    Action, Answer, Capabilities, DEAD_LETTER_QUEUE, DEAD_LETTER_REASON, Delivery, Error,
    ErrorKind, Inspection, Lease, Limit, Message, Ordering, Receipt, Settlement, Sink as _, Source,
};
use tokio::sync::{Notify, OnceCell};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::batch::{Outcome, outcomes};
use crate::leases::{self, Leases};
use crate::polls::{Poll, Polls};
use crate::queue::{BATCH, Queue, all_of};
use crate::settings::Settings;
use crate::{Config, SqsSink, error, message};

/// Takes messages from a queue, FIFO or standard. See the [crate's page](crate).
///
/// Dropping it without [`close`](Source::close) aborts its long polls, and leaves what it holds to the end of the
/// visibility timeout.
pub struct SqsSource {
    shared: Arc<Shared>,
    _dropped: DropGuard,
}

struct Shared {
    queue: Queue,
    state: Mutex<State>,
    changed: Notify,
    polling: TaskTracker,
    /// The source was dropped.
    dropped: CancellationToken,
    /// The queue's own visibility timeout.
    visibility: OnceCell<Duration>,
    dead_letters: OnceCell<SqsSink>,
}

struct State {
    polls: Polls,
    leases: Leases,
    closed: bool,
}

type Handle = Arc<str>;

impl SqsSource {
    /// A source that connects when it is first used. Does not block.
    ///
    /// # Errors
    /// The configuration cannot work.
    pub fn new(config: Config) -> Result<Self, Error> {
        Self::open(config, None)
    }

    /// The same, by a client of your own: with other credentials, another TLS stack, interceptors. Switch its retries
    /// off; what it sends again by itself may come late.
    ///
    /// # Errors
    /// The configuration cannot work.
    pub fn with_client(config: Config, client: Client) -> Result<Self, Error> {
        Self::open(config, Some(client))
    }

    fn open(config: Config, client: Option<Client>) -> Result<Self, Error> {
        let dropped = CancellationToken::new();
        let shared = Shared {
            state: Mutex::new(State {
                polls: Polls::new(config.polls),
                leases: Leases::default(),
                closed: false,
            }),
            queue: Queue::new(config, client)?,
            changed: Notify::new(),
            polling: TaskTracker::new(),
            dropped: dropped.clone(),
            visibility: OnceCell::new(),
            dead_letters: OnceCell::new(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            _dropped: dropped.drop_guard(),
        })
    }
}

#[async_trait]
impl Source for SqsSource {
    fn name(&self) -> &str {
        self.shared.queue.name()
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.confirms_settle = true;
        capabilities.extend = true;
        capabilities.timed_lease = true;
        capabilities.delayed_nack = true;
        capabilities.dead_letter = true;
        capabilities.counts_attempts = true;
        capabilities.settle_batch = Some(BATCH);
        if self.shared.queue.is_fifo() {
            capabilities.ordering = Ordering::Group;
        }
        capabilities
    }

    async fn receive(&self, limit: Limit) -> Result<Vec<Delivery>, Error> {
        let deadline = after(limit.wait);
        let visibility = self.shared.visibility().await?;
        loop {
            let changed = self.shared.changed.notified();
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(received) = self
                .shared
                .receive_now(limit, left.min(visibility * 2 / 3))?
            {
                return Ok(received);
            }
            let paused = self.shared.state().polls.pause_until;
            tokio::select! {
                () = changed => {}
                () = sleep_until(deadline) => return Ok(Vec::new()),
                () = sleep_until(paused.unwrap_or(deadline)), if paused.is_some() => {
                    self.shared.state().polls.pause_until = None;
                }
            }
        }
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<Answer> {
        self.shared.settle(batch).await
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<Answer> {
        let wanted = batch.iter().enumerate();
        let wanted = wanted.map(|(at, receipt)| (at, receipt, lease)).collect();
        let answers = all_of(requests(wanted, |chunk| self.shared.extend(chunk)), true).await;
        in_places(batch.len(), answers)
    }

    async fn inspect(&self) -> Result<Inspection, Error> {
        let queue = &self.shared.queue;
        let settings = Settings::read(queue).await?;
        if let Ok(visibility) = settings.visibility(queue.name()) {
            // So that the first receive need not ask again.
            let _ = self.shared.visibility.set(visibility);
        }
        settings.inspection(&queue.config)
    }

    /// Waits for the long polls under way, 20 seconds at most: a message that SQS gives to an
    /// [aborted poll](https://github.com/aws/aws-sdk-java-v2/issues/1395) is lost to everyone until its visibility timeout
    /// ends. Then gives back what is held.
    async fn close(&self) -> Result<(), Error> {
        self.shared.close().await
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is, while enough polls are kept under way; `None` if it has to be waited for.
    fn receive_now(
        self: &Arc<Self>,
        limit: Limit,
        wait: Duration,
    ) -> Result<Option<Vec<Delivery>>, Error> {
        let mut state = self.state();
        if state.closed {
            return Err(self.closed());
        }
        while let Some(poll) = state.polls.next(limit, wait, self.queue.is_fifo()) {
            self.polling.spawn(self.clone().poll(poll));
        }
        let ready = state.polls.take(limit);
        if !ready.is_empty() {
            return Ok(Some(ready));
        }
        state.polls.error.take().map_or(Ok(None), Err)
    }

    fn closed(&self) -> Error {
        Error::new(ErrorKind::Closed, "the source was closed").on_queue(self.queue.name())
    }

    /// A task of its own, so that whoever stops waiting loses nothing.
    async fn poll(self: Arc<Self>, poll: Poll) {
        let result = tokio::select! {
            () = self.dropped.cancelled() => return,
            result = self.receive(&poll) => result,
        };
        let mut state = self.state();
        match result {
            Ok(received) => {
                for delivery in &received {
                    self.begin_lease(&mut state.leases, delivery);
                }
                let deliveries = received.into_iter().map(|(delivery, _)| delivery).collect();
                state.polls.came_back(&poll, deliveries);
            }
            Err(error) => state.polls.failed(poll, error),
        }
        drop(state);
        self.changed.notify_waiters();
    }

    fn begin_lease(&self, leases: &mut Leases, (delivery, received): &(Delivery, Instant)) {
        if let (Receipt::Handle(handle), Some(until)) = (&delivery.receipt, delivery.lease.until) {
            leases.begin(handle.clone(), delivery.message.clone(), *received, until);
        }
    }

    /// One request. Leases are reckoned from when it was sent: SQS began to count no earlier. How much later nobody
    /// tells, which is why polls wait for two thirds of the visibility timeout at most: a third is left in any case.
    async fn receive(&self, poll: &Poll) -> Result<Vec<(Delivery, Instant)>, Error> {
        let visibility = self.visibility().await?;
        let url = self.queue.url().await?;
        let sent = Instant::now();
        let request = self
            .queue
            .client()
            .await?
            .receive_message()
            .queue_url(url)
            .max_number_of_messages(whole(poll.messages as u64))
            .wait_time_seconds(whole(poll.wait.as_secs()))
            .visibility_timeout(whole(visibility.as_secs()))
            .message_attribute_names("All")
            .message_system_attribute_names(System::All)
            .set_receive_request_attempt_id(poll.attempt.clone());
        let answer = self.queue.call("cannot receive", poll.wait, request.send());
        let messages = answer.await?.messages.unwrap_or_default();
        let mut received = Vec::with_capacity(messages.len());
        for message in &messages {
            // Without a handle nothing can be done with it; it comes again.
            let Some(handle) = message.receipt_handle() else {
                continue;
            };
            let read = message::read(message, self.queue.is_fifo());
            let lease = Lease::until(sent + visibility);
            let mut delivery = Delivery::new(read.message, Receipt::Handle(handle.into()), lease);
            delivery.attempt = read.attempt;
            delivery.malformed = read.malformed;
            received.push((delivery, sent));
        }
        Ok(received)
    }

    async fn visibility(&self) -> Result<Duration, Error> {
        if let Some(visibility) = self.queue.config.visibility_timeout {
            return Ok(visibility);
        }
        let read = || async {
            Settings::read(&self.queue)
                .await?
                .visibility(self.queue.name())
        };
        self.visibility.get_or_try_init(read).await.copied()
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<Answer> {
        let (mut acks, mut nacks, mut dead) = (Vec::new(), Vec::new(), Vec::new());
        for (at, settlement) in batch.iter().enumerate() {
            let receipt = &settlement.receipt;
            match &settlement.action {
                Action::Ack => acks.push((at, receipt, ())),
                Action::Nack { delay } => nacks.push((at, receipt, *delay)),
                Action::DeadLetter { reason } => dead.push((at, receipt, reason.as_str())),
            }
        }
        // Last first: a group stays closed until its head is given back.
        nacks.sort_by_key(|(_, receipt, _)| Reverse(self.arrival(receipt)));
        let side_by_side = !self.queue.is_fifo();
        let (acks, nacks, dead) = join3(
            all_of(requests(acks, |chunk| self.delete(chunk)), true),
            all_of(requests(nacks, |chunk| self.give_back(chunk)), side_by_side),
            all_of(requests(dead, |chunk| self.bury(chunk)), false),
        )
        .await;
        in_places(batch.len(), acks.into_iter().chain(nacks).chain(dead))
    }

    fn arrival(&self, receipt: &Receipt) -> Option<u64> {
        let lasting = self.state().leases.lasting(receipt);
        lasting.map(|(_, lease)| lease.seq)
    }

    /// Those of a chunk whose leases last; the others are answered.
    fn lasting<'a, T>(&self, chunk: Chunk<'a, T>) -> (Vec<Held<T>>, Vec<(usize, Answer)>) {
        let state = self.state();
        let (mut held, mut lost) = (Vec::new(), Vec::new());
        for (at, receipt, wanted) in chunk {
            match state.leases.lasting(receipt) {
                Some((handle, lease)) => held.push(Held {
                    at,
                    handle,
                    lease,
                    wanted,
                }),
                None => lost.push((at, Answer::LeaseLost)),
            }
        }
        (held, lost)
    }

    async fn delete(&self, chunk: Chunk<'_, ()>) -> Vec<(usize, Answer)> {
        let (held, mut answers) = self.lasting(chunk);
        let deleted = match held.is_empty() {
            true => Ok(Vec::new()),
            false => self.delete_batch(&held).await,
        };
        self.conclude(
            held,
            deleted,
            "cannot delete",
            &mut answers,
            |leases, held| {
                leases.end(&held.handle);
            },
        );
        answers
    }

    async fn delete_batch<T>(&self, held: &[Held<T>]) -> Result<Vec<Outcome>, Error> {
        let entry = |(id, held): (usize, &Held<T>)| {
            DeleteMessageBatchRequestEntry::builder()
                .id(id.to_string())
                .receipt_handle(&*held.handle)
                .build()
                .map_err(impossible)
        };
        let entries: Result<_, Error> = held.iter().enumerate().map(entry).collect();
        let request = self
            .queue
            .client()
            .await?
            .delete_message_batch()
            .queue_url(self.queue.url().await?)
            .set_entries(Some(entries?));
        let answer = self
            .queue
            .call("cannot delete", Duration::ZERO, request.send());
        let answer = answer.await?;
        let done = answer.successful().iter().map(|entry| entry.id());
        Ok(outcomes(held.len(), done, answer.failed()))
    }

    /// Makes messages visible again, now or after their delays.
    async fn give_back(&self, chunk: Chunk<'_, Duration>) -> Vec<(usize, Answer)> {
        let (held, mut answers) = self.lasting(chunk);
        let delay = |held: &Held<Duration>| rounded_up(held.wanted).min(held.lease.rest());
        let changed = self.change_visibility(&held, delay);
        let changed = changed.await;
        self.conclude(
            held,
            changed,
            "cannot give back",
            &mut answers,
            |leases, held| {
                leases.end(&held.handle);
            },
        );
        answers
    }

    async fn extend(&self, chunk: Chunk<'_, Duration>) -> Vec<(usize, Answer)> {
        let (held, mut answers) = self.lasting(chunk);
        let (held, ended): (Vec<_>, Vec<_>) = held
            .into_iter()
            .partition(|held| rounded_up(held.wanted) <= held.lease.rest());
        answers.extend(ended.into_iter().map(|held| {
            let text = "cannot extend: SQS ends a lease 12 hours after the receive";
            let error = Error::new(ErrorKind::Other, text).on_queue(self.queue.name());
            (
                held.at,
                Answer::Unknown(error.on_message(held.lease.message.label())),
            )
        }));
        let sent = Instant::now();
        let lease = |held: &Held<Duration>| rounded_up(held.wanted);
        let changed = self.change_visibility(&held, lease).await;
        self.conclude(
            held,
            changed,
            "cannot extend",
            &mut answers,
            |leases, held| {
                leases.extended(&held.handle, sent + held.wanted);
            },
        );
        answers
    }

    async fn change_visibility(
        &self,
        held: &[Held<Duration>],
        seconds: impl Fn(&Held<Duration>) -> u64,
    ) -> Result<Vec<Outcome>, Error> {
        if held.is_empty() {
            return Ok(Vec::new());
        }
        let entry = |(id, held): (usize, &Held<Duration>)| {
            ChangeMessageVisibilityBatchRequestEntry::builder()
                .id(id.to_string())
                .receipt_handle(&*held.handle)
                .visibility_timeout(whole(seconds(held)))
                .build()
                .map_err(impossible)
        };
        let entries: Result<_, Error> = held.iter().enumerate().map(entry).collect();
        let request = self
            .queue
            .client()
            .await?
            .change_message_visibility_batch()
            .queue_url(self.queue.url().await?)
            .set_entries(Some(entries?));
        let what = "cannot change the visibility timeout";
        let answer = self
            .queue
            .call(what, Duration::ZERO, request.send())
            .await?;
        let done = answer.successful().iter().map(|entry| entry.id());
        Ok(outcomes(held.len(), done, answer.failed()))
    }

    /// Turns what SQS said of each message into its answer, and keeps the leases in step.
    fn conclude<T>(
        &self,
        held: Vec<Held<T>>,
        said: Result<Vec<Outcome>, Error>,
        what: &str,
        answers: &mut Vec<(usize, Answer)>,
        done: impl Fn(&mut Leases, &Held<T>),
    ) {
        let mut state = self.state();
        let mut said = said.map(Vec::into_iter);
        for held in held {
            let label = held.lease.message.label();
            let unknown =
                |error: Error| Answer::Unknown(error.on_queue(self.queue.name()).on_message(label));
            let answer = match &mut said {
                Err(error) => unknown(error.clone()),
                Ok(outcomes) => match outcomes.next() {
                    Some(Outcome::Done) => {
                        done(&mut state.leases, &held);
                        Answer::Applied
                    }
                    Some(Outcome::Refused(entry)) if error::is_lease_lost(&entry) => {
                        state.leases.end(&held.handle);
                        Answer::LeaseLost
                    }
                    Some(Outcome::Refused(entry)) => unknown(error::of_entry(what, &entry)),
                    Some(Outcome::Unmentioned) | None => unknown(error::of_silence(what)),
                },
            };
            answers.push((held.at, answer));
        }
    }

    /// Sends messages to the queue that the redrive policy names, then deletes them here.
    async fn bury(&self, chunk: Chunk<'_, &str>) -> Vec<(usize, Answer)> {
        let (held, mut answers) = self.lasting(chunk);
        if held.is_empty() {
            return answers;
        }
        let letters: Vec<Message> = held.iter().map(|held| self.letter(held)).collect();
        let published = match self.dead_letters().await {
            Ok(sink) => sink.publish(&letters).await,
            Err(error) => letters
                .iter()
                .map(|letter| Err(error.clone().on_message(letter.label())))
                .collect(),
        };
        let mut buried = Vec::new();
        for (held, published) in held.into_iter().zip(published) {
            match published {
                Ok(()) => buried.push((held.at, Receipt::Handle(held.handle))),
                Err(error) => answers.push((held.at, Answer::Unknown(error))),
            }
        }
        let acks = buried.iter().map(|(at, receipt)| (*at, receipt, ()));
        answers.extend(self.delete(acks.collect()).await);
        answers
    }

    fn letter(&self, held: &Held<&str>) -> Message {
        let message = Message::clone(&held.lease.message);
        message
            .with_attribute(DEAD_LETTER_REASON, held.wanted)
            .with_attribute(DEAD_LETTER_QUEUE, self.queue.name())
    }

    async fn dead_letters(&self) -> Result<&SqsSink, Error> {
        let open = || async {
            let settings = Settings::read(&self.queue).await?;
            let target = match settings.redrive() {
                Some(policy) => policy.target(),
                None => Err(Error::config(
                    "the queue has no redrive policy, so it has no dead-letter queue; give it one, or give the pipeline's dead_letter() a sink",
                )),
            };
            let target = target.map_err(|error| error.on_queue(self.queue.name()))?;
            Ok(SqsSink::to(self.queue.beside(target).await?))
        };
        self.dead_letters.get_or_try_init(open).await
    }

    async fn close(&self) -> Result<(), Error> {
        self.state().closed = true;
        self.changed.notify_waiters();
        self.polling.close();
        self.polling.wait().await;
        let held = {
            let mut state = self.state();
            state.polls.ready.clear();
            state.leases.last_first()
        };
        let receipts: Vec<Receipt> = held.into_iter().map(Receipt::Handle).collect();
        let nacks: Vec<_> = receipts
            .iter()
            .map(|receipt| (0, receipt, Duration::ZERO))
            .collect();
        let side_by_side = !self.queue.is_fifo();
        let answers = all_of(requests(nacks, |chunk| self.give_back(chunk)), side_by_side).await;
        self.state().leases.end_all();
        let failed = answers.into_iter().find_map(|(_, answer)| match answer {
            Answer::Unknown(error) => Some(error),
            _ => None,
        });
        failed.map_or(Ok(()), Err)
    }
}

/// A message whose lease lasts, and what is wanted of it.
struct Held<T> {
    /// Its place among the answers.
    at: usize,
    handle: Handle,
    lease: leases::Lease,
    wanted: T,
}

/// What fits into one request: places among the answers, messages, and what is wanted of them.
type Chunk<'a, T> = Vec<(usize, &'a Receipt, T)>;

/// The requests, not yet begun, that are made of as many full chunks as there are and a rest.
fn requests<'a, T, F>(
    mut all: Vec<(usize, &'a Receipt, T)>,
    request: impl Fn(Chunk<'a, T>) -> F,
) -> Vec<F> {
    let mut requests = Vec::with_capacity(all.len().div_ceil(BATCH));
    while !all.is_empty() {
        let rest = all.split_off(all.len().min(BATCH));
        requests.push(request(std::mem::replace(&mut all, rest)));
    }
    requests
}

fn in_places(count: usize, answers: impl IntoIterator<Item = (usize, Answer)>) -> Vec<Answer> {
    let mut placed: Vec<(usize, Answer)> = answers.into_iter().collect();
    debug_assert_eq!(placed.len(), count, "one answer each");
    placed.sort_by_key(|(at, _)| *at);
    placed.into_iter().map(|(_, answer)| answer).collect()
}

fn impossible(error: aws_sdk_sqs::error::BuildError) -> Error {
    Error::new(ErrorKind::Other, "an entry of a batch could not be made").caused_by(error)
}

/// No wait is too long to be reckoned.
fn after(wait: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(36_500 * 86_400);
    let now = Instant::now();
    now.checked_add(wait).unwrap_or(now + CENTURY)
}

/// In whole seconds, as SQS takes it.
fn rounded_up(time: Duration) -> u64 {
    let more = u64::from(time.subsec_nanos() > 0);
    time.as_secs().saturating_add(more)
}

/// A number as SQS takes it; none is anywhere near the bound.
fn whole(number: impl TryInto<i32>) -> i32 {
    number.try_into().unwrap_or(i32::MAX)
}

impl fmt::Debug for SqsSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqsSource")
            .field("config", &self.shared.queue.config)
            .finish_non_exhaustive()
    }
}
