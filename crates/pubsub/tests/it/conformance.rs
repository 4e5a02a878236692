//! The public conformance suite, on each kind of subscription: `./tests/run pubsub`.
//!
//! On ordered subscriptions the emulator does two things otherwise than Pub/Sub, as `emulator/table.rs` shows, so there
//! [`OnTheEmulator`] stands between it and the suite. How Pub/Sub's way is dealt with, the scripted tests show.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::Message;
use onlyonce_core::attributes::DEAD_LETTER_REASON;
use onlyonce_core::driver::{Receipt, Sink, Source};
use onlyonce_pubsub::v1::{Subscription, Topic};
use onlyonce_pubsub::{Config, PubSubReceipt, PubSubSink, PubSubSource};
use onlyonce_testkit::proxy::{End, Proxy};
use onlyonce_testkit::source::{DeadLettered, SourceHarness};
use onlyonce_testkit::source_suite;

use crate::common::{
    OnTheEmulator, PROJECT, Queue, dead_letters_after, exactly_once, exactly_once_and_ordered,
    ordered, plain, url,
};

const OTHER_PROJECT: &str = "projects/onlyonce-other";

/// Sources go through a proxy that can cut their connections; sinks go straight to the emulator.
struct Harness {
    queue: Queue,
    like: Subscription,
    proxy: Proxy,
}

impl Harness {
    /// With the shortest ack deadline that the service takes.
    async fn new(like: Subscription) -> Self {
        let like = Subscription {
            ack_deadline_seconds: 10,
            ..like
        };
        let emulator = url();
        let address = emulator.strip_prefix("http://").unwrap();
        Self {
            queue: Queue::create(like.clone()).await,
            like,
            proxy: Proxy::to(address.trim_end_matches('/')).await.unwrap(),
        }
    }

    fn source_of(&self, subscription: &str) -> PubSubSource {
        let mut config: Config = subscription.parse().unwrap();
        config.endpoint = Some(format!("http://127.0.0.1:{}", self.proxy.port()));
        PubSubSource::new(config).unwrap()
    }
}

fn sink_of(topic: &str) -> Arc<dyn Sink> {
    let mut config: Config = topic.parse().unwrap();
    config.endpoint = Some(url());
    // A large body takes its time on a busy machine.
    config.timeout = Duration::from_secs(60);
    Arc::new(PubSubSink::new(config).unwrap())
}

#[async_trait]
impl SourceHarness for Harness {
    async fn source(&self) -> Arc<dyn Source> {
        let source = self.source_of(&self.queue.subscription);
        match self.like.enable_message_ordering {
            true => Arc::new(OnTheEmulator(source)),
            false => Arc::new(source),
        }
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        let sink = sink_of(&self.queue.topic);
        match self.like.enable_message_ordering {
            true => Arc::new(OnTheEmulator(sink)),
            false => sink,
        }
    }

    async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>) {
        let there = |resource: &str| resource.replace(PROJECT, OTHER_PROJECT);
        let topic = Topic {
            name: there(&self.queue.topic),
            ..Topic::default()
        };
        let subscription = Subscription {
            name: there(&self.queue.subscription),
            topic: topic.name.clone(),
            dead_letter_policy: None,
            ..self.like.clone()
        };
        let (name, sink) = (subscription.name.clone(), sink_of(&topic.name));
        self.queue.publisher().create_topic(topic).await.unwrap();
        let created = self
            .queue
            .subscriber()
            .create_subscription(subscription)
            .await;
        created.unwrap();
        (Arc::new(self.source_of(&name)), sink)
    }

    fn made_up(&self, _: &Receipt) -> Vec<Receipt> {
        let ack_id = "no-such-id".into();
        vec![Receipt::new(PubSubReceipt { ack_id })]
    }

    fn lease(&self) -> Duration {
        Duration::from_secs(10)
    }

    /// An extension on an exactly-once subscription asks for a minute.
    fn patience(&self) -> Duration {
        Duration::from_secs(100)
    }

    fn large_body(&self) -> usize {
        9_900_000
    }

    fn refused_message(&self) -> Option<Message> {
        Some(Message::new("x").with_attribute("too-long", "x".repeat(1_025)))
    }

    async fn break_connection(&self) -> bool {
        self.proxy.cut(End::Reset).await;
        true
    }

    async fn dead_letters(&self) -> Vec<DeadLettered> {
        let letters = self.queue.dead_letters().await.into_iter();
        let messages = letters.filter_map(|letter| letter.message);
        let letter = |message: onlyonce_pubsub::v1::PubsubMessage| DeadLettered {
            body: message.data,
            reason: message.attributes[DEAD_LETTER_REASON].clone(),
        };
        messages.map(letter).collect()
    }
}

/// The emulator fails every pull of an ordered subscription with a dead-letter policy.
fn with_dead_letters(like: Subscription) -> Subscription {
    Subscription {
        dead_letter_policy: dead_letters_after(100),
        ..like
    }
}

mod exactly_once_ordered {
    use super::*;
    source_suite!(
        ignore = "needs the Pub/Sub emulator: ./tests/run pubsub",
        Harness::new(exactly_once_and_ordered()).await
    );
}

mod exactly_once_unordered {
    use super::*;
    source_suite!(
        ignore = "needs the Pub/Sub emulator: ./tests/run pubsub",
        Harness::new(with_dead_letters(exactly_once())).await
    );
}

mod at_least_once_ordered {
    use super::*;
    source_suite!(
        ignore = "needs the Pub/Sub emulator: ./tests/run pubsub",
        Harness::new(ordered()).await
    );
}

mod at_least_once_unordered {
    use super::*;
    source_suite!(
        ignore = "needs the Pub/Sub emulator: ./tests/run pubsub",
        Harness::new(with_dead_letters(plain())).await
    );
}
