//! Acks, give-backs and extensions: what is sent, what is not, and what each entry's answer means.

use std::time::Duration;

use onlyonce_core::ErrorKind;
use onlyonce_core::driver::{Delivery, Receipt, SettleResult, Settlement, Source as _};
use onlyonce_sqs::SqsReceipt;
use serde_json::{Value, json};
use tokio::time::{sleep, sleep_until};

use super::script::*;

const FIFO: &str = "orders.fifo?visibility_timeout=30s";
const STANDARD: &str = "orders?visibility_timeout=30s";
const EXPIRED: &str =
    "Value h for parameter ReceiptHandle is invalid. Reason: The receipt handle has expired.";
const GONE: &str = "Value h for parameter ReceiptHandle is invalid. Reason: Message does not exist or is not \
    available for visibility timeout change.";
const INVALID: &str = "The input receipt handle is invalid.";

/// Entries of a batch that failed, as SQS says it, and what becomes of their settlements.
fn failures() -> Vec<(&'static str, &'static str, bool, &'static str)> {
    vec![
        ("InvalidParameterValue", EXPIRED, true, "lost"),
        ("InvalidParameterValueException", EXPIRED, false, "lost"),
        ("InvalidParameterValue", GONE, true, "lost"),
        (
            "ReceiptHandleIsInvalid",
            "The receipt handle has expired",
            true,
            "lost",
        ),
        ("ReceiptHandleIsInvalid", INVALID, true, "lost"),
        ("MessageNotInflight", "", true, "lost"),
        (
            "AWS.SimpleQueueService.MessageNotInflight",
            "",
            true,
            "lost",
        ),
        ("InternalError", "", false, "again"),
        ("ServiceUnavailable", "", false, "again"),
        ("RequestThrottled", "", true, "again"),
        (
            "InvalidParameterValue",
            "Value x for parameter y is invalid.",
            true,
            "never",
        ),
        ("AccessDenied", "", true, "never"),
    ]
}

/// Each entry has an answer of its own, and what is lost is not asked for again.
#[tokio::test(start_paused = true)]
async fn an_entry_that_fails_concerns_no_other() {
    type Act = fn(&Delivery) -> Settlement;
    type Ask = fn(&[&str]) -> Request;
    let give_back: Act = |delivery| nack(delivery, Duration::ZERO);
    // What is given back goes last first.
    let ask_back: Ask = |handles| {
        let last_first: Vec<&str> = handles.iter().rev().copied().collect();
        change_visibility(&last_first, 0)
    };
    for (act, ask) in [(ack as Act, delete as Ask), (give_back, ask_back)] {
        for (code, text, sender_fault, word) in failures() {
            let retry: &[&str] = if word == "lost" { &[] } else { &["b"] };
            let answer = partly(&[0, 2], &[failed(1, code, text, sender_fault)]);
            let mut steps = vec![ask(&["a", "b", "c"]).gets(answer)];
            if !retry.is_empty() {
                steps.push(ask(retry).gets(done(1)));
            }
            let (_script, source, held) = holding(STANDARD, &["a", "b", "c"], steps).await;
            let batch: Vec<Settlement> = held.iter().map(act).collect();
            let answers = source.settle(&batch).await;
            assert_eq!(
                words(&answers),
                ["applied", word, "applied"],
                "{code}: {text}"
            );
            if let SettleResult::Unknown(error) = &answers[1] {
                let shown = error.to_string();
                for part in [text, "[queue orders]", "[message dedup-b]"] {
                    assert!(shown.contains(part), "no `{part}` in: {shown}");
                }
            }
            let again = source.settle(&batch[1..2]).await;
            let expected = if word == "lost" { "lost" } else { "applied" };
            assert_eq!(words(&again), [expected], "{code}: {text}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_entry_that_the_answer_leaves_out_may_be_tried_again() {
    let (_script, source, held) = holding(
        FIFO,
        &["a", "b", "c"],
        [
            delete(&["a", "b", "c"]).gets(partly(&[0, 7], &[])),
            delete(&["b", "c"]).gets(done(2)),
        ],
    )
    .await;
    let batch: Vec<Settlement> = held.iter().map(ack).collect();
    let answers = source.settle(&batch).await;
    assert_eq!(words(&answers), ["applied", "again", "again"]);
    assert_eq!(error_in(&answers[1..2]).kind(), ErrorKind::Connection);
    assert_eq!(words(&source.settle(&batch[1..]).await), ["applied"; 2]);
}

/// Three requests, and every answer where its settlement was.
#[tokio::test(start_paused = true)]
async fn answers_come_in_the_order_of_the_batch() {
    let names: Vec<String> = (0..25).map(|n| n.to_string()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    // Every fifth is given back, last first.
    let backs: Vec<&str> = (0..25).step_by(5).rev().map(|n| names[n]).collect();
    let acks: Vec<&str> = (0..25).filter(|n| n % 5 != 0).map(|n| names[n]).collect();
    let expired = |id| failed(id, "ReceiptHandleIsInvalid", "", true);
    let down = |id| failed(id, "InternalError", "", false);
    let (_script, source, held) = holding(
        FIFO,
        &names,
        [
            // Those that follow are answered first.
            delete(&acks[..10])
                .gets(partly(&[1, 2, 3, 4, 5, 6, 7, 8, 9], &[expired(0)]).after(seconds(2))),
            delete(&acks[10..]).gets(partly(&[0, 1, 2, 3, 4, 5, 6, 7, 8], &[down(9)])),
            change_visibility(&backs, 0)
                .gets(partly(&[0, 1, 2, 3], &[expired(4)]).after(seconds(1))),
        ],
    )
    .await;
    let batch: Vec<Settlement> = held
        .iter()
        .enumerate()
        .map(|(n, delivery)| match n % 5 {
            0 => nack(delivery, Duration::ZERO),
            _ => ack(delivery),
        })
        .collect();
    let mut expected = ["applied"; 25];
    expected[0] = "lost"; // the last give-back
    expected[1] = "lost"; // the first ack
    expected[24] = "again"; // the last ack
    assert_eq!(words(&source.settle(&batch).await), expected);
}

#[tokio::test(start_paused = true)]
async fn nothing_to_settle_is_no_request() {
    let (_script, source, _held) = holding(FIFO, &["a"], []).await;
    assert!(source.settle(&[]).await.is_empty());
    assert!(source.extend(&[], seconds(30)).await.is_empty());
}

/// SQS takes handles whose lease has ended, as long as nobody else got the message.
#[tokio::test(start_paused = true)]
async fn nothing_is_sent_once_the_lease_has_ended() {
    let (_script, source, held) = holding(FIFO, &["a", "b"], [delete(&["a"]).gets(done(1))]).await;
    let until = held[0].lease.until.unwrap();
    sleep_until(until - Duration::from_millis(1)).await;
    assert_eq!(words(&source.settle(&[ack(&held[0])]).await), ["applied"]);
    sleep_until(until).await;
    let batch = [
        ack(&held[1]),
        nack(&held[1], Duration::ZERO),
        dead(&held[1], "poison"),
    ];
    assert_eq!(words(&source.settle(&batch).await), ["lost"; 3]);
    let extended = extend(&source, &receipts(&held), seconds(30)).await;
    assert_eq!(words(&extended), ["lost"; 2]);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_for_what_was_never_received() {
    let (_script, source, held) = holding(FIFO, &["a"], []).await;
    let mut strange = held[0].clone();
    for receipt in [
        Receipt::new(SqsReceipt {
            handle: "somebody else's".into(),
        }),
        Receipt::new(1),
    ] {
        strange.receipt = receipt.clone();
        assert_eq!(words(&source.settle(&[ack(&strange)]).await), ["lost"]);
        assert_eq!(
            words(&extend(&source, &[receipt], seconds(1)).await),
            ["lost"]
        );
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_after_close() {
    let back = change_visibility(&["b", "a"], 0).gets(done(2));
    let (script, source, held) = holding(FIFO, &["a", "b"], [back]).await;
    source.close().await.unwrap();
    let batch: Vec<Settlement> = held.iter().map(ack).collect();
    assert_eq!(words(&source.settle(&batch).await), ["lost"; 2]);
    let extended = extend(&source, &receipts(&held), seconds(30)).await;
    assert_eq!(words(&extended), ["lost"; 2]);
    source.close().await.unwrap();
    assert_eq!(script.sent("ReceiveMessage").len(), 1);
}

/// A lease that ends while earlier requests are under way is lost, too; and no answer is waited for beyond it.
#[tokio::test(start_paused = true)]
async fn the_lease_is_looked_at_when_its_request_is_sent() {
    let names: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let last_first: Vec<&str> = names[10..].iter().rev().copied().collect();
    let slow = change_visibility(&last_first, 0).gets(done(10).after(seconds(5)));
    let (_script, source, held) = holding(FIFO, &names, [slow]).await;
    sleep(seconds(26)).await;
    let batch: Vec<Settlement> = held.iter().map(|d| nack(d, Duration::ZERO)).collect();
    let answers = source.settle(&batch).await;
    assert_eq!(words(&answers[..10]), ["lost"; 10]);
    assert_eq!(words(&answers[10..]), ["again"; 10]);
    assert_eq!(words(&source.settle(&batch).await), ["lost"; 20]);
}

/// One that hangs leaves time for another.
#[tokio::test(start_paused = true)]
async fn an_extension_may_take_a_third_of_what_is_left() {
    let hangs = change_visibility(&["a"], 30).gets(never());
    let works = change_visibility(&["a"], 30).gets(done(1));
    let (_script, source, held) = holding(FIFO, &["a"], [hangs, works]).await;
    let begun = held[0].lease.until.unwrap() - seconds(30);
    sleep_until(begun + seconds(21)).await;
    let held = receipts(&held);
    let again = || extend(&source, &held, seconds(30));
    assert_eq!(words(&again().await), ["again"]);
    assert_eq!(begun.elapsed(), seconds(24));
    assert_eq!(words(&again().await), ["applied"]);
}

/// Counted from before the request, like the first lease.
#[tokio::test(start_paused = true)]
async fn an_extension_moves_the_deadline() {
    let (_script, source, held) = holding(
        FIFO,
        &["a", "b", "c"],
        [
            change_visibility(&["a", "b", "c"], 30).gets(
                partly(
                    &[0],
                    &[
                        failed(1, "InternalError", "", false),
                        failed(2, "ReceiptHandleIsInvalid", INVALID, true),
                    ],
                )
                .after(seconds(3)),
            ),
            delete(&["a", "b"]).gets(partly(
                &[],
                &[
                    failed(0, "InternalError", "", false),
                    failed(1, "InternalError", "", false),
                ],
            )),
            delete(&["a"]).gets(partly(&[], &[failed(0, "InternalError", "", false)])),
        ],
    )
    .await;
    let begun = held[0].lease.until.unwrap() - seconds(30);
    sleep_until(begun + seconds(20)).await;
    let extended = extend(&source, &receipts(&held), seconds(30)).await;
    assert_eq!(words(&extended), ["applied", "again", "lost"]);
    let acks: Vec<Settlement> = held.iter().map(ack).collect();
    for (at, expected) in [
        (29_999, ["again", "again", "lost"]),
        (49_999, ["again", "lost", "lost"]),
        (50_000, ["lost", "lost", "lost"]),
    ] {
        sleep_until(begun + Duration::from_millis(at)).await;
        assert_eq!(
            words(&source.settle(&acks).await),
            expected,
            "after {at} ms"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_ends_12_hours_after_the_receive() {
    const HOUR: u64 = 3_600;
    let (_script, source, held) = holding(
        "orders.fifo?visibility_timeout=12h",
        &["a"],
        [change_visibility(&["a"], 11 * HOUR as u32 - 1).gets(done(1))],
    )
    .await;
    sleep(seconds(HOUR) + Duration::from_millis(500)).await;
    let receipts = receipts(&held);
    // Half a second less than this is left, and SQS takes whole seconds.
    for refused in [
        seconds(11 * HOUR),
        seconds(11 * HOUR) - Duration::from_millis(600),
        Duration::MAX,
    ] {
        let answers = extend(&source, &receipts, refused).await;
        let error = error_in(&answers);
        assert!(!error.is_retryable(), "{error}");
        for part in ["12 hours", "[queue orders.fifo]", "[message dedup-a]"] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }
    let answers = extend(&source, &receipts, seconds(11 * HOUR - 1)).await;
    assert_eq!(words(&answers), ["applied"]);
}

/// SQS takes whole seconds, and no more than are left of 12 hours since the receive.
#[tokio::test(start_paused = true)]
async fn a_delay_is_rounded_up_and_ends_after_12_hours() {
    let millis = Duration::from_millis;
    for (after, delay, asked) in [
        (Duration::ZERO, Duration::ZERO, 0),
        (Duration::ZERO, Duration::from_nanos(1), 1),
        (Duration::ZERO, millis(1), 1),
        (Duration::ZERO, seconds(1), 1),
        (Duration::ZERO, Duration::new(1, 1), 2),
        (Duration::ZERO, millis(1_001), 2),
        (Duration::ZERO, seconds(900), 900),
        (Duration::ZERO, seconds(43_200), 43_200),
        (Duration::ZERO, Duration::MAX, 43_200),
        (seconds(10), seconds(43_200), 43_190),
        // Rounded up it would be half a second too much, and refused.
        (millis(500), seconds(43_200), 43_199),
        (millis(500), Duration::MAX, 43_199),
    ] {
        let back = change_visibility(&["a"], asked).gets(done(1));
        let (_script, source, held) = holding(FIFO, &["a"], [back]).await;
        sleep(after).await;
        let answers = source.settle(&[nack(&held[0], delay)]).await;
        assert_eq!(words(&answers), ["applied"], "{delay:?} after {after:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn each_give_back_has_its_own_delay() {
    let delays = |delays: &[(&str, u64)]| -> Value {
        let entry = |(id, (handle, delay)): (usize, &(&str, u64))| json!({ "Id": id.to_string(), "ReceiptHandle": handle, "VisibilityTimeout": delay });
        json!({ "Entries": delays.iter().enumerate().map(entry).collect::<Vec<_>>() })
    };
    let (_script, source, held) = holding(
        FIFO,
        &["a", "b"],
        [request(
            "ChangeMessageVisibilityBatch",
            delays(&[("b", 60), ("a", 0)]),
        )
        .gets(done(2))],
    )
    .await;
    let batch = [nack(&held[0], Duration::ZERO), nack(&held[1], seconds(60))];
    assert_eq!(words(&source.settle(&batch).await), ["applied"; 2]);
}

/// A group stays closed until its head is given back, which so is given back last, and only once the rest is.
#[tokio::test(start_paused = true)]
async fn a_fifo_queue_gets_its_messages_back_last_first() {
    let (names, last_first) = many();
    let slow = |at: usize| {
        let handles = last_first.chunks(10).nth(at).unwrap();
        change_visibility(&refs(handles), 0).gets(done(handles.len()).after(seconds(2)))
    };
    let steps = || [slow(0), slow(1), slow(2)];
    let (script, source, held) = holding(FIFO, &refs(&names), steps()).await;
    let batch: Vec<Settlement> = held.iter().map(|d| nack(d, Duration::ZERO)).collect();
    assert_eq!(words(&source.settle(&batch).await), ["applied"; 25]);
    one_after_another(&script);

    let (script, source, _held) = holding(FIFO, &refs(&names), steps()).await;
    source.close().await.unwrap();
    one_after_another(&script);
}

#[tokio::test(start_paused = true)]
async fn a_standard_queue_gets_its_messages_back_side_by_side() {
    let (names, last_first) = many();
    let steps = last_first.chunks(10).map(|handles| {
        change_visibility(&refs(handles), 0).gets(done(handles.len()).after(seconds(2)))
    });
    let (script, source, held) = holding(STANDARD, &refs(&names), steps).await;
    let batch: Vec<Settlement> = held.iter().map(|d| nack(d, Duration::ZERO)).collect();
    assert_eq!(words(&source.settle(&batch).await), ["applied"; 25]);
    side_by_side(&script, "ChangeMessageVisibilityBatch");
}

#[tokio::test(start_paused = true)]
async fn acks_go_side_by_side() {
    let (names, _) = many();
    let steps = names
        .chunks(10)
        .map(|handles| delete(&refs(handles)).gets(done(handles.len()).after(seconds(2))));
    let (script, source, held) = holding(FIFO, &refs(&names), steps).await;
    let batch: Vec<Settlement> = held.iter().map(ack).collect();
    assert_eq!(words(&source.settle(&batch).await), ["applied"; 25]);
    side_by_side(&script, "DeleteMessageBatch");
}

/// 25 names, and from the last to the first.
fn many() -> (Vec<String>, Vec<String>) {
    let names: Vec<String> = (0..25).map(|n| n.to_string()).collect();
    let last_first = names.iter().rev().cloned().collect();
    (names, last_first)
}

fn refs(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

fn one_after_another(script: &Script) {
    let sent = script.sent("ChangeMessageVisibilityBatch");
    assert_eq!(sent.len(), 3);
    for pair in sent.windows(2) {
        assert!(Some(pair[1].at) >= pair[0].answered, "{pair:?}");
    }
}

fn side_by_side(script: &Script, action: &str) {
    let sent = script.sent(action);
    assert_eq!(sent.len(), 3);
    assert!(sent.iter().all(|s| s.at == sent[0].at), "{sent:?}");
}

/// The leases end by themselves, as the error says.
#[tokio::test(start_paused = true)]
async fn close_tells_what_could_not_be_given_back() {
    let back = change_visibility(&["b", "a"], 0);
    let answer = partly(&[0], &[failed(1, "InternalError", "", false)]);
    let (_script, source, held) = holding(FIFO, &["a", "b"], [back.gets(answer)]).await;
    let error = source.close().await.unwrap_err();
    assert!(error.to_string().contains("[message dedup-a]"), "{error}");
    assert_eq!(words(&source.settle(&[ack(&held[0])]).await), ["lost"]);
    source.close().await.unwrap();
}
