//! A fresh subscription for each run, filled before the clock starts; by the community's client, past the proxy.

use gcloud_gax::conn::Environment;
use gcloud_googleapis::pubsub::v1::PubsubMessage;
use gcloud_pubsub::client::{Client, ClientConfig};
use gcloud_pubsub::subscription::SubscriptionConfig;

use crate::Error;

pub(crate) const PROJECT: &str = "peers";
const BODY: [u8; 256] = [b'x'; 256];
/// Messages of a request, as many as it may have.
const BATCH: usize = 1_000;

/// `address` is the emulator's, or a proxy's to it.
pub(crate) async fn client(address: String) -> Result<Client, Error> {
    let config = ClientConfig {
        environment: Environment::Emulator(address),
        project_id: Some(PROJECT.into()),
        ..ClientConfig::default()
    };
    Ok(Client::new(config).await?)
}

/// Without keys it keeps no order: with one, the emulator would want all of its acks in order.
pub(crate) async fn fill(
    client: &Client,
    name: &str,
    count: usize,
    keys: usize,
) -> Result<(), Error> {
    let topic = client.create_topic(name, None, None).await?;
    let config = SubscriptionConfig {
        ack_deadline_seconds: 60,
        enable_exactly_once_delivery: true,
        enable_message_ordering: keys > 0,
        ..SubscriptionConfig::default()
    };
    client.create_subscription(name, name, config, None).await?;
    let key = |n: usize| match keys {
        0 => String::new(),
        keys => format!("key-{}", n % keys),
    };
    let message = |n: usize| PubsubMessage {
        data: BODY.to_vec(),
        ordering_key: key(n),
        ..PubsubMessage::default()
    };
    let messages: Vec<PubsubMessage> = (0..count).map(message).collect();
    let mut publisher = topic.new_publisher(None);
    for batch in messages.chunks(BATCH) {
        publisher.publish_immediately(batch.to_vec(), None).await?;
    }
    publisher.shutdown().await;
    Ok(())
}

pub(crate) async fn delete(client: &Client, name: &str) -> Result<(), Error> {
    client.subscription(name).delete(None).await?;
    Ok(client.topic(name).delete(None).await?)
}
