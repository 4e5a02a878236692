//! What needs a hand on the broker itself: `./tests/run rabbitmq`. It changes the whole node, so these run one after another.

mod tls;

use std::time::Duration;

use crate::common::*;
use bytes::Bytes;
use lapin::options::BasicPublishOptions;
use lapin::{BasicProperties, Connection, ConnectionProperties};
use onlyonce_core::driver::{Disposition, SettleResult, Sink as _, Source as _};
use onlyonce_core::memory::{MemoryStore, MemoryTx};
use onlyonce_core::{ConfigRisk, Context, Counters, ErrorKind, Failure, Pipeline, RetryPolicy};
use tokio::sync::{Mutex, oneshot};
use tokio::time::{Instant, sleep, timeout};

static NODE: Mutex<()> = Mutex::const_new(());

/// Sets the acknowledgement time-out of new channels, and how often it is looked at.
fn set_consumer_timeout(millis: u32, tick: u32) {
    let eval = format!(
        "application:set_env(rabbit, consumer_timeout, {millis}), application:set_env(rabbit, channel_tick_interval, {tick})."
    );
    ctl(&["eval", &eval]);
}

/// Puts the broker's defaults back, whatever the test came to.
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        set_consumer_timeout(1_800_000, 60_000);
    }
}

/// A memory alarm, until it is dropped: the broker reads nothing more from connections that publish.
struct Alarm;

impl Alarm {
    async fn raise() -> Self {
        let alarm = Self;
        ctl(&["set_vm_memory_high_watermark", "0.0001"]);
        let (url, properties) = (url(), ConnectionProperties::default());
        let connection = Connection::connect(&url, properties).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let deadline = Instant::now() + PATIENCE;
        while !connection.status().blocked() {
            assert!(Instant::now() < deadline, "no alarm");
            // To no queue.
            let (options, none) = (BasicPublishOptions::default(), BasicProperties::default());
            let publish = channel.basic_publish("".into(), "none".into(), options, b"", none);
            publish.await.unwrap();
            sleep(Duration::from_millis(100)).await;
        }
        alarm
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        ctl(&["set_vm_memory_high_watermark", "0.4"]);
    }
}

/// Longer than any time-out and heartbeat in [`SHORT`].
const ALARM: Duration = Duration::from_secs(12);
const SHORT: &str = "&timeout=1s&heartbeat=1s";

async fn until(counters: &Counters, is: impl Fn(onlyonce_core::Report) -> bool) {
    let deadline = Instant::now() + 2 * PATIENCE;
    while !is(counters.report()) {
        assert!(Instant::now() < deadline, "{:?}", counters.report());
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn an_alarm_doubles_no_dead_letter() {
    let _node = NODE.lock().await;
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("alarm", kind, &[]).await;
        let dead = Queue::declare("alarm.dead", kind, &[]).await;
        queue.fill(10).await;
        let alarm = Alarm::raise().await;
        let (stop, stopped) = oneshot::channel::<()>();
        let source = queue.source("");
        let pipeline = Pipeline::transactional(source, MemoryStore::new())
            .allow(ConfigRisk::StoreForgets)
            .dead_letter(dead.sink(SHORT))
            .shutdown(async {
                let _ = stopped.await;
            });
        let counters = pipeline.counters();
        let fail = |_: Bytes, _: &mut MemoryTx| async { Err::<(), _>(Failure::dead_letter("no")) };
        let running = tokio::spawn(pipeline.run(fail));
        until(&counters, |report| report.failed == 10).await;
        sleep(ALARM).await;
        assert_eq!(counters.report().dead_lettered, 0, "there was no alarm");
        drop(alarm);
        until(&counters, |report| report.dead_lettered == 10).await;
        stop.send(()).unwrap();
        running.await.unwrap().unwrap();
        queue.assert_left(0).await;
        assert_settled(&dead, 10).await;
    }
}

/// Asserts that `many` messages are there, and that no more come.
async fn assert_settled(queue: &Queue, many: u32) {
    queue.assert_left(many).await;
    sleep(Duration::from_secs(2)).await;
    queue.assert_left(many).await;
}

async fn fail_first(context: Context, body: Bytes, tx: &mut MemoryTx) -> Result<(), Failure> {
    let fails = body.len() == 1;
    if fails && context.attempt == 1 {
        return Err(Failure::retry("not yet"));
    }
    tx.push(body);
    Ok(())
}

/// Nor does it hold up the acks of other messages: only publishers are blocked.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn an_alarm_doubles_no_delayed_copy() {
    let _node = NODE.lock().await;
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("alarm.delay", kind, &[]).await;
        // The first ten fail: those whose number has one digit.
        queue.fill(60).await;
        let alarm = Alarm::raise().await;
        let second = Duration::from_secs(1);
        let retry = RetryPolicy::default().delays(second, second);
        let (stop, stopped) = oneshot::channel::<()>();
        let store = MemoryStore::new();
        // It is closed at the end, on a node that may be busy.
        let source = queue.source("&timeout=4s&heartbeat=1s");
        let pipeline = Pipeline::transactional(source, store.clone())
            .allow(ConfigRisk::StoreForgets)
            .retry(retry.in_place(Duration::ZERO))
            .allow(ConfigRisk::NoDeadLetter)
            .shutdown(async {
                let _ = stopped.await;
            });
        let counters = pipeline.counters();
        let running = tokio::spawn(pipeline.run(fail_first));
        until(&counters, |report| report.settled == 50).await;
        sleep(ALARM).await;
        assert_eq!(counters.report().received, 60, "there was no alarm");
        drop(alarm);
        until(&counters, |report| report.applied == 60).await;
        assert_settled(&queue, 0).await;
        assert_eq!(counters.report().received, 70, "one copy of each");
        stop.send(()).unwrap();
        running.await.unwrap().unwrap();
        assert_eq!(store.effects().len(), 60);
        queue.assert_left(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_publish_that_is_dropped_during_an_alarm_is_made_once() {
    let _node = NODE.lock().await;
    let queue = Queue::declare("alarm.drop", Kind::Classic, &[]).await;
    let sink = queue.sink(SHORT);
    let alarm = Alarm::raise().await;
    let short = Duration::from_millis(500);
    let first = [numbered(0)];
    assert!(timeout(short, sink.publish(&first)).await.is_err());
    for _ in 0..3 {
        let error = sink.publish(&[numbered(1)]).await.remove(0).unwrap_err();
        assert_eq!(
            (error.kind(), error.is_retryable()),
            (ErrorKind::Throttled, true)
        );
        assert!(
            error.to_string().contains("memory or disk alarm"),
            "{error}"
        );
    }
    drop(alarm);
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = sink.publish(&[numbered(1)]).await.remove(0) {
        assert!(error.is_retryable() && Instant::now() < deadline, "{error}");
    }
    assert_settled(&queue, 2).await;
    sink.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn closing_during_an_alarm_ends() {
    let _node = NODE.lock().await;
    let queue = Queue::declare("alarm.close", Kind::Classic, &[]).await;
    let (sink, idle) = (queue.sink(SHORT), queue.sink(SHORT));
    assert!(idle.publish(&[numbered(0)]).await[0].is_ok());
    let alarm = Alarm::raise().await;
    let (batch, begun) = ([numbered(1)], Instant::now());
    let close = async {
        sleep(Duration::from_millis(500)).await;
        sink.close().await
    };
    let (published, closed) = tokio::join!(sink.publish(&batch), close);
    assert_eq!(closed.unwrap_err().kind(), ErrorKind::Throttled);
    assert_eq!(published[0].as_ref().unwrap_err().kind(), ErrorKind::Closed);
    idle.close().await.unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    drop(alarm);
    // What was sent is not taken back.
    assert_settled(&queue, 2).await;
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn an_overdue_message_comes_again_and_its_old_receipt_is_worthless() {
    let _node = NODE.lock().await;
    let _restore = Restore;
    set_consumer_timeout(2_000, 500);
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("overdue", kind, &[]).await;
        queue.fill(2).await;
        let source = queue.source("&consumer_timeout=2s");
        let begun = Instant::now();
        let held = receive(&source, 2).await;
        let until = held[0].lease.until.unwrap();
        // Less what the broker's clock may be ahead: it runs from when it sent them.
        assert!(until >= begun + Duration::from_millis(1_800));
        assert!(until <= Instant::now() + Duration::from_millis(1_800));
        let lost = held[0].lease.lost.as_ref().unwrap();
        timeout(PATIENCE, lost.cancelled()).await.unwrap();
        assert!(
            Instant::now() >= until,
            "the lease ended sooner than it said"
        );
        let again = receive(&source, 2).await;
        for answer in settle(&source, &held, &Disposition::Ack).await {
            assert!(matches!(answer, SettleResult::LeaseLost), "{answer:?}");
        }
        ack(&source, &again).await;
        source.close().await.unwrap();
        queue.assert_left(0).await;
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn source_and_sink_outlive_a_restart_of_the_broker() {
    let _node = NODE.lock().await;
    let queue = Queue::declare("restart", Kind::Quorum, &[]).await;
    let (source, sink) = (queue.source(""), queue.sink(""));
    assert!(sink.publish(&[numbered(0)]).await[0].is_ok());
    let held = receive(&source, 1).await;
    ctl(&["stop_app"]);
    let error = sink.publish(&[numbered(1)]).await.remove(0).unwrap_err();
    assert!(error.is_retryable(), "{error}");
    let deadline = Instant::now() + PATIENCE;
    let failed = loop {
        assert!(Instant::now() < deadline, "no error came");
        if let Err(error) = source.receive(limit(1)).await {
            break error;
        }
    };
    assert!(failed.is_retryable(), "{failed}");
    ctl(&["start_app"]);
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = sink.publish(&[numbered(1)]).await.remove(0) {
        assert!(error.is_retryable() && Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The second may be there twice: a publish whose confirmation was lost.
    let mut back = receive(&source, 2).await;
    back.dedup_by_key(|delivery| delivery.message.dedup_id.clone());
    assert_eq!(sorted(bodies(&back)), numbers(0..2));
    assert!(matches!(
        settle(&source, &held, &Disposition::Ack).await[0],
        SettleResult::LeaseLost
    ));
    source.close().await.unwrap();
    sink.close().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn connections_closed_by_the_operator_are_opened_again() {
    let _node = NODE.lock().await;
    let queue = Queue::declare("operator", Kind::Classic, &[]).await;
    queue.fill(3).await;
    let source = queue.source("");
    let held = receive(&source, 3).await;
    ctl(&["close_all_connections", "maintenance"]);
    let lost = held[0].lease.lost.as_ref().unwrap();
    timeout(PATIENCE, lost.cancelled()).await.unwrap();
    assert_eq!(sorted(drain(&source, 3).await), numbers(0..3));
    source.close().await.unwrap();
}

/// How many moments of a connection's opening are tried.
const MOMENTS: u32 = 60;

/// Whatever is dropped half-way, no connection stays, least of all one with a consumer that keeps messages to itself.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn nothing_stays_open() {
    let _node = NODE.lock().await;
    let queue = Queue::declare("open", Kind::Classic, &[]).await;
    queue.fill(5).await;
    let connections = || {
        let list = ctl(&["list_connections", "client_properties"]);
        list.matches(&queue.name).count()
    };
    let (source, began) = (queue.source(""), Instant::now());
    receive(&source, 1).await;
    let opening = began.elapsed();
    assert_eq!(connections(), 1, "it is seen");
    source.close().await.unwrap();
    // At moments all through its opening, until it has been open a few times. The heartbeat would close what was forgotten.
    let (source, sink) = (
        || queue.source("&heartbeat=600s"),
        || queue.sink("&heartbeat=600s"),
    );
    let (mut opened, deadline) = (0, Instant::now() + 4 * PATIENCE);
    for moment in 0.. {
        let why = "a consumer that was forgotten holds the messages";
        assert!(Instant::now() < deadline, "{why}");
        let short = opening * moment / MOMENTS;
        let (closed, dropped) = (source(), source());
        let got = timeout(short, closed.receive(limit(1))).await;
        closed.close().await.unwrap();
        opened += usize::from(got.is_ok());
        let _ = timeout(short, dropped.receive(limit(1))).await;
        drop(dropped);
        let sink = sink();
        let _ = timeout(short, sink.publish(&[numbered(0)])).await;
        let _ = timeout(short, sink.close()).await;
        let _ = timeout(short, source().queue_info()).await;
        if opened > 10 {
            break;
        }
    }
    queue.purge().await;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let open = connections();
        if open == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{open} connections are open");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
