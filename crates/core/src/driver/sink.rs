use std::sync::Arc;

use async_trait::async_trait;

use crate::{Error, Message};

/// What a [`Sink`] has found of its queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SinkInfo {
    /// Which queue messages go to, in the words of [`QueueInfo::identity`](crate::driver::QueueInfo::identity); `None` where the
    /// broker does not tell, or routes them.
    pub identity: Option<String>,
    /// Whether [`publish`](Sink::publish) stops a group at its first failure: after one, nothing that follows it in its group is
    /// published by the same call, and each of those answers with a retryable error. Otherwise whoever needs the order
    /// publishes one message of a group at a time. The conformance suite proves it where it is claimed.
    pub stops_groups: bool,
    /// What could not be found out, each with the reason, for people.
    pub unknown: Vec<String>,
}

/// A queue to publish to: dead letters, an outbox, tests.
///
/// All methods may be called concurrently. Each tries once: the caller retries, with the same dedup id.
#[async_trait]
pub trait Sink: Send + Sync + 'static {
    /// The queue's name, for logs and errors. It holds no secret.
    fn name(&self) -> &str;

    /// Looks at the queue: it is there and messages can be published. Publishes nothing. The pipeline asks once, before it
    /// receives.
    ///
    /// # Errors
    /// The queue does not exist, or may not be published to: this ends the pipeline. Connection errors are retryable, and the
    /// pipeline asks again.
    async fn sink_info(&self) -> Result<SinkInfo, Error>;

    /// Publishes each message; one result per message, in the same order. `Ok` means that the broker has confirmed that
    /// it keeps the message durably in a queue. Messages of one group are published in the order given.
    ///
    /// No error ends the pipeline. It publishes a dead letter again after one that is retryable; after another the message stays in
    /// its queue and the dead letter is tried again later.
    ///
    /// Dropping the future leaves each message either published or not.
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>>;

    /// Waits for what is under way, then closes. Closing twice is harmless.
    ///
    /// # Errors
    /// The connection broke before everything was confirmed.
    async fn close(&self) -> Result<(), Error>;
}

#[async_trait]
impl<S: Sink + ?Sized> Sink for Arc<S> {
    fn name(&self) -> &str {
        (**self).name()
    }
    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        (**self).sink_info().await
    }
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        (**self).publish(batch).await
    }
    async fn close(&self) -> Result<(), Error> {
        (**self).close().await
    }
}
