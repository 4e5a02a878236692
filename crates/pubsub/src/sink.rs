use std::collections::HashSet;
use std::fmt;

use async_trait::async_trait;
use google_cloud_gax::retry_policy::{NeverRetry, RetryPolicyExt as _};
use google_cloud_pubsub::client::Publisher;
use google_cloud_pubsub::error::PublishError;
use onlyonce_core::driver::{Sink, SinkInfo};
use onlyonce_core::{Error, ErrorKind, Message};
use tokio::sync::{Mutex, RwLock};
use tokio::time::timeout;

use crate::connection::{Connection, credentials_of_publisher};
use crate::subscription::subscriptions_of;
use crate::{Config, error, message};

/// Messages of one request.
const BATCH: u32 = 100;

/// Publishes to a topic, by Google's own publisher. See the [crate's page](crate).
pub struct PubSubSink {
    config: Config,
    connection: Connection,
    /// Made when it is first needed, and anew after it has left a message without an answer: its connection may be dead.
    publisher: Mutex<Option<Publisher>>,
    /// Written by `close`, which so waits for what is under way.
    closed: RwLock<bool>,
}

impl PubSubSink {
    /// A sink that connects when it is first used. Does not block.
    ///
    /// # Errors
    /// The configuration cannot work.
    pub fn new(config: Config) -> Result<Self, Error> {
        config.check()?;
        if !config.address.is_topic() {
            let text = "a subscription cannot be published to: name its topic, as `pubsub://PROJECT/topics/TOPIC`";
            return Err(Error::config(text).on_queue(config.name()));
        }
        Ok(Self {
            connection: Connection::new(config.clone(), None),
            config,
            publisher: Mutex::default(),
            closed: RwLock::default(),
        })
    }

    async fn publisher(&self) -> Result<Publisher, Error> {
        let mut known = self.publisher.lock().await;
        if let Some(publisher) = &*known {
            return Ok(publisher.clone());
        }
        let config = &self.config;
        // Each request once: who publishes decides what is published again.
        let once = NeverRetry.with_time_limit(config.timeout);
        let builder = Publisher::builder(config.resource())
            .with_endpoint(config.target())
            .with_credentials(credentials_of_publisher(config)?)
            .with_retry_policy(once)
            .set_message_count_threshold(BATCH);
        let publisher = builder.build().await.map_err(|error| {
            let text = "Google's publisher cannot be made";
            Error::config(text).caused_by(error)
        })?;
        *known = Some(publisher.clone());
        Ok(publisher)
    }

    /// Each in its turn: the publisher keeps the order of a key, and holds up what comes behind one that failed.
    async fn publish_all(&self, batch: &[Message]) -> Result<Vec<Result<(), Error>>, Error> {
        let publisher = self.publisher().await?;
        let hand_over = |message: &Message| {
            let written = message::write(message)?;
            Ok(publisher.publish(message::of_publisher(written)))
        };
        let under_way: Vec<_> = batch.iter().map(hand_over).collect();
        let mut results = Vec::with_capacity(batch.len());
        let mut failed: HashSet<&str> = HashSet::new();
        let limit = self.config.timeout;
        let sent = timeout(limit, publisher.flush()).await;
        for (message, under_way) in batch.iter().zip(under_way) {
            let result = match (under_way, &sent) {
                (Err(error), _) => Err(error),
                (Ok(published), Ok(())) => published.await.map(drop).map_err(of_publisher),
                (Ok(_), Err(_)) => {
                    let text = format!("cannot publish: no answer within {limit:?}");
                    Err(Error::new(ErrorKind::Timeout, text))
                }
            };
            if let (Err(_), Some(group)) = (&result, message.group.as_deref()) {
                failed.insert(group);
            }
            results.push(result.map_err(|error| error.on_message(message)));
        }
        if sent.is_err() || results.iter().any(is_unanswered) {
            *self.publisher.lock().await = None;
        }
        for group in failed {
            publisher.resume_publish(group);
        }
        Ok(results)
    }

    fn closed_error(&self) -> Error {
        Error::new(ErrorKind::Closed, "the sink was closed")
    }
}

#[async_trait]
impl Sink for PubSubSink {
    fn name(&self) -> &str {
        self.config.name()
    }

    /// Reads the topic and lists its subscriptions, if that is allowed (`pubsub.topics.get`): what is published to a topic
    /// without one is gone, so that is an error. Whether messages may be published shows with the first.
    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        let named = |error: Error| error.on_queue(self.config.name());
        if *self.closed.read().await {
            return Err(named(self.closed_error()));
        }
        let mut found = SinkInfo::default();
        match subscriptions_of(&self.connection, &self.config, &self.config.address).await {
            Ok(none) if none.is_empty() => {
                let text = "the topic has no subscription, so whatever is published there is lost: give it one";
                return Err(named(Error::new(ErrorKind::Unsafe, text)));
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Permission && !error.is_retryable() => {
                found.unknown.push(format!(
                    "whether the topic exists and has a subscription: {error}"
                ));
            }
            Err(error) => return Err(error),
        }
        Ok(found)
    }

    /// `Ok`: Pub/Sub has stored it for every subscription of the topic. Tries once; after a retryable error the message may or
    /// may not have been published.
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        let closed = self.closed.read().await;
        let all = match *closed {
            true => Err(self.closed_error()),
            false => self.publish_all(batch).await,
        };
        let named = |error: Error| error.on_queue(self.config.name());
        match all {
            Ok(results) => results
                .into_iter()
                .map(|result| result.map_err(named))
                .collect(),
            Err(error) => batch
                .iter()
                .map(|message| Err(named(error.clone()).on_message(message)))
                .collect(),
        }
    }

    async fn close(&self) -> Result<(), Error> {
        *self.closed.write().await = true;
        Ok(())
    }
}

fn is_unanswered(result: &Result<(), Error>) -> bool {
    let error = result.as_ref().err();
    error.is_some_and(|error| error.kind() == ErrorKind::Timeout)
}

fn of_publisher(failed: PublishError) -> Error {
    const WHAT: &str = "cannot publish";
    match failed {
        PublishError::OrderingKeyPaused => {
            let text =
                "not published, because an earlier message of its key could not be published";
            Error::new(ErrorKind::Other, text).retryable(true)
        }
        PublishError::Rpc(cause) => match cause.status() {
            Some(status) => {
                let code = tonic::Code::from_i32(status.code as i32);
                error::of_status(WHAT, &tonic::Status::new(code, status.message.clone()))
            }
            None if cause.is_timeout() || cause.is_exhausted() => {
                Error::new(ErrorKind::Timeout, WHAT).caused_by(cause)
            }
            None if cause.is_authentication() => {
                Error::new(ErrorKind::Permission, WHAT).caused_by(cause)
            }
            None => Error::new(ErrorKind::Connection, WHAT).caused_by(cause),
        },
        other => Error::new(ErrorKind::Connection, WHAT).caused_by(other),
    }
}

impl fmt::Debug for PubSubSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PubSubSink")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}
