//! The consumer loops that people write with lapin.

use futures_util::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};

use super::queue::Queue;
use crate::Error;
use crate::measure::Done;

pub(crate) async fn consume(queue: &Queue) -> Result<(Channel, Consumer), Error> {
    let channel = queue.connection.create_channel().await?;
    channel.basic_qos(1_000, BasicQosOptions::default()).await?;
    let consumer = channel
        .basic_consume(
            queue.name.as_str().into(),
            "bench".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok((channel, consumer))
}

async fn handler(delivery: &Delivery) -> usize {
    delivery.data.len()
}

pub(crate) async fn awaited(queue: &Queue, count: usize) -> Result<Done, Error> {
    let (channel, mut consumer) = consume(queue).await?;
    for _ in 0..count {
        let delivery = consumer.next().await.ok_or("the consumer ended")??;
        handler(&delivery).await;
        delivery.ack(BasicAckOptions::default()).await?;
    }
    finish(channel).await
}

pub(crate) async fn not_awaited(queue: &Queue, count: usize) -> Result<Done, Error> {
    let (channel, mut consumer) = consume(queue).await?;
    let mut acks = tokio::task::JoinSet::new();
    for _ in 0..count {
        let delivery = consumer.next().await.ok_or("the consumer ended")??;
        handler(&delivery).await;
        acks.spawn(async move { delivery.ack(BasicAckOptions::default()).await });
    }
    while let Some(ack) = acks.join_next().await {
        ack??;
    }
    finish(channel).await
}

pub(crate) async fn multiple(queue: &Queue, count: usize) -> Result<Done, Error> {
    let (channel, mut consumer) = consume(queue).await?;
    for n in 1..=count {
        let delivery = consumer.next().await.ok_or("the consumer ended")??;
        handler(&delivery).await;
        if n % 100 == 0 || n == count {
            delivery.ack(BasicAckOptions { multiple: true }).await?;
        }
    }
    finish(channel).await
}

async fn finish(channel: Channel) -> Result<Done, Error> {
    channel.close(200, "done".into()).await?;
    Ok(Done::default())
}
