//! mq-bridge: a route from AMQP to a handler, which gets batches so as to do its work once a batch.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use mq_bridge::models::{AmqpConfig, Endpoint, EndpointType};
use mq_bridge::route::RouteHandle;
use mq_bridge::traits::Handler;
use mq_bridge::{CanonicalMessage, Handled, HandlerError, Route, anyhow};
use tokio::time::sleep;

use super::Setup;
use crate::work::{Work, decode};
use crate::{BATCH, Error, PREFETCH};

pub(super) async fn consume(setup: &Setup) -> Result<(), Error> {
    let amqp = AmqpConfig {
        prefetch_count: Some(PREFETCH),
        ..AmqpConfig::new(&setup.url).with_queue(&setup.queue)
    };
    let input = Endpoint::new(EndpointType::Amqp(amqp));
    let route = Route::new(input, Endpoint::new(EndpointType::Null))
        .with_batch_size(BATCH)
        .with_handler(Batches(setup.work.clone()));
    let running = route.run("peers").await?;
    tokio::select! {
        () = setup.work.all_done() => running.stop().await,
        () = ended(&running) => {}
    }
    Ok(running.join().await?)
}

/// A route connects again by itself; this is when it has given up.
async fn ended(running: &RouteHandle) {
    while running.outcome().is_none() {
        sleep(Duration::from_millis(100)).await;
    }
}

struct Batches(Arc<Work>);

impl Batches {
    async fn all(&self, messages: &[CanonicalMessage]) -> Result<(), HandlerError> {
        let jobs = messages.iter().map(|message| decode(&message.payload));
        let ids = jobs.map(|job| job.map(|job| job.id));
        let ids: Result<Vec<_>, _> = ids.collect();
        let ids = ids.map_err(|error| HandlerError::NonRetryable(anyhow::anyhow!(error)))?;
        let done = self.0.many(ids).await;
        done.map_err(|error| HandlerError::Retryable(anyhow::anyhow!(error)))
    }
}

#[async_trait]
impl Handler for Batches {
    async fn handle(&self, message: CanonicalMessage) -> Result<Handled, HandlerError> {
        self.all(&[message]).await.map(|()| Handled::Ack)
    }

    async fn handle_many(
        &self,
        messages: Vec<CanonicalMessage>,
    ) -> Vec<Result<Handled, HandlerError>> {
        match self.all(&messages).await {
            Ok(()) => messages.iter().map(|_| Ok(Handled::Ack)).collect(),
            Err(error) => {
                let failed = |_| Err(HandlerError::Retryable(anyhow::anyhow!("{error}")));
                messages.iter().map(failed).collect()
            }
        }
    }

    fn prefers_batches(&self) -> bool {
        true
    }
}
