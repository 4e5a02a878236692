//! What Google's own services publish, as a handler reads it.

use std::sync::{Arc, Mutex};

use onlyonce_core::handler::Json;
use onlyonce_core::memory::MemoryQueue;
use onlyonce_core::{Attributes, Failure, KeyPolicy, Pipeline, Report, State};
use onlyonce_pubsub::v1::{AcknowledgeRequest, GetSubscriptionRequest, PullResponse};
use serde_json::{Value, json};

use super::script::*;
use super::*;

type Seen = Arc<Mutex<Vec<(Value, Attributes)>>>;

async fn see(Json(body): Json<Value>, attributes: Attributes, State(seen): State<Seen>) {
    seen.lock().unwrap().push((body, attributes));
}

/// The body and the attributes that a handler of JSON sees of this message.
async fn handled(body: impl Into<Vec<u8>>, attributes: &[(&str, &str)]) -> (Value, Attributes) {
    let mut received = message_of("", "m");
    let message = received.message.as_mut().unwrap();
    message.data = body.into().into();
    let owned = attributes
        .iter()
        .map(|(name, value)| ((*name).into(), (*value).into()));
    message.attributes = owned.collect();
    let brought = PullResponse {
        received_messages: vec![received],
    };
    let script = Script::of([pull().gets(ok(brought))])
        .then(|_: &GetSubscriptionRequest| ok(subscription()))
        .then(|_: &AcknowledgeRequest| done());
    let seen = Seen::default();
    let pipeline = Pipeline::at_least_once(source(&script))
        .dead_letter(MemoryQueue::new("dead"))
        .state(seen.clone())
        .stop_when_idle(seconds(1));
    let report: Report = pipeline.run(see).await.unwrap();
    assert_eq!(report.applied, 1, "{report:?}");
    seen.lock().unwrap().remove(0)
}

/// <https://cloud.google.com/storage/docs/pubsub-notifications>
#[tokio::test(start_paused = true)]
async fn a_notification_of_cloud_storage_is_read() {
    let object = json!({"kind": "storage#object", "name": "a.csv", "bucket": "in", "size": "17"});
    let sent = [
        ("eventType", "OBJECT_FINALIZE"),
        ("objectId", "a.csv"),
        ("objectGeneration", "1700000000000000"),
    ];
    let (body, attributes) = handled(object.to_string(), &sent).await;
    assert_eq!(body["name"], "a.csv");
    assert_eq!(attributes.get("eventType"), Some("OBJECT_FINALIZE"));
}

/// In binary mode the event is in the attributes, in structured mode in the body.
/// <https://github.com/googleapis/google-cloudevents/blob/main/docs/spec/pubsub.md>
#[tokio::test(start_paused = true)]
async fn a_cloud_event_is_read_in_both_modes() {
    let binary = [
        ("ce-id", "42"),
        ("ce-type", "google.cloud.audit.log.v1.written"),
        ("content-type", "application/json"),
    ];
    let (body, attributes) = handled(r#"{"resource": "r"}"#, &binary).await;
    assert_eq!(body["resource"], "r");
    assert_eq!(attributes.get("ce-id"), Some("42"));

    let event = json!({"specversion": "1.0", "id": "42", "type": "t", "data": {"resource": "r"}});
    let structured = [("content-type", "application/cloudevents+json")];
    let (body, _) = handled(event.to_string(), &structured).await;
    assert_eq!(
        (&body["id"], &body["data"]["resource"]),
        (&json!("42"), &json!("r"))
    );
}

/// The key of such a message is what its sender calls it.
#[test]
fn an_event_is_known_by_its_id() {
    let policy = KeyPolicy::attribute("ce-id");
    let mut event = message_of("", "m").message.unwrap();
    event.attributes.insert("ce-id".into(), "42".into());
    let key = policy
        .choose(&onlyonce_pubsub::message::read(event))
        .unwrap();
    assert_eq!(key.to_string(), "42");
}

/// A continuous query exports rows as JSON.
/// <https://cloud.google.com/bigquery/docs/export-to-pubsub>
#[tokio::test(start_paused = true)]
async fn a_row_of_bigquery_is_read() {
    let row = json!({"order_id": "o-1", "_CHANGE_TYPE": "UPSERT"});
    let (body, _) = handled(row.to_string(), &[]).await;
    assert_eq!(body["order_id"], "o-1");
}

/// <https://cloud.google.com/pubsub/docs/schemas>
#[tokio::test(start_paused = true)]
async fn a_message_of_a_schema_says_how_it_is_encoded() {
    let encoded = [
        ("googclient_schemaencoding", "JSON"),
        ("googclient_schemaname", "s"),
    ];
    let (_, attributes) = handled(r#"{"id": 1}"#, &encoded).await;
    assert_eq!(attributes.get("googclient_schemaencoding"), Some("JSON"));
}

async fn fails(_: Json<Value>) -> Result<(), Failure> {
    Ok(())
}

/// What a handler cannot read is set aside with its reason, as it came.
#[tokio::test(start_paused = true)]
async fn what_is_no_json_is_a_dead_letter() {
    let script = Script::of([pull().gets(messages(&["\u{1f}\u{8b}"]))])
        .then(|_: &GetSubscriptionRequest| ok(subscription()))
        .then(|_: &AcknowledgeRequest| done());
    let dead = MemoryQueue::new("dead");
    let pipeline = Pipeline::at_least_once(source(&script))
        .dead_letter(dead.clone())
        .stop_when_idle(seconds(1));
    let report = pipeline.run(fails).await.unwrap();
    assert_eq!(report.dead_lettered, 1, "{report:?}");
    assert_eq!(script.sent::<AcknowledgeRequest>().len(), 1);
}
