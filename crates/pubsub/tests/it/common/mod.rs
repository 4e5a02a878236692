//! What the tests against the emulator share, by nothing but the stubs.

mod emulated;

pub(crate) use emulated::OnTheEmulator;

use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::publisher_client::PublisherClient;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::subscriber_client::SubscriberClient;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::*;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// The emulator has every project.
pub(crate) const PROJECT: &str = "projects/onlyonce-test";

pub(crate) type Answer<T> = Result<T, Status>;

pub(crate) fn url() -> String {
    let url = std::env::var("ONLYONCE_PUBSUB_URL");
    url.expect("set ONLYONCE_PUBSUB_URL, see `./tests/run pubsub`")
}

/// What a test's subscription is to be like; its names are given by [`Queue::create`].
pub(crate) fn plain() -> Subscription {
    Subscription {
        ack_deadline_seconds: 30,
        ..Subscription::default()
    }
}

pub(crate) fn exactly_once() -> Subscription {
    Subscription {
        enable_exactly_once_delivery: true,
        ..plain()
    }
}

pub(crate) fn ordered() -> Subscription {
    Subscription {
        enable_message_ordering: true,
        ..plain()
    }
}

pub(crate) fn exactly_once_and_ordered() -> Subscription {
    Subscription {
        enable_exactly_once_delivery: true,
        ..ordered()
    }
}

/// To the dead-letter topic that each test has.
pub(crate) fn dead_letters_after(attempts: i32) -> Option<DeadLetterPolicy> {
    Some(DeadLetterPolicy {
        dead_letter_topic: String::new(),
        max_delivery_attempts: attempts,
    })
}

pub(crate) fn retries_between(least: i64, most: i64) -> Option<RetryPolicy> {
    Some(RetryPolicy {
        minimum_backoff: duration(least),
        maximum_backoff: duration(most),
    })
}

pub(crate) fn duration(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

pub(crate) fn message(key: &str, body: &str) -> PubsubMessage {
    PubsubMessage {
        data: body.to_owned().into(),
        ordering_key: key.to_owned(),
        ..PubsubMessage::default()
    }
}

/// A topic and a subscription of a test's own, with a topic and a subscription for dead letters.
pub(crate) struct Queue {
    channel: Channel,
    pub(crate) topic: String,
    pub(crate) subscription: String,
    pub(crate) dead_topic: String,
    pub(crate) dead_subscription: String,
}

impl Queue {
    pub(crate) async fn create(like: Subscription) -> Self {
        Self::try_create(like).await.unwrap()
    }

    /// What the emulator says, if it does not create such a subscription.
    pub(crate) async fn try_create(mut like: Subscription) -> Answer<Self> {
        let name = format!("test-{:x}", fastrand::u64(..));
        let dead = format!("dead-{name}");
        let endpoint = Endpoint::from_shared(url()).unwrap();
        // An error has a detail for each ack id.
        let endpoint = endpoint.http2_max_header_list_size(8 << 20);
        let queue = Self {
            channel: endpoint.connect_lazy(),
            topic: format!("{PROJECT}/topics/{name}"),
            subscription: format!("{PROJECT}/subscriptions/{name}"),
            dead_topic: format!("{PROJECT}/topics/{dead}"),
            dead_subscription: format!("{PROJECT}/subscriptions/{dead}"),
        };
        for topic in [&queue.topic, &queue.dead_topic] {
            let topic = Topic {
                name: topic.clone(),
                ..Topic::default()
            };
            queue.publisher().create_topic(topic).await?;
        }
        if let Some(policy) = &mut like.dead_letter_policy {
            policy.dead_letter_topic.clone_from(&queue.dead_topic);
        }
        like.name.clone_from(&queue.subscription);
        like.topic.clone_from(&queue.topic);
        queue.subscriber().create_subscription(like).await?;
        let dead = Subscription {
            name: queue.dead_subscription.clone(),
            topic: queue.dead_topic.clone(),
            ..plain()
        };
        queue.subscriber().create_subscription(dead).await?;
        Ok(queue)
    }

    pub(crate) fn publisher(&self) -> PublisherClient<Channel> {
        PublisherClient::new(self.channel.clone()).max_encoding_message_size(usize::MAX)
    }

    pub(crate) fn subscriber(&self) -> SubscriberClient<Channel> {
        SubscriberClient::new(self.channel.clone()).max_decoding_message_size(usize::MAX)
    }

    /// The ids of the messages.
    pub(crate) async fn publish(&self, messages: Vec<PubsubMessage>) -> Answer<Vec<String>> {
        let request = PublishRequest {
            topic: self.topic.clone(),
            messages,
        };
        let answer = self.publisher().publish(request).await?;
        Ok(answer.into_inner().message_ids)
    }

    /// What can be had at once.
    pub(crate) async fn pull(&self, most: i32) -> Answer<Vec<ReceivedMessage>> {
        self.pull_from(&self.subscription, most).await
    }

    pub(crate) async fn dead_letters(&self) -> Vec<ReceivedMessage> {
        self.pull_from(&self.dead_subscription, 100).await.unwrap()
    }

    #[allow(
        deprecated,
        reason = "a pull that is given up can take what nobody sees"
    )]
    async fn pull_from(&self, subscription: &str, most: i32) -> Answer<Vec<ReceivedMessage>> {
        let request = PullRequest {
            subscription: subscription.to_owned(),
            return_immediately: true,
            max_messages: most,
        };
        let answer = self.subscriber().pull(request).await?;
        Ok(answer.into_inner().received_messages)
    }

    pub(crate) async fn acknowledge(&self, ids: &[&str]) -> Answer<()> {
        let request = AcknowledgeRequest {
            subscription: self.subscription.clone(),
            ack_ids: ids.iter().map(|&id| id.to_owned()).collect(),
        };
        self.subscriber().acknowledge(request).await?;
        Ok(())
    }

    /// From now on; for no time to give them back.
    pub(crate) async fn modify_deadline(&self, ids: &[&str], seconds: i32) -> Answer<()> {
        let request = ModifyAckDeadlineRequest {
            subscription: self.subscription.clone(),
            ack_ids: ids.iter().map(|&id| id.to_owned()).collect(),
            ack_deadline_seconds: seconds,
        };
        self.subscriber().modify_ack_deadline(request).await?;
        Ok(())
    }
}
