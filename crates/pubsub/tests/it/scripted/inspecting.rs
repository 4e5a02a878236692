//! What a subscription and a topic are found to be.

use onlyonce_core::driver::{Acks, Ordering, Sink as _, Source as _};
use onlyonce_core::memory::MemoryQueue;
use onlyonce_core::{Error, ErrorKind, Pipeline};
use onlyonce_pubsub::v1::{
    DeadLetterPolicy, ListTopicSubscriptionsResponse, PushConfig, Subscription, Topic,
};
use onlyonce_pubsub::{Config, PubSubSink, PubSubSource};
use tonic::Code;

use super::script::*;
use super::*;

const DEAD: &str = "projects/project/topics/dead";
const LETTERS: &str = "projects/project/subscriptions/letters";

fn days(days: i64) -> Option<prost_types::Duration> {
    let seconds = days * 86_400;
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn of_days(days: u64) -> Duration {
    seconds(days * 86_400)
}

fn with_dead_letters() -> Subscription {
    Subscription {
        dead_letter_policy: Some(DeadLetterPolicy {
            dead_letter_topic: DEAD.to_owned(),
            max_delivery_attempts: 50,
        }),
        ..subscription()
    }
}

fn subscriptions(names: &[&str]) -> Answer {
    ok(ListTopicSubscriptionsResponse {
        subscriptions: names.iter().map(|&name| name.to_owned()).collect(),
        ..ListTopicSubscriptionsResponse::default()
    })
}

/// The dead-letter topic has these subscriptions.
fn dead_topic(names: &[&str]) -> [Step; 2] {
    [
        get_topic().gets(ok(Topic::default())),
        list_subscriptions().gets(subscriptions(names)),
    ]
}

async fn inspected(
    subscription: Subscription,
    steps: impl IntoIterator<Item = Step>,
) -> Result<onlyonce_core::driver::QueueInfo, Error> {
    let first = get_subscription().gets(ok(subscription));
    let script = Script::of([first].into_iter().chain(steps));
    source(&script).queue_info().await
}

#[tokio::test(start_paused = true)]
async fn the_subscription_tells_what_can_be_done_with_it() {
    let info = inspected(subscription(), []).await.unwrap();
    assert_eq!(info.identity.as_deref(), Some(SUBSCRIPTION));
    assert_eq!(info.lease, Some(seconds(60)));
    assert_eq!(info.retention, Some(of_days(7)), "unless it is set");
    let can = info.capabilities;
    assert_eq!(can.acks, Acks::Confirmed);
    assert_eq!(can.ordering, Ordering::Group);
    assert!(can.extend && can.timed_lease && can.delayed_nack);
    assert!(!can.dead_letter && !can.counts_attempts);
    assert_eq!(info.max_deliveries, None);

    let other = Subscription {
        enable_exactly_once_delivery: false,
        enable_message_ordering: false,
        ..subscription()
    };
    let can = inspected(other, []).await.unwrap().capabilities;
    assert_eq!(
        (can.acks, can.ordering),
        (Acks::Unconfirmed, Ordering::None)
    );
}

#[tokio::test(start_paused = true)]
async fn records_have_to_cover_a_seek_to_the_past() {
    for (own, topic, horizon) in [(3, None, 3), (3, days(31), 31), (10, days(1), 10)] {
        let subscription = Subscription {
            message_retention_duration: days(own),
            topic_message_retention_duration: topic,
            retain_acked_messages: true,
            ..subscription()
        };
        let info = inspected(subscription, []).await.unwrap();
        assert_eq!(info.retention, Some(of_days(horizon)));
    }
}

#[tokio::test(start_paused = true)]
async fn records_have_to_cover_a_redrive() {
    let letters = Subscription {
        message_retention_duration: days(14),
        ..Subscription::default()
    };
    let steps = dead_topic(&[LETTERS]).into_iter();
    let info = inspected(
        with_dead_letters(),
        steps.chain([get_subscription().gets(ok(letters))]),
    );
    let info = info.await.unwrap();
    assert_eq!(info.retention, Some(of_days(7 + 14 + 7)));
    assert_eq!(info.max_deliveries, Some(50));
    assert_eq!(info.dead_letter.as_deref(), Some(DEAD));
    assert!(info.capabilities.dead_letter && info.capabilities.counts_attempts);
}

#[tokio::test(start_paused = true)]
async fn dead_letters_that_nobody_keeps_are_refused() {
    let error = inspected(with_dead_letters(), dead_topic(&[]))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsafe, "{error}");
    assert!(error.to_string().contains("has no subscription"), "{error}");

    let filtered = Subscription {
        filter: "attributes.kind = \"order\"".to_owned(),
        ..Subscription::default()
    };
    let steps = dead_topic(&[LETTERS]).into_iter();
    let steps = steps.chain([get_subscription().gets(ok(filtered))]);
    let error = inspected(with_dead_letters(), steps).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsafe, "{error}");
    assert!(error.to_string().contains("filter"), "{error}");

    let deleted = Subscription {
        dead_letter_policy: Some(DeadLetterPolicy {
            dead_letter_topic: "_deleted-topic_".to_owned(),
            max_delivery_attempts: 5,
        }),
        ..subscription()
    };
    let error = inspected(deleted, []).await.unwrap_err();
    assert!(error.to_string().contains("_deleted-topic_"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn what_may_not_be_read_of_dead_letters_is_named() {
    let refusal = refused(Code::PermissionDenied, "no");
    let info = inspected(with_dead_letters(), [get_topic().gets(refusal.clone())]).await;
    let unknown = info.unwrap().unknown.join("\n");
    assert!(
        unknown.contains("whether they are kept at all"),
        "{unknown}"
    );

    let steps = dead_topic(&[LETTERS]).into_iter();
    let steps = steps.chain([get_subscription().gets(refusal)]);
    let unknown = inspected(with_dead_letters(), steps).await.unwrap().unknown;
    assert!(unknown.join("\n").contains(LETTERS), "{unknown:?}");
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_pulled_from_is_refused_with_what_to_change() {
    let push = Subscription {
        push_config: Some(PushConfig {
            push_endpoint: "https://example.com".to_owned(),
            ..PushConfig::default()
        }),
        ..subscription()
    };
    let bigquery = Subscription {
        bigquery_config: Some(Default::default()),
        ..subscription()
    };
    let storage = Subscription {
        cloud_storage_config: Some(Default::default()),
        ..subscription()
    };
    let detached = Subscription {
        detached: true,
        ..subscription()
    };
    for (subscription, expected) in [
        (push, "change its delivery type to pull"),
        (bigquery, "BigQuery"),
        (storage, "Cloud Storage"),
        (detached, "detached"),
    ] {
        let error = inspected(subscription, []).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn delivery_is_exactly_once_within_a_region_only() {
    let (global, regional) = ("", "?endpoint=https://europe-west3-pubsub.googleapis.com");
    for (endpoint, exactly_once, told) in [
        (global, true, true),
        (global, false, false),
        (regional, true, false),
    ] {
        let subscription = Subscription {
            enable_exactly_once_delivery: exactly_once,
            ..subscription()
        };
        let script = Script::of([get_subscription().gets(ok(subscription))]);
        let config = format!("pubsub://project/orders{endpoint}")
            .parse()
            .unwrap();
        let source = PubSubSource::with_channel(config, script.channel()).unwrap();
        let unknown = source.queue_info().await.unwrap().unknown.join("\n");
        assert_eq!(unknown.contains("one region"), told, "{unknown}");
    }
}

async fn handle(_: String) -> Result<(), onlyonce_core::Failure> {
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn at_most_once_is_refused_where_acks_are_not_confirmed() {
    let plain = Subscription {
        enable_exactly_once_delivery: false,
        ..subscription()
    };
    let script = Script::of([get_subscription().gets(ok(plain))]);
    let pipeline = Pipeline::at_most_once(source(&script));
    let refusal = pipeline.run(handle).await.unwrap_err().to_string();
    assert!(refusal.contains("UnconfirmedAck"), "{refusal}");
}

#[tokio::test(start_paused = true)]
async fn a_retention_that_records_do_not_cover_is_refused() {
    let long = Subscription {
        topic_message_retention_duration: days(31),
        ..subscription()
    };
    let script = Script::of([get_subscription().gets(ok(long))]);
    let store = onlyonce_core::memory::MemoryStore::new();
    let pipeline = Pipeline::idempotent(source(&script), store)
        .consumer("test")
        .dead_letter(MemoryQueue::new("dead"));
    let refusal = pipeline.run(handle).await.unwrap_err().to_string();
    assert!(refusal.contains("ShortRetention"), "{refusal}");
    assert!(refusal.contains("31.0 days"), "{refusal}");
}

async fn sink_to(script: &Script, topic: &str) -> PubSubSink {
    let mut config: Config = topic.parse().unwrap();
    config.endpoint = Some(script.listen().await);
    PubSubSink::new(config).unwrap()
}

#[tokio::test]
async fn a_topic_that_loses_messages_is_refused() {
    let script = Script::of(dead_topic(&[]));
    let error = sink_to(&script, DEAD).await.sink_info().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsafe, "{error}");
    let script = Script::of(dead_topic(&[LETTERS]));
    let info = sink_to(&script, DEAD).await.sink_info().await.unwrap();
    assert!(info.unknown.is_empty());
}

#[tokio::test]
async fn a_topic_that_may_not_be_read_may_still_be_published_to() {
    let script = Script::of([get_topic().gets(refused(Code::PermissionDenied, "no"))]);
    let info = sink_to(&script, DEAD).await.sink_info().await.unwrap();
    assert!(info.unknown[0].contains("pubsub.topics.get"), "{info:?}");
    let script = Script::of([get_topic().gets(refused(Code::NotFound, "no"))]);
    let error = sink_to(&script, DEAD).await.sink_info().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn a_topic_is_no_source_and_a_subscription_no_sink() {
    let error = PubSubSource::new(DEAD.parse().unwrap()).unwrap_err();
    assert!(
        error.to_string().contains("one of its subscriptions"),
        "{error}"
    );
    let error = PubSubSink::new(LETTERS.parse().unwrap()).unwrap_err();
    assert!(error.to_string().contains("topics/TOPIC"), "{error}");
}
