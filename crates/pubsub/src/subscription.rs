use std::time::Duration;

use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::{
    self as pubsub, GetSubscriptionRequest, GetTopicRequest, ListTopicSubscriptionsRequest,
};
use onlyonce_core::driver::{Acks, Capabilities, Ordering, QueueInfo};
use onlyonce_core::{Error, ErrorKind};
use tonic::{Code, Status};

use crate::Config;
use crate::config::{Address, SHORTEST_LEASE};
use crate::connection::{Connection, GET_SUBSCRIPTION, GET_TOPIC, LIST_TOPIC_SUBSCRIPTIONS};

/// What Google's own clients ask for at least, where delivery is exactly once:
/// <https://cloud.google.com/pubsub/docs/exactly-once-delivery#considerations>
const LEAST_EXTENSION: Duration = Duration::from_secs(60);
/// Unless the subscription says otherwise: <https://cloud.google.com/pubsub/docs/subscription-properties>
const USUAL_RETENTION: Duration = Duration::from_secs(7 * 86_400);
const USUAL_DEADLINE: Duration = SHORTEST_LEASE;
/// Of so many subscriptions of a dead-letter topic the settings are read.
const READ_AT_MOST: usize = 20;
/// As many settlements fit into one request: <https://cloud.google.com/pubsub/quotas#resource_limits>
pub(crate) const BATCH: usize = 1_000;

/// What the source has to know of its subscription before it pulls.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traits {
    pub(crate) exactly_once: bool,
    pub(crate) ordered: bool,
    /// Delivery attempts are counted where there is a dead-letter policy.
    pub(crate) counts_attempts: bool,
    /// For how long Pub/Sub leases what it gives to a pull.
    pub(crate) deadline: Duration,
}

impl Traits {
    /// What an extension asks for at least.
    pub(crate) fn least_extension(&self) -> Duration {
        match self.exactly_once {
            true => LEAST_EXTENSION,
            false => SHORTEST_LEASE,
        }
    }
}

/// A subscription's settings, as Pub/Sub tells them.
pub(crate) struct Settings(pubsub::Subscription);

impl Settings {
    /// # Errors
    /// It does not exist, or `pubsub.subscriptions.get` is not allowed.
    pub(crate) async fn read(connection: &Connection, config: &Config) -> Result<Self, Error> {
        let what = "cannot read the subscription (pubsub.subscriptions.get)";
        let read = get(connection, config, config.resource()).await;
        read.map(Self)
            .map_err(|status| connection.error(what, &status))
    }

    pub(crate) fn traits(&self) -> Traits {
        let seconds = u64::try_from(self.0.ack_deadline_seconds).unwrap_or_default();
        Traits {
            exactly_once: self.0.enable_exactly_once_delivery,
            ordered: self.0.enable_message_ordering,
            counts_attempts: self.0.dead_letter_policy.is_some(),
            deadline: match seconds {
                0 => USUAL_DEADLINE,
                _ => Duration::from_secs(seconds),
            },
        }
    }

    /// Where Pub/Sub puts what was delivered too often.
    ///
    /// # Errors
    /// The policy names no topic.
    pub(crate) fn dead_letter_topic(&self) -> Result<Option<Address>, Error> {
        let Some(policy) = &self.0.dead_letter_policy else {
            return Ok(None);
        };
        let name = &policy.dead_letter_topic;
        let topic = Address::of_resource(name).filter(Address::is_topic);
        match topic {
            Some(topic) => Ok(Some(topic)),
            None => Err(Error::config(format!(
                "the dead-letter policy names no topic that is there: {name}; give it another"
            ))),
        }
    }

    /// Refuses what cannot be pulled from.
    fn check(&self) -> Result<(), Error> {
        let Self(it) = self;
        let pushes = it.push_config.as_ref();
        let pushes = pushes.is_some_and(|push| !push.push_endpoint.is_empty());
        let fault = if pushes {
            "the subscription pushes its messages to an endpoint, so nothing can be pulled: change its delivery type to pull"
        } else if it.bigquery_config.is_some() {
            "the subscription writes its messages to BigQuery, so nothing can be pulled: make one of the delivery type pull"
        } else if it.cloud_storage_config.is_some() {
            "the subscription writes its messages to Cloud Storage, so nothing can be pulled: make one of the delivery type pull"
        } else if it.bigtable_config.is_some() {
            "the subscription writes its messages to Bigtable, so nothing can be pulled: make one of the delivery type pull"
        } else if it.detached {
            "the subscription is detached from its topic and has lost its messages: make a new one"
        } else {
            return Ok(());
        };
        Err(Error::config(fault))
    }

    fn retention(&self) -> Duration {
        let own = self.0.message_retention_duration;
        own.and_then(|time| time.try_into().ok())
            .unwrap_or(USUAL_RETENTION)
    }

    /// How long after it was published a message may be delivered: what was acked, too, by a seek to the past, which
    /// reaches as far as the subscription or the topic keeps messages.
    /// <https://cloud.google.com/pubsub/docs/replay-overview>
    fn horizon(&self) -> Duration {
        let topic = self.0.topic_message_retention_duration;
        let topic: Duration = topic
            .and_then(|time| time.try_into().ok())
            .unwrap_or_default();
        self.retention().max(topic)
    }

    fn queue_info(&self, config: &Config) -> QueueInfo {
        let traits = self.traits();
        let policy = self.0.dead_letter_policy.as_ref();
        let mut info = QueueInfo::default();
        info.identity = Some(config.resource());
        info.lease = Some(config.lease.unwrap_or(traits.deadline));
        info.retention = Some(self.horizon());
        // 5, where it is not said.
        let attempts = policy.map(|policy| policy.max_delivery_attempts.max(5));
        info.max_deliveries = attempts.and_then(|attempts| attempts.try_into().ok());
        info.dead_letter = policy.map(|policy| policy.dead_letter_topic.clone());
        info.capabilities = capabilities(traits);
        info.settings = self.shown();
        if traits.exactly_once && config.is_global() {
            info.unknown.push(
                "whether all consumers are in one region: delivery is exactly once within a region only, and requests go to the nearest; name a regional endpoint, like `endpoint=https://europe-west3-pubsub.googleapis.com`".to_owned(),
            );
        }
        info
    }

    /// What else decides how the subscription behaves, under Google's own names.
    fn shown(&self) -> Vec<(String, String)> {
        let Self(it) = self;
        let time = |time: Option<Duration>| time.map(|time| format!("{}s", time.as_secs()));
        let topic_keeps = it.topic_message_retention_duration;
        let topic_keeps = topic_keeps.and_then(|time| time.try_into().ok());
        let ttl = it.expiration_policy.and_then(|policy| policy.ttl);
        let backoff = it.retry_policy.and_then(|policy| policy.minimum_backoff);
        let all = [
            ("topic", Some(it.topic.clone())),
            (
                "ackDeadlineSeconds",
                Some(it.ack_deadline_seconds.to_string()),
            ),
            (
                "enableExactlyOnceDelivery",
                Some(it.enable_exactly_once_delivery.to_string()),
            ),
            (
                "enableMessageOrdering",
                Some(it.enable_message_ordering.to_string()),
            ),
            ("messageRetentionDuration", time(Some(self.retention()))),
            ("topicMessageRetentionDuration", time(topic_keeps)),
            (
                "retainAckedMessages",
                Some(it.retain_acked_messages.to_string()),
            ),
            (
                "expirationPolicy.ttl",
                time(ttl.and_then(|ttl| ttl.try_into().ok())),
            ),
            (
                "retryPolicy.minimumBackoff",
                time(backoff.and_then(|time| time.try_into().ok())),
            ),
            (
                "filter",
                Some(it.filter.clone()).filter(|filter| !filter.is_empty()),
            ),
        ];
        let told = all
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?)));
        told.collect()
    }
}

fn capabilities(traits: Traits) -> Capabilities {
    let mut can = Capabilities::default();
    // Without exactly-once delivery an ack is told to have been taken, and its message may come again all the same.
    // https://cloud.google.com/pubsub/docs/subscriber#at-least-once-delivery
    can.acks = match traits.exactly_once {
        true => Acks::Confirmed,
        false => Acks::Unconfirmed,
    };
    can.extend = true;
    can.timed_lease = true;
    can.delayed_nack = true;
    can.dead_letter = traits.counts_attempts;
    can.counts_attempts = traits.counts_attempts;
    can.settle_batch = Some(BATCH);
    can.ordering = match traits.ordered {
        true => Ordering::Group,
        false => Ordering::None,
    };
    can
}

/// Looks at the subscription, and at where its dead letters go.
pub(crate) async fn inspect(connection: &Connection, config: &Config) -> Result<QueueInfo, Error> {
    let settings = Settings::read(connection, config).await?;
    let named = |error: Error| error.on_queue(config.name());
    settings.check().map_err(named)?;
    let mut info = settings.queue_info(config);
    if let Some(topic) = settings.dead_letter_topic().map_err(named)? {
        match DeadLetters::read(connection, config, &topic).await {
            Ok(dead) => {
                dead.check(&topic).map_err(named)?;
                // Forwarded, kept there, and published again by a redrive: each is a new message with a time of its own.
                info.retention = info.retention.map(|own| own + dead.retention + own);
                info.unknown.extend(dead.unknown);
            }
            Err(error) if error.kind() == ErrorKind::Permission && !error.is_retryable() => {
                info.unknown.push(format!(
                    "how long dead letters are kept, which may be redriven, and whether they are kept at all: {error}"
                ));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(info)
}

/// Who keeps the messages of a dead-letter topic.
#[derive(Default)]
struct DeadLetters {
    subscriptions: usize,
    /// Those that drop what does not match their filters.
    filtered: usize,
    /// The longest of all.
    retention: Duration,
    unknown: Vec<String>,
}

impl DeadLetters {
    async fn read(
        connection: &Connection,
        config: &Config,
        topic: &Address,
    ) -> Result<Self, Error> {
        let names = subscriptions_of(connection, config, topic).await?;
        let mut found = Self {
            subscriptions: names.len(),
            ..Self::default()
        };
        for name in names.into_iter().take(READ_AT_MOST) {
            match get(connection, config, name.clone()).await {
                Ok(subscription) => {
                    found.filtered += usize::from(!subscription.filter.is_empty());
                    let kept = Settings(subscription).horizon();
                    found.retention = found.retention.max(kept);
                }
                Err(status) if status.code() == Code::PermissionDenied => found.unknown.push(
                    format!("how long {name} keeps dead letters, which may be redriven (pubsub.subscriptions.get)"),
                ),
                Err(status) => {
                    let what = format!("cannot read {name}, which has the dead letters");
                    return Err(connection.error(&what, &status));
                }
            }
        }
        Ok(found)
    }

    /// What is published to a topic without a subscription is gone.
    fn check(&self, topic: &Address) -> Result<(), Error> {
        let fault = |what: &str| {
            let topic = topic.resource();
            Err(Error::new(
                ErrorKind::Unsafe,
                format!("the dead-letter topic {topic} {what}"),
            ))
        };
        if self.subscriptions == 0 {
            return fault("has no subscription, so dead letters would be lost: give it one");
        }
        if self.filtered == self.subscriptions {
            return fault(
                "has only subscriptions with a filter, which lose the dead letters that do not match: give it one without",
            );
        }
        Ok(())
    }
}

/// The subscriptions of a topic, the first thousand of them.
///
/// # Errors
/// The topic does not exist, or `pubsub.topics.get` is not allowed.
pub(crate) async fn subscriptions_of(
    connection: &Connection,
    config: &Config,
    topic: &Address,
) -> Result<Vec<String>, Error> {
    let resource = topic.resource();
    let topic_read = GetTopicRequest {
        topic: resource.clone(),
    };
    let failed = |status: Status| {
        connection.error(
            &format!("cannot read the topic {resource} (pubsub.topics.get)"),
            &status,
        )
    };
    // A list of a topic that is not there may be empty.
    let limit = config.timeout;
    let there = connection
        .call(&GET_TOPIC, &resource, topic_read, limit)
        .await;
    there.map_err(failed)?;
    let request = ListTopicSubscriptionsRequest {
        topic: resource.clone(),
        page_size: 1_000,
        ..ListTopicSubscriptionsRequest::default()
    };
    let list = connection
        .call(&LIST_TOPIC_SUBSCRIPTIONS, &resource, request, limit)
        .await;
    Ok(list.map_err(failed)?.subscriptions)
}

async fn get(
    connection: &Connection,
    config: &Config,
    subscription: String,
) -> Result<pubsub::Subscription, Status> {
    let resource = subscription.clone();
    let request = GetSubscriptionRequest { subscription };
    connection
        .call(&GET_SUBSCRIPTION, &resource, request, config.timeout)
        .await
}
