use std::collections::HashSet;
use std::fmt;

use async_trait::async_trait;
use aws_sdk_sqs::Client;
use onlyonce_core::driver::{Sink, SinkInfo};
use onlyonce_core::{Error, ErrorKind, Message};
use tokio::sync::{Mutex, RwLock};

use crate::batch::{Outcome, entries, outcomes};
use crate::message::{MAX_BYTES, Outgoing};
use crate::queue::{BATCH, Queue, all_of};
use crate::settings::Settings;
use crate::{Config, error};

/// Publishes to a queue, FIFO or standard. See the [crate's page](crate).
pub struct SqsSink {
    queue: Queue,
    /// One batch at a time on FIFO queues, so that groups keep their order.
    turn: Mutex<()>,
    /// Written by `close`, which so waits for what is under way.
    closed: RwLock<bool>,
}

/// What fits into one request: places in the batch, and messages.
type Chunk<'a> = Vec<(usize, &'a Outgoing)>;

impl SqsSink {
    /// A sink that connects when it is first used. Does not block.
    ///
    /// # Errors
    /// The configuration cannot work.
    pub fn new(config: Config) -> Result<Self, Error> {
        Ok(Self::to(Queue::new(config, None)?))
    }

    /// The same, by a client of your own; see [`SqsSource::with_client`](crate::SqsSource::with_client).
    ///
    /// # Errors
    /// The configuration cannot work.
    pub fn with_client(config: Config, client: Client) -> Result<Self, Error> {
        Ok(Self::to(Queue::new(config, Some(client))?))
    }

    fn closed_error(&self) -> Error {
        Error::new(ErrorKind::Closed, "the sink was closed").on_queue(self.queue.name())
    }

    pub(crate) fn to(queue: Queue) -> Self {
        Self {
            queue,
            turn: Mutex::default(),
            closed: RwLock::default(),
        }
    }

    /// One after another, and after a failure nothing more of that group: it would overtake what failed.
    async fn in_order(&self, chunks: Vec<Chunk<'_>>) -> Vec<(usize, Result<(), Error>)> {
        let _turn = self.turn.lock().await;
        let mut stopped: HashSet<&str> = HashSet::new();
        let mut results = Vec::new();
        for chunk in chunks {
            let is_stopped = |group: Option<&str>| group.is_some_and(|g| stopped.contains(g));
            let (held_up, chunk): (Chunk<'_>, Chunk<'_>) = chunk
                .into_iter()
                .partition(|(_, outgoing)| is_stopped(outgoing.group()));
            results.extend(
                held_up
                    .into_iter()
                    .map(|(at, _)| (at, Err(held_up_error()))),
            );
            let groups: Vec<_> = chunk.iter().map(|(_, outgoing)| outgoing.group()).collect();
            let sent = self.send(chunk).await;
            let failed = groups
                .into_iter()
                .zip(&sent)
                .filter(|(_, (_, r))| r.is_err());
            stopped.extend(failed.filter_map(|(group, _)| group));
            results.extend(sent);
        }
        results
    }

    async fn send(&self, chunk: Chunk<'_>) -> Vec<(usize, Result<(), Error>)> {
        if chunk.is_empty() {
            return Vec::new();
        }
        const WHAT: &str = "cannot send";
        let sent = self.send_batch(WHAT, &chunk).await;
        let mut sent = sent.map(Vec::into_iter);
        let of_outcome = |outcome: Option<Outcome>| match outcome {
            Some(Outcome::Done) => Ok(()),
            Some(Outcome::Refused(entry)) => Err(error::of_entry(WHAT, &entry)),
            Some(Outcome::Unmentioned) | None => Err(error::of_silence(WHAT)),
        };
        let places = chunk.into_iter().map(|(at, _)| at);
        places
            .map(|at| match &mut sent {
                Ok(outcomes) => (at, of_outcome(outcomes.next())),
                Err(error) => (at, Err(error.clone())),
            })
            .collect()
    }

    async fn send_batch(&self, what: &str, chunk: &Chunk<'_>) -> Result<Vec<Outcome>, Error> {
        let entries = entries(chunk, |id, (_, outgoing)| outgoing.entry(id));
        let request = self
            .queue
            .client()
            .await?
            .send_message_batch()
            .queue_url(self.queue.url().await?)
            .set_entries(Some(entries?));
        let answer = self
            .queue
            .call(what, self.queue.config.timeout, request.send())
            .await?;
        let done = answer.successful().iter().map(|entry| entry.id());
        Ok(outcomes(chunk.len(), done, answer.failed()))
    }
}

#[async_trait]
impl Sink for SqsSink {
    fn name(&self) -> &str {
        self.queue.name()
    }

    /// Reads the queue's attributes, if that is allowed (`sqs:GetQueueAttributes`); whether messages may be sent there shows
    /// with the first.
    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        if *self.closed.read().await {
            return Err(self.closed_error());
        }
        let mut found = SinkInfo::default();
        match Settings::read(&self.queue).await {
            Ok(settings) => found.identity = settings.arn(),
            Err(error) if error.kind() == ErrorKind::Permission && !error.is_retryable() => {
                found
                    .unknown
                    .push(format!("whether the queue exists: {error}"));
            }
            Err(error) => return Err(error),
        }
        Ok(found)
    }

    /// `Ok`: SQS has stored it, or on a FIFO queue has stored one with this dedup id within five minutes. On a FIFO
    /// queue the requests of a batch go one after another; SQS may refuse one entry of a request and take a later one
    /// of the same group. Tries once; after a retryable error the message may or may not be in the queue.
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        let closed = self.closed.read().await;
        if *closed {
            return batch.iter().map(|_| Err(self.closed_error())).collect();
        }
        let fifo = self.queue.is_fifo();
        let outgoing: Vec<_> = batch.iter().map(|m| Outgoing::of(m, fifo)).collect();
        let good = outgoing.iter().enumerate();
        let good = good.filter_map(|(at, outgoing)| Some((at, outgoing.as_ref().ok()?)));
        let chunks = chunks(good);
        let sent = match fifo {
            true => self.in_order(chunks).await,
            false => {
                all_of(
                    chunks.into_iter().map(|chunk| self.send(chunk)).collect(),
                    true,
                )
                .await
            }
        };
        let mut results: Vec<Result<(), Error>> = Vec::with_capacity(batch.len());
        results.extend(outgoing.into_iter().map(|outgoing| outgoing.map(drop)));
        for (at, result) in sent {
            results[at] = result.map_err(|error| error.on_message(&batch[at]));
        }
        let named = |error: Error| error.on_queue(self.queue.name());
        results
            .into_iter()
            .map(|result| result.map_err(named))
            .collect()
    }

    async fn close(&self) -> Result<(), Error> {
        *self.closed.write().await = true;
        Ok(())
    }
}

/// As many as fit into one request, by number and by bytes.
fn chunks<'a>(all: impl IntoIterator<Item = (usize, &'a Outgoing)>) -> Vec<Chunk<'a>> {
    let mut chunks: Vec<Chunk<'a>> = Vec::new();
    let mut bytes = 0;
    for item in all {
        let size = item.1.size();
        match chunks.last_mut() {
            Some(chunk) if chunk.len() < BATCH && bytes + size <= MAX_BYTES => {
                bytes += size;
                chunk.push(item);
            }
            _ => {
                bytes = size;
                chunks.push(vec![item]);
            }
        }
    }
    chunks
}

fn held_up_error() -> Error {
    let text = "not sent, because an earlier message of its group could not be sent";
    Error::new(ErrorKind::Other, text).retryable(true)
}

impl fmt::Debug for SqsSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqsSink")
            .field("config", &self.queue.config)
            .finish_non_exhaustive()
    }
}
