//! The consumer loops that people write with lapin.

use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties, Consumer};

use super::Setup;
use crate::work::decode;
use crate::{BATCH, Error, PREFETCH};

async fn start(setup: &Setup) -> Result<(Connection, Consumer), Error> {
    let connection = Connection::connect(&setup.url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let consumer = channel
        .basic_consume(
            setup.queue.as_str().into(),
            "peers".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok((connection, consumer))
}

/// A message, its effect, its ack.
pub(super) async fn one_by_one(setup: &Setup) -> Result<(), Error> {
    let (connection, mut consumer) = start(setup).await?;
    while !setup.work.is_done() {
        let delivery = consumer.next().await.ok_or("the consumer ended")??;
        setup.work.one(&decode(&delivery.data)?).await?;
        delivery.ack(BasicAckOptions::default()).await?;
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// The effects of up to a hundred messages in one transaction, and one ack for all of them. It never waits for more to come.
pub(super) async fn hundreds(setup: &Setup) -> Result<(), Error> {
    let (connection, mut consumer) = start(setup).await?;
    while !setup.work.is_done() {
        let deliveries = ready(&mut consumer).await?;
        let jobs = deliveries.iter().map(|delivery| decode(&delivery.data));
        let ids = jobs.map(|job| job.map(|job| job.id));
        setup.work.many(ids.collect::<Result<_, _>>()?).await?;
        if let Some(last) = deliveries.last() {
            last.ack(BasicAckOptions { multiple: true }).await?;
        }
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// One delivery at least, and those that are there already.
async fn ready(consumer: &mut Consumer) -> Result<Vec<Delivery>, Error> {
    let mut deliveries = vec![consumer.next().await.ok_or("the consumer ended")??];
    while deliveries.len() < BATCH {
        match consumer.next().now_or_never() {
            Some(Some(delivery)) => deliveries.push(delivery?),
            Some(None) | None => break,
        }
    }
    Ok(deliveries)
}
