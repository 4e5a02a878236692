use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{MaybeDone, maybe_done};
use lapin::message::BasicReturnMessage;
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueDeclareOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, ConnectionStatus, ExchangeKind};
use onlyonce_core::{Error, ErrorKind};
use tokio::sync::{Mutex, OwnedMutexGuard, oneshot};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::connection::{Link, after, answer, is_blocked};
use crate::error::Fault;
use crate::{Config, headers};

/// One message on its way out.
pub(crate) struct Outgoing {
    pub(crate) routing_key: ShortString,
    pub(crate) properties: BasicProperties,
    pub(crate) body: Bytes,
}

/// At most this is handed to the connection before its confirmations are awaited.
const CHUNK_MESSAGES: usize = 1_000;
const CHUNK_BYTES: usize = 16 << 20;

/// The time-out is measured in this number of steps.
const STEPS: u32 = 10;
/// How often it is looked at whether the broker blocks the connection.
const LOOK: Duration = Duration::from_millis(100);

/// Publishes with confirms and mandatory routing, one batch at a time, over a connection of its own: a broker short of
/// memory or disk stops reading from connections that publish, acks included
/// (<https://www.rabbitmq.com/docs/connection-blocked>).
///
/// What was sent on a blocked connection is published when the broker reads on, even if the connection is closed before.
/// So nothing is sent twice because of that: a batch once sent is waited for as long as the connection is blocked, and
/// no other is sent meanwhile.
pub(crate) struct Publisher {
    shared: Arc<Shared>,
    _stop: DropGuard,
}

struct Shared {
    config: Config,
    role: String,
    exchange: ShortString,
    /// For errors: the queue or the exchange.
    target: String,
    /// Whoever has it locked uses the connection.
    link: Arc<Mutex<Option<Link>>>,
    /// Of that connection.
    status: StdMutex<Option<ConnectionStatus>>,
    /// How long a batch waits while the broker blocks the connection.
    unsent: Duration,
    /// It was closed.
    stop: CancellationToken,
}

impl Publisher {
    /// While the broker blocks the connection, a batch that is not sent waits for `unsent`.
    pub(crate) fn new(
        config: Config,
        role: &str,
        exchange: ShortString,
        target: &str,
        unsent: Duration,
    ) -> Self {
        let stop = CancellationToken::new();
        Self {
            _stop: stop.clone().drop_guard(),
            shared: Arc::new(Shared {
                config,
                role: format!("{role} {target}"),
                exchange,
                target: target.to_owned(),
                link: Arc::default(),
                status: StdMutex::default(),
                unsent,
                stop,
            }),
        }
    }

    /// Publishes each message; `Ok` when the broker confirmed that it is in a queue. Queues in `declare` are declared
    /// first.
    ///
    /// If this future is dropped after the batch was sent, a task still waits for the confirmations, and the next call
    /// for the task.
    pub(crate) async fn publish(
        &self,
        declare: BTreeMap<ShortString, FieldTable>,
        batch: Vec<Outgoing>,
    ) -> Vec<Result<(), Error>> {
        let many = batch.len();
        if many == 0 {
            return Vec::new();
        }
        let link = match self.shared.turn(self.shared.unsent).await {
            Ok(link) => link,
            Err(fault) => return self.shared.refuse(many, &fault),
        };
        let (answer, results) = oneshot::channel();
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move { shared.run(link, declare, batch, answer).await });
        let closed = |_| self.shared.refuse(many, &Fault::Closed);
        results.await.unwrap_or_else(closed)
    }

    /// Asks the broker for the exchange, or for the queue of this name where none is given.
    pub(crate) async fn find(&self, queue: &ShortString) -> Result<(), Error> {
        let found = async {
            let mut kept = self.shared.turn(self.shared.unsent).await?;
            if self.shared.stop.is_cancelled() {
                return Err(Fault::Closed);
            }
            let link = self.shared.link(&mut kept, BTreeMap::new()).await?;
            let found = self.shared.find(&link, queue).await;
            *kept = Some(link);
            found
        };
        found.await.map_err(|fault| self.shared.error(&fault))
    }

    /// Ends when the broker blocks the connection.
    pub(crate) async fn blocked(&self) {
        while !self.shared.is_blocked() {
            sleep(LOOK).await;
        }
    }

    /// Why nothing is published while the broker blocks the connection.
    pub(crate) fn blocked_error(&self) -> Error {
        self.shared.error(&Fault::Blocked)
    }

    /// Waits for the batch under way, then closes. While the broker blocks the connection, it waits for the time-out and
    /// gives the batch up.
    pub(crate) async fn close(&self) -> Result<(), Error> {
        let turn = self.shared.turn(self.shared.config.timeout).await;
        self.shared.stop.cancel();
        let closed = match turn.map(|mut link| link.take()) {
            // The broker would not read the request; it is closed when the broker reads on.
            Ok(Some(link)) if !link.is_blocked() => link.close().await,
            Ok(_) => Ok(()),
            Err(fault) => Err(fault),
        };
        closed.map_err(|fault| self.shared.error(&fault))
    }
}

type Results = Vec<Result<(), Error>>;

impl Shared {
    /// Waits for the batch under way, but while the broker blocks the connection for this long only.
    async fn turn(&self, blocked: Duration) -> Result<OwnedMutexGuard<Option<Link>>, Fault> {
        let mut turn = pin!(Arc::clone(&self.link).lock_owned());
        loop {
            match timeout(blocked, turn.as_mut()).await {
                Ok(link) => return Ok(link),
                Err(_) if self.is_blocked() => return Err(Fault::Blocked),
                Err(_) => {}
            }
        }
    }

    /// Publishes a batch and answers, unless the publisher is closed meanwhile.
    async fn run(
        &self,
        mut link: OwnedMutexGuard<Option<Link>>,
        declare: BTreeMap<ShortString, FieldTable>,
        batch: Vec<Outgoing>,
        answer: oneshot::Sender<Results>,
    ) {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {}
            results = self.publish(&mut link, declare, batch, &answer) => {
                drop(link);
                // If nobody waits for it, nobody needs it.
                let _ = answer.send(results);
            }
        }
    }

    /// The link is taken out meanwhile: if anything fails, the next call opens a new one. Otherwise an answer to this
    /// batch could be taken for one to the next.
    async fn publish(
        &self,
        kept: &mut Option<Link>,
        declare: BTreeMap<ShortString, FieldTable>,
        batch: Vec<Outgoing>,
        answer: &oneshot::Sender<Results>,
    ) -> Results {
        let link = match self.link(kept, declare).await {
            Ok(link) => link,
            Err(fault) => return self.refuse(batch.len(), &fault),
        };
        let most = link.frame_max();
        let batch: Vec<_> = batch.into_iter().map(|m| self.fit(m, most)).collect();
        let mut results = Vec::with_capacity(batch.len());
        // What has not been sent when nobody waits for it any more is not sent.
        while results.len() < batch.len() && !answer.is_closed() {
            let rest = &batch[results.len()..];
            results.extend(match self.unblocked(&link).await {
                Ok(()) => self.publish_chunk(&link, &rest[..chunk(rest)]).await,
                Err(fault) => self.refuse(rest.len(), &fault),
            });
        }
        // After a timeout the channel is open, but answers are still to come.
        let late =
            |r: &Result<(), Error>| r.as_ref().is_err_and(|e| e.kind() == ErrorKind::Timeout);
        if link.is_open() && !results.iter().any(late) {
            *kept = Some(link);
        }
        results
    }

    async fn link(
        &self,
        kept: &mut Option<Link>,
        declare: BTreeMap<ShortString, FieldTable>,
    ) -> Result<Link, Fault> {
        if let Some(link) = kept {
            self.unblocked(link).await?;
        }
        let link = match kept.take().filter(Link::is_open) {
            Some(link) => link,
            None => self.open().await?,
        };
        let durable = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        for (queue, arguments) in declare {
            let request = link.channel.queue_declare(queue, durable, arguments);
            answer(self.config.timeout, request).await?;
        }
        Ok(link)
    }

    async fn open(&self) -> Result<Link, Fault> {
        let link = Link::open(&self.config, &self.role).await?;
        let confirm = link.channel.confirm_select(ConfirmSelectOptions::default());
        answer(self.config.timeout, confirm).await?;
        *self.status() = Some(link.connection.status().clone());
        Ok(link)
    }

    /// On a channel of its own, since a refusal ends it.
    async fn find(&self, link: &Link, queue: &ShortString) -> Result<(), Fault> {
        let asked = answer(self.config.timeout, async {
            let channel = link.connection.create_channel().await?;
            let none = FieldTable::default();
            if self.exchange.as_str().is_empty() {
                let passive = QueueDeclareOptions {
                    passive: true,
                    ..QueueDeclareOptions::default()
                };
                channel.queue_declare(queue.clone(), passive, none).await?;
            } else {
                let passive = ExchangeDeclareOptions {
                    passive: true,
                    ..ExchangeDeclareOptions::default()
                };
                // The broker does not look at the kind.
                let kind = ExchangeKind::Direct;
                let exchange = self.exchange.clone();
                channel
                    .exchange_declare(exchange, kind, passive, none)
                    .await?;
            }
            channel.close(200, "found".into()).await
        });
        asked.await
    }

    fn status(&self) -> MutexGuard<'_, Option<ConnectionStatus>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the broker blocks the connection, as far as it has said so: it does at the first message that it reads.
    fn is_blocked(&self) -> bool {
        self.status().as_ref().is_some_and(is_blocked)
    }

    /// Waits until the broker does not block this connection.
    async fn unblocked(&self, link: &Link) -> Result<(), Fault> {
        let deadline = after(self.unsent);
        while link.is_blocked() {
            if Instant::now() >= deadline {
                return Err(Fault::Blocked);
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Ends when the time-out has passed, not counting the time in which the broker blocks this connection: what it does
    /// not read, it does not answer.
    async fn silence(&self, link: &Link) {
        let mut steps = 0;
        while steps < STEPS {
            sleep(self.config.timeout / STEPS).await;
            steps = if link.is_blocked() { 0 } else { steps + 1 };
        }
    }

    /// All headers and properties of a message share a frame.
    fn fit(&self, mut message: Outgoing, most: usize) -> Outgoing {
        let group_header = self.config.group_header.as_deref();
        if headers::size(&message.properties) > most {
            message.properties = headers::fit(message.properties, most, group_header);
            if let Some(left_out) = headers::left_out(&message.properties) {
                tracing::warn!(
                    queue = self.target,
                    message_id = ?message.properties.message_id(),
                    left_out,
                    "a dead letter goes without some of its attributes: they do not fit into a frame"
                );
            }
        }
        message
    }

    async fn publish_chunk(&self, link: &Link, chunk: &[Outgoing]) -> Results {
        let most = link.frame_max();
        // All are handed over, in order, before the first confirmation is awaited.
        let confirms: Vec<_> = chunk
            .iter()
            .map(|message| {
                let fits = headers::size(&message.properties) <= most;
                fits.then(|| start(confirm(&link.channel, self.exchange.clone(), message)))
            })
            .collect();
        let mut silence = pin!(maybe_done(self.silence(link)));
        let mut returned = Vec::new();
        let mut faults = Vec::with_capacity(chunk.len());
        let mut results = Vec::with_capacity(chunk.len());
        for confirm in confirms {
            let Some(confirm) = confirm else {
                let why = "its headers and properties exceed the broker's frame size";
                results.push(Err(self.too_large(why)));
                continue;
            };
            let outcome = tokio::select! {
                biased;
                outcome = finish(confirm) => outcome.map_err(Fault::Lapin),
                () = silence.as_mut() => Err(Fault::Silence(self.config.timeout)),
            };
            let outcome = match outcome {
                Ok(Confirmation::Ack(message)) => {
                    returned.extend(message);
                    Ok(())
                }
                Ok(_) => Err(self.nacked()),
                Err(fault) => {
                    let error = self.error(&fault);
                    faults.push((results.len(), fault));
                    Err(error)
                }
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

    fn refuse(&self, many: usize, fault: &Fault) -> Results {
        (0..many).map(|_| Err(self.error(fault))).collect()
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
