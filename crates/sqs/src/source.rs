use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::MessageSystemAttributeName as System;
use onlyonce_core::driver::{
    Delivery, Disposition, ExtendResult, Lease, QueueInfo, Receipt, ReceiveLimits, SettleResult,
    Settlement, Source,
};
use onlyonce_core::{Error, ErrorKind};
use tokio::sync::{Notify, OnceCell};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::leases::{Leases, SqsReceipt};
use crate::polls::{Poll, Polls};
use crate::queue::Queue;
use crate::settings::Settings;
use crate::{Config, SqsSink, message};

/// Takes messages from a queue, FIFO or standard. See the [crate's page](crate).
///
/// Dropping it without [`close`](Source::close) aborts its long polls, and leaves what it holds to the end of the
/// visibility timeout.
pub struct SqsSource {
    shared: Arc<Shared>,
    _dropped: DropGuard,
}

/// What the source and its polls share.
pub(crate) struct Shared {
    pub(crate) queue: Queue,
    state: Mutex<State>,
    pub(crate) changed: Notify,
    polling: TaskTracker,
    /// The source was dropped.
    dropped: CancellationToken,
    /// The visibility timeout: the configuration's, else the queue's own.
    visibility: OnceCell<Duration>,
    pub(crate) dead_letters: OnceCell<SqsSink>,
}

pub(crate) struct State {
    pub(crate) polls: Polls,
    pub(crate) leases: Leases,
    closed: bool,
}

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
        let visibility = config.visibility_timeout;
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
            visibility: OnceCell::new_with(visibility),
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

    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        let deadline = limits.deadline();
        loop {
            let changed = self.shared.changed.notified();
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(received) = self.shared.receive_now(limits, left)? {
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

    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        self.shared.settle(batch).await
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        self.shared.extend(batch, lease).await
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let queue = &self.shared.queue;
        let settings = Settings::read(queue).await?;
        if let Ok(visibility) = settings.visibility(queue.name()) {
            // So that the first receive need not ask again.
            let _ = self.shared.visibility.set(visibility);
        }
        let mut info = settings.queue_info(&queue.config)?;
        if let Some(redrive) = settings.redrive() {
            let dead = async { Settings::read(&queue.beside(redrive.target()?)?).await };
            match dead.await {
                Ok(dead) => info.retention = settings.horizon(&dead, queue.is_fifo()),
                Err(error) if error.is_retryable() || error.kind() == ErrorKind::NotFound => {
                    return Err(error);
                }
                Err(error) => info.unknown.push(format!(
                    "how long the dead-letter queue keeps a message, which may be redriven: {error}"
                )),
            }
        }
        match queue.sources_of_dead_letters().await {
            Ok(names) => info.dead_letters_of = names,
            Err(error) if error.is_retryable() => return Err(error),
            Err(error) => info.unknown.push(format!(
                "whether this is another's dead-letter queue: {error}"
            )),
        }
        Ok(info)
    }

    /// Waits for the long polls under way, 20 seconds at most: a message that SQS gives to an
    /// [aborted poll](https://github.com/aws/aws-sdk-java-v2/issues/1395) is lost to everyone until its visibility timeout
    /// ends. Then gives back what is held.
    async fn close(&self) -> Result<(), Error> {
        self.shared.close().await
    }
}

impl Shared {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is, while enough polls are kept under way; `None` if it has to be waited for.
    fn receive_now(
        self: &Arc<Self>,
        limits: ReceiveLimits,
        wait: Duration,
    ) -> Result<Option<Vec<Delivery>>, Error> {
        let mut state = self.state();
        if state.closed {
            return Err(self.closed());
        }
        while let Some(poll) = state.polls.next(limits, wait, self.queue.is_fifo()) {
            self.polling.spawn(self.clone().poll(poll));
        }
        let State { polls, leases, .. } = &mut *state;
        let groups_out = match self.queue.is_fifo() && !polls.ready.is_empty() {
            true => leases.groups_out(),
            false => HashSet::new(),
        };
        let ready = polls.ready.take(limits, &groups_out, |_| false);
        if !ready.is_empty() {
            leases.are_out(&ready);
            return Ok(Some(ready));
        }
        state.polls.error.take().map_or(Ok(None), Err)
    }

    fn closed(&self) -> Error {
        Error::new(ErrorKind::Closed, "the source was closed").on_queue(self.queue.name())
    }

    /// A task of its own, so that whoever stops waiting loses nothing.
    async fn poll(self: Arc<Self>, mut poll: Poll) {
        let result = tokio::select! {
            () = self.dropped.cancelled() => return,
            result = self.receive(&mut poll) => result,
        };
        let mut state = self.state();
        match result {
            Ok((sent, deliveries)) => {
                state.leases.begin(&deliveries, sent);
                state.polls.came_back(&poll, deliveries);
            }
            Err(error) => state.polls.failed(poll, error),
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// One request: when it was sent, and what it brought. Leases are counted from when it was sent: SQS began to count
    /// no earlier. How much later nobody tells, which is why polls wait for two thirds of the visibility timeout at
    /// most: a third is left in any case.
    async fn receive(&self, poll: &mut Poll) -> Result<(Instant, Vec<Delivery>), Error> {
        let visibility = self.visibility().await?;
        poll.wait = poll
            .wait
            .min(Duration::from_secs(visibility.as_secs() * 2 / 3));
        let url = self.queue.url().await?;
        let client = self.queue.client().await?;
        let sent = Instant::now();
        poll.withheld = Some(sent + poll.wait + visibility);
        let request = client
            .receive_message()
            .queue_url(url)
            .max_number_of_messages(whole(poll.messages as u64))
            .wait_time_seconds(whole(poll.wait.as_secs()))
            .visibility_timeout(whole(visibility.as_secs()))
            .message_attribute_names("All")
            .message_system_attribute_names(System::All)
            .set_receive_request_attempt_id(poll.attempt.clone());
        let limit = self.queue.config.timeout.saturating_add(poll.wait);
        let answer = self.queue.call("cannot receive", limit, request.send());
        let messages = answer.await?.messages.unwrap_or_default();
        let mut received = Vec::with_capacity(messages.len());
        for message in &messages {
            // Without a handle nothing can be done with it; it comes again.
            let Some(handle) = message.receipt_handle() else {
                continue;
            };
            let read = message::read(message, self.queue.is_fifo());
            let lease = Lease::until(sent + visibility);
            let receipt = Receipt::new(SqsReceipt {
                handle: handle.into(),
            });
            let mut delivery = Delivery::new(read.message, receipt, lease);
            delivery.attempt = read.attempt;
            delivery.malformed = read.malformed;
            received.push(delivery);
        }
        Ok((sent, received))
    }

    async fn visibility(&self) -> Result<Duration, Error> {
        let read = || async {
            Settings::read(&self.queue)
                .await?
                .visibility(self.queue.name())
        };
        self.visibility.get_or_try_init(read).await.copied()
    }

    async fn close(&self) -> Result<(), Error> {
        self.state().closed = true;
        self.changed.notify_waiters();
        self.polling.close();
        self.polling.wait().await;
        let held = {
            let mut state = self.state();
            state.polls.ready.clear();
            state.leases.handles()
        };
        let nacks = held.into_iter().map(|handle| {
            Settlement::new(
                Receipt::new(SqsReceipt { handle }),
                Disposition::Nack {
                    delay: Duration::ZERO,
                },
            )
        });
        let answers = self.settle(&nacks.collect::<Vec<_>>()).await;
        self.state().leases.end_all();
        let failed = answers.into_iter().find_map(|answer| match answer {
            SettleResult::Unknown(error) => Some(error),
            _ => None,
        });
        failed.map_or(Ok(()), Err)
    }
}

/// A number as SQS takes it; none is anywhere near the bound.
pub(crate) fn whole(number: impl TryInto<i32>) -> i32 {
    number.try_into().unwrap_or(i32::MAX)
}

impl fmt::Debug for SqsSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqsSource")
            .field("config", &self.shared.queue.config)
            .finish_non_exhaustive()
    }
}
