//! What the network can do between a worker and a live service: `./tests/run pubsub`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use onlyonce_core::driver::{ReceiveLimits, Sink as _, Source as _};
use onlyonce_core::memory::{MemoryStore, MemoryTx};
use onlyonce_core::{ConfigRisk, Counters, ErrorKind, Message, Pipeline, Report, RunError, State};
use onlyonce_pubsub::v1::Subscription;
use onlyonce_pubsub::{Config, PubSubSink, PubSubSource};
use onlyonce_testkit::proxy::{Direction, End, Fault, Proxy, Side, Storm};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::common::{OnTheEmulator, Queue, exactly_once_and_ordered, url};

use Direction::{ToClient, ToServer};

/// The least that the service takes.
const LEASE: Duration = Duration::from_secs(10);
/// Longer than any test of one fault takes: messages come again when the longest lease has ended.
const LONG: Duration = Duration::from_secs(150);

async fn queue() -> Queue {
    let like = Subscription {
        ack_deadline_seconds: 10,
        ..exactly_once_and_ordered()
    };
    Queue::create(like).await
}

async fn proxy() -> Proxy {
    let emulator = url();
    let address = emulator.strip_prefix("http://").unwrap();
    Proxy::to(address.trim_end_matches('/')).await.unwrap()
}

fn through(proxy: &Proxy, resource: &str) -> Config {
    let mut config: Config = resource.parse().unwrap();
    config.endpoint = Some(format!("http://127.0.0.1:{}", proxy.port()));
    config.timeout = Duration::from_secs(1);
    config
}

fn source_through(proxy: &Proxy, queue: &Queue) -> PubSubSource {
    PubSubSource::new(through(proxy, &queue.subscription)).unwrap()
}

fn sink_through(proxy: &Proxy, queue: &Queue) -> PubSubSink {
    PubSubSink::new(through(proxy, &queue.topic)).unwrap()
}

fn sink(queue: &Queue) -> PubSubSink {
    let mut config: Config = queue.topic.parse().unwrap();
    config.endpoint = Some(url());
    PubSubSink::new(config).unwrap()
}

/// How long each run of a handler takes, and how many began.
#[derive(Clone)]
struct Pace {
    takes: Arc<[Duration]>,
    runs: Arc<AtomicUsize>,
    started: Arc<Notify>,
}

impl Pace {
    fn of(takes: &[Duration]) -> Self {
        Self {
            takes: takes.into(),
            runs: Arc::default(),
            started: Arc::default(),
        }
    }
}

async fn record(body: Bytes, State(pace): State<Pace>, tx: &mut MemoryTx) {
    let run = pace.runs.fetch_add(1, Ordering::Relaxed);
    pace.started.notify_one();
    tx.push(body);
    sleep(pace.takes[run.min(pace.takes.len() - 1)]).await;
}

/// A transactional pipeline in a task of its own. Its effects are the bodies of the messages.
struct Worker {
    store: MemoryStore,
    counters: Arc<Counters>,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<Report, RunError>>,
}

impl Worker {
    fn start(source: PubSubSource) -> Self {
        let pace = Pace::of(&[Duration::from_millis(2)]);
        Self::with(source, &pace, MemoryStore::new())
    }

    fn with(source: PubSubSource, pace: &Pace, store: MemoryStore) -> Self {
        let (stop, stopped) = oneshot::channel();
        let pipeline = Pipeline::transactional(OnTheEmulator(source), store.clone())
            .allow(ConfigRisk::StoreForgets)
            .allow(ConfigRisk::NoDeadLetter)
            .claim_lease(LEASE)
            .state(pace.clone())
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

    async fn until(&self, what: &str, is: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + LONG;
        while !is(self) {
            let report = self.counters.report();
            assert!(Instant::now() < deadline, "{what}: {report:?}");
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn until_effects(&self, many: usize) {
        let what = format!("{many} effects");
        self.until(&what, |worker| worker.store.effects().len() >= many)
            .await;
    }

    async fn stop(self) -> Report {
        self.stop.send(()).unwrap();
        timeout(LONG, self.running).await.unwrap().unwrap().unwrap()
    }

    /// Stops it, and asserts that each of the messages took effect once and nothing is left of them.
    async fn finish(self, queue: &Queue, many: usize) -> Report {
        let store = self.store.clone();
        let report = self.stop().await;
        settle_duplicates(&store, queue).await;
        let mut effects: Vec<usize> = store.effects().iter().map(number).collect();
        effects.sort_unstable();
        assert_eq!(effects, (0..many).collect::<Vec<_>>());
        assert!(queue.pull(100).await.unwrap().is_empty());
        report
    }
}

/// Acks that vanished leave messages that come back when their leases end, which can be after the worker stopped.
async fn settle_duplicates(store: &MemoryStore, queue: &Queue) {
    let mut config: Config = queue.subscription.parse().unwrap();
    config.endpoint = Some(url());
    let source = OnTheEmulator(PubSubSource::new(config).unwrap());
    let duplicates = Pipeline::transactional(source, store.clone())
        .allow(ConfigRisk::StoreForgets)
        .allow(ConfigRisk::NoDeadLetter)
        .state(Pace::of(&[Duration::ZERO]))
        .stop_when_idle(LEASE + Duration::from_secs(2));
    let done = timeout(LONG, duplicates.run(record)).await.unwrap();
    done.unwrap();
}

/// The number that a padded body begins with.
fn number(body: &Bytes) -> usize {
    let text = std::str::from_utf8(body).unwrap();
    text.split('.').next().unwrap().parse().unwrap()
}

/// A numbered message of about `size` bytes, one of forty groups.
fn padded(n: usize, size: usize) -> Message {
    let message = Message::new(format!("{n}.{}", "x".repeat(size)));
    message
        .with_dedup_id(n.to_string())
        .with_group((n % GROUPS).to_string())
}

fn numbered(n: usize) -> Message {
    padded(n, 0)
}

async fn publish(sink: &PubSubSink, messages: impl IntoIterator<Item = Message>) {
    let batch: Vec<Message> = messages.into_iter().collect();
    for result in sink.publish(&batch).await {
        result.unwrap();
    }
}

/// Publishes each, again and again until it is confirmed.
async fn publish_at_last(sink: &PubSubSink, mut messages: Vec<Message>) {
    let deadline = Instant::now() + LONG;
    while !messages.is_empty() {
        assert!(Instant::now() < deadline, "{} left", messages.len());
        let results = sink.publish(&messages).await;
        let failed = |error: &onlyonce_core::Error| assert!(error.is_retryable(), "{error}");
        results
            .iter()
            .filter_map(|result| result.as_ref().err())
            .for_each(failed);
        let both = messages.into_iter().zip(results);
        messages = both
            .filter_map(|(message, result)| result.err().map(|_| message))
            .collect();
    }
}

#[tokio::test]
#[ignore = "needs the Pub/Sub emulator: ./tests/run pubsub"]
async fn a_handler_of_three_ack_deadlines_finishes_once() {
    let (queue, proxy) = (queue().await, proxy().await);
    publish(&sink(&queue), [numbered(0)]).await;
    let pace = Pace::of(&[LEASE * 3]);
    let worker = Worker::with(source_through(&proxy, &queue), &pace, MemoryStore::new());
    worker.until_effects(1).await;
    let report = worker.finish(&queue, 1).await;
    assert_eq!(pace.runs.load(Ordering::Relaxed), 1, "it ran once");
    assert_eq!(
        (report.received, report.applied, report.cancelled),
        (1, 1, 0)
    );
}

#[tokio::test]
#[ignore = "needs the Pub/Sub emulator: ./tests/run pubsub"]
async fn a_handler_whose_extensions_are_blocked_is_cancelled_before_its_lease_ends() {
    let (queue, proxy) = (queue().await, proxy().await);
    publish(&sink(&queue), [numbered(0)]).await;
    let pace = Pace::of(&[LEASE * 3, Duration::ZERO]);
    let worker = Worker::with(source_through(&proxy, &queue), &pace, MemoryStore::new());
    pace.started.notified().await;
    proxy.set(ToServer, Fault::BlackHole);
    let cancelled = async {
        let is = |worker: &Worker| worker.counters.report().cancelled > 0;
        worker.until("the handler is cancelled", is).await;
        Instant::now()
    };
    let received = async {
        loop {
            if let Some(one) = queue.pull(1).await.unwrap().pop() {
                return (one.ack_id, Instant::now());
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    let (cancelled, (ack_id, received)) = tokio::join!(cancelled, received);
    // To the moment it is shown with a paused clock; a busy machine is late for both.
    assert!(
        cancelled < received + LEASE / 4,
        "{:?} after somebody else got the message",
        cancelled - received
    );
    assert!(
        worker.store.effects().is_empty(),
        "its effect must not be committed"
    );
    queue.modify_deadline(&[&ack_id], 0).await.unwrap();
    proxy.heal();
    proxy.cut(End::Reset).await;
    worker.until_effects(1).await;
    worker.finish(&queue, 1).await;
}

#[tokio::test]
#[ignore = "needs the Pub/Sub emulator: ./tests/run pubsub"]
async fn acks_that_vanish_are_made_up_for_by_duplicates() {
    let (queue, proxy) = (queue().await, proxy().await);
    publish(&sink(&queue), (0..100).map(numbered)).await;
    let slow = Pace::of(&[Duration::from_secs(2)]);
    let worker = Worker::with(source_through(&proxy, &queue), &slow, MemoryStore::new());
    slow.started.notified().await;
    proxy.set(ToServer, Fault::BlackHole);
    worker.until_effects(20).await;
    let vanished = |_: &Worker| proxy.swallowed(ToServer) > 0;
    worker.until("an ack vanishes", vanished).await;
    // Until the leases have ended.
    sleep(LEASE).await;
    proxy.heal();
    proxy.cut(End::Reset).await;
    let again = |worker: &Worker| worker.counters.report().duplicates >= 1;
    worker.until("a duplicate", again).await;
    worker.until_effects(100).await;
    worker.finish(&queue, 100).await;
}

#[tokio::test]
#[ignore = "needs the Pub/Sub emulator: ./tests/run pubsub"]
async fn a_pipeline_outlives_half_open_connections() {
    for gone in [Side::Server, Side::Client] {
        let (queue, proxy) = (queue().await, proxy().await);
        let worker = Worker::start(source_through(&proxy, &queue));
        publish(&sink(&queue), (0..2_000).map(numbered)).await;
        worker.until_effects(50).await;
        proxy.half_open(gone).await;
        worker.until_effects(2_000).await;
        worker.finish(&queue, 2_000).await;
    }
}

/// Nothing but the keepalive can notice it: a pull may wait for long.
#[tokio::test]
#[ignore = "needs the Pub/Sub emulator: ./tests/run pubsub"]
async fn a_pull_on_a_half_open_connection_is_given_up() {
    let (queue, proxy) = (queue().await, proxy().await);
    let source = source_through(&proxy, &queue);
    let short = ReceiveLimits::new(1, Duration::from_millis(200));
    assert!(source.receive(short).await.unwrap().is_empty());
    proxy.half_open(Side::Server).await;
    publish(&sink(&queue), [numbered(0)]).await;
    let begun = Instant::now();
    loop {
        let limits = ReceiveLimits::new(1, Duration::from_secs(20));
        match source.receive(limits).await {
            Ok(got) if got.is_empty() => assert!(begun.elapsed() < LONG, "never"),
            Ok(_) => break,
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
    }
    source.close().await.unwrap();
}

/// The answers vanish, or the messages.
#[tokio::test]
#[ignore = "needs the Pub/Sub emulator: ./tests/run pubsub"]
async fn an_unconfirmed_publish_is_an_error_in_time_and_a_retry_loses_nothing() {
    for (direction, stored) in [(ToClient, true), (ToServer, false)] {
        let (queue, proxy) = (queue().await, proxy().await);
        let sink = sink_through(&proxy, &queue);
        publish(&sink, [numbered(0)]).await;
        proxy.set(direction, Fault::BlackHole);
        let begun = Instant::now();
        let error = sink.publish(&[numbered(1)]).await.remove(0).unwrap_err();
        assert!(error.is_retryable(), "{error}");
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        let took = begun.elapsed();
        assert!((1..5).contains(&took.as_secs()), "{took:?}");
        proxy.heal();
        publish(&sink, [numbered(1)]).await;
        sink.close().await.unwrap();
        let worker = Worker::start(source_through(&proxy, &queue));
        worker.until_effects(2).await;
        let expected = u64::from(stored);
        let again = |worker: &Worker| worker.counters.report().duplicates == expected;
        worker.until("duplicates", again).await;
        worker.finish(&queue, 2).await;
    }
}

#[tokio::test]
#[ignore = "needs the Pub/Sub emulator: ./tests/run pubsub"]
async fn what_is_cut_in_the_middle_of_a_frame_loses_nothing() {
    for direction in [ToClient, ToServer] {
        let (queue, proxy) = (queue().await, proxy().await);
        let sink = sink(&queue);
        let worker = Worker::start(source_through(&proxy, &queue));
        publish(&sink, (0..20).map(|n| padded(n, 1_000))).await;
        worker.until_effects(20).await;
        let mut sent = 20;
        // In a frame's header, in the headers of a message, in a body, at the end of it all.
        for n in [0, 1, 5, 9, 10, 60, 120, 500, 2_500, 15_000] {
            let connections = proxy.accepted();
            proxy.set(direction, Fault::Truncate(n));
            // Acks are small: it takes some to get that far.
            while proxy.accepted() == connections {
                publish(&sink, (sent..sent + 20).map(|n| padded(n, 1_000))).await;
                sent += 20;
                worker.until_effects(sent).await;
            }
        }
        worker.finish(&queue, sent).await;
    }
}

#[tokio::test]
#[ignore = "needs the Pub/Sub emulator: ./tests/run pubsub"]
async fn a_throttled_or_distant_service_is_slow_and_nothing_else() {
    for fault in [
        Fault::Throttle(60_000),
        Fault::Delay(Duration::from_millis(150)),
    ] {
        let (queue, proxy) = (queue().await, proxy().await);
        let mut patient = through(&proxy, &queue.subscription);
        patient.timeout = Duration::from_secs(60);
        let worker = Worker::start(PubSubSource::new(patient).unwrap());
        publish(&sink(&queue), [numbered(0)]).await;
        worker.until_effects(1).await;
        let connections = proxy.accepted();
        for direction in [ToServer, ToClient] {
            proxy.set(direction, fault);
        }
        publish(&sink(&queue), (1..241).map(|n| padded(n, 400))).await;
        worker.until_effects(241).await;
        assert_eq!(proxy.accepted(), connections, "no connection was given up");
        proxy.heal();
        worker.finish(&queue, 241).await;
    }
}

#[tokio::test]
#[ignore = "needs the Pub/Sub emulator: ./tests/run pubsub"]
async fn a_delay_beyond_every_time_out_is_an_error_until_it_is_over() {
    let (queue, proxy) = (queue().await, proxy().await);
    let worker = Worker::start(source_through(&proxy, &queue));
    publish(&sink(&queue), [numbered(0)]).await;
    worker.until_effects(1).await;
    proxy.set(ToClient, Fault::Delay(Duration::from_secs(3)));
    let sink = sink_through(&proxy, &queue);
    for _ in 0..2 {
        let begun = Instant::now();
        let error = sink.publish(&[numbered(1)]).await.remove(0).unwrap_err();
        assert!(error.is_retryable(), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{error}");
    }
    proxy.heal();
    publish_at_last(&sink, (1..50).map(numbered).collect()).await;
    worker.until_effects(50).await;
    worker.finish(&queue, 50).await;
}

const GROUPS: usize = 40;
const ROUNDS: usize = 50;

/// Publishes a message of each group per round, and none before the one ahead of it in its group is confirmed.
async fn publish_rounds(sink: &PubSubSink, rounds: Range<usize>) {
    for round in rounds {
        let all = (0..GROUPS).map(|group| numbered(round * GROUPS + group));
        publish_at_last(sink, all.collect()).await;
        // Spread over the storm.
        sleep(Duration::from_millis(200)).await;
    }
}

fn assert_groups_in_order(store: &MemoryStore) {
    let mut last = BTreeMap::new();
    for effect in store.effects() {
        let n = number(&effect);
        let before = last.insert(n % GROUPS, n);
        let rises = before.is_none_or(|before| before < n);
        assert!(rises, "{before:?} and then {n}");
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

/// All faults one after another while two workers handle messages in groups: each message takes effect once, in the order of
/// its group.
#[tokio::test]
#[ignore = "needs the Pub/Sub emulator: ./tests/run pubsub"]
async fn a_storm_of_faults_loses_doubles_and_reorders_nothing() {
    let seed = seed();
    let (queue, proxy) = (queue().await, proxy().await);
    let store = MemoryStore::new();
    let pace = Pace::of(&[Duration::from_millis(2)]);
    let worker = || Worker::with(source_through(&proxy, &queue), &pace, store.clone());
    let workers = [worker(), worker()];
    let sink = sink_through(&proxy, &queue);
    let (longest, lasting) = (Duration::from_millis(600), Duration::from_secs(15));
    let storm = Storm::new(seed).rage(&proxy, lasting, longest);
    tokio::join!(publish_rounds(&sink, 0..ROUNDS - 1), storm);
    publish_rounds(&sink, ROUNDS - 1..ROUNDS).await;
    sink.close().await.unwrap();
    workers[0].until_effects(GROUPS * ROUNDS).await;
    assert_groups_in_order(&store);
    for worker in workers {
        let report = worker.finish(&queue, GROUPS * ROUNDS).await;
        eprintln!("{report:?}");
    }
    eprintln!("{} connections", proxy.accepted());
}
