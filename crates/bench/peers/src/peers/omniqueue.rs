//! omniqueue: a loop of one's own over its consumer, as in its README.

use std::time::Duration;

use futures_util::future::try_join_all;
use omniqueue::backends::rabbitmq::{
    BasicConsumeOptions, BasicProperties, BasicPublishOptions, ConnectionProperties, FieldTable,
};
use omniqueue::backends::{RabbitMqBackend, RabbitMqConfig, RabbitMqConsumer};
use omniqueue::{Delivery, QueueError};

use super::Setup;
use crate::work::Job;
use crate::{BATCH, Error, PREFETCH};

async fn start(setup: &Setup) -> Result<RabbitMqConsumer, Error> {
    let config = RabbitMqConfig {
        uri: setup.url.clone(),
        // As its tests set it up: without these, its client has a runtime of its own.
        connection_properties: ConnectionProperties::default()
            .with_executor(tokio_executor_trait::Tokio::current())
            .with_reactor(tokio_reactor_trait::Tokio),
        publish_exchange: String::new(),
        publish_routing_key: setup.queue.clone(),
        publish_options: BasicPublishOptions::default(),
        publish_properties: BasicProperties::default(),
        consume_queue: setup.queue.clone(),
        consumer_tag: "peers".into(),
        consume_options: BasicConsumeOptions::default(),
        consume_arguments: FieldTable::default(),
        consume_prefetch_count: Some(PREFETCH),
        requeue_on_nack: true,
    };
    let builder = RabbitMqBackend::builder(config);
    Ok(builder.build_consumer().await?)
}

fn job(delivery: &Delivery) -> Result<Job, Error> {
    Ok(delivery.payload_serde_json()?.ok_or("no payload")?)
}

async fn ack(delivery: Delivery) -> Result<(), QueueError> {
    delivery.ack().await.map_err(|(error, _)| error)
}

/// A message, its effect, its ack.
pub(super) async fn receive(setup: &Setup) -> Result<(), Error> {
    let mut consumer = start(setup).await?;
    while !setup.work.is_done() {
        let delivery = consumer.receive().await?;
        setup.work.one(&job(&delivery)?).await?;
        ack(delivery).await?;
    }
    Ok(())
}

/// The effects of up to a hundred messages in one transaction, and an ack for each of them.
pub(super) async fn receive_all(setup: &Setup) -> Result<(), Error> {
    let mut consumer = start(setup).await?;
    while !setup.work.is_done() {
        let deliveries = consumer.receive_all(BATCH, Duration::from_secs(5)).await?;
        if deliveries.is_empty() {
            continue;
        }
        let ids = deliveries
            .iter()
            .map(|delivery| job(delivery).map(|j| j.id));
        setup.work.many(ids.collect::<Result<_, _>>()?).await?;
        try_join_all(deliveries.into_iter().map(ack)).await?;
    }
    Ok(())
}
