//! What goes back to the queue: nothing is lost by it, groups stay in order, and the counts are the broker's own.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::*;
use lapin::BasicProperties;
use lapin::options::BasicPublishOptions;
use lapin::types::{AMQPValue, FieldTable};
use onlyonce_core::driver::{Disposition, Sink as _, Source as _};
use onlyonce_core::memory::MemoryStore;
use onlyonce_core::{ConfigRisk, ErrorKind, Failure, Message, Pipeline, RetryPolicy};
use onlyonce_rabbitmq::RabbitSource;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

const KINDS: [Kind; 2] = [Kind::Classic, Kind::Quorum];
const NACK: Disposition = Disposition::Nack {
    delay: Duration::ZERO,
};
/// More than RabbitMQ 4 forgives: it deletes at the 21st.
const RETURNS: usize = 25;

fn single() -> (&'static str, AMQPValue) {
    ("x-single-active-consumer", AMQPValue::Boolean(true))
}

/// As a queue has to be where the order is kept, on every version: a high limit, which is not reached here.
fn ordered(kind: Kind) -> Vec<(&'static str, AMQPValue)> {
    let limit = ("x-delivery-limit", AMQPValue::LongInt(1_000));
    match kind {
        Kind::Classic => vec![single()],
        Kind::Quorum => vec![single(), limit],
    }
}

fn in_group(n: usize) -> Message {
    numbered(n).with_group("g")
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn nothing_is_lost_when_workers_die_with_all_they_hold() {
    for kind in KINDS {
        let queue = Queue::declare("dying", kind, &[]).await;
        let proxy = proxy().await;
        queue.fill(60).await;
        for _ in 0..RETURNS {
            die_with_all(&proxy, &queue, "").await;
        }
        let source = queue.source("");
        assert_eq!(distinct(&source).await, sorted(numbers(0..60)), "{kind:?}");
        source.close().await.unwrap();
        queue.assert_left(0).await;
    }
}

/// Receives and acks until nothing comes for a while; each body once, since a worker can die between a copy and the ack of
/// its original.
async fn distinct(source: &RabbitSource) -> Vec<String> {
    let mut all = BTreeSet::new();
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_secs(5) {
        let some = source.receive(limit(100)).await.unwrap();
        if !some.is_empty() {
            last = Instant::now();
        }
        ack(source, &some).await;
        all.extend(bodies(&some));
    }
    all.into_iter().collect()
}

/// A worker that loses its connection, and never comes back, while it holds what the broker had.
async fn die_with_all(proxy: &Proxy, queue: &Queue, more: &str) {
    let source = RabbitSource::new(through(proxy, &queue.name, more)).unwrap();
    receive(&source, 1).await;
    proxy.cut(End::Reset).await;
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn nothing_is_lost_when_workers_stop_with_all_they_hold() {
    // More than the rounds handle, however slow the machine is to stop one.
    const MESSAGES: usize = 1_000;
    for kind in KINDS {
        let queue = Queue::declare("stopping", kind, &[]).await;
        queue.fill(MESSAGES).await;
        let mut seen = Vec::new();
        for _ in 0..RETURNS {
            let (handled, report) = work(queue.source(""), Duration::from_millis(20)).await;
            report.unwrap();
            seen.extend(handled);
        }
        let source = queue.source("");
        let left = queue_size(&queue).await;
        seen.extend(drain(&source, left).await);
        seen.sort_by_key(|body| body.parse::<usize>().unwrap());
        seen.dedup();
        assert_eq!(seen, numbers(0..MESSAGES), "{kind:?}");
        source.close().await.unwrap();
    }
}

/// How many messages there are once nobody holds any.
async fn queue_size(queue: &Queue) -> usize {
    let mut size = queue.waiting().await;
    loop {
        sleep(Duration::from_millis(300)).await;
        let now = queue.waiting().await;
        if now == size {
            return usize::try_from(size).unwrap();
        }
        size = now;
    }
}

/// A pipeline whose handler takes 20 ms a message and never fails, stopped a while after the first; what it handled, in
/// order.
async fn work(
    source: RabbitSource,
    lasting: Duration,
) -> (Vec<String>, Result<(), onlyonce_core::Error>) {
    let handled = Arc::new(Mutex::new(Vec::new()));
    let (stop, stopped) = oneshot::channel::<()>();
    let handler = {
        let handled = handled.clone();
        move |body: bytes::Bytes| {
            let handled = handled.clone();
            async move {
                sleep(Duration::from_millis(20)).await;
                let body = String::from_utf8_lossy(&body).into_owned();
                handled.lock().unwrap().push(body);
            }
        }
    };
    let pipeline = Pipeline::at_least_once(source)
        .allow(ConfigRisk::NoDeadLetter)
        .allow(ConfigRisk::GivesUp)
        .concurrency(1)
        .shutdown(async {
            let _ = stopped.await;
        });
    let running = tokio::spawn(pipeline.run(handler));
    let deadline = Instant::now() + PATIENCE;
    while handled.lock().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "nothing came");
        sleep(Duration::from_millis(5)).await;
    }
    sleep(lasting).await;
    let _ = stop.send(());
    let report = timeout(PATIENCE, running).await.unwrap().unwrap();
    let handled = std::mem::take(&mut *handled.lock().unwrap());
    (
        handled,
        report.map(drop).map_err(onlyonce_core::Error::from),
    )
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_pipeline_that_stops_with_a_group_waiting_keeps_its_order() {
    for kind in KINDS {
        let queue = Queue::declare("stops", kind, &ordered(kind)).await;
        queue.fill(100).await;
        let mut handled = Vec::new();
        while handled.len() < 100 {
            let source = queue.source("&single_active_consumer=true");
            let (more, report) = work(source, Duration::from_millis(150)).await;
            report.unwrap();
            handled.extend(more);
        }
        assert_eq!(handled, numbers(0..100), "{kind:?}");
        queue.assert_left(0).await;
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_head_that_goes_back_while_its_group_is_held_comes_first_again() {
    for kind in KINDS {
        let queue = Queue::declare("head", kind, &ordered(kind)).await;
        let sink = queue.sink("&group_header=x-group");
        let messages: Vec<_> = (0..30).map(in_group).collect();
        for result in sink.publish(&messages).await {
            result.unwrap();
        }
        let source = queue.source("&group_header=x-group&prefetch=20");
        for round in 0..5 {
            let held = receive(&source, 10).await;
            assert_eq!(bodies(&held), numbers(round..round + 10), "{kind:?}");
            ack(&source, &held[..1]).await;
            // Last first, and not even all of them.
            for delivery in held[1..8].iter().rev() {
                settle(&source, std::slice::from_ref(delivery), &NACK).await;
            }
            let lost = held[1].lease.lost.as_ref().unwrap();
            timeout(PATIENCE, lost.cancelled()).await.unwrap();
        }
        assert_eq!(drain(&source, 25).await, numbers(5..30), "{kind:?}");
        source.close().await.unwrap();
        queue.assert_left(0).await;
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_message_that_nobody_settles_in_time_goes_back_whatever_the_broker_does() {
    for kind in KINDS {
        let queue = Queue::declare("late", kind, &[]).await;
        queue.fill(5).await;
        // The broker's own time-out is half an hour.
        let source = queue.source("&consumer_timeout=1s&prefetch=3");
        let held = receive(&source, 3).await;
        ack(&source, &held[..1]).await;
        let lost = held[1].lease.lost.as_ref().unwrap();
        timeout(PATIENCE, lost.cancelled()).await.unwrap();
        assert!(Instant::now() >= held[1].lease.until.unwrap());
        let mut rest = drain(&source, 4).await;
        rest.sort();
        assert_eq!(rest, numbers(1..5), "{kind:?}");
        source.close().await.unwrap();
    }
}

/// Publishes one message with these headers as they are.
async fn publish_with(queue: &Queue, headers: &[(&str, AMQPValue)]) {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        table.insert((*name).into(), value.clone());
    }
    let properties = BasicProperties::default()
        .with_message_id("m".into())
        .with_headers(table);
    let options = BasicPublishOptions::default();
    let key = queue.name.as_str().into();
    let published = queue
        .channel
        .basic_publish("".into(), key, options, b"m", properties);
    published.await.unwrap().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn counts_that_a_producer_wrote_are_not_believed() {
    for kind in KINDS {
        let queue = Queue::declare("counts", kind, &[]).await;
        let forged = ["x-delivery-count", "x-acquired-count"];
        publish_with(&queue, &forged.map(|name| (name, AMQPValue::LongInt(20)))).await;
        let source = queue.source("");
        let mut attempts = Vec::new();
        for _ in 0..3 {
            let held = receive(&source, 1).await;
            attempts.push(held[0].attempt);
            settle(&source, &held, &NACK).await;
        }
        let expected = match kind {
            Kind::Classic => [None; 3],
            Kind::Quorum => [Some(1), Some(2), Some(3)],
        };
        assert_eq!(attempts, expected, "{kind:?}");
        source.close().await.unwrap();
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn what_another_queue_gave_up_on_begins_anew_and_is_not_lost() {
    let dead = Queue::declare("dead", Kind::Quorum, &[]).await;
    let text = |text: &str| AMQPValue::LongString(text.into());
    let more = [
        ("x-delivery-limit", AMQPValue::LongInt(1)),
        ("x-dead-letter-exchange", text("")),
        ("x-dead-letter-routing-key", text(&dead.name)),
    ];
    let queue = Queue::declare("giving-up", Kind::Quorum, &more).await;
    queue.fill(3).await;
    let proxy = proxy().await;
    let source = queue.source("");
    // The limit is too low for a copy to take a message's place in time.
    let why = source.queue_info().await.unwrap().gives_up.unwrap();
    assert!(
        why.contains("delivery limit of 1") && why.contains("moves it"),
        "{why}"
    );
    for _ in 0..2 {
        die_with_all(&proxy, &queue, "").await;
    }
    let deadline = Instant::now() + PATIENCE;
    while dead.waiting().await < 3 {
        assert!(Instant::now() < deadline, "they are not given up");
        sleep(Duration::from_millis(50)).await;
    }
    let source = dead.source("");
    let held = receive(&source, 3).await;
    for delivery in &held {
        assert_eq!(delivery.attempt, Some(1));
    }
    source.close().await.unwrap();
    for _ in 0..RETURNS {
        die_with_all(&proxy, &dead, "").await;
    }
    let source = dead.source("");
    assert_eq!(distinct(&source).await, numbers(0..3));
    source.close().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_queue_that_cannot_keep_its_promise_is_refused_with_what_to_set() {
    let stream = Queue::declare("stream", Kind::Classic, &[]).await;
    stream.delete().await;
    stream.declare_stream().await;
    let classic = Queue::declare("plain", Kind::Classic, &[]).await;
    for (queue, more, word) in [
        (&stream, "", "stream"),
        (&classic, "&quorum=true", "classic"),
        (
            &classic,
            "&single_active_consumer=true",
            "x-single-active-consumer",
        ),
    ] {
        let source = queue.source(more);
        let received = receive_error(&source).await;
        let inspected = source.queue_info().await.unwrap_err();
        for error in [received, inspected] {
            assert_eq!(error.kind(), ErrorKind::Config, "{error}");
            assert!(
                !error.is_retryable() && error.to_string().contains(word),
                "{error}"
            );
        }
    }
    stream.delete().await;

    let low = [single(), ("x-delivery-limit", AMQPValue::LongInt(20))];
    let limited = Queue::declare("limited", Kind::Quorum, &low).await;
    let source = limited.source("&single_active_consumer=true");
    let info = source.queue_info().await.unwrap();
    let why = info.gives_up.unwrap();
    assert!(
        why.contains("x-delivery-limit") && why.contains("deletes it"),
        "{why}"
    );
    let settings = |name: &str| {
        let found = info.settings.iter().find(|(it, _)| it == name);
        found.map(|(_, value)| value.as_str())
    };
    assert_eq!(settings("x-delivery-limit"), Some("20"));
    assert_eq!(settings("x-queue-type"), Some("quorum"));
    let pipeline = Pipeline::at_least_once(source).allow(ConfigRisk::NoDeadLetter);
    let error = pipeline.run(async |_: bytes::Bytes| {}).await.unwrap_err();
    assert!(error.to_string().contains("ConfigRisk::GivesUp"), "{error}");
    // A message that has no successors can be renewed.
    assert_eq!(
        limited.source("").queue_info().await.unwrap().gives_up,
        None
    );
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_queue_that_is_deleted_is_waited_for_where_the_url_says_so() {
    let queue = Queue::declare("again", Kind::Classic, &[]).await;
    queue.fill(1).await;
    let (patient, other) = (queue.source("&wait_for_queue=true"), queue.source(""));
    assert_eq!(drain(&patient, 1).await, numbers(0..1));
    queue.delete().await;
    let gone = |error: &onlyonce_core::Error| error.kind() == ErrorKind::NotFound;
    let error = other.queue_info().await.unwrap_err();
    assert!(gone(&error) && !error.is_retryable(), "{error}");
    let error = patient.queue_info().await.unwrap_err();
    assert!(gone(&error) && error.is_retryable(), "{error}");
    sleep(Duration::from_secs(1)).await;
    queue.declare_again(Kind::Classic, &[]).await;
    queue.fill(2).await;
    assert_eq!(drain(&patient, 2).await, numbers(0..2));
    patient.close().await.unwrap();
}

/// What cannot be had on RabbitMQ is said and counted: a group that fails fills the prefetch, and the others wait.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_group_that_fills_the_prefetch_is_counted() {
    let queue = Queue::declare("stalls", Kind::Classic, &[]).await;
    let source = Arc::new(queue.source("&group_header=x-group&prefetch=5"));
    let sink = queue.sink("&group_header=x-group");
    let messages: Vec<_> = (0..10)
        .map(|n| numbered(n).with_group(if n < 8 { "fails" } else { "waits" }))
        .collect();
    for result in sink.publish(&messages).await {
        result.unwrap();
    }
    let pipeline = Pipeline::idempotent(source.clone(), MemoryStore::new())
        .allow(ConfigRisk::StoreForgets)
        .retry(
            RetryPolicy::default()
                .max_attempts(1_000)
                .in_place(PATIENCE * 10),
        )
        .allow(ConfigRisk::NoDeadLetter)
        .run(|| async { Err::<(), _>(Failure::retry("always")) });
    let counted = async {
        while source.stalls() == 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        ended = pipeline => panic!("it has work: {ended:?}"),
        counted = tokio::time::timeout(PATIENCE * 4, counted) => counted.unwrap(),
    }
}
