//! What the network can do between a worker and a live broker: `./tests/run rabbitmq`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::common::*;
use bytes::Bytes;
use lapin::types::AMQPValue;
use onlyonce_core::driver::{Disposition, SettleResult, Sink as _, Source as _};
use onlyonce_core::memory::{MemoryStore, MemoryTx};
use onlyonce_core::{ConfigRisk, Counters, ErrorKind, Message, Pipeline, Report, RunError};
use onlyonce_rabbitmq::{Config, RabbitSink, RabbitSource};
use onlyonce_testkit::proxy::{Direction, Fault, Side, Storm};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use Direction::{ToClient, ToServer};

/// A client that soon notices what is wrong.
const QUICK: &str = "&heartbeat=1s&timeout=2s";

/// Longer than any test of one fault takes; a storm leaves long pauses between attempts to connect.
const LONG: Duration = Duration::from_secs(90);

/// A transactional pipeline in a task of its own. Its effects are the bodies of the messages.
struct Worker {
    store: MemoryStore,
    counters: Arc<Counters>,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<Report, RunError>>,
}

impl Worker {
    fn start(config: Config) -> Self {
        Self::with(config, MemoryStore::new())
    }

    fn with(config: Config, store: MemoryStore) -> Self {
        let source = RabbitSource::new(config).unwrap();
        let (stop, stopped) = oneshot::channel();
        let pipeline = Pipeline::transactional(source, store.clone())
            .allow(ConfigRisk::StoreForgets)
            .allow(ConfigRisk::NoDeadLetter)
            .allow(ConfigRisk::GivesUp)
            .claim_lease(Duration::from_secs(5))
            .shutdown(async {
                let _ = stopped.await;
            });
        Self {
            store,
            counters: pipeline.counters(),
            stop,
            running: tokio::spawn(pipeline.run(record)),
        }
    }

    async fn until_effects(&self, many: usize) {
        let effects = || self.store.effects().len();
        until(|| effects() >= many, || format!("{} of {many}", effects())).await;
    }

    /// Stops it, and asserts that each of the messages took effect once and nothing is left of them.
    async fn finish(self, queue: &Queue, many: usize) -> Report {
        self.stop.send(()).unwrap();
        let report = timeout(LONG, self.running).await.unwrap().unwrap().unwrap();
        settle_duplicates(&self.store, queue).await;
        let mut effects: Vec<usize> = self.store.effects().iter().map(number).collect();
        effects.sort_unstable();
        assert_eq!(effects, (0..many).collect::<Vec<_>>());
        queue.assert_left(0).await;
        report
    }
}

/// Acks that vanished leave messages that come back when the broker has noticed, which can be after the worker stopped.
async fn settle_duplicates(store: &MemoryStore, queue: &Queue) {
    let source = RabbitSource::new(queue.config("")).unwrap();
    let duplicates = Pipeline::transactional(source, store.clone())
        .allow(ConfigRisk::StoreForgets)
        .allow(ConfigRisk::NoDeadLetter)
        .stop_when_idle(Duration::from_secs(1));
    timeout(LONG, duplicates.run(record))
        .await
        .unwrap()
        .unwrap();
}

async fn record(body: Bytes, tx: &mut MemoryTx) {
    // So that there is always something under way.
    sleep(Duration::from_millis(fastrand::u64(..5))).await;
    tx.push(body);
}

/// The number that a padded body begins with.
fn number(body: &Bytes) -> usize {
    let text = std::str::from_utf8(body).unwrap();
    text.split('.').next().unwrap().parse().unwrap()
}

/// A numbered message of about `size` bytes.
fn padded(n: usize, size: usize) -> Message {
    Message::new(format!("{n}.{}", "x".repeat(size))).with_dedup_id(n.to_string())
}

async fn until(is: impl Fn() -> bool, state: impl Fn() -> String) {
    let deadline = Instant::now() + LONG;
    while !is() {
        assert!(
            Instant::now() < deadline,
            "it never came to it: {}",
            state()
        );
        sleep(Duration::from_millis(10)).await;
    }
}

async fn publish(sink: &RabbitSink, messages: impl IntoIterator<Item = Message>) {
    let messages: Vec<_> = messages.into_iter().collect();
    for result in sink.publish(&messages).await {
        result.unwrap();
    }
}

/// Publishes each, again and again until it is confirmed.
async fn publish_at_last(sink: &RabbitSink, mut messages: Vec<Message>) {
    let deadline = Instant::now() + LONG;
    while !messages.is_empty() {
        let results = sink.publish(&messages).await;
        let mut results = results.into_iter();
        messages.retain(|_| match results.next().unwrap() {
            Ok(()) => false,
            Err(error) => {
                assert!(error.is_retryable() && Instant::now() < deadline, "{error}");
                true
            }
        });
    }
}

fn source_through(proxy: &Proxy, queue: &Queue, more: &str) -> RabbitSource {
    RabbitSource::new(through(proxy, &queue.name, more)).unwrap()
}

fn sink_through(proxy: &Proxy, queue: &Queue, more: &str) -> RabbitSink {
    RabbitSink::new(through(proxy, &queue.name, more)).unwrap()
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn acks_that_vanish_are_made_up_for_by_duplicates() {
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("lostacks", kind, &[]).await;
        let (proxy, sink) = (proxy().await, queue.sink(""));
        let worker = Worker::start(through(&proxy, &queue.name, ""));
        publish(&sink, [numbered(0)]).await;
        worker.until_effects(1).await;
        proxy.set(ToServer, Fault::BlackHole);
        publish(&sink, (1..101).map(numbered)).await;
        let settled = || worker.counters.report().settled;
        until(|| settled() == 101, || format!("{} settled", settled())).await;
        until(|| proxy.swallowed(ToServer) > 0, || "no ack came".into()).await;
        proxy.heal();
        proxy.cut(End::Reset).await;
        let duplicates = || worker.counters.report().duplicates;
        until(|| duplicates() >= 100, || format!("{} again", duplicates())).await;
        worker.finish(&queue, 101).await;
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_half_open_connection_is_noticed_and_everything_comes_again() {
    for (kind, gone) in [
        (Kind::Classic, Side::Server),
        (Kind::Quorum, Side::Server),
        (Kind::Classic, Side::Client),
        (Kind::Quorum, Side::Client),
    ] {
        let queue = Queue::declare("halfopen", kind, &[]).await;
        let proxy = proxy().await;
        queue.fill(20).await;
        let source = source_through(&proxy, &queue, QUICK);
        let held = receive(&source, 20).await;
        let begun = Instant::now();
        proxy.half_open(gone).await;
        let lost = held[0].lease.lost.as_ref().unwrap();
        timeout(PATIENCE, lost.cancelled()).await.unwrap();
        // The broker, if nobody tells it, takes as long as a client to find out.
        let again = receive(&source, 20).await;
        assert!(begun.elapsed() < Duration::from_secs(10), "{gone:?}");
        assert_eq!(sorted(bodies(&again)), sorted(numbers(0..20)));
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
async fn a_pipeline_outlives_half_open_connections() {
    for gone in [Side::Server, Side::Client] {
        let queue = Queue::declare("halfopenpipe", Kind::Quorum, &[]).await;
        let (proxy, sink) = (proxy().await, queue.sink(""));
        let worker = Worker::start(through(&proxy, &queue.name, QUICK));
        publish(&sink, (0..2_000).map(numbered)).await;
        worker.until_effects(50).await;
        proxy.half_open(gone).await;
        worker.until_effects(2_000).await;
        worker.finish(&queue, 2_000).await;
    }
}

/// The confirmations vanish, or the messages.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn an_unconfirmed_publish_is_an_error_in_time_and_a_retry_loses_nothing() {
    for (direction, stored) in [(ToClient, true), (ToServer, false)] {
        let queue = Queue::declare("unconfirmed", Kind::Quorum, &[]).await;
        let proxy = proxy().await;
        let sink = sink_through(&proxy, &queue, "&timeout=2s");
        publish(&sink, [numbered(0)]).await;
        proxy.set(direction, Fault::BlackHole);
        let begun = Instant::now();
        let error = sink.publish(&[numbered(1)]).await.remove(0).unwrap_err();
        assert_eq!(
            (error.kind(), error.is_retryable()),
            (ErrorKind::Timeout, true),
            "{error}"
        );
        let took = begun.elapsed();
        assert!(took >= Duration::from_secs(2), "{took:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
        proxy.heal();
        publish(&sink, [numbered(1)]).await;
        sink.close().await.unwrap();
        let worker = Worker::start(queue.config(""));
        worker.until_effects(2).await;
        let duplicates = || worker.counters.report().duplicates;
        let expected = u64::from(stored);
        until(|| duplicates() == expected, || format!("{}", duplicates())).await;
        worker.finish(&queue, 2).await;
    }
}

/// Long before the time-out of the confirmation.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_publish_into_a_dead_connection_ends_with_its_heartbeats() {
    for direction in [ToClient, ToServer] {
        let queue = Queue::declare("deadpublish", Kind::Classic, &[]).await;
        let proxy = proxy().await;
        let sink = sink_through(&proxy, &queue, "&heartbeat=1s&timeout=60s");
        publish(&sink, [numbered(0)]).await;
        proxy.set(direction, Fault::BlackHole);
        let begun = Instant::now();
        let error = sink.publish(&[numbered(1)]).await.remove(0).unwrap_err();
        assert_eq!(
            (error.kind(), error.is_retryable()),
            (ErrorKind::Connection, true),
            "{error}"
        );
        assert!(begun.elapsed() < Duration::from_secs(10), "{direction:?}");
        proxy.heal();
        publish(&sink, [numbered(1)]).await;
        sink.close().await.unwrap();
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_delivery_cut_in_the_middle_of_a_frame_comes_again() {
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("midframe", kind, &[]).await;
        let (proxy, sink) = (proxy().await, queue.sink(""));
        let worker = Worker::start(through(&proxy, &queue.name, ""));
        publish(&sink, (0..20).map(|n| padded(n, 1_000))).await;
        worker.until_effects(20).await;
        let mut sent = 20;
        // In a frame's header, in the headers of a message, in a body, at the end of it all.
        for n in [0, 1, 5, 7, 8, 60, 120, 500, 2_500, 15_000, 20_000] {
            let connections = proxy.accepted();
            proxy.set(ToClient, Fault::Truncate(n));
            publish(&sink, (sent..sent + 20).map(|n| padded(n, 1_000))).await;
            sent += 20;
            worker.until_effects(sent).await;
            assert!(proxy.accepted() > connections, "nothing was cut at {n}");
        }
        worker.finish(&queue, sent).await;
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn acks_and_publishes_cut_in_the_middle_of_a_frame_lose_nothing() {
    let queue = Queue::declare("midack", Kind::Quorum, &[]).await;
    let proxy = proxy().await;
    let sink = sink_through(&proxy, &queue, QUICK);
    let worker = Worker::start(through(&proxy, &queue.name, ""));
    publish(&sink, (0..20).map(numbered)).await;
    worker.until_effects(20).await;
    let mut sent = 20;
    // An ack has 21 bytes; a publish begins with about 40 before its header.
    for n in (0..24).chain([45, 70, 100, 500, 1_500]) {
        let connections = proxy.accepted();
        proxy.set(ToServer, Fault::Truncate(n));
        let batch = (sent..sent + 20).map(numbered).collect();
        publish_at_last(&sink, batch).await;
        sent += 20;
        worker.until_effects(sent).await;
        assert!(proxy.accepted() > connections, "nothing was cut at {n}");
    }
    sink.close().await.unwrap();
    worker.finish(&queue, sent).await;
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_throttled_link_is_slow_and_nothing_else() {
    let queue = Queue::declare("throttled", Kind::Quorum, &[]).await;
    let proxy = proxy().await;
    let more = "&heartbeat=1s";
    let sink = sink_through(&proxy, &queue, more);
    let worker = Worker::start(through(&proxy, &queue.name, more));
    publish(&sink, [numbered(0)]).await;
    worker.until_effects(1).await;
    let connections = proxy.accepted();
    for direction in [ToServer, ToClient] {
        proxy.set(direction, Fault::Throttle(30_000));
    }
    // 120 kB there and as much back, beside each other: at least 4 s.
    let begun = Instant::now();
    publish(&sink, (1..241).map(|n| padded(n, 400))).await;
    worker.until_effects(241).await;
    let took = begun.elapsed();
    assert!(took >= Duration::from_secs(3), "not throttled: {took:?}");
    assert_eq!(proxy.accepted(), connections, "no connection was given up");
    proxy.heal();
    sink.close().await.unwrap();
    worker.finish(&queue, 241).await;
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_delay_beyond_every_time_out_is_an_error_until_it_is_over() {
    let queue = Queue::declare("delayed", Kind::Quorum, &[]).await;
    let proxy = proxy().await;
    let more = "&heartbeat=1s&timeout=1s";
    let sink = sink_through(&proxy, &queue, more);
    let worker = Worker::start(through(&proxy, &queue.name, more));
    publish_at_last(&sink, vec![numbered(0)]).await;
    worker.until_effects(1).await;
    let connections = proxy.accepted();
    proxy.set(ToClient, Fault::Delay(Duration::from_secs(3)));
    // Twice: on the connection that there is, and on a new one.
    for _ in 0..2 {
        let begun = Instant::now();
        let error = sink.publish(&[numbered(1)]).await.remove(0).unwrap_err();
        assert!(error.is_retryable(), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{error}");
    }
    let source = source_through(&proxy, &queue, more);
    let error = loop {
        if let Err(error) = source.receive(limit(1)).await {
            break error;
        }
    };
    assert!(error.is_retryable(), "{error}");
    source.close().await.unwrap();
    assert!(proxy.accepted() > connections + 2, "they try again");
    proxy.heal();
    publish_at_last(&sink, (1..50).map(numbered).collect()).await;
    worker.until_effects(50).await;
    sink.close().await.unwrap();
    worker.finish(&queue, 50).await;
}

/// A delay within the time-outs costs time alone.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_distant_broker_is_no_reason_to_give_up() {
    let queue = Queue::declare("distant", Kind::Quorum, &[]).await;
    let proxy = proxy().await;
    for direction in [ToServer, ToClient] {
        proxy.set(direction, Fault::Delay(Duration::from_millis(150)));
    }
    let sink = sink_through(&proxy, &queue, "&heartbeat=1s");
    let worker = Worker::start(through(&proxy, &queue.name, "&heartbeat=1s"));
    publish(&sink, [numbered(0)]).await;
    worker.until_effects(1).await;
    let connections = proxy.accepted();
    for n in 0..10 {
        publish(&sink, (n * 100 + 1..n * 100 + 101).map(numbered)).await;
    }
    worker.until_effects(1_001).await;
    assert_eq!(proxy.accepted(), connections, "no connection was given up");
    sink.close().await.unwrap();
    worker.finish(&queue, 1_001).await;
}

const GROUPS: usize = 40;
const ROUNDS: usize = 50;

/// Publishes a message of each group per round, and none before the one ahead of it in its group is confirmed.
async fn publish_rounds(sink: &RabbitSink, rounds: Range<usize>) {
    for round in rounds {
        let message = |group: usize| {
            let n = round * GROUPS + group;
            numbered(n).with_group(group.to_string())
        };
        publish_at_last(sink, (0..GROUPS).map(message).collect()).await;
        // Spread over the storm.
        sleep(Duration::from_millis(200)).await;
    }
}

/// With a single active consumer, since the broker keeps the consumer of a connection that nobody told it is gone, for as
/// long as the heartbeats allow, while there is another one already.
fn ordered(kind: Kind) -> Vec<(&'static str, AMQPValue)> {
    let single = ("x-single-active-consumer", AMQPValue::Boolean(true));
    // By default RabbitMQ 4 gives up on a message after 20 connections.
    let patient = ("x-delivery-limit", AMQPValue::LongInt(1_000));
    match kind {
        Kind::Classic => vec![single],
        Kind::Quorum => vec![single, patient],
    }
}

fn assert_groups_in_order(store: &MemoryStore) {
    let mut last = BTreeMap::new();
    for effect in store.effects() {
        let n = number(&effect);
        let before = last.insert(n % GROUPS, n);
        assert!(
            before.is_none_or(|before| before < n),
            "{before:?} and then {n}"
        );
    }
}

fn seed() -> u64 {
    let seed = std::env::var("ONLYONCE_SEED").map_or_else(
        |_| fastrand::u64(..),
        |seed| seed.parse().expect("ONLYONCE_SEED is a number"),
    );
    eprintln!("to replay this storm: ONLYONCE_SEED={seed}");
    seed
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_storm_of_faults_loses_doubles_and_reorders_nothing_in_a_classic_queue() {
    storm(Kind::Classic).await;
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_storm_of_faults_loses_doubles_and_reorders_nothing_in_a_quorum_queue() {
    storm(Kind::Quorum).await;
}

/// All faults one after another while two workers handle messages in groups, one after the other since only one of them
/// is the active consumer: each message takes effect once, in the order of its group.
async fn storm(kind: Kind) {
    let seed = seed();
    let queue = Queue::declare("storm", kind, &ordered(kind)).await;
    let proxy = proxy().await;
    let more = "&heartbeat=1s&timeout=1s&group_header=x-group&prefetch=100";
    let store = MemoryStore::new();
    let worker = || Worker::with(through(&proxy, &queue.name, more), store.clone());
    let workers = [worker(), worker()];
    let sink = sink_through(&proxy, &queue, more);
    let (longest, lasting) = (Duration::from_millis(600), Duration::from_secs(15));
    let storm = Storm::new(seed).rage(&proxy, lasting, longest);
    tokio::join!(publish_rounds(&sink, 0..ROUNDS - 1), storm);
    // One more, so that the workers are seen to be connected again.
    publish_rounds(&sink, ROUNDS - 1..ROUNDS).await;
    sink.close().await.unwrap();
    workers[0].until_effects(GROUPS * ROUNDS).await;
    assert_groups_in_order(&store);
    for worker in workers {
        let report = worker.finish(&queue, GROUPS * ROUNDS).await;
        eprintln!("{kind:?}: {report:?}");
    }
    eprintln!("{kind:?}: {} connections", proxy.accepted());
}
