use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{MaybeDone, maybe_done};
use lapin::message::BasicReturnMessage;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation};
use onlyonce_core::{Error, ErrorKind};
use tokio::sync::Mutex;
use tokio::time::timeout_at;

use crate::connection::{Link, after, answer};
use crate::error::Fault;
use crate::{Config, headers};

/// One message on its way out.
pub(crate) struct Outgoing {
    pub(crate) routing_key: ShortString,
    pub(crate) properties: BasicProperties,
    pub(crate) body: Bytes,
}

/// So much is handed to the connection before its confirmations are awaited.
const CHUNK_MESSAGES: usize = 1_000;
const CHUNK_BYTES: usize = 16 << 20;

/// Publishes with confirms and mandatory routing, one batch at a time, over a connection of its own: a broker short of
/// memory or disk stops reading from connections that publish, acks included
/// (<https://www.rabbitmq.com/docs/connections#flow-control>).
pub(crate) struct Publisher {
    config: Config,
    role: String,
    exchange: ShortString,
    /// For errors: the queue or the exchange.
    target: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    link: Option<Link>,
    closed: bool,
}

impl Publisher {
    pub(crate) fn new(config: Config, role: &str, exchange: ShortString, target: &str) -> Self {
        Self {
            config,
            role: format!("{role} {target}"),
            exchange,
            target: target.to_owned(),
            state: Mutex::default(),
        }
    }

    /// Publishes each message; `Ok` when the broker confirmed that it is in a queue. Queues in `declare` are declared
    /// first.
    ///
    /// The link is taken out meanwhile: if this future is dropped, or anything fails, the next call opens a new one.
    /// Otherwise an answer to this batch could be taken for one to the next.
    pub(crate) async fn publish(
        &self,
        declare: &BTreeMap<ShortString, FieldTable>,
        batch: Vec<Outgoing>,
    ) -> Vec<Result<(), Error>> {
        if batch.is_empty() {
            return Vec::new();
        }
        let mut state = self.state.lock().await;
        let link = match self.link(&mut state, declare).await {
            Ok(link) => link,
            Err(fault) => return batch.iter().map(|_| Err(self.error(&fault))).collect(),
        };
        let batch: Vec<_> = batch
            .into_iter()
            .map(|message| self.fit(message, link.frame_max()))
            .collect();
        let mut results = Vec::with_capacity(batch.len());
        while results.len() < batch.len() {
            let rest = &batch[results.len()..];
            results.extend(self.publish_chunk(&link, &rest[..chunk(rest)]).await);
        }
        // After a timeout the channel is open, but answers are still to come.
        let late =
            |r: &Result<(), Error>| r.as_ref().is_err_and(|e| e.kind() == ErrorKind::Timeout);
        if link.is_open() && !results.iter().any(late) {
            state.link = Some(link);
        }
        results
    }

    async fn link(
        &self,
        state: &mut State,
        declare: &BTreeMap<ShortString, FieldTable>,
    ) -> Result<Link, Fault> {
        if state.closed {
            return Err(Fault::Closed);
        }
        let link = match state.link.take().filter(Link::is_open) {
            Some(link) => link,
            None => {
                let link = Link::open(&self.config, &self.role).await?;
                let confirm = link.channel.confirm_select(ConfirmSelectOptions::default());
                answer(self.config.timeout, confirm).await?;
                link
            }
        };
        let durable = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        for (queue, arguments) in declare {
            let request = link
                .channel
                .queue_declare(queue.clone(), durable, arguments.clone());
            answer(self.config.timeout, request).await?;
        }
        Ok(link)
    }

    /// All headers and properties of a message share a frame.
    fn fit(&self, mut message: Outgoing, most: usize) -> Outgoing {
        let group_header = self.config.group_header.as_deref();
        if headers::size(&message.properties) > most {
            message.properties = headers::fit(message.properties, most, group_header);
            if let Some(left_out) = headers::left_out(&message.properties) {
                tracing::warn!(
                    queue = self.target,
                    message = ?message.properties.message_id(),
                    left_out,
                    "a dead letter goes without some of its attributes: they do not fit into a frame"
                );
            }
        }
        message
    }

    async fn publish_chunk(&self, link: &Link, chunk: &[Outgoing]) -> Vec<Result<(), Error>> {
        let deadline = after(self.config.timeout);
        let most = link.frame_max();
        // All are handed over, in order, before the first confirmation is awaited.
        let confirms: Vec<_> = chunk
            .iter()
            .map(|message| {
                let fits = headers::size(&message.properties) <= most;
                fits.then(|| start(confirm(&link.channel, self.exchange.clone(), message)))
            })
            .collect();
        let mut returned = Vec::new();
        let mut faults = Vec::with_capacity(chunk.len());
        let mut results = Vec::with_capacity(chunk.len());
        for confirm in confirms {
            let outcome = match confirm {
                None => {
                    Err(self.too_large("its headers and properties exceed the broker's frame size"))
                }
                Some(confirm) => match timeout_at(deadline, finish(confirm)).await {
                    Ok(Ok(Confirmation::Ack(message))) => {
                        returned.extend(message);
                        Ok(())
                    }
                    Ok(Ok(_)) => Err(self.nacked()),
                    Ok(Err(error)) => {
                        let fault = Fault::Lapin(error);
                        let error = self.error(&fault);
                        faults.push((results.len(), fault));
                        Err(error)
                    }
                    Err(_) => Err(self.error(&Fault::Silence(self.config.timeout))),
                },
            };
            results.push(outcome);
        }
        self.blame(chunk, &faults, &mut results);
        self.mark_returned(chunk, returned, &mut results);
        results
    }

    /// A message that the broker refuses closes the channel, and with it everything under way fails. Tells the one from
    /// the others, which may be tried again.
    fn blame(
        &self,
        chunk: &[Outgoing],
        faults: &[(usize, Fault)],
        results: &mut [Result<(), Error>],
    ) {
        for (at, fault) in faults {
            let Some((406, text)) = fault.exception() else {
                continue;
            };
            // "message size 20 is larger than configured max size 10"
            let guilty = match text
                .split("message size ")
                .nth(1)
                .and_then(|rest| rest.split(' ').next())
            {
                Some(size) => chunk[*at].body.len().to_string() == size,
                None => chunk.len() == 1,
            };
            results[*at] = Err(if guilty {
                self.too_large(text)
            } else {
                let what = "the broker refused another message of the batch and closed the channel";
                Error::new(ErrorKind::Connection, what).on_queue(&self.target)
            });
        }
    }

    /// A returned message is confirmed as well, and lapin hands it to any of the confirmations that came with it. So it
    /// is looked up by what it is; equal messages are interchangeable.
    fn mark_returned(
        &self,
        chunk: &[Outgoing],
        returned: Vec<BasicReturnMessage>,
        results: &mut [Result<(), Error>],
    ) {
        for message in returned {
            let why = format!("{} {}", message.reply_code, message.reply_text);
            let unroutable = || {
                let what = format!(
                    "the broker has no queue for this message ({why}): declare or bind one"
                );
                Error::new(ErrorKind::Unroutable, what).on_queue(&self.target)
            };
            let found =
                (0..chunk.len()).find(|i| results[*i].is_ok() && same(&chunk[*i], &message));
            match found {
                Some(i) => results[i] = Err(unroutable()),
                // It belongs to this chunk but to nothing in it: then nothing in it is known to be kept.
                None => results
                    .iter_mut()
                    .filter(|r| r.is_ok())
                    .for_each(|r| *r = Err(unroutable())),
            }
        }
    }

    /// Waits for the batch under way, then closes.
    pub(crate) async fn close(&self) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        state.closed = true;
        match state.link.take() {
            Some(link) => link.close().await.map_err(|fault| self.error(&fault)),
            None => Ok(()),
        }
    }

    fn error(&self, fault: &Fault) -> Error {
        fault.error("cannot publish", &self.target)
    }

    fn too_large(&self, why: &str) -> Error {
        let what = format!("the broker does not take this message: {why}");
        Error::new(ErrorKind::Message, what).on_queue(&self.target)
    }

    fn nacked(&self) -> Error {
        let what = "the broker could not take the message (basic.nack): the queue is full or its node in trouble";
        Error::new(ErrorKind::Throttled, what).on_queue(&self.target)
    }
}

fn same(sent: &Outgoing, returned: &BasicReturnMessage) -> bool {
    sent.routing_key == returned.routing_key
        && sent.properties == returned.properties
        && sent.body == returned.data
}

/// How many of these go out together: at least one.
fn chunk(messages: &[Outgoing]) -> usize {
    let mut bytes = 0;
    let fits = |message: &&Outgoing| {
        bytes += message.body.len();
        bytes <= CHUNK_BYTES
    };
    messages
        .iter()
        .take(CHUNK_MESSAGES)
        .take_while(fits)
        .count()
        .max(1)
}

async fn confirm(
    channel: &Channel,
    exchange: ShortString,
    message: &Outgoing,
) -> lapin::Result<Confirmation> {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = message.properties.clone();
    let key = message.routing_key.clone();
    channel
        .basic_publish(exchange, key, options, &message.body, properties)
        .await?
        .await
}

/// A request whose frames have been handed to the connection, before its answer came.
pub(crate) type Started<F> = Pin<Box<MaybeDone<F>>>;

/// Hands the frames of a request to the connection now; lapin does so when the request is first polled. So requests
/// started one after another are on the wire in that order.
pub(crate) fn start<F: Future>(request: F) -> Started<F> {
    let mut request = Box::pin(maybe_done(request));
    let _ = request.as_mut().now_or_never();
    request
}

/// Waits for the answer to a started request.
pub(crate) async fn finish<T, F: Future<Output = lapin::Result<T>>>(
    mut request: Started<F>,
) -> lapin::Result<T> {
    request.as_mut().await;
    let output = request.as_mut().take_output();
    output.unwrap_or_else(|| Err(lapin::ErrorKind::FutureCompleted.into()))
}
