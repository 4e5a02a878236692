//! Pulls, and the leases of what they bring.

use onlyonce_core::ErrorKind;
use onlyonce_core::driver::{Disposition, ReceiveLimits, Settlement, Source as _};
use onlyonce_pubsub::PubSubSource;
use onlyonce_pubsub::v1::{
    DeadLetterPolicy, ModifyAckDeadlineRequest, PullRequest, ReceivedMessage, Subscription,
};
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

use super::script::*;
use super::*;

#[tokio::test(start_paused = true)]
async fn an_idle_subscription_costs_less_than_a_pull_a_minute() {
    let script = Script::of([told()]);
    let source = source(&script);
    let begun = Instant::now();
    while begun.elapsed() < seconds(600) {
        assert!(receive(&source, 100).await.is_empty());
    }
    assert_eq!(script.sent::<PullRequest>().len(), 7);
}

#[tokio::test(start_paused = true)]
async fn a_pull_outlives_the_receive_that_began_it() {
    let answer = messages(&["m"]).after(Duration::from_millis(200));
    let script = Script::of([told(), pull().gets(answer)]);
    let source = source(&script);
    let dropped = timeout(Duration::from_millis(100), source.receive(limit(10))).await;
    assert!(dropped.is_err());
    assert_eq!(bodies(&receive(&source, 10).await), ["m"]);
    assert_eq!(script.sent::<PullRequest>().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_pull_that_nobody_waits_for_is_cancelled() {
    let script = Script::of([told()]);
    let source = source(&script);
    let limits = ReceiveLimits::new(10, seconds(1));
    assert!(source.receive(limits).await.unwrap().is_empty());
    sleep(seconds(4)).await;
    assert_eq!(
        script.under_way::<PullRequest>(),
        1,
        "somebody may only settle"
    );
    sleep(seconds(6)).await;
    assert_eq!(script.under_way::<PullRequest>(), 0);
    // The next one pulls again.
    assert!(source.receive(limits).await.unwrap().is_empty());
    assert_eq!(script.sent::<PullRequest>().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_pull_asks_for_no_more_than_may_be_received() {
    let script = Script::of([told(), pull().gets(messages(&["a", "b"]))]);
    let source = source(&script);
    let held = receive(&source, 2).await;
    assert_eq!(held.len(), 2);
    assert!(receive(&source, 5_000).await.is_empty());
    let asked = script.sent::<PullRequest>().into_iter();
    let asked: Vec<_> = asked.map(|sent| sent.message.max_messages).collect();
    // A thousand is the most that it takes; the first came back full, so there are two.
    assert_eq!(asked, [2, 1_000, 1_000]);
}

/// Twenty to a pull are worth another one beside it.
#[tokio::test(start_paused = true)]
async fn pulls_follow_the_load() {
    let names: Vec<String> = (0..80).map(|n| n.to_string()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let full = |part: usize| pull().gets(messages(&names[part * 20..(part + 1) * 20]));
    let plain = Subscription {
        enable_message_ordering: false,
        ..subscription()
    };
    let script = Script::of([
        get_subscription().gets(ok(plain)),
        full(0),
        full(1),
        full(2),
        full(3),
    ]);
    let source = source(&script);
    let mut received = 0;
    while received < 80 {
        received += receive(&source, 5_000).await.len();
    }
    assert!(receive(&source, 5_000).await.is_empty());
    assert_eq!(script.under_way::<PullRequest>(), 4, "no more than `pulls`");
    // All of them come back empty.
    let begun = Instant::now();
    while begun.elapsed() < seconds(200) {
        assert!(receive(&source, 5_000).await.is_empty());
    }
    assert_eq!(script.under_way::<PullRequest>(), 1);
}

#[tokio::test(start_paused = true)]
async fn leases_count_from_before_the_pull() {
    let answer = messages(&["m"]).after(seconds(5));
    let script = Script::of([told(), pull().gets(answer)]);
    let held = receive(&source(&script), 10).await;
    assert_eq!(left(&held[0]), seconds(55));
}

#[tokio::test(start_paused = true)]
async fn what_the_pull_waited_for_is_leased_anew() {
    let script = Script::of([
        told(),
        pull().gets(messages(&["a", "b"]).after(seconds(40))),
        modify_deadline(&["a", "b"], 60).gets(done().after(seconds(1))),
    ]);
    let source = source(&script);
    assert!(receive(&source, 10).await.is_empty());
    assert!(receive(&source, 10).await.is_empty());
    let held = receive(&source, 10).await;
    assert_eq!(bodies(&held), ["a", "b"]);
    assert_eq!(left(&held[0]), seconds(59), "from before the request");
}

#[tokio::test(start_paused = true)]
async fn what_is_somebody_elses_by_then_is_dropped() {
    let failed = refused(Code::FailedPrecondition, "some failed");
    let script = Script::of([
        told(),
        pull().gets(messages(&["a", "b", "c"]).after(seconds(25))),
        modify_deadline(&["a", "b", "c"], 60)
            .gets(failed.naming([("a", INVALID), ("c", TRANSIENT)])),
    ]);
    let source = source(&script);
    assert!(receive(&source, 10).await.is_empty());
    let held = receive(&source, 10).await;
    assert_eq!(bodies(&held), ["b", "c"]);
    assert_eq!(left(&held[0]), seconds(60));
    assert_eq!(left(&held[1]), seconds(35), "as the pull gave it");
}

/// While its lease is extended a message belongs to nobody yet.
#[tokio::test(start_paused = true)]
async fn what_a_pull_has_brought_is_kept_though_nobody_waits() {
    let script = Script::of([
        told(),
        pull().gets(messages(&["m"]).after(seconds(25))),
        modify_deadline(&["m"], 60).gets(done().after(seconds(5))),
        modify_deadline(&["m"], 0).gets(done()),
    ]);
    let source = source(&script);
    let limits = ReceiveLimits::new(10, seconds(26));
    assert!(source.receive(limits).await.unwrap().is_empty());
    sleep(seconds(2)).await;
    source.close().await.unwrap();
    assert_eq!(script.sent::<ModifyAckDeadlineRequest>().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_longer_lease_is_asked_for_at_once() {
    let script = Script::of([
        told(),
        pull().gets(messages(&["m"])),
        modify_deadline(&["m"], 120).gets(done()),
    ]);
    let config = "pubsub://project/orders?lease=2m".parse().unwrap();
    let source = PubSubSource::with_channel(config, script.channel()).unwrap();
    assert_eq!(left(&receive(&source, 10).await[0]), seconds(120));
}

fn again(ack_id: &str, message: &str) -> ReceivedMessage {
    ReceivedMessage {
        ack_id: ack_id.to_owned(),
        ..message_of("a", message)
    }
}

#[tokio::test(start_paused = true)]
async fn only_the_newest_ack_id_of_a_message_counts() {
    let twice = onlyonce_pubsub::v1::PullResponse {
        received_messages: vec![again("newer", "m")],
    };
    let (script, source, old) = holding(&["m"], [pull().gets(ok(twice))]).await;
    let first = Settlement::new(old[0].receipt.clone(), Disposition::Ack);
    // Its group is out, so the newer one waits until the older one is known to be lost.
    let new = receive(&source, 10).await;
    assert!(is_lost(&old[0]), "its handler has to end");
    assert!(!is_lost(&new[0]));
    let answers = source.settle(&[first]).await;
    let lost = matches!(
        answers[..],
        [onlyonce_core::driver::SettleResult::LeaseLost]
    );
    assert!(lost, "{answers:?}");
    assert_eq!(script.sent::<PullRequest>().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_rest_of_a_key_waits_while_its_head_is_out() {
    let script = Script::of([
        told(),
        pull().gets(messages_of("a", &["a1", "a2"])),
        acknowledge(&["a1"]).gets(done()),
    ]);
    let source = source(&script);
    let dropped = timeout(Duration::ZERO, source.receive(limit(2))).await;
    assert!(dropped.is_err());
    sleep(Duration::from_millis(10)).await;
    let head = receive(&source, 1).await;
    assert_eq!(bodies(&head), ["a1"]);
    let short = ReceiveLimits::new(10, Duration::from_millis(100));
    assert!(source.receive(short).await.unwrap().is_empty());
    let ack = Settlement::new(head[0].receipt.clone(), Disposition::Ack);
    assert!(source.settle(&[ack]).await[0].is_applied());
    assert_eq!(bodies(&source.receive(short).await.unwrap()), ["a2"]);
}

#[tokio::test(start_paused = true)]
async fn a_pull_whose_time_is_over_has_found_nothing() {
    let over = refused(Code::DeadlineExceeded, "deadline exceeded").after(seconds(5));
    let script = Script::of([told(), pull().gets(over), pull().gets(messages(&["m"]))]);
    assert_eq!(bodies(&receive(&source(&script), 10).await), ["m"]);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_answers_at_once_is_not_asked_without_end() {
    let script = Script::of([told()]).then(|_: &PullRequest| nothing());
    let source = source(&script);
    let limits = ReceiveLimits::new(10, seconds(10));
    assert!(source.receive(limits).await.unwrap().is_empty());
    let pulls = script.sent::<PullRequest>().len();
    assert!((50..=101).contains(&pulls), "{pulls} in ten seconds");
}

#[tokio::test(start_paused = true)]
async fn an_error_is_told_and_the_next_receive_pulls_again() {
    for (code, kind, again) in [
        (Code::Unavailable, ErrorKind::Connection, true),
        (Code::NotFound, ErrorKind::NotFound, false),
        (Code::PermissionDenied, ErrorKind::Permission, false),
        (Code::FailedPrecondition, ErrorKind::Config, false),
    ] {
        let script = Script::of([
            told(),
            pull().gets(refused(code, "why")),
            pull().gets(messages(&["m"])),
        ]);
        let source = source(&script);
        let error = source.receive(limit(10)).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.is_retryable()),
            (kind, again),
            "{error}"
        );
        assert!(error.to_string().contains("orders"), "{error}");
        assert_eq!(bodies(&receive(&source, 10).await), ["m"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_busy_is_left_alone_for_as_long_as_it_asks() {
    let busy = refused(Code::ResourceExhausted, "quota").retry_after(seconds(7));
    let script = Script::of([told(), pull().gets(busy), pull().gets(messages(&["m"]))]);
    let source = source(&script);
    let error = source.receive(limit(10)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Throttled, "{error}");
    assert_eq!(bodies(&receive(&source, 10).await), ["m"]);
    let pulls = script.sent::<PullRequest>();
    assert!(pulls[1].at - pulls[0].at >= seconds(7), "{:?}", pulls[1].at);
}

#[tokio::test(start_paused = true)]
async fn attempts_are_told_where_the_service_counts_them() {
    let mut received = message_of("", "m");
    received.delivery_attempt = 3;
    let policy = DeadLetterPolicy {
        dead_letter_topic: TOPIC.to_owned(),
        max_delivery_attempts: 5,
    };
    for (dead_letter_policy, attempt) in [(Some(policy), Some(3)), (None, None)] {
        let subscription = Subscription {
            dead_letter_policy,
            ..subscription()
        };
        let answer = onlyonce_pubsub::v1::PullResponse {
            received_messages: vec![received.clone()],
        };
        let script = Script::of([
            get_subscription().gets(ok(subscription)),
            pull().gets(ok(answer)),
        ]);
        let held = receive(&source(&script), 1).await;
        assert_eq!(held[0].attempt, attempt);
        assert!(!held[0].is_first);
    }
}

#[tokio::test(start_paused = true)]
async fn closing_cancels_the_pulls_and_gives_back_what_is_held() {
    let (script, source, held) = holding(
        &["a1", "a2"],
        [modify_deadline(&["a1", "a2"], 0).gets(done())],
    )
    .await;
    let short = ReceiveLimits::new(10, Duration::from_millis(100));
    assert!(source.receive(short).await.unwrap().is_empty());
    assert_eq!(script.under_way::<PullRequest>(), 1);
    let begun = Instant::now();
    source.close().await.unwrap();
    assert!(
        begun.elapsed() < seconds(1),
        "it does not wait for the pull"
    );
    assert!(held.iter().all(is_lost));
    let error = source.receive(limit(1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    source.close().await.unwrap();
    assert_eq!(script.sent::<ModifyAckDeadlineRequest>().len(), 1);
}
