//! Dead letters: published where the redrive policy says, and deleted only then.

use onlyonce_core::ErrorKind;
use onlyonce_core::driver::{Settlement, Source as _};
use serde_json::{Value, json};

use super::script::*;

const FIFO: &str = "orders.fifo?visibility_timeout=30s";
const STANDARD: &str = "orders?visibility_timeout=30s";

fn policy(target: &str) -> Answer {
    let arn = format!("arn:aws:sqs:eu-central-1:123456789012:{target}");
    let policy = json!({ "deadLetterTargetArn": arn, "maxReceiveCount": "5" }).to_string();
    ok(json!({ "Attributes": { "RedrivePolicy": policy } }))
}

/// The requests by which the dead-letter queue is found.
fn finding(target: &str) -> [Step; 2] {
    let named = json!({ "QueueName": target, "QueueOwnerAWSAccountId": "123456789012" });
    [
        get_attributes().gets(policy(target)),
        request("GetQueueUrl", named).gets(ok(json!({ "QueueUrl": format!("{URL}{target}") }))),
    ]
}

/// What is sent of a message of this name.
fn letter(id: usize, name: &str, reason: &str) -> Value {
    let text = |text: &str| json!({ "DataType": "String", "StringValue": text });
    json!({
        "Id": id.to_string(),
        "MessageBody": name,
        "MessageGroupId": "group",
        "MessageDeduplicationId": format!("id-of-{name}"),
        "MessageAttributes": {
            "onlyonce-reason": text(reason),
            "onlyonce-queue": text("orders.fifo"),
            "onlyonce-dedup-id": text(&format!("dedup-{name}")),
        },
    })
}

fn letters(letters: &[Value]) -> Request {
    send().with(json!({ "QueueUrl": format!("{URL}dead.fifo"), "Entries": letters }))
}

/// Under the id that the message had here, so that a letter that is sent again is dropped, and one that was redriven and
/// failed again within five minutes is not.
#[tokio::test(start_paused = true)]
async fn a_dead_letter_is_published_then_deleted() {
    let steps = finding("dead.fifo").into_iter().chain([
        letters(&[letter(0, "a", "poison")]).gets(done(1).after(seconds(2))),
        letters(&[letter(0, "b", "too old")]).gets(done(1)),
        delete(&["a"]).gets(done(1)),
        delete(&["b"]).gets(done(1)),
    ]);
    let (script, source, held) = holding(FIFO, &["a", "b"], steps).await;
    let settled = source.settle(&[dead(&held[0], "poison")]).await;
    assert_eq!(words(&settled), ["applied"]);
    let sent = &script.sent("SendMessageBatch")[0];
    let deleted = &script.sent("DeleteMessageBatch")[0];
    assert!(Some(deleted.at) >= sent.answered, "{sent:?}, {deleted:?}");
    // Where to is known now.
    let settled = source.settle(&[dead(&held[1], "too old")]).await;
    assert_eq!(words(&settled), ["applied"]);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_deleted_that_was_not_published() {
    for (answer, kind) in [
        (never(), ErrorKind::Timeout),
        (page(502), ErrorKind::Connection),
        (refused(400, "RequestThrottled", ""), ErrorKind::Throttled),
        (
            partly(&[], &[failed(0, "InternalError", "", false)]),
            ErrorKind::Connection,
        ),
        (partly(&[], &[]), ErrorKind::Connection),
    ] {
        let again = letters(&[letter(0, "a", "poison")]);
        let steps = finding("dead.fifo").into_iter().chain([
            letters(&[letter(0, "a", "poison")]).gets(answer),
            again.gets(done(1)),
            delete(&["a"]).gets(done(1)),
        ]);
        let (script, source, held) = holding(FIFO, &["a"], steps).await;
        let batch = [dead(&held[0], "poison")];
        let answers = source.settle(&batch).await;
        let error = error_in(&answers);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.is_retryable(), "{error}");
        assert!(error.to_string().contains("[queue dead.fifo]"), "{error}");
        assert!(script.sent("DeleteMessageBatch").is_empty());
        assert_eq!(words(&source.settle(&batch).await), ["applied"]);
    }
}

#[tokio::test(start_paused = true)]
async fn only_what_was_published_is_deleted() {
    let refusal = failed(1, "InvalidMessageContents", "Invalid characters", true);
    let steps = finding("dead").into_iter().chain([
        send().gets(partly(&[0, 2], &[refusal])),
        delete(&["a", "c"]).gets(done(2)),
        change_visibility(&["b"], 0).gets(done(1)),
    ]);
    let (_script, source, held) = holding(STANDARD, &["a", "b", "c"], steps).await;
    let batch: Vec<Settlement> = held.iter().map(|d| dead(d, "poison")).collect();
    let answers = source.settle(&batch).await;
    assert_eq!(words(&answers), ["applied", "never", "applied"]);
    let error = error_in(&answers[1..2]);
    assert_eq!(error.kind(), ErrorKind::Message, "{error}");
    // It is still held.
    let back = source.settle(&[nack(&held[1], seconds(0))]).await;
    assert_eq!(words(&back), ["applied"]);
}

/// It is published once more under the same id, which SQS drops.
#[tokio::test(start_paused = true)]
async fn a_letter_that_could_not_be_deleted_is_published_under_the_same_id() {
    let steps = finding("dead.fifo").into_iter().chain([
        letters(&[letter(0, "a", "poison")]).gets(done(1)),
        delete(&["a"]).gets(broken()),
        letters(&[letter(0, "a", "poison")]).gets(done(1)),
        delete(&["a"]).gets(done(1)),
    ]);
    let (_script, source, held) = holding(FIFO, &["a"], steps).await;
    let batch = [dead(&held[0], "poison")];
    assert_eq!(words(&source.settle(&batch).await), ["again"]);
    assert_eq!(words(&source.settle(&batch).await), ["applied"]);
}

/// While the letter was on its way, the lease ended: who has the message now will settle it.
#[tokio::test(start_paused = true)]
async fn a_letter_that_took_too_long_is_not_deleted() {
    let steps = finding("dead.fifo")
        .into_iter()
        .chain([send().gets(done(1).after(seconds(9)))]);
    let (_script, source, held) = holding(FIFO, &["a"], steps).await;
    tokio::time::sleep(seconds(25)).await;
    let answers = source.settle(&[dead(&held[0], "poison")]).await;
    assert_eq!(words(&answers), ["lost"]);
}

#[tokio::test(start_paused = true)]
async fn without_a_redrive_policy_nothing_is_done() {
    let no_queue = json!({ "deadLetterTargetArn": "arn:aws:sns:x:1:topic", "maxReceiveCount": 5 });
    for (attributes, hint) in [
        (json!({}), "redrive policy"),
        (
            json!({ "RedrivePolicy": no_queue.to_string() }),
            "arn:aws:sns:x:1:topic",
        ),
    ] {
        let steps = [get_attributes().gets(ok(json!({ "Attributes": attributes })))];
        let (_script, source, held) = holding(FIFO, &["a"], steps).await;
        let answers = source.settle(&[dead(&held[0], "poison")]).await;
        let error = error_in(&answers);
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(!error.is_retryable(), "{error}");
        for part in [hint, "[queue orders.fifo]", "[message dedup-a]"] {
            assert!(error.to_string().contains(part), "no `{part}` in: {error}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn without_permission_to_look_the_error_says_which() {
    let denied = "User: x is not authorized to perform: sqs:getqueueattributes";
    let steps = [get_attributes().gets(refused(400, "AccessDeniedException", denied))];
    let (_script, source, held) = holding(FIFO, &["a"], steps).await;
    let answers = source.settle(&[dead(&held[0], "poison")]).await;
    let error = error_in(&answers);
    assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
    assert!(
        error.to_string().contains("sqs:GetQueueAttributes"),
        "{error}"
    );
}
