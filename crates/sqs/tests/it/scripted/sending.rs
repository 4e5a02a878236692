//! What a sink sends, in which requests, and what becomes of each message.

use std::sync::Arc;

use onlyonce_core::driver::Sink as _;
use onlyonce_core::memory::{MemoryQueue, MemoryStore};
use onlyonce_core::{Error, ErrorKind, Message, Pipeline};
use serde_json::{Value, json};

use super::script::*;

const FIFO: &str = "orders.fifo";
const STANDARD: &str = "orders";
const MIB: usize = 1 << 20;

fn message_of(group: &str, name: &str) -> Message {
    Message::new(name.to_owned())
        .with_group(group)
        .with_dedup_id(name)
}

/// The bodies of each request so far.
fn bodies(script: &Script) -> Vec<Vec<Value>> {
    let all = script.sent_values("SendMessageBatch", "Entries");
    let bodies = |entries: &Value| -> Vec<Value> {
        let entries = entries.as_array().unwrap().iter();
        entries.map(|entry| entry["MessageBody"].clone()).collect()
    };
    all.iter().map(bodies).collect()
}

/// How each message fared, in a word.
fn fates(results: &[Result<(), Error>]) -> Vec<&'static str> {
    let fate = |result: &Result<(), Error>| match result {
        Ok(()) => "sent",
        Err(error) if error.is_retryable() => "again",
        Err(_) => "never",
    };
    results.iter().map(fate).collect()
}

#[tokio::test(start_paused = true)]
async fn an_entry_says_all_that_the_message_says() {
    const TRACE: &str = "Root=1-5759e988-bd862e3fe1be46a994272793;Sampled=1";
    let text = |text: &str| json!({ "DataType": "String", "StringValue": text });
    let trace = json!({ "AWSTraceHeader": text(TRACE) });
    let fifo = json!([{
        "Id": "0",
        "MessageBody": "hello",
        "MessageGroupId": "g-1",
        "MessageDeduplicationId": "d-1",
        "MessageAttributes": { "kind": text("greeting") },
        "MessageSystemAttributes": trace,
    }]);
    // Standard queues take neither: a group id there is a tenant's, and a dedup id refused.
    let standard = json!([{
        "Id": "0",
        "MessageBody": "hello",
        "MessageGroupId": "g-1",
        "MessageAttributes": {
            "kind": text("greeting"),
            "onlyonce-dedup-id": text("d-1"),
            "onlyonce-group": text("g-1"),
        },
        "MessageSystemAttributes": trace,
    }]);
    for (queue, entries) in [(FIFO, fifo), (STANDARD, standard)] {
        let body = json!({ "QueueUrl": format!("{URL}{queue}"), "Entries": entries });
        let script = Script::of([send().with(body).gets(done(1))]);
        let message = Message::new("hello")
            .with_group("g-1")
            .with_dedup_id("d-1")
            .with_attribute("kind", "greeting")
            .with_attribute("AWSTraceHeader", TRACE);
        let results = script.sink(queue).publish(&[message]).await;
        assert_eq!(fates(&results), ["sent"]);
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_to_send_is_no_request() {
    let script = Script::of([]);
    assert!(script.sink(FIFO).publish(&[]).await.is_empty());
}

/// Ten messages a request; in order on a FIFO queue, else side by side.
#[tokio::test(start_paused = true)]
async fn requests_have_ten_messages_at_most() {
    for (queue, in_order) in [(FIFO, true), (STANDARD, false)] {
        let slow = |count| send().gets(done(count).after(seconds(1)));
        let script = Script::of([slow(10), slow(10), slow(5)]);
        let batch: Vec<Message> = (0..25).map(|n| message_of("g", &n.to_string())).collect();
        let results = script.sink(queue).publish(&batch).await;
        assert_eq!(fates(&results), ["sent"; 25]);
        let sent = script.sent("SendMessageBatch");
        for pair in sent.windows(2) {
            assert_eq!(Some(pair[1].at) >= pair[0].answered, in_order, "{queue}");
        }
        let numbers: Vec<Value> = bodies(&script).concat();
        let expected: Vec<Value> = (0..25).map(|n| json!(n.to_string())).collect();
        assert_eq!(numbers, expected);
    }
}

/// 1 MiB of bodies and attributes, types included.
#[tokio::test(start_paused = true)]
async fn requests_have_a_mebibyte_at_most() {
    let body = |size: usize| Message::new("x".repeat(size));
    // Its attribute counts 10 bytes: `k`, `String`, `abc`.
    let with_attribute = |size: usize| body(size - 10).with_attribute("k", "abc");
    for (batch, requests) in [
        (vec![body(MIB / 2), body(MIB / 2)], vec![2]),
        (vec![body(MIB / 2), body(MIB / 2 + 1)], vec![1, 1]),
        (vec![body(MIB / 2), with_attribute(MIB / 2)], vec![2]),
        (vec![body(MIB / 2), with_attribute(MIB / 2 + 1)], vec![1, 1]),
        (vec![body(MIB), body(1), body(MIB)], vec![1, 1, 1]),
        (vec![body(1), body(MIB - 2), body(1), body(1)], vec![3, 1]),
    ] {
        let script = Script::of(requests.iter().map(|count| send().gets(done(*count))));
        let results = script.sink(STANDARD).publish(&batch).await;
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        let counts: Vec<usize> = bodies(&script).iter().map(Vec::len).collect();
        assert_eq!(counts, requests);
    }
}

/// What SQS would refuse, and with it the request or a part of it, is not sent; the others are.
#[tokio::test(start_paused = true)]
async fn what_sqs_cannot_take_is_not_sent() {
    let plain = || Message::new("body");
    let named = |name: &str| plain().with_attribute(name, "value");
    let many = (0..11).fold(plain(), |m, n| m.with_attribute(format!("a{n}"), "x"));
    for (message, hint) in [
        (Message::new("x".repeat(MIB + 1)), "1048577"),
        (Message::new(vec![0xff; MIB * 3 / 4 + 1]), "grow by a third"),
        (
            Message::new("x".repeat(MIB - 9)).with_attribute("k", "abc"),
            "1048577",
        ),
        (plain().with_attribute("k", "a\u{0}b"), "'\\0'"),
        (plain().with_attribute("k", "a\u{b}b"), "'\\u{b}'"),
        (plain().with_attribute("k", "\u{ffff}"), "'\\u{ffff}'"),
        (plain().with_attribute("k", ""), "`k` is empty"),
        (named(""), "name ``"),
        (named("a b"), "`a b`"),
        (named(".a"), "`.a`"),
        (named("a."), "`a.`"),
        (named("a..b"), "`a..b`"),
        (named("AWS.x"), "`AWS.x`"),
        (named("amazon.x"), "`amazon.x`"),
        (named(&"n".repeat(257)), "256"),
        (named("onlyonce-body"), "onlyonce's own"),
        (named("onlyonce-dedup-id"), "onlyonce's own"),
        (named("onlyonce-group"), "onlyonce's own"),
        (named("onlyonce-attributes"), "onlyonce's own"),
        (many, "10 attributes, and this message needs 11"),
        (plain().with_dedup_id("a\u{1}"), "`onlyonce-dedup-id`"),
    ] {
        let script = Script::of([send().gets(done(2))]);
        let batch = [Message::new("before"), message, Message::new("after")];
        let results = script.sink(STANDARD).publish(&batch).await;
        assert_eq!(fates(&results), ["sent", "never", "sent"], "{hint}");
        assert_eq!(bodies(&script), [["before", "after"]]);
        let error = results[1].as_ref().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Message, "{error}");
        for part in [hint, "[queue orders]", "[message "] {
            assert!(error.to_string().contains(part), "no `{part}` in: {error}");
        }
    }
}

/// As SQS says it of single entries.
#[tokio::test(start_paused = true)]
async fn an_entry_that_fails_concerns_no_other() {
    for (code, text, sender_fault, kind, retryable) in [
        (
            "InvalidMessageContents",
            "Invalid characters found",
            true,
            ErrorKind::Message,
            false,
        ),
        (
            "InvalidParameterValue",
            "Message must be shorter than 1024 bytes.",
            true,
            ErrorKind::Message,
            false,
        ),
        ("InternalError", "", false, ErrorKind::Connection, true),
        ("RequestThrottled", "", true, ErrorKind::Throttled, true),
        (
            "KMS.ThrottlingException",
            "",
            true,
            ErrorKind::Throttled,
            true,
        ),
    ] {
        let failure = failed(1, code, text, sender_fault);
        let script = Script::of([send().gets(partly(&[0, 2], &[failure]))]);
        let batch = ["a", "b", "c"].map(|name| message_of("g", name));
        let results = script.sink(STANDARD).publish(&batch).await;
        let fate = if retryable { "again" } else { "never" };
        assert_eq!(fates(&results), ["sent", fate, "sent"], "{code}");
        let error = results[1].as_ref().unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        for part in [text, "[queue orders]", "[message b]"] {
            assert!(error.to_string().contains(part), "no `{part}` in: {error}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_answer_leaves_out_may_be_sent_again() {
    let script = Script::of([send().gets(partly(&[1, 9], &[]))]);
    let batch = ["a", "b"].map(|name| message_of("g", name));
    let results = script.sink(FIFO).publish(&batch).await;
    assert_eq!(fates(&results), ["again", "sent"]);
}

#[tokio::test(start_paused = true)]
async fn what_fails_as_a_whole_fails_for_each() {
    for (answer, kind, fate) in [
        (never(), ErrorKind::Timeout, "again"),
        (broken(), ErrorKind::Connection, "again"),
        (cut(), ErrorKind::Connection, "again"),
        (page(502), ErrorKind::Connection, "again"),
        (
            refused(400, "RequestThrottled", ""),
            ErrorKind::Throttled,
            "again",
        ),
        (
            refused(400, "BatchRequestTooLong", ""),
            ErrorKind::Message,
            "never",
        ),
        (
            refused(400, "QueueDoesNotExist", ""),
            ErrorKind::NotFound,
            "never",
        ),
        (
            refused(400, "AccessDeniedException", ""),
            ErrorKind::Permission,
            "never",
        ),
    ] {
        let script = Script::of([send().gets(answer)]);
        let batch = ["a", "b"].map(|name| message_of("g", name));
        let results = script.sink(FIFO).publish(&batch).await;
        assert_eq!(fates(&results), [fate; 2], "{kind:?}");
        for (result, name) in results.iter().zip(["a", "b"]) {
            let error = result.as_ref().unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(
                error.to_string().contains(&format!("[message {name}]")),
                "{error}"
            );
        }
    }
}

/// What follows in the group would overtake what failed; other groups are not held up.
#[tokio::test(start_paused = true)]
async fn a_failure_on_a_fifo_queue_stops_its_group() {
    let names: Vec<String> = (0..25).map(|n| n.to_string()).collect();
    // Even ones are of one group, odd ones of another.
    let group = |n: usize| ["even", "odd"][n % 2];
    let batch: Vec<Message> = (0..25).map(|n| message_of(group(n), &names[n])).collect();
    let failure = failed(4, "InternalError", "", false);
    let others = [0, 1, 2, 3, 5, 6, 7, 8, 9];
    for answer in [partly(&others, &[failure]), partly(&others, &[])] {
        let script = Script::of([
            send().gets(answer),
            send().gets(done(5)),
            send().gets(done(2)),
        ]);
        let results = script.sink(FIFO).publish(&batch).await;
        let expected = std::array::from_fn::<_, 25, _>(|n| match n {
            4 => "again",
            10.. if n % 2 == 0 => "again",
            _ => "sent",
        });
        assert_eq!(fates(&results), expected);
        let held_up = results[10].as_ref().unwrap_err().to_string();
        for part in ["not sent", "earlier message of its group", "[message 10]"] {
            assert!(held_up.contains(part), "{held_up}");
        }
        let odd = |range: std::ops::Range<usize>| -> Vec<Value> {
            let numbers = range.filter(|n| n % 2 == 1);
            numbers.map(|n| json!(n.to_string())).collect()
        };
        assert_eq!(bodies(&script)[1..], [odd(10..20), odd(20..25)]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_request_on_a_fifo_queue_stops_its_groups() {
    let script = Script::of([send().gets(broken()), send().gets(done(1))]);
    let mut batch: Vec<Message> = (0..11).map(|n| message_of("a", &n.to_string())).collect();
    batch.push(message_of("b", "other"));
    let results = script.sink(FIFO).publish(&batch).await;
    assert_eq!(fates(&results)[..11], ["again"; 11]);
    assert_eq!(fates(&results)[11..], ["sent"]);
    assert_eq!(bodies(&script)[1], ["other"]);
}

/// Two batches at once: the second's first request waits for the first's last.
#[tokio::test(start_paused = true)]
async fn batches_for_a_fifo_queue_do_not_mix() {
    let slow = |count| send().gets(done(count).after(seconds(1)));
    let script = Script::of([slow(10), slow(2), slow(1)]);
    let sink = script.sink(FIFO);
    let first: Vec<Message> = (0..12).map(|n| message_of("g", &n.to_string())).collect();
    let second = [message_of("g", "12")];
    let (first, second) = tokio::join!(sink.publish(&first), sink.publish(&second));
    assert_eq!(fates(&first), ["sent"; 12]);
    assert_eq!(fates(&second), ["sent"]);
    let order: Vec<Value> = (0..13).map(|n| json!(n.to_string())).collect();
    assert_eq!(bodies(&script).concat(), order);
}

#[tokio::test(start_paused = true)]
async fn close_waits_for_what_is_under_way() {
    let script = Script::of([send().gets(done(1).after(seconds(3)))]);
    let sink = Arc::new(script.sink(FIFO));
    let sending = tokio::spawn({
        let sink = sink.clone();
        async move { sink.publish(&[message_of("g", "a")]).await }
    });
    quiet().await;
    sink.close().await.unwrap();
    assert!(sending.is_finished());
    assert_eq!(fates(&sending.await.unwrap()), ["sent"]);
    let results = sink.publish(&[message_of("g", "b")]).await;
    let error = results[0].as_ref().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    sink.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_sink_says_which_queue_it_is_and_whether_it_is_there() {
    let arn = "arn:aws:sqs:eu-central-1:123456789012:orders";
    let told = ok(json!({ "Attributes": { "QueueArn": arn } }));
    let found = Script::of([get_attributes().gets(told)]);
    let found = found.sink(STANDARD).sink_info().await.unwrap();
    assert_eq!(found.identity.as_deref(), Some(arn));
    assert_eq!(found.unknown, [""; 0]);

    // A producer need not be allowed to look.
    let script = Script::of([get_attributes().gets(refused(403, "AccessDenied", "no"))]);
    let found = script.sink(STANDARD).sink_info().await.unwrap();
    assert_eq!(found.identity, None);
    assert!(
        found.unknown[0].contains("sqs:GetQueueAttributes"),
        "{:?}",
        found.unknown
    );
}

/// Found only with the first dead letter, its message would run again every minute until then.
#[tokio::test(start_paused = true)]
async fn a_dead_letter_queue_that_does_not_exist_is_found_at_the_start() {
    let gone = get_attributes().gets(refused(400, "QueueDoesNotExist", "no"));
    let away = get_attributes().gets(page(503));
    let script = Script::of([away, gone]);
    let orders = MemoryQueue::new("orders");
    let error = Pipeline::idempotent(orders.clone(), MemoryStore::new())
        .dead_letter(script.sink(STANDARD))
        .run(async || {})
        .await
        .unwrap_err();
    assert_eq!(error.error.kind(), ErrorKind::NotFound, "{error}");
}
