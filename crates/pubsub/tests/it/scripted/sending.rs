//! What the sink publishes, by Google's publisher over a socket.

use onlyonce_core::driver::{Disposition, SettleResult, Settlement, Sink as _, Source as _};
use onlyonce_core::{ErrorKind, Message};
use onlyonce_pubsub::v1::{DeadLetterPolicy, PublishRequest, PublishResponse, Subscription};
use onlyonce_pubsub::{PubSubSink, PubSubSource};
use tonic::Code;

use super::script::*;
use super::*;

async fn sink(script: &Script) -> PubSubSink {
    sink_by(script, "").await
}

async fn sink_by(script: &Script, parameters: &str) -> PubSubSink {
    let mut config: Config = format!("pubsub://project/topics/orders{parameters}")
        .parse()
        .unwrap();
    config.endpoint = Some(script.listen().await);
    PubSubSink::new(config).unwrap()
}

/// As many ids as there are messages.
fn taken(request: &PublishRequest) -> Answer {
    ok(PublishResponse {
        message_ids: request.messages.iter().map(|_| "id".to_owned()).collect(),
    })
}

fn sent(script: &Script) -> Vec<String> {
    let requests = script.sent::<PublishRequest>().into_iter();
    let messages = requests.flat_map(|sent| sent.message.messages);
    let text = |message: onlyonce_pubsub::v1::PubsubMessage| {
        String::from_utf8(message.data.to_vec()).unwrap()
    };
    messages.map(text).collect()
}

fn of_key(key: &str, bodies: &[&str]) -> Vec<Message> {
    let message = |body: &&str| Message::new((*body).to_owned()).with_group(key);
    bodies.iter().map(message).collect()
}

#[tokio::test]
async fn a_message_goes_with_its_key_attributes_and_dedup_id() {
    let script = Script::of([]).then(taken);
    let message = Message::new("x")
        .with_group("key")
        .with_dedup_id("id-1")
        .with_attribute("name", "value");
    let results = sink(&script).await.publish(&[message]).await;
    assert!(results[0].is_ok(), "{results:?}");
    let request = script.sent::<PublishRequest>().remove(0);
    assert_eq!(request.message.topic, TOPIC);
    let message = &request.message.messages[0];
    assert_eq!(message.ordering_key, "key");
    assert_eq!(message.attributes["name"], "value");
    assert_eq!(message.attributes["onlyonce-dedup-id"], "id-1");
}

#[tokio::test]
async fn a_key_keeps_its_order_over_requests() {
    let script = Script::of([]).then(taken);
    let bodies: Vec<String> = (0..250).map(|n| n.to_string()).collect();
    let bodies: Vec<&str> = bodies.iter().map(String::as_str).collect();
    let results = sink(&script).await.publish(&of_key("key", &bodies)).await;
    assert!(results.iter().all(Result::is_ok));
    assert_eq!(sent(&script), bodies);
    assert_eq!(script.sent::<PublishRequest>().len(), 3);
}

/// Pub/Sub takes no request of two.
#[tokio::test]
async fn a_request_has_one_key() {
    let script = Script::of([]).then(taken);
    let mut batch = of_key("a", &["a1", "a2"]);
    batch.extend(of_key("b", &["b1"]));
    batch.push(Message::new("alone"));
    let results = sink(&script).await.publish(&batch).await;
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    for request in script.sent::<PublishRequest>() {
        let keys = request
            .message
            .messages
            .iter()
            .map(|message| &message.ordering_key);
        let keys: std::collections::BTreeSet<_> = keys.collect();
        assert_eq!(keys.len(), 1, "{keys:?}");
    }
}

/// What comes behind a failed message of its key is held up; what comes next may be published.
#[tokio::test]
async fn a_key_goes_on_after_a_failure() {
    let failure = refused(Code::Unavailable, "later");
    let script = Script::of([publish().gets(failure)]).then(taken);
    let sink = sink(&script).await;
    let bodies: Vec<String> = (0..150).map(|n| n.to_string()).collect();
    let bodies: Vec<&str> = bodies.iter().map(String::as_str).collect();
    for result in sink.publish(&of_key("key", &bodies)).await {
        let error = result.unwrap_err();
        assert!(error.is_retryable(), "{error}");
    }
    assert_eq!(sent(&script).len(), 100, "the second hundred was held up");
    let results = sink.publish(&of_key("key", &bodies)).await;
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert_eq!(sent(&script)[100..], bodies);
}

#[tokio::test]
async fn a_message_beyond_the_limits_is_refused_here_and_alone() {
    let script = Script::of([]).then(taken);
    let mut batch = of_key("key", &["a", "b"]);
    let large = Message::new(vec![0; 10_000_001]).with_group("other");
    batch.insert(1, large);
    let results = sink(&script).await.publish(&batch).await;
    let error = results[1].as_ref().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Message, "{error}");
    assert!(results[0].is_ok() && results[2].is_ok());
    assert_eq!(sent(&script), ["a", "b"]);
}

#[tokio::test]
async fn an_answer_is_waited_for_as_long_as_is_said() {
    let script = Script::of([publish().gets(never())]);
    let sink = sink_by(&script, "?timeout=300ms").await;
    let results = sink.publish(&of_key("key", &["a"])).await;
    let error = results[0].as_ref().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(error.is_retryable());
    assert!(error.to_string().contains("orders"), "{error}");
}

#[tokio::test]
async fn a_refusal_says_what_to_do() {
    let refusal = refused(Code::PermissionDenied, "User not authorized");
    let script = Script::of([publish().gets(refusal)]);
    let results = sink(&script).await.publish(&of_key("key", &["a"])).await;
    let error = results[0].as_ref().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Permission);
    assert!(
        !error.is_retryable() && error.to_string().contains("access-control"),
        "{error}"
    );
}

#[tokio::test]
async fn a_closed_sink_publishes_nothing() {
    let script = Script::of([]);
    let sink = sink(&script).await;
    sink.close().await.unwrap();
    sink.close().await.unwrap();
    let results = sink.publish(&of_key("key", &["a"])).await;
    let error = results[0].as_ref().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
}

/// An ordered subscription with a dead-letter policy, which the emulator cannot have.
#[tokio::test]
async fn a_dead_letter_is_acked_when_its_topic_has_it() {
    const DEAD: &str = "projects/project/topics/dead";
    let subscription = Subscription {
        dead_letter_policy: Some(DeadLetterPolicy {
            dead_letter_topic: DEAD.to_owned(),
            max_delivery_attempts: 5,
        }),
        ..subscription()
    };
    let script = Script::of([
        get_subscription().gets(ok(subscription.clone())),
        pull().gets(messages_of("key", &["a", "b"])),
        get_subscription().gets(ok(subscription)),
        publish().gets(refused(Code::PermissionDenied, "no")),
        acknowledge(&["a"]).gets(done()),
    ])
    .then(taken);
    let mut config = config();
    config.endpoint = Some(script.listen().await);
    let source = PubSubSource::new(config).unwrap();
    let held = receive(&source, 2).await;
    let reason = "cannot be applied".to_owned();
    let letter = Settlement::new(held[0].receipt.clone(), Disposition::DeadLetter { reason });
    let letter = [letter];
    let first = source.settle(&letter).await;
    let SettleResult::Unknown(error) = &first[0] else {
        panic!("nothing has it: {first:?}");
    };
    assert!(error.to_string().contains("gcp-sa-pubsub"), "{error}");
    let second = source.settle(&letter).await;
    assert!(second[0].is_applied(), "{second:?}");
    let published = script.sent::<PublishRequest>().pop().unwrap().message;
    assert_eq!(published.topic, DEAD);
    let letter = &published.messages[0];
    assert_eq!(letter.ordering_key, "key");
    assert_eq!(letter.attributes["onlyonce-reason"], "cannot be applied");
    assert_eq!(letter.attributes["onlyonce-queue"], SUBSCRIPTION);
}
