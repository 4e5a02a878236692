use std::collections::BTreeMap;
use std::fmt;

use async_trait::async_trait;
use lapin::BasicProperties;
use lapin::types::ShortString;
use onlyonce_core::driver::{Sink, SinkInfo};
use onlyonce_core::{Error, ErrorKind, Message};

use crate::publisher::{Outgoing, Publisher};
use crate::{Config, config, headers, queue_info};

/// Publishes to a queue or an exchange, confirmed by the broker. See the [crate's page](crate).
pub struct RabbitSink {
    name: String,
    group_header: Option<String>,
    user: Option<String>,
    routing_key: ShortString,
    publisher: Publisher,
    /// Of the queue, where no exchange routes.
    identity: Option<String>,
}

impl RabbitSink {
    /// A sink that connects when it is first used. Does not block.
    ///
    /// # Errors
    /// The configuration names no queue or exchange, or cannot work.
    pub fn new(config: Config) -> Result<Self, Error> {
        let (exchange, routing_key) = config.sink_target()?;
        let name = config.queue.as_ref().or(config.exchange.as_ref());
        let name = name.cloned().unwrap_or_default();
        config.warn_of_plain_credentials();
        let unsent = config.timeout;
        let queue = config.queue.as_deref();
        let identity = queue.map(|queue| queue_info::identity(&config, queue));
        Ok(Self {
            group_header: config.group_header.clone(),
            user: config.user().map(str::to_owned),
            routing_key,
            publisher: Publisher::new(config, "sink", exchange, &name, unsent),
            name,
            identity,
        })
    }
}

impl RabbitSink {
    fn properties(&self, message: &Message) -> Result<BasicProperties, Error> {
        let properties = headers::write(message, self.group_header.as_deref())?;
        // The broker refuses every other user.
        let user = message.attributes.get(headers::USER_ID);
        match user.filter(|user| Some(*user) == self.user.as_deref()) {
            Some(user) => Ok(properties.with_user_id(config::name("user", user)?)),
            None => Ok(properties),
        }
    }
}

#[async_trait]
impl Sink for RabbitSink {
    fn name(&self) -> &str {
        &self.name
    }

    /// Asks for the queue or the exchange. Whether an exchange routes to any queue shows with the first message.
    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        self.publisher.find(&self.routing_key).await?;
        let mut found = SinkInfo::default();
        found.identity.clone_from(&self.identity);
        Ok(found)
    }

    /// One batch at a time, in order; a second call waits for the first. `Ok`: the broker confirmed it, on a quorum queue
    /// by a majority. Tries once; after a retryable error the message may or may not be in the queue.
    ///
    /// While the broker blocks publishers (memory or disk alarm), what was sent before is waited for as long as that
    /// lasts; what was not fails as [`Throttled`](ErrorKind::Throttled) after the time-out, unsent. If the future is
    /// dropped, what was sent is published all the same, and the next call waits for its confirmation.
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        let mut results = Vec::with_capacity(batch.len());
        let mut outgoing = Vec::with_capacity(batch.len());
        for message in batch {
            let properties = self.properties(message);
            results.push(properties.map(|properties| {
                outgoing.push(Outgoing {
                    routing_key: self.routing_key.clone(),
                    properties,
                    body: message.body.clone(),
                });
            }));
        }
        let mut published = self
            .publisher
            .publish(BTreeMap::new(), outgoing)
            .await
            .into_iter();
        for (result, message) in results.iter_mut().zip(batch) {
            if result.is_ok() {
                let silent = || Err(Error::new(ErrorKind::Other, "no result came back"));
                let outcome = published.next().unwrap_or_else(silent);
                *result = outcome.map_err(|error| error.on_message(message));
            }
        }
        results
    }

    async fn close(&self) -> Result<(), Error> {
        self.publisher.close().await
    }
}

impl fmt::Debug for RabbitSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitSink")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
