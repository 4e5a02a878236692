//! Pub/Sub as Google documents it, without a network or on loopback.

mod connecting;
mod foreign;
mod handling;
mod inspecting;
mod itself;
mod receiving;
mod script;
mod sending;
mod settling;

use std::time::Duration;

use onlyonce_core::driver::{Delivery, ReceiveLimits, Source as _};
use onlyonce_pubsub::v1::Subscription;
use onlyonce_pubsub::{Config, PubSubSource};

use script::{SUBSCRIPTION, Script, Step, TOPIC, get_subscription, messages_of, ok, pull, seconds};

/// Exactly-once and ordered, with the ack deadline that its users are told to set.
pub(crate) fn subscription() -> Subscription {
    Subscription {
        name: SUBSCRIPTION.to_owned(),
        topic: TOPIC.to_owned(),
        ack_deadline_seconds: 60,
        enable_exactly_once_delivery: true,
        enable_message_ordering: true,
        ..Subscription::default()
    }
}

/// The first pull needs to know it.
fn told() -> Step {
    get_subscription().gets(ok(subscription()))
}

fn config() -> Config {
    "pubsub://project/orders".parse().unwrap()
}

fn source(script: &Script) -> PubSubSource {
    PubSubSource::with_channel(config(), script.channel()).unwrap()
}

fn limit(messages: usize) -> ReceiveLimits {
    ReceiveLimits::new(messages, seconds(20))
}

async fn receive(source: &PubSubSource, messages: usize) -> Vec<Delivery> {
    source.receive(limit(messages)).await.unwrap()
}

/// A source that has received these messages of the key `a`, and the steps of the script behind that.
async fn holding(
    names: &[&str],
    steps: impl IntoIterator<Item = Step>,
) -> (Script, PubSubSource, Vec<Delivery>) {
    holding_of(subscription(), "a", names, steps).await
}

async fn holding_of(
    subscription: Subscription,
    key: &str,
    names: &[&str],
    steps: impl IntoIterator<Item = Step>,
) -> (Script, PubSubSource, Vec<Delivery>) {
    let begin = [
        get_subscription().gets(ok(subscription)),
        pull().gets(messages_of(key, names)),
    ];
    let script = Script::of(begin.into_iter().chain(steps));
    let source = source(&script);
    let held = receive(&source, names.len()).await;
    assert_eq!(bodies(&held), names);
    (script, source, held)
}

fn bodies(deliveries: &[Delivery]) -> Vec<String> {
    let text = |delivery: &Delivery| String::from_utf8(delivery.message.body.to_vec()).unwrap();
    deliveries.iter().map(text).collect()
}

/// How long the lease lasts from now on.
fn left(delivery: &Delivery) -> Duration {
    let until = delivery.lease.until.unwrap();
    until.saturating_duration_since(tokio::time::Instant::now())
}

fn is_lost(delivery: &Delivery) -> bool {
    delivery.lease.lost.as_ref().unwrap().is_cancelled()
}
