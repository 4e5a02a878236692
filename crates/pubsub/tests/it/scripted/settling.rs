//! Acks, extensions and what is given back.

use onlyonce_core::driver::{
    Disposition, ExtendResult, Receipt, SettleResult, Settlement, Source as _,
};
use onlyonce_pubsub::v1::{AcknowledgeRequest, ModifyAckDeadlineRequest, Subscription};
use tokio::time::{Instant, sleep};
use tonic::Code;

use super::script::*;
use super::*;

const NACK: Disposition = Disposition::Nack {
    delay: Duration::ZERO,
};

fn all(held: &[Delivery], disposition: &Disposition) -> Vec<Settlement> {
    let settlement =
        |delivery: &Delivery| Settlement::new(delivery.receipt.clone(), disposition.clone());
    held.iter().map(settlement).collect()
}

fn receipts(held: &[Delivery]) -> Vec<Receipt> {
    held.iter()
        .map(|delivery| delivery.receipt.clone())
        .collect()
}

/// `.` it was done, `L` the lease was lost, `?` it may be tried again, `!` it may not.
fn said(answers: &[SettleResult]) -> String {
    let letter = |answer: &SettleResult| match answer {
        SettleResult::Applied => '.',
        SettleResult::LeaseLost => 'L',
        SettleResult::Unknown(error) if error.is_retryable() => '?',
        SettleResult::Unknown(_) => '!',
    };
    answers.iter().map(letter).collect()
}

fn mixed(ids: &[(&'static str, &'static str)]) -> Answer {
    let failed = refused(Code::FailedPrecondition, "Some acks failed.");
    failed.naming(ids.iter().copied())
}

#[tokio::test(start_paused = true)]
async fn each_ack_has_its_own_answer() {
    let answer = mixed(&[("b", INVALID), ("c", TRANSIENT), ("d", UNORDERED)]);
    let (_script, source, held) = holding_of(
        subscription(),
        "",
        &["a", "b", "c", "d"],
        [
            acknowledge(&["a", "b", "c", "d"]).gets(answer),
            acknowledge(&["c", "d"]).gets(done()),
        ],
    )
    .await;
    let acks = all(&held, &Disposition::Ack);
    assert_eq!(said(&source.settle(&acks).await), ".L??");
    assert!(is_lost(&held[1]) && !is_lost(&held[2]));
    // What was done or lost is not sent again.
    assert_eq!(said(&source.settle(&acks).await), "LL..");
}

#[tokio::test(start_paused = true)]
async fn what_fails_as_a_whole_is_unknown_for_each_and_can_be_tried_again() {
    for failure in [
        refused(Code::Unavailable, "going away"),
        refused(Code::Internal, "oops"),
        refused(Code::Aborted, "oops"),
        broken(),
        never(),
    ] {
        let ids = ["a", "b"];
        let steps = [
            acknowledge(&ids).gets(failure),
            acknowledge(&ids).gets(done()),
        ];
        let (_script, source, held) = holding(&ids, steps).await;
        let acks = all(&held, &Disposition::Ack);
        assert_eq!(said(&source.settle(&acks).await), "??");
        assert_eq!(said(&source.settle(&acks).await), "..");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_as_a_whole_is_not_tried_again() {
    let refusal = refused(Code::InvalidArgument, "bad id");
    let (_script, source, held) = holding(&["a"], [acknowledge(&["a"]).gets(refusal)]).await;
    assert_eq!(
        said(&source.settle(&all(&held, &Disposition::Ack)).await),
        "!"
    );
}

#[tokio::test(start_paused = true)]
async fn acks_of_a_key_go_in_the_order_of_delivery() {
    let ids = ["a1", "a2", "a3"];
    let (_script, source, held) = holding(&ids, [acknowledge(&ids).gets(done())]).await;
    let mut acks = all(&held, &Disposition::Ack);
    acks.reverse();
    assert_eq!(said(&source.settle(&acks).await), "...");
}

#[tokio::test(start_paused = true)]
async fn one_request_of_acks_is_under_way_at_a_time() {
    let (script, source, held) = holding(
        &["a1", "a2"],
        [
            acknowledge(&["a1"]).gets(done().after(seconds(3))),
            acknowledge(&["a2"]).gets(done()),
        ],
    )
    .await;
    let acks = all(&held, &Disposition::Ack);
    let (first, second) = tokio::join!(source.settle(&acks[..1]), source.settle(&acks[1..]));
    assert_eq!((said(&first), said(&second)), (".".into(), ".".into()));
    let sent = script.sent::<AcknowledgeRequest>();
    assert_eq!(Some(sent[1].at), sent[0].answered);
}

fn many(count: usize, length: usize) -> Vec<String> {
    (0..count).map(|n| format!("{n:0length$}")).collect()
}

#[tokio::test(start_paused = true)]
async fn a_request_takes_a_thousand_ids_and_half_a_megabyte() {
    for (count, length, requests) in [(1_001, 10, [1_000, 1]), (600, 1_000, [500, 100])] {
        let names = many(count, length);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let parts: Vec<&[&str]> = names.chunks(requests[0]).collect();
        let steps: Vec<_> = parts
            .iter()
            .map(|ids| acknowledge(ids).gets(done()))
            .collect();
        let plain = Subscription {
            enable_message_ordering: false,
            ..subscription()
        };
        // More than a pull asks for.
        let begin = [
            get_subscription().gets(ok(plain)),
            pull().gets(messages(&names)),
        ];
        let script = Script::of(begin.into_iter().chain(steps));
        let source = source(&script);
        let mut held = receive(&source, 1_000).await;
        if held.len() < count {
            held.extend(receive(&source, count).await);
        }
        let answers = source.settle(&all(&held, &Disposition::Ack)).await;
        assert_eq!(said(&answers), ".".repeat(count));
    }
}

/// Else an ack of a key could be taken before an earlier one of it.
#[tokio::test(start_paused = true)]
async fn behind_a_failed_request_nothing_of_its_keys_is_acked() {
    let names = many(600, 1_000);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let failure = refused(Code::Unavailable, "later");
    let steps = [acknowledge(&names[..500]).gets(failure)];
    let (_script, source, held) = holding(&names, steps).await;
    let answers = source.settle(&all(&held, &Disposition::Ack)).await;
    assert_eq!(said(&answers), "?".repeat(600));
}

#[tokio::test(start_paused = true)]
async fn a_failed_head_goes_back_with_all_that_follows_it() {
    let (_script, source, held) = holding(
        &["a1", "a2", "a3"],
        [
            acknowledge(&["a1"]).gets(done()),
            modify_deadline(&["a2", "a3"], 0).gets(done()),
        ],
    )
    .await;
    let ack = all(&held[..1], &Disposition::Ack);
    assert_eq!(said(&source.settle(&ack).await), ".");
    assert_eq!(said(&source.settle(&all(&held[1..2], &NACK)).await), ".");
    assert!(is_lost(&held[2]), "whoever has it must not go on");
    let late = all(&held[2..], &Disposition::Ack);
    assert_eq!(said(&source.settle(&late).await), "L");
}

#[tokio::test(start_paused = true)]
async fn what_is_given_back_together_goes_in_one_request_in_order() {
    let ids = ["a1", "a2", "a3"];
    let (_script, source, held) = holding(&ids, [modify_deadline(&ids, 0).gets(done())]).await;
    let mut nacks = all(&held, &NACK);
    nacks.reverse();
    assert_eq!(said(&source.settle(&nacks).await), "...");
}

#[tokio::test(start_paused = true)]
async fn followers_that_nobody_has_yet_go_back_too() {
    let script = Script::of([
        told(),
        pull().gets(messages_of("a", &["a1", "a2"])),
        modify_deadline(&["a1", "a2"], 0).gets(done()),
    ]);
    let source = source(&script);
    let dropped = tokio::time::timeout(Duration::ZERO, source.receive(limit(2))).await;
    assert!(dropped.is_err());
    sleep(Duration::from_millis(10)).await;
    let head = receive(&source, 1).await;
    assert_eq!(bodies(&head), ["a1"]);
    assert_eq!(said(&source.settle(&all(&head, &NACK)).await), ".");
    assert!(receive(&source, 10).await.is_empty(), "a2 went back");
}

#[tokio::test(start_paused = true)]
async fn without_order_a_message_goes_back_alone() {
    let plain = Subscription {
        enable_message_ordering: false,
        ..subscription()
    };
    let nack = modify_deadline(&["a1"], 0).gets(done());
    let (_script, source, held) = holding_of(plain, "a", &["a1", "a2"], [nack]).await;
    assert_eq!(said(&source.settle(&all(&held[..1], &NACK)).await), ".");
    assert!(!is_lost(&held[1]));
}

#[tokio::test(start_paused = true)]
async fn a_delay_is_a_deadline_in_whole_seconds() {
    for (delay, deadline) in [(Duration::from_millis(1_500), 2), (seconds(3_600), 600)] {
        let nack = modify_deadline(&["a"], deadline).gets(done());
        let (_script, source, held) = holding(&["a"], [nack]).await;
        let nacks = all(&held, &Disposition::Nack { delay });
        assert_eq!(said(&source.settle(&nacks).await), ".");
    }
}

/// The key waits for as long as its head: all of it comes again in order.
#[tokio::test(start_paused = true)]
async fn a_key_has_one_delay() {
    let ids = ["a1", "a2"];
    let (_script, source, held) = holding(&ids, [modify_deadline(&ids, 5).gets(done())]).await;
    let mut nacks = all(&held, &NACK);
    nacks[0].disposition = Disposition::Nack { delay: seconds(5) };
    assert_eq!(said(&source.settle(&nacks).await), "..");
}

#[tokio::test(start_paused = true)]
async fn a_give_back_has_an_answer_for_each_id() {
    let answer = mixed(&[("a", INVALID), ("b", TRANSIENT)]);
    let steps = [
        modify_deadline(&["a", "b", "c"], 0).gets(answer),
        modify_deadline(&["b"], 0).gets(done()),
    ];
    let (_script, source, held) = holding_of(subscription(), "", &["a", "b", "c"], steps).await;
    let nacks = all(&held, &NACK);
    assert_eq!(said(&source.settle(&nacks).await), "L?.");
    assert_eq!(said(&source.settle(&nacks).await), "L.L");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_once_the_lease_has_ended() {
    let (script, source, held) = holding(&["a"], []).await;
    sleep(seconds(60)).await;
    for disposition in [Disposition::Ack, NACK] {
        assert_eq!(said(&source.settle(&all(&held, &disposition)).await), "L");
    }
    let answers = source.extend(&receipts(&held), seconds(60)).await;
    assert!(
        matches!(answers[..], [ExtendResult::LeaseLost]),
        "{answers:?}"
    );
    assert_eq!(script.sent::<AcknowledgeRequest>().len(), 0);
}

/// The service says of an ack that came too late that its id is not valid, and delivers the message again.
#[tokio::test(start_paused = true)]
async fn an_ack_that_the_service_finds_too_late_is_a_lost_lease() {
    let late = acknowledge(&["a"]).gets(mixed(&[("a", INVALID)]));
    let (_script, source, held) = holding(&["a"], [late]).await;
    assert_eq!(
        said(&source.settle(&all(&held, &Disposition::Ack)).await),
        "L"
    );
}

#[tokio::test(start_paused = true)]
async fn an_extension_moves_the_deadline() {
    let steps = [
        modify_deadline(&["a", "b"], 60).gets(done().after(seconds(2))),
        acknowledge(&["a", "b"]).gets(done()),
    ];
    let (_script, source, held) = holding(&["a", "b"], steps).await;
    sleep(seconds(50)).await;
    let asked = Instant::now();
    for answer in source.extend(&receipts(&held), seconds(60)).await {
        let ExtendResult::Extended(until) = answer else {
            panic!("{answer:?}");
        };
        assert_eq!(until, asked + seconds(60), "from before the request");
    }
    sleep(seconds(50)).await;
    assert_eq!(
        said(&source.settle(&all(&held, &Disposition::Ack)).await),
        ".."
    );
}

#[tokio::test(start_paused = true)]
async fn an_exactly_once_subscription_is_asked_for_a_minute_at_least() {
    for (exactly_once, deadline) in [(true, 60), (false, 10)] {
        let subscription = Subscription {
            enable_exactly_once_delivery: exactly_once,
            ..subscription()
        };
        let extension = modify_deadline(&["a"], deadline).gets(done());
        let (_script, source, held) = holding_of(subscription, "a", &["a"], [extension]).await;
        let asked = Instant::now();
        let answers = source.extend(&receipts(&held), seconds(5)).await;
        let ExtendResult::Extended(until) = answers[0] else {
            panic!("{answers:?}");
        };
        // What was not asked for is not counted on.
        assert_eq!(until, asked + seconds(5));
    }
}

#[tokio::test(start_paused = true)]
async fn an_extension_has_an_answer_for_each_id() {
    let answer = mixed(&[("b", INVALID), ("c", TRANSIENT)]);
    let step = modify_deadline(&["a", "b", "c"], 60).gets(answer);
    let (_script, source, held) = holding(&["a", "b", "c"], [step]).await;
    let answers = source.extend(&receipts(&held), seconds(60)).await;
    let answers: Vec<SettleResult> = answers.into_iter().map(SettleResult::from).collect();
    assert_eq!(said(&answers), ".L?");
    assert!(is_lost(&held[1]), "its handler has to end");
}

#[tokio::test(start_paused = true)]
async fn an_extension_that_hangs_leaves_time_for_another() {
    let steps = [
        modify_deadline(&["a"], 60).gets(never()),
        modify_deadline(&["a"], 60).gets(done()),
    ];
    let (script, source, held) = holding(&["a"], steps).await;
    sleep(seconds(45)).await;
    let first = source.extend(&receipts(&held), seconds(60)).await;
    assert!(matches!(first[..], [ExtendResult::Unknown(_)]), "{first:?}");
    assert_eq!(left(&held[0]), seconds(10));
    let second = source.extend(&receipts(&held), seconds(60)).await;
    assert!(second[0].is_extended(), "{second:?}");
    assert_eq!(script.sent::<ModifyAckDeadlineRequest>().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_busy_service_is_left_alone_for_as_long_as_it_asks() {
    let busy = refused(Code::ResourceExhausted, "quota").retry_after(seconds(4));
    let steps = [
        acknowledge(&["a"]).gets(busy),
        acknowledge(&["a"]).gets(done()),
    ];
    let (script, source, held) = holding(&["a"], steps).await;
    let acks = all(&held, &Disposition::Ack);
    assert_eq!(said(&source.settle(&acks).await), "?");
    assert_eq!(said(&source.settle(&acks).await), ".");
    let sent = script.sent::<AcknowledgeRequest>();
    assert_eq!(sent[1].at - sent[0].at, seconds(4));
}

#[tokio::test(start_paused = true)]
async fn receipts_of_nobody_are_lost_leases() {
    let script = Script::of([]);
    let source = source(&script);
    let receipt = Receipt::new("of another adapter");
    let ack = Settlement::new(receipt, Disposition::Ack);
    assert_eq!(said(&source.settle(&[ack]).await), "L");
}
