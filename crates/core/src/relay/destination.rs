use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::driver::{
    Fetch, FetchResult, Outbox, OutboxDisposition, OutboxSettlement, Outgoing, Owner, Sink,
};
use crate::pipeline::{Backoff, answered};
use crate::{Error, ErrorKind, Message};

use super::round::{Answers, Round};
use super::{Counters, Options};

/// One destination of a relay, and all that it needs.
pub(super) struct Destination {
    pub(super) name: String,
    pub(super) sink: Arc<dyn Sink>,
    pub(super) outbox: Arc<dyn Outbox>,
    pub(super) relay: Owner,
    pub(super) options: Options,
    pub(super) counters: Arc<Counters>,
    pub(super) stop: CancellationToken,
}

impl Destination {
    /// Publishes until it is told to stop.
    pub(super) async fn run(&self) -> Result<(), Error> {
        let look = answered(self.sink.name(), || self.sink.sink_info());
        let Some(info) = self.unless_stopped(look).await else {
            return Ok(());
        };
        let stops_groups = info?.stops_groups;
        let mut backoff = Backoff::new();
        while !self.stop.is_cancelled() {
            // Other tasks of this thread run too, even where outbox and sink answer at once.
            tokio::task::consume_budget().await;
            // Before the call, so that no lease is believed in for longer than the store does.
            let asked = Instant::now();
            let fetch = self.outbox.fetch(&self.name, self.fetch());
            let Some(fetched) = self.unless_stopped(self.in_time(fetch)).await else {
                return Ok(());
            };
            let pause = match fetched {
                Ok(FetchResult::Fetched { messages, .. }) if !messages.is_empty() => {
                    let round = Round::new(messages, stops_groups);
                    match self.publish(round, asked).await? {
                        true => backoff.next(),
                        false => {
                            backoff.reset();
                            continue;
                        }
                    }
                }
                Ok(FetchResult::Fetched { ready_in, mark, .. }) => {
                    if self.wait(mark, ready_in).await {
                        continue;
                    }
                    backoff.next()
                }
                Ok(FetchResult::Busy { retry_in }) => retry_in.min(self.options.poll),
                Err(error) => self.tolerate("fetch", error, &mut backoff)?,
            };
            self.unless_stopped(sleep(pause)).await;
        }
        Ok(())
    }

    fn fetch(&self) -> Fetch {
        let options = &self.options;
        Fetch::new(self.relay, options.messages, options.lease)
            .with_bytes(options.bytes)
            .waiting_for_set_aside(options.waits_for_set_aside)
    }

    /// Waits for more to be committed. `false`: the outbox could not say.
    async fn wait(&self, mark: u64, ready_in: Option<Duration>) -> bool {
        // The lease is to be renewed before it ends.
        let longest = self.options.poll.min(self.options.lease / 3);
        let longest = ready_in.map_or(longest, |ready| ready.min(longest));
        let wait = self.outbox.wait(&self.name, mark, longest);
        match self.unless_stopped(wait).await {
            Some(Err(error)) => {
                tracing::debug!(destination = self.name, %error, "cannot wait for commits");
                false
            }
            Some(Ok(())) | None => true,
        }
    }

    /// Publishes what was fetched and settles it. `true`: the queue is away.
    async fn publish(&self, mut round: Round, asked: Instant) -> Result<bool, Error> {
        let ends = asked + self.options.lease;
        // To fetch may have taken long, so the first call has all the time that there is.
        let mut begins_before = ends;
        let mut settlements = Vec::new();
        let mut away = false;
        while !away && Instant::now() < begins_before && !self.stop.is_cancelled() {
            let batch = round.next_call();
            if batch.is_empty() {
                break;
            }
            let answers = self.call(&batch, ends).await;
            let answered = round.answered(batch, answers, &self.options.retry);
            away = answered.queue_is_away.is_some();
            self.tell(&answered);
            settlements.extend(answered.settlements);
            // What is left of the lease is for the last call and for settling.
            begins_before = asked + self.options.lease / 2;
        }
        self.settle(&settlements).await?;
        Ok(away)
    }

    /// One answer for each message of the batch. A call that outlasts the lease is dropped: another relay may publish from
    /// then on.
    async fn call(&self, batch: &[Outgoing], ends: Instant) -> Vec<Result<(), Error>> {
        let messages: Vec<Message> = batch.iter().map(Outgoing::to_publish).collect();
        let published = tokio::time::timeout_at(ends, self.sink.publish(&messages)).await;
        let mut answers = published.unwrap_or_default();
        let no_answer = || {
            let text = "no answer before the lease of the destination ended";
            Err(Error::new(ErrorKind::Timeout, text).on_queue(self.sink.name()))
        };
        answers.resize_with(batch.len(), no_answer);
        answers
    }

    fn tell(&self, answered: &Answers) {
        let (destination, queue) = (self.name.as_str(), self.sink.name());
        if let Some(error) = &answered.queue_is_away {
            if error.is_retryable() {
                tracing::warn!(destination, queue, %error, "nothing was published; trying again");
            } else {
                tracing::error!(destination, queue, %error, "nothing was published; trying again");
            }
        }
        for OutboxSettlement { id, disposition } in &answered.settlements {
            match disposition {
                OutboxDisposition::Sent => {}
                OutboxDisposition::Failed { reason, retry_in } => {
                    tracing::warn!(destination, queue, %id, reason, ?retry_in, "not published; trying again");
                }
                OutboxDisposition::SetAside { reason } => {
                    tracing::error!(destination, queue, %id, reason, "set aside");
                }
            }
        }
    }

    /// Tries until it is done: what is fetched before would be published twice.
    async fn settle(&self, settlements: &[OutboxSettlement]) -> Result<(), Error> {
        if settlements.is_empty() {
            return Ok(());
        }
        let mut backoff = Backoff::new();
        loop {
            let settle = self.outbox.settle(self.relay, &self.name, settlements);
            match self.in_time(settle).await {
                Ok(verdicts) => {
                    let done = settlements.iter().zip(verdicts);
                    let done = done.filter(|(_, verdict)| verdict.is_ok());
                    done.for_each(|(settlement, _)| self.count(&settlement.disposition));
                    return Ok(());
                }
                Err(error) => {
                    let pause = self.tolerate("settle", error, &mut backoff)?;
                    sleep(pause).await;
                }
            }
        }
    }

    fn count(&self, disposition: &OutboxDisposition) {
        let counter = match disposition {
            OutboxDisposition::Sent => &self.counters.sent,
            OutboxDisposition::Failed { .. } => &self.counters.failed,
            OutboxDisposition::SetAside { .. } => &self.counters.set_aside,
        };
        counter.fetch_add(1, Relaxed);
    }

    /// For how long to wait after an error of the outbox, unless it is for good.
    fn tolerate(&self, call: &str, error: Error, backoff: &mut Backoff) -> Result<Duration, Error> {
        if !error.is_retryable() {
            return Err(error);
        }
        let (outbox, delay) = (self.outbox.name(), backoff.next());
        tracing::warn!(outbox, destination = self.name, call, %error, ?delay, "the outbox failed; trying again");
        Ok(delay)
    }

    async fn in_time<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let limit = self.options.lease;
        timeout(limit, call).await.unwrap_or_else(|_| {
            let text = format!("no answer of the outbox within {limit:?}");
            Err(Error::new(ErrorKind::Timeout, text))
        })
    }

    async fn unless_stopped<T>(&self, what: impl Future<Output = T>) -> Option<T> {
        self.stop.run_until_cancelled(what).await
    }
}
