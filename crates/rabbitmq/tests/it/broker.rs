//! What is RabbitMQ's own, against a live broker: `./tests/run rabbitmq`.

use std::time::Duration;

use crate::common::*;
use lapin::options::{BasicConsumeOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use onlyonce_core::driver::{
    Delivery, Disposition, Ordering, QueueInfo, SettleResult, Sink as _, Source as _,
};
use onlyonce_core::{ErrorKind, Message, Pipeline};
use onlyonce_rabbitmq::{Config, RabbitSink, RabbitSource};
use tokio::time::Instant;

const REQUEUE: Disposition = Disposition::Nack {
    delay: Duration::ZERO,
};

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn stale_receipts_settle_nothing_after_a_cut() {
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("cut", kind, &[]).await;
        let proxy = proxy().await;
        queue.fill(20).await;
        let source = RabbitSource::new(through(&proxy, &queue.name, "")).unwrap();
        let old = receive(&source, 20).await;
        proxy.cut(End::Finish).await;
        old[0].lease.lost.as_ref().unwrap().cancelled().await;
        // The tags of the new channel are the same numbers: an ack by the old ones would take these messages.
        let new = receive(&source, 20).await;
        for disposition in [Disposition::Ack, REQUEUE] {
            for answer in settle(&source, &old, &disposition).await {
                assert!(matches!(answer, SettleResult::LeaseLost), "{answer:?}");
            }
        }
        ack(&source, &new[..5]).await;
        source.close().await.unwrap();
        queue.assert_left(15).await;
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn nothing_is_lost_over_many_cuts() {
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("cuts", kind, &[]).await;
        let proxy = proxy().await;
        queue.fill(500).await;
        let source = RabbitSource::new(through(&proxy, &queue.name, "&prefetch=50")).unwrap();
        let mut missing: std::collections::BTreeSet<_> = numbers(0..500).into_iter().collect();
        let deadline = Instant::now() + 10 * PATIENCE;
        for round in 0.. {
            let Ok(deliveries) = source.receive(limit(20)).await else {
                continue;
            };
            // Before or in the middle of the acks.
            let cut = async {
                if round % 5 == 1 {
                    proxy.cut(End::Finish).await;
                }
            };
            let (answers, ()) = tokio::join!(settle(&source, &deliveries, &Disposition::Ack), cut);
            // An ack that was written can still be lost: only what never comes again was taken.
            assert_eq!(answers.len(), deliveries.len());
            for body in bodies(&deliveries) {
                missing.remove(&body);
            }
            if missing.is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "lost: {missing:?}");
        }
        // It may meet the last cut.
        let _ = source.close().await;
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn acks_out_of_order_take_nothing_but_themselves() {
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("outoforder", kind, &[]).await;
        queue.fill(100).await;
        let source = queue.source("");
        let mut deliveries = receive(&source, 100).await;
        let slow = deliveries.remove(10);
        let failed = deliveries.remove(50);
        // In batches from the end, from the start, and mixed with one that is given back.
        let (head, tail) = deliveries.split_at(40);
        ack(&source, tail).await;
        let mixed = [
            settlement(&head[0], &Disposition::Ack),
            settlement(&failed, &REQUEUE),
        ];
        let answers = source.settle(&mixed).await;
        assert!(answers.iter().all(SettleResult::is_applied), "{answers:?}");
        ack(&source, &head[1..]).await;
        let again = receive(&source, 1).await;
        assert_eq!(bodies(&again), bodies(std::slice::from_ref(&failed)));
        source.close().await.unwrap();
        queue.assert_left(2).await;
        let rest = queue.source("");
        let mut left = bodies(&receive(&rest, 2).await);
        left.sort();
        assert_eq!(left, sorted(bodies(&[slow, failed])));
        rest.close().await.unwrap();
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn no_more_than_prefetch_is_out() {
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("prefetch", kind, &[]).await;
        queue.fill(50).await;
        let source = queue.source("&prefetch=7");
        let held = receive(&source, 7).await;
        assert_silent(&source).await;
        assert_eq!(queue.waiting().await, 43);
        ack(&source, &held[..3]).await;
        receive(&source, 3).await;
        assert_silent(&source).await;
        source.close().await.unwrap();
        queue.assert_left(47).await;
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn closing_gives_back_in_order() {
    for kind in [Kind::Classic, Kind::Quorum] {
        let single = [("x-single-active-consumer", AMQPValue::Boolean(true))];
        let queue = Queue::declare("order", kind, &single).await;
        queue.fill(100).await;
        let more = "&single_active_consumer=true&prefetch=30";
        for _ in 0..3 {
            let source = queue.source(more);
            let info = source.queue_info().await.unwrap();
            assert_eq!(info.capabilities.ordering, Ordering::Delivery);
            let deliveries = receive(&source, 20).await;
            assert_eq!(bodies(&deliveries), numbers(0..20));
            assert_eq!(deliveries[0].message.group.as_ref(), Some(&queue.name));
            source.close().await.unwrap();
            queue.assert_left(100).await;
        }
        // Dropped without a close, too.
        drop(receive_some(queue.source(more)).await);
        let source = queue.source(more);
        let all = drain(&source, 100).await;
        assert_eq!(all, numbers(0..100));
        source.close().await.unwrap();
        queue.assert_left(0).await;
    }
}

async fn receive_some(source: RabbitSource) -> Vec<Delivery> {
    receive(&source, 10).await
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_channel_exception_is_recovered_from() {
    let queue = Queue::declare("exception", Kind::Quorum, &[]).await;
    queue.fill(3).await;
    let source = queue.source("");
    let held = receive(&source, 3).await;
    // The queue goes and comes back: the broker cancels the consumer, the channel would stay.
    queue.delete().await;
    held[0].lease.lost.as_ref().unwrap().cancelled().await;
    let error = receive_error(&source).await;
    assert_eq!(
        (error.kind(), error.is_retryable()),
        (ErrorKind::NotFound, false),
        "{error}"
    );
    assert!(error.to_string().contains(&queue.name), "{error}");
    for answer in settle(&source, &held, &Disposition::Ack).await {
        assert!(matches!(answer, SettleResult::LeaseLost), "{answer:?}");
    }
    queue.declare_again(Kind::Quorum, &[]).await;
    queue.fill(2).await;
    assert_eq!(drain(&source, 2).await, numbers(0..2));
    source.close().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn what_cannot_work_is_said_at_once_and_without_secrets() {
    let url = url();
    let wrong = url.replacen("guest:guest", "guest:s3cr3t", 1);
    assert_ne!(url, wrong, "the tests' URL has guest's password");
    let nowhere = url.rsplit_once('/').unwrap().0;
    for (url, kind, retryable) in [
        (
            format!("{url}?queue=no.such.queue"),
            ErrorKind::NotFound,
            false,
        ),
        (format!("{wrong}?queue=q"), ErrorKind::Permission, false),
        (
            format!("{nowhere}/no.such.vhost?queue=q"),
            ErrorKind::NotFound,
            false,
        ),
        (
            "amqp://u:s3cr3t@127.0.0.1:1/?queue=q".to_owned(),
            ErrorKind::Connection,
            true,
        ),
    ] {
        let config: Config = url.parse().unwrap();
        let source = RabbitSource::new(config.clone()).unwrap();
        let sink = RabbitSink::new(config).unwrap();
        let received = receive_error(&source).await;
        let inspected = source.queue_info().await.unwrap_err();
        for error in [&received, &inspected] {
            assert_eq!(
                (error.kind(), error.is_retryable()),
                (kind, retryable),
                "{error}"
            );
            let shown = format!("{error} {error:?} {source:?} {sink:?}");
            assert!(!shown.contains("s3cr3t"), "{shown}");
        }
        let published = sink.publish(&[numbered(0)]).await.remove(0).unwrap_err();
        let unroutable = url.contains("no.such.queue");
        let expected = if unroutable {
            ErrorKind::Unroutable
        } else {
            kind
        };
        assert_eq!(
            (published.kind(), published.is_retryable()),
            (expected, retryable),
            "{published}"
        );
        source.close().await.unwrap();
        sink.close().await.unwrap();
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn an_unroutable_message_fails_alone() {
    // A headers exchange routes each message of a batch on its own.
    let queue = Queue::declare("unroutable", Kind::Classic, &[]).await;
    let exchange = format!("{}.exchange", queue.name);
    queue.bind_by_header(&exchange, "to", "here").await;
    let config: Config = format!("{}?exchange={exchange}", url()).parse().unwrap();
    let sink = RabbitSink::new(config).unwrap();
    // Equal ids and bodies, so that only the whole message tells which was returned.
    let routed = |n: usize| n % 7 != 3;
    let message = |n| {
        Message::new("x")
            .with_dedup_id("id")
            .with_attribute("to", if routed(n) { "here" } else { "nowhere" })
    };
    let batch: Vec<_> = (0..200).map(message).collect();
    for _ in 0..5 {
        for (n, result) in sink.publish(&batch).await.into_iter().enumerate() {
            match result {
                Ok(()) => assert!(routed(n), "{n} was lost"),
                Err(error) => {
                    assert!(!routed(n), "{n}: {error}");
                    assert_eq!(
                        (error.kind(), error.is_retryable()),
                        (ErrorKind::Unroutable, false)
                    );
                }
            }
        }
        queue
            .assert_left((0..200).filter(|n| routed(*n)).count().try_into().unwrap())
            .await;
        queue.purge().await;
    }
    sink.close().await.unwrap();
    let error = sink.publish(&[numbered(0)]).await.remove(0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_message_that_the_broker_refuses_is_told_from_the_others() {
    let queue = Queue::declare("refused", Kind::Classic, &[]).await;
    let sink = queue.sink("");
    let frame = Message::new("x")
        .with_dedup_id("header")
        .with_attribute("a", "x".repeat(200_000));
    let id = Message::new("x").with_dedup_id("x".repeat(256));
    let results = sink.publish(&[numbered(0), frame, id, numbered(1)]).await;
    assert!(results[0].is_ok() && results[3].is_ok(), "{results:?}");
    for result in &results[1..3] {
        let error = result.as_ref().unwrap_err();
        assert_eq!(
            (error.kind(), error.is_retryable()),
            (ErrorKind::Message, false),
            "{error}"
        );
    }
    // Over RabbitMQ's own bound of 128 MiB it closes the channel.
    let huge = Message::new(vec![0; (128 << 20) + 1]).with_dedup_id("huge");
    let results = sink.publish(&[huge, numbered(2)]).await;
    let error = results[0].as_ref().unwrap_err();
    assert_eq!(
        (error.kind(), error.is_retryable()),
        (ErrorKind::Message, false),
        "{error}"
    );
    if let Err(error) = &results[1] {
        assert!(error.is_retryable(), "{error}");
    }
    assert!(sink.publish(&[numbered(3)]).await[0].is_ok(), "it goes on");
    sink.close().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_full_queue_is_a_retryable_error() {
    let full = [
        ("x-max-length", AMQPValue::LongInt(3)),
        ("x-overflow", AMQPValue::LongString("reject-publish".into())),
    ];
    let queue = Queue::declare("full", Kind::Classic, &full).await;
    let sink = queue.sink("");
    let batch: Vec<_> = (0..10).map(numbered).collect();
    let results = sink.publish(&batch).await;
    let kept = results.iter().filter(|result| result.is_ok()).count();
    queue.assert_left(kept.try_into().unwrap()).await;
    let error = results[9].as_ref().unwrap_err();
    assert_eq!(
        (error.kind(), error.is_retryable()),
        (ErrorKind::Throttled, true),
        "{error}"
    );
    sink.close().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_dropped_publish_does_not_confuse_the_next() {
    let queue = Queue::declare("dropped", Kind::Classic, &[]).await;
    let sink = queue.sink("");
    assert!(sink.publish(&[numbered(0)]).await[0].is_ok());
    let batch: Vec<_> = (0..500).map(numbered).collect();
    for micros in (0..4_000).step_by(500) {
        let short = Duration::from_micros(micros);
        let _ = tokio::time::timeout(short, sink.publish(&batch)).await;
        assert!(sink.publish(&[numbered(0)]).await[0].is_ok());
    }
    sink.close().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_delayed_retry_keeps_the_message_and_its_count() {
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("delay", kind, &[]).await;
        let sink = queue.sink("");
        let sent = numbered(1)
            .with_attribute("k", "v")
            .with_attribute("amqp-reply-to", "r");
        assert!(sink.publish(std::slice::from_ref(&sent)).await[0].is_ok());
        let source = queue.source("");
        assert!(source.queue_info().await.unwrap().capabilities.delayed_nack);
        let mut attempts = Vec::new();
        for millis in [100, 1_000, 100, 100] {
            let held = receive(&source, 1).await;
            attempts.push(held[0].attempt);
            let message = &held[0].message;
            assert_eq!(
                (&message.body, &message.dedup_id),
                (&sent.body, &sent.dedup_id)
            );
            assert_eq!(message.attributes.get("k"), Some("v"));
            assert_eq!(message.attributes.get("amqp-reply-to"), Some("r"));
            let delay = Duration::from_millis(millis);
            let begun = Instant::now();
            let later = Disposition::Nack { delay };
            let answers = settle(&source, &held, &later).await;
            assert!(answers[0].is_applied(), "{answers:?}");
            // Once more is the same; taking it back is not possible.
            assert!(settle(&source, &held, &later).await[0].is_applied());
            assert!(matches!(
                settle(&source, &held, &Disposition::Ack).await[0],
                SettleResult::LeaseLost
            ));
            let back = receive(&source, 1).await;
            assert!(begun.elapsed() >= delay, "{:?}", begun.elapsed());
            attempts.push(back[0].attempt);
            let answers = settle(&source, &back, &REQUEUE).await;
            assert!(answers[0].is_applied(), "{answers:?}");
        }
        let mut expected = [1, 2, 3, 4, 5, 6, 7, 8].map(Some);
        if kind == Kind::Classic {
            // Nobody has counted yet.
            expected[0] = None;
        }
        assert_eq!(attempts, expected, "{kind:?}");
        assert_eq!(drain(&source, 1).await, ["1"]);
        source.close().await.unwrap();
        queue.assert_left(0).await;
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_delayed_retry_is_refused_where_it_would_break_the_order() {
    let single = [("x-single-active-consumer", AMQPValue::Boolean(true))];
    let queue = Queue::declare("nodelay", Kind::Quorum, &single).await;
    queue.fill(1).await;
    for more in [
        "&group_header=g",
        "&single_active_consumer=true",
        "&delayed_retry=false",
    ] {
        let source = queue.source(more);
        assert!(!source.queue_info().await.unwrap().capabilities.delayed_nack);
        let held = receive(&source, 1).await;
        let delay = Duration::from_secs(1);
        let answers = settle(&source, &held, &Disposition::Nack { delay }).await;
        assert!(
            matches!(&answers[0], SettleResult::Unknown(error) if !error.is_retryable()),
            "{answers:?}"
        );
        source.close().await.unwrap();
        queue.assert_left(1).await;
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn queue_info_tells_what_can_be_known() {
    let queue = Queue::declare("queue_info", Kind::Quorum, &[]).await;
    let source = queue.source("&group_header=g&consumer_timeout=5m");
    queue.consume(&source, 1).await;
    let alone = source.queue_info().await.unwrap();
    assert_eq!(alone.lease, Some(Duration::from_secs(300)));
    assert_eq!(alone.capabilities.ordering, Ordering::Delivery);
    assert!(
        alone.capabilities.counts_attempts,
        "the URL does not say so"
    );
    let mentions =
        |info: &QueueInfo, word: &str| info.unknown.iter().any(|line| line.contains(word));
    for word in ["policies", "consumer_timeout", "ordered"] {
        assert!(mentions(&alone, word), "{alone:?}");
    }
    // A second consumer takes part of each group.
    let other = queue.source("&group_header=g");
    queue.consume(&other, 2).await;
    let shared = source.queue_info().await.unwrap();
    assert_eq!(shared.capabilities.ordering, Ordering::None);
    source.close().await.unwrap();
    other.close().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn what_other_clients_send_can_be_read() {
    let queue = Queue::declare("foreign", Kind::Classic, &[]).await;
    queue
        .channel
        .confirm_select(ConfirmSelectOptions::default())
        .await
        .unwrap();
    let mut headers = FieldTable::default();
    headers.insert("n".into(), AMQPValue::LongInt(7));
    headers.insert("group".into(), AMQPValue::FieldTable(FieldTable::default()));
    let properties = lapin::BasicProperties::default()
        .with_headers(headers)
        .with_timestamp(1_000)
        .with_content_type("text/plain".into());
    let key = queue.name.as_str().into();
    let publish = queue
        .channel
        .basic_publish("".into(), key, Default::default(), b"x", properties);
    publish.await.unwrap().await.unwrap();
    let source = queue.source("&group_header=group");
    let held = receive(&source, 1).await;
    let message = &held[0].message;
    assert_eq!(message.attributes.get("n"), Some("7"));
    assert_eq!(
        message.attributes.get("amqp-content-type"),
        Some("text/plain")
    );
    assert_eq!(
        message.published_at,
        Some(std::time::UNIX_EPOCH + Duration::from_secs(1_000))
    );
    assert_eq!(message.dedup_id, None);
    assert!(held[0].malformed.as_ref().unwrap().contains("group"));
    ack(&source, &held).await;
    source.close().await.unwrap();
}

/// The port of a host that answers nobody.
async fn closed_port() -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().port()
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn the_next_host_is_taken_when_one_does_not_answer() {
    let queue = Queue::declare("failover", Kind::Classic, &[]).await;
    let mut first = url::Url::parse(&url()).unwrap();
    first.set_port(Some(closed_port().await)).unwrap();
    // One that refuses, one that accepts and says nothing, and the broker.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = silent
        .local_addr()
        .map(|address| (silent, address))
        .unwrap();
    let url = format!(
        "{first}?queue={}&timeout=1s&failover={},{}",
        queue.name,
        silent.1,
        address()
    );
    let config: Config = url.parse().unwrap();
    let sink = RabbitSink::new(config.clone()).unwrap();
    assert!(sink.publish(&[numbered(0)]).await[0].is_ok());
    let source = RabbitSource::new(config).unwrap();
    assert_eq!(drain(&source, 1).await, ["0"]);
    sink.close().await.unwrap();
    source.close().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn credentials_that_one_host_refuses_are_shown_to_no_other() {
    let queue = Queue::declare("refusing", Kind::Classic, &[]).await;
    let mut url = url::Url::parse(&url()).unwrap();
    url.set_password(Some("wrong")).unwrap();
    let other = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let more = other.local_addr().unwrap();
    let config: Config = format!("{url}?queue={}&failover={more}", queue.name)
        .parse()
        .unwrap();
    let error = config.connect().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
    let silent = tokio::time::timeout(Duration::from_millis(200), other.accept()).await;
    assert!(silent.is_err(), "the next host was asked");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_consumer_of_a_higher_priority_comes_first() {
    let queue = Queue::declare("priority", Kind::Quorum, &[]).await;
    let (low, high) = (
        queue.source("&consumer_priority=1"),
        queue.source("&consumer_priority=2"),
    );
    queue.consume(&low, 1).await;
    queue.consume(&high, 2).await;
    queue.fill(10).await;
    let all = receive(&high, 10).await;
    assert_silent(&low).await;
    ack(&high, &all).await;
    low.close().await.unwrap();
    high.close().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn the_validated_user_can_be_read_and_outlives_a_delay() {
    let queue = Queue::declare("user", Kind::Classic, &[]).await;
    let user = url::Url::parse(&url()).unwrap();
    let user = match user.username() {
        "" => "guest",
        user => user,
    };
    let sink = queue.sink("");
    let message = numbered(0).with_attribute("amqp-user-id", user);
    let other = numbered(1).with_attribute("amqp-user-id", "somebody else");
    for result in sink.publish(&[message, other]).await {
        result.unwrap();
    }
    let source = queue.source("");
    let held = receive(&source, 2).await;
    let read = |delivery: &Delivery, name| delivery.message.attributes.get(name).map(str::to_owned);
    assert_eq!(read(&held[0], "amqp-user-id").as_deref(), Some(user));
    assert_eq!(read(&held[1], "amqp-user-id"), None);
    assert_eq!(
        read(&held[1], "header-amqp-user-id").as_deref(),
        Some("somebody else")
    );
    let later = Disposition::Nack {
        delay: Duration::from_millis(100),
    };
    for answer in settle(&source, &held, &later).await {
        assert!(answer.is_applied(), "{answer:?}");
    }
    let mut again = receive(&source, 2).await;
    again.sort_by_key(|delivery| delivery.message.dedup_id.clone());
    for name in ["amqp-user-id", "header-amqp-user-id"] {
        assert_eq!(read(&again[0], name), read(&held[0], name));
        assert_eq!(read(&again[1], name), read(&held[1], name));
    }
    ack(&source, &again).await;
    sink.close().await.unwrap();
    source.close().await.unwrap();
}

/// A consumer that somebody else holds exclusively may end: no reason to give up.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn somebody_elses_exclusive_consumer_is_waited_for() {
    let queue = Queue::declare("exclusive", Kind::Classic, &[]).await;
    let exclusive = BasicConsumeOptions {
        exclusive: true,
        ..Default::default()
    };
    let name = queue.name.as_str();
    let consume = queue.channel.basic_consume(
        name.into(),
        "other".into(),
        exclusive,
        FieldTable::default(),
    );
    let consumer = consume.await.unwrap();
    let source = queue.source("");
    let error = receive_error(&source).await;
    assert!(error.is_retryable(), "{error}");
    queue
        .channel
        .basic_cancel("other".into(), Default::default())
        .await
        .unwrap();
    drop(consumer);
    queue.fill(1).await;
    assert_eq!(drain(&source, 1).await, ["0"]);
    source.close().await.unwrap();
}

/// Found only with the first dead letter, its message would run again every minute until then.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_dead_letter_queue_that_does_not_exist_is_found_at_the_start() {
    let queue = Queue::declare("letters", Kind::Quorum, &[]).await;
    let url = url();
    let run = async |sink: RabbitSink| {
        Pipeline::at_least_once(queue.source(""))
            .dead_letter(sink)
            .run(async |_: bytes::Bytes| {})
            .await
            .unwrap_err()
    };
    for to in [
        "queue=no.such.queue",
        "exchange=no.such.exchange&routing_key=k",
    ] {
        let sink = RabbitSink::new(format!("{url}?{to}").parse().unwrap()).unwrap();
        let error = run(sink).await;
        assert_eq!(error.error.kind(), ErrorKind::NotFound, "{error}");
        assert!(
            !error.error.is_retryable() && error.to_string().contains("no.such"),
            "{error}"
        );
    }
    let own = run(queue.sink("")).await;
    assert!(own.to_string().contains("OwnDeadLetters"), "{own}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_sink_that_was_checked_publishes() {
    let queue = Queue::declare("checked", Kind::Classic, &[]).await;
    let sink = queue.sink("");
    let identity = queue.source("").queue_info().await.unwrap().identity;
    assert!(identity.is_some());
    assert_eq!(sink.sink_info().await.unwrap().identity, identity);
    sink.publish(&[Message::new("x")])
        .await
        .pop()
        .unwrap()
        .unwrap();
    sink.sink_info().await.unwrap();
    let exchange = format!("{}?exchange=amq.direct&routing_key=k", url());
    let exchange = RabbitSink::new(exchange.parse().unwrap()).unwrap();
    assert_eq!(exchange.sink_info().await.unwrap().identity, None);
}
