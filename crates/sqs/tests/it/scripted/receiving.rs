//! Long polls, and the ids by which a FIFO queue knows a receive that is repeated.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use onlyonce_core::driver::{Receipt, Source as _};
use onlyonce_core::memory::MemoryStore;
use onlyonce_core::{ConfigRisk, ErrorKind, Pipeline};
use onlyonce_sqs::{SqsReceipt, SqsSource};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::script::*;

const FIFO: &str = "orders.fifo?visibility_timeout=30s";
const STANDARD: &str = "orders?visibility_timeout=30s";
const POLICY: &str =
    r#"{"deadLetterTargetArn":"arn:aws:sqs:eu-central-1:123456789012:dead","maxReceiveCount":5}"#;
const TEN: [&str; 10] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];

/// The ids of all receive attempts so far.
fn attempts(script: &Script) -> Vec<Value> {
    script.sent_values("ReceiveMessage", "ReceiveRequestAttemptId")
}

#[tokio::test(start_paused = true)]
async fn what_is_delivered_is_what_sqs_says() {
    let script = Script::of([receive()
        .with(json!({
            "QueueUrl": format!("{URL}orders.fifo"),
            "MaxNumberOfMessages": 10,
            "WaitTimeSeconds": 5,
            "VisibilityTimeout": 30,
            "MessageAttributeNames": ["All"],
            "MessageSystemAttributeNames": ["All"],
        }))
        .gets(ok(json!({ "Messages": [{
            "MessageId": "5fea7756-0ea4-451a-a703-a558b933e274",
            "ReceiptHandle": "MbZj6wDWli",
            "Body": "hello",
            "MessageAttributes": { "kind": { "DataType": "String", "StringValue": "greeting" } },
            "Attributes": {
                "AWSTraceHeader": "Root=1-5759e988-bd862e3fe1be46a994272793",
                "ApproximateReceiveCount": "3",
                "MessageDeduplicationId": "d-1",
                "MessageGroupId": "g-1",
                "SentTimestamp": "1700000000123",
                "SequenceNumber": "18849496460467696128",
            },
        }]})))]);
    let source = script.source(FIFO);
    let begun = Instant::now();
    let received = source.receive(limit(10, seconds(5))).await.unwrap();
    let [delivery] = &received[..] else {
        panic!("{received:?}");
    };
    let message = &delivery.message;
    assert_eq!(message.body, "hello");
    assert_eq!(message.dedup_id.as_deref(), Some("d-1"));
    assert_eq!(message.group.as_deref(), Some("g-1"));
    assert_eq!(message.attributes.get("kind"), Some("greeting"));
    assert_eq!(
        message.attributes.get("AWSTraceHeader"),
        Some("Root=1-5759e988-bd862e3fe1be46a994272793")
    );
    assert_eq!(
        message.broker_id.as_deref(),
        Some("5fea7756-0ea4-451a-a703-a558b933e274")
    );
    let published = UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
    assert_eq!(message.published_at, Some(published));
    assert_eq!(
        delivery.receipt,
        Receipt::new(SqsReceipt {
            handle: "MbZj6wDWli".into()
        })
    );
    assert_eq!(delivery.attempt, Some(3));
    assert_eq!(delivery.malformed, None);
    assert_eq!(delivery.lease.until, Some(begun + seconds(30)));
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_asked_for_again_by_its_id() {
    for (answer, kind) in [
        (never(), ErrorKind::Timeout),
        (broken(), ErrorKind::Connection),
        (cut(), ErrorKind::Connection),
        (
            refused(500, "InternalFailure", "unknown error"),
            ErrorKind::Connection,
        ),
        (
            refused(503, "ServiceUnavailable", "try later"),
            ErrorKind::Connection,
        ),
        (page(502), ErrorKind::Connection),
        (page(200), ErrorKind::Connection),
        (
            refused(408, "RequestTimeoutException", "read timed out"),
            ErrorKind::Connection,
        ),
        (
            refused(400, "RequestAbortedException", "aborted before a reply"),
            ErrorKind::Connection,
        ),
    ] {
        let script = Script::of([
            receive().gets(answer.clone()),
            receive().gets(answer),
            receive().gets(messages(&["a"])),
            receive().gets(messages_of("group-2", &["b"])),
        ]);
        let source = script.source(FIFO);
        for _ in 0..2 {
            let error = source.receive(limit(1, seconds(60))).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.is_retryable(), "{error}");
        }
        for name in ["a", "b"] {
            let received = source.receive(limit(1, seconds(1))).await.unwrap();
            assert_eq!(names(&received), [name]);
        }
        let [first, again, at_last, next] = &attempts(&script)[..] else {
            panic!("{:?}", attempts(&script));
        };
        assert!(first.is_string(), "{first}");
        assert_eq!([again, at_last], [first, first], "{kind:?}");
        assert_ne!(next, first, "{kind:?}");
    }
}

/// As long as AWS knows an attempt, which is five minutes, and may withhold what it brought, which is its wait and the
/// visibility timeout; with what it was asked for: the same number of messages, which are there or not.
#[tokio::test(start_paused = true)]
async fn an_attempt_is_repeated_while_it_may_have_brought_something() {
    for (visibility, after, same) in [
        (30, 49, true),
        (30, 50, false),
        (600, 299, true),
        (600, 300, false),
    ] {
        let first = json!({ "MaxNumberOfMessages": 3, "WaitTimeSeconds": 20 });
        let wait = if same { 0 } else { 1 };
        let script = Script::of([
            receive().with(first).gets(never()),
            receive()
                .with(json!({ "WaitTimeSeconds": wait }))
                .gets(messages(&["a"])),
        ]);
        let source = script.source(&format!("orders.fifo?visibility_timeout={visibility}s"));
        let begun = Instant::now();
        source.receive(limit(3, seconds(60))).await.unwrap_err();
        sleep_until(begun + seconds(after)).await;
        source.receive(limit(10, seconds(1))).await.unwrap();
        let sent = attempts(&script);
        assert_eq!(sent[0] == sent[1], same, "after {after} s");
        let asked = script.sent_values("ReceiveMessage", "MaxNumberOfMessages");
        assert_eq!(asked[1] == 3, same, "after {after} s");
    }
}

/// Of a refused one, for throttling too, SQS says later that it cannot be repeated:
/// <https://github.com/awslabs/amazon-sqs-java-messaging-lib/issues/213>
#[tokio::test(start_paused = true)]
async fn a_refused_attempt_is_not_repeated() {
    for (code, retryable) in [("AccessDeniedException", false), ("RequestThrottled", true)] {
        let script = Script::of([
            receive().gets(refused(400, code, "no")),
            receive().gets(messages(&["a"])),
        ]);
        let source = script.source(FIFO);
        let error = source.receive(limit(1, seconds(1))).await.unwrap_err();
        assert_eq!(error.is_retryable(), retryable, "{error}");
        source.receive(limit(1, seconds(1))).await.unwrap();
        let sent = attempts(&script);
        assert_ne!(sent[0], sent[1]);
    }
}

/// Somebody else received, and perhaps deleted, what it brought.
#[tokio::test(start_paused = true)]
async fn an_attempt_that_is_over_is_no_error() {
    let over = "Value x for parameter ReceiveRequestAttemptId is invalid. Reason: The receiveRequestAttemptId is not \
        valid anymore since the receive call is not retryable.";
    let script = Script::of([
        receive().gets(broken()),
        receive().gets(refused(400, "InvalidParameterValue", over)),
        receive().gets(messages(&["a"])),
    ]);
    let source = script.source(FIFO);
    source.receive(limit(1, seconds(1))).await.unwrap_err();
    let received = source.receive(limit(1, seconds(5))).await.unwrap();
    assert_eq!(names(&received), ["a"]);
    let [first, again, next] = &attempts(&script)[..] else {
        panic!("{:?}", attempts(&script));
    };
    assert_eq!(first, again);
    assert_ne!(first, next);
}

/// All at once: what they brought is withheld from everyone for no longer than its visibility timeout.
#[tokio::test(start_paused = true)]
async fn lost_attempts_are_repeated_side_by_side() {
    let full = |group: &str| receive().gets(messages_of(group, &TEN).after(seconds(1)));
    let lost = || receive().gets(broken().after(seconds(1)));
    let script = Script::of([full("g1"), full("g2"), full("g3"), lost(), lost(), lost()]);
    let source = script.source("orders.fifo?visibility_timeout=30s&polls=3");
    let mut received = 0;
    while received < 30 {
        received += source.receive(limit(100, seconds(60))).await.unwrap().len();
        quiet().await;
    }
    assert_eq!(script.under_way("ReceiveMessage"), 3);
    sleep(seconds(2)).await;
    source.receive(limit(100, seconds(60))).await.unwrap_err();
    let before = attempts(&script);
    let next = timeout(Duration::ZERO, source.receive(limit(100, seconds(60)))).await;
    assert!(next.is_err(), "nothing has come yet");
    quiet().await;
    let all = attempts(&script);
    assert_eq!(all.len(), before.len() + 3);
    for again in &all[before.len()..] {
        assert!(before[before.len() - 3..].contains(again));
    }
}

#[tokio::test(start_paused = true)]
async fn standard_queues_know_no_attempts() {
    let script = Script::of([receive().gets(broken()), receive().gets(messages(&["a"]))]);
    let source = script.source(STANDARD);
    source.receive(limit(1, seconds(1))).await.unwrap_err();
    source.receive(limit(1, seconds(1))).await.unwrap();
    assert_eq!(attempts(&script), [Value::Null, Value::Null]);
}

/// Every receive attempt has an id of its own, those that are under way at the same time included.
#[tokio::test(start_paused = true)]
async fn attempts_have_different_ids() {
    let script = Script::of([receive().gets(messages(&TEN))]);
    let source = script.source(FIFO);
    source.receive(limit(100, seconds(1))).await.unwrap();
    quiet().await;
    assert_eq!(script.under_way("ReceiveMessage"), 2);
    let [first, second, third] = &attempts(&script)[..] else {
        panic!("{:?}", attempts(&script));
    };
    assert!(first != second && second != third && first != third);
}

/// SQS may have begun to count when the request came.
#[tokio::test(start_paused = true)]
async fn a_lease_is_counted_from_before_the_request() {
    let script = Script::of([receive().gets(messages(&["a"]).after(seconds(15)))]);
    let source = script.source(STANDARD);
    let begun = Instant::now();
    let received = source.receive(limit(1, seconds(20))).await.unwrap();
    assert_eq!(begun.elapsed(), seconds(15));
    assert_eq!(received[0].lease.until, Some(begun + seconds(30)));
}

/// 20 seconds is what SQS takes, and a third of the visibility timeout must be left of any lease.
#[tokio::test(start_paused = true)]
async fn a_poll_waits_as_long_as_it_may() {
    for (visibility, wait, asked) in [
        (30, seconds(60), 20),
        (3_600, seconds(60), 20),
        (12, seconds(60), 8),
        (2, seconds(60), 1),
        (1, seconds(2), 0),
        (30, seconds(5), 5),
        (30, Duration::from_millis(800), 1),
        (30, Duration::from_millis(700), 0),
        (30, Duration::MAX, 20),
    ] {
        let script = Script::of([]);
        let source = script.source(&format!("orders?visibility_timeout={visibility}s"));
        let received = timeout(seconds(90), source.receive(limit(1, wait))).await;
        assert_eq!(received.is_err(), wait == Duration::MAX);
        let waits = script.sent_values("ReceiveMessage", "WaitTimeSeconds");
        assert_eq!(waits[0], asked, "{visibility} s, for {wait:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_time_out_is_too_long() {
    let script = Script::of([receive().gets(messages(&["a"]).after(seconds(15)))]);
    let mut config = config(STANDARD);
    config.timeout = Duration::MAX;
    let source = SqsSource::with_client(config, script.client()).unwrap();
    let received = source.receive(limit(1, seconds(20))).await.unwrap();
    assert_eq!(names(&received), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn an_empty_queue_is_not_asked_without_a_pause() {
    let script = Script::of([]);
    let source = script.source("orders?visibility_timeout=1s");
    let received = source.receive(limit(1, seconds(2))).await.unwrap();
    assert!(received.is_empty());
    let asked = script.sent("ReceiveMessage").len();
    assert!((15..=21).contains(&asked), "{asked} requests in 2 s");
}

/// However long the answers are under way: a receive that has little time left sends one poll for it, and not many.
#[tokio::test(start_paused = true)]
async fn an_idle_queue_costs_three_requests_a_minute() {
    for late in [5, 50, 200, 900] {
        let script = Script::of([]).far_away(Duration::from_millis(late));
        let source = script.source(FIFO);
        let begun = Instant::now();
        while begun.elapsed() < seconds(600) {
            let received = source.receive(limit(10, seconds(20))).await.unwrap();
            assert!(received.is_empty());
        }
        let asked = script.sent("ReceiveMessage").len();
        assert!((25..=32).contains(&asked), "{asked} requests in 10 minutes");
    }
}

#[tokio::test(start_paused = true)]
async fn a_receive_asks_for_no_more_than_its_limit() {
    for (queue, messages, per_group, asked) in [
        (STANDARD, 3, usize::MAX, 3),
        (STANDARD, 50, 4, 10),
        (FIFO, 3, usize::MAX, 3),
        (FIFO, 50, 4, 4),
        (FIFO, 2, 4, 2),
        (FIFO, 50, usize::MAX, 10),
    ] {
        let script = Script::of([]);
        let limit = limit(messages, Duration::ZERO).with_per_group(per_group);
        let source = script.source(queue);
        source.receive(limit).await.unwrap();
        quiet().await;
        let all = script.sent_values("ReceiveMessage", "MaxNumberOfMessages");
        assert_eq!(all, [asked], "{queue}, {messages}, {per_group}");
    }
}

/// One poll more after each that came back full, one less after each that was empty, and no more than are configured, or
/// than the limit has room for.
#[tokio::test(start_paused = true)]
async fn polls_follow_the_load() {
    let full = || receive().gets(messages(&TEN).after(seconds(1)));
    let half = || receive().gets(messages(&TEN[..5]).after(seconds(1)));
    let script = Script::of([full(), full(), full(), full(), half(), half(), half()]);
    let source = script.source("orders?visibility_timeout=30s&polls=3");
    let mut under_way = Vec::new();
    for _ in 0..4 {
        let received = source.receive(limit(100, seconds(60))).await.unwrap();
        quiet().await;
        under_way.push((received.len(), script.under_way("ReceiveMessage")));
    }
    // Two full ones, then one more with two half full.
    assert_eq!(under_way, [(10, 2), (20, 3), (20, 3), (5, 3)]);
    let empty = timeout(seconds(21), source.receive(limit(100, seconds(60)))).await;
    assert!(empty.is_err());
    assert_eq!(script.under_way("ReceiveMessage"), 1);
}

/// What waits has the bytes already that a receive may take.
#[tokio::test(start_paused = true)]
async fn no_more_is_asked_for_than_has_room() {
    let names_of = ["a", "b", "c"];
    for (bytes, got, asked) in [(1, 1, 1), (usize::MAX, 3, 2)] {
        let script = Script::of([receive().gets(messages(&names_of).after(seconds(1)))]);
        let source = script.source(STANDARD);
        let dropped = timeout(Duration::ZERO, source.receive(limit(10, seconds(20)))).await;
        assert!(dropped.is_err(), "its poll goes on");
        sleep(seconds(2)).await;
        let limit = limit(20, Duration::ZERO).with_bytes(bytes);
        let received = source.receive(limit).await.unwrap();
        quiet().await;
        assert_eq!(names(&received), names_of[..got], "{bytes} bytes");
        assert_eq!(script.sent("ReceiveMessage").len(), asked, "{bytes} bytes");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dropped_receive_loses_nothing() {
    let script = Script::of([receive().gets(messages(&["a"]).after(seconds(5)))]);
    let source = script.source(FIFO);
    let dropped = timeout(seconds(1), source.receive(limit(10, seconds(20)))).await;
    assert!(dropped.is_err());
    let received = source.receive(limit(10, seconds(20))).await.unwrap();
    assert_eq!(names(&received), ["a"]);
    assert_eq!(script.sent("ReceiveMessage").len(), 1);
}

/// However soon it is dropped: what the first receive has to find out is not asked for anew by each.
#[tokio::test(start_paused = true)]
async fn receives_that_are_dropped_get_on() {
    let attributes = json!({ "Attributes": { "VisibilityTimeout": "30" } });
    let script = Script::of([
        get_attributes().gets(ok(attributes).after(seconds(1))),
        receive().gets(messages(&["a"]).after(seconds(1))),
    ]);
    let source = script.source("orders.fifo");
    let begun = Instant::now();
    let received = loop {
        assert!(begun.elapsed() < seconds(3), "nothing came");
        let short = Duration::from_millis(1);
        if let Ok(received) = timeout(short, source.receive(limit(10, seconds(20)))).await {
            break received.unwrap();
        }
    };
    assert_eq!(names(&received), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn what_waited_past_its_lease_is_not_delivered() {
    let script = Script::of([receive().gets(messages(&["a"]).after(seconds(5)))]);
    let source = script.source(FIFO);
    let dropped = timeout(seconds(1), source.receive(limit(10, seconds(20)))).await;
    assert!(dropped.is_err());
    sleep(seconds(29)).await;
    let received = source.receive(limit(10, Duration::ZERO)).await.unwrap();
    assert_eq!(names(&received), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn close_gives_back_what_polls_under_way_bring() {
    let script = Script::of([
        receive().gets(messages(&["a", "b"]).after(seconds(7))),
        change_visibility(&["b", "a"], 0).gets(done(2)),
    ]);
    let source = Arc::new(script.source(FIFO));
    let receiving = tokio::spawn({
        let source = source.clone();
        async move { source.receive(limit(10, seconds(20))).await }
    });
    sleep(seconds(1)).await;
    let begun = Instant::now();
    source.close().await.unwrap();
    assert_eq!(begun.elapsed(), seconds(6));
    for closed in [
        receiving.await.unwrap(),
        source.receive(limit(1, seconds(20))).await,
    ] {
        assert_eq!(closed.unwrap_err().kind(), ErrorKind::Closed);
    }
    source.close().await.unwrap();
    assert_eq!(script.sent("ReceiveMessage").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_is_dropped_aborts_its_polls() {
    let script = Script::of([receive().gets(never())]);
    let source = script.source(FIFO);
    source.receive(limit(1, Duration::ZERO)).await.unwrap();
    quiet().await;
    assert_eq!(script.under_way("ReceiveMessage"), 1);
    drop(source);
    quiet().await;
    assert!(script.sent("ReceiveMessage")[0].given_up);
}

#[tokio::test(start_paused = true)]
async fn the_lease_is_the_queues_own_unless_told_otherwise() {
    let script = Script::of([
        get_attributes().gets(ok(json!({ "Attributes": { "VisibilityTimeout": "45" } }))),
        receive()
            .with(json!({ "VisibilityTimeout": 45 }))
            .gets(messages(&["a"])),
        receive().gets(messages(&["b"])),
    ]);
    let source = script.source("orders");
    for _ in 0..2 {
        let begun = Instant::now();
        let received = source.receive(limit(1, seconds(1))).await.unwrap();
        assert_eq!(received[0].lease.until, Some(begun + seconds(45)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_queue_without_leases_is_refused() {
    let script = Script::of([
        get_attributes().gets(ok(json!({ "Attributes": { "VisibilityTimeout": "0" } })))
    ]);
    let source = script.source("orders");
    let error = source.receive(limit(1, seconds(1))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(
        error.to_string().contains("visibility_timeout=30s"),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn the_queues_settings_are_read_as_aws_tells_them() {
    let policy = r#"{"deadLetterTargetArn":"arn:aws:sqs:eu-central-1:123456789012:dead.fifo","maxReceiveCount":5}"#;
    let own = get_attributes().gets(ok(json!({ "Attributes": {
        "ApproximateNumberOfMessages": "0",
        "ContentBasedDeduplication": "false",
        "DeduplicationScope": "messageGroup",
        "FifoQueue": "true",
        "FifoThroughputLimit": "perMessageGroupId",
        "MaximumMessageSize": "1048576",
        "MessageRetentionPeriod": "345600",
        "RedrivePolicy": policy,
        "SqsManagedSseEnabled": "true",
        "VisibilityTimeout": "45",
    }})));
    let found = request("GetQueueUrl", json!({ "QueueName": "dead.fifo" }));
    let found = found.gets(ok(json!({ "QueueUrl": format!("{URL}dead.fifo") })));
    let dead = json!({ "MessageRetentionPeriod": "1209600" });
    let dead = get_attributes().gets(ok(json!({ "Attributes": dead })));
    let script = Script::of([own, found, dead, sources(&[])]);
    let info = script.source("orders.fifo").queue_info().await.unwrap();
    assert_eq!(info.lease, Some(seconds(45)));
    // Its own, that of the dead-letter queue, and its own again.
    assert_eq!(info.retention, Some(seconds((4 + 14 + 4) * 86_400)));
    assert_eq!(info.unknown, [""; 0]);
    assert_eq!(info.max_deliveries, Some(5));
    assert!(info.dead_letter.unwrap().ends_with(":dead.fifo"));
    assert_eq!(info.dedup_window, Some(seconds(300)));
    assert_eq!(
        info.capabilities.ordering,
        onlyonce_core::driver::Ordering::Group
    );
    let shown = |name: &str, value: &str| {
        let setting = (name.to_owned(), value.to_owned());
        assert!(info.settings.contains(&setting), "{name}");
    };
    shown("FifoThroughputLimit", "perMessageGroupId");
    shown("SqsManagedSseEnabled", "true");
}

/// The answer to which queues' dead letters come to this one.
fn sources(names: &[&str]) -> Step {
    let urls: Vec<_> = names.iter().map(|name| format!("{URL}{name}")).collect();
    request("ListDeadLetterSourceQueues", json!({})).gets(ok(json!({ "queueUrls": urls })))
}

/// What took effect in the queues themselves would run here again.
#[tokio::test(start_paused = true)]
async fn a_dead_letter_queue_is_not_consumed_with_records_of_its_own() {
    let own = || get_attributes().gets(ok(json!({ "Attributes": { "VisibilityTimeout": "45" } })));
    let script = Script::of([own(), sources(&["orders", "payments"])]);
    let info = script.source("dead").queue_info().await.unwrap();
    assert_eq!(info.dead_letters_of, ["orders", "payments"]);

    let script = Script::of([own(), sources(&["orders"])]);
    let refused = Pipeline::idempotent(script.source("dead"), MemoryStore::new())
        .allow(ConfigRisk::StoreForgets)
        .allow(ConfigRisk::NoDeadLetter)
        .run(async || {})
        .await
        .unwrap_err();
    assert_eq!(refused.error.kind(), ErrorKind::Unsafe);
    assert!(
        refused.to_string().contains("dead-letter queue of orders"),
        "{refused}"
    );
}

#[tokio::test(start_paused = true)]
async fn who_may_not_ask_whose_dead_letters_come_here_is_told_so() {
    let own = get_attributes().gets(ok(json!({ "Attributes": { "VisibilityTimeout": "45" } })));
    let asked = request("ListDeadLetterSourceQueues", json!({}));
    let script = Script::of([own, asked.gets(refused(403, "AccessDenied", "no"))]);
    let info = script.source("orders").queue_info().await.unwrap();
    assert!(info.unknown[0].contains("sqs:ListDeadLetterSourceQueues"));
}

/// A move to a standard dead-letter queue leaves the message as old as it is; a redrive makes a new one of it.
#[tokio::test(start_paused = true)]
async fn a_message_of_a_standard_queue_grows_as_old_as_its_dead_letter_queue_lets_it() {
    for (dead, days) in [("1209600", Some(14 + 4)), ("86400", Some(4 + 4))] {
        let retention = |seconds: &str| json!({ "MessageRetentionPeriod": seconds });
        let mut own = retention("345600");
        own["VisibilityTimeout"] = "45".into();
        own["RedrivePolicy"] = POLICY.into();
        let found = ok(json!({ "QueueUrl": format!("{URL}dead") }));
        let script = Script::of([
            get_attributes().gets(ok(json!({ "Attributes": own }))),
            request("GetQueueUrl", json!({})).gets(found),
            get_attributes().gets(ok(json!({ "Attributes": retention(dead) }))),
            sources(&[]),
        ]);
        let info = script.source("orders").queue_info().await.unwrap();
        assert_eq!(info.retention, days.map(|days| seconds(days * 86_400)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_queue_that_may_not_be_asked_is_said_to_be_unknown() {
    for (status, code, known) in [
        (403, "AccessDenied", true),
        (400, "QueueDoesNotExist", false),
        (503, "ServiceUnavailable", false),
    ] {
        let own = json!({
            "MessageRetentionPeriod": "345600",
            "RedrivePolicy": POLICY,
            "VisibilityTimeout": "45",
        });
        let mut steps = vec![
            get_attributes().gets(ok(json!({ "Attributes": own }))),
            request("GetQueueUrl", json!({})).gets(refused(status, code, "no")),
        ];
        steps.extend(known.then(|| sources(&[])));
        let script = Script::of(steps);
        let inspected = script.source("orders").queue_info().await;
        assert_eq!(inspected.is_ok(), known, "{inspected:?}");
        if let Ok(info) = inspected {
            assert_eq!(info.retention, Some(seconds(4 * 86_400)));
            assert!(info.unknown[0].contains("AccessDenied"));
        }
    }
}
