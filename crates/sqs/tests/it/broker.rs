//! What is SQS's own, against both emulators: `./tests/run sqs`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::common::*;
use aws_sdk_sqs::types::QueueAttributeName as Attribute;
use bytes::Bytes;
use onlyonce_core::attributes::DEAD_LETTER_REASON;
use onlyonce_core::driver::{Delivery, Disposition, SettleResult, Settlement, Sink as _, Source};
use onlyonce_core::memory::{MemoryStore, MemoryTx};
use onlyonce_core::{
    ConfigRisk, Counters, ErrorKind, Failure, Message, Pipeline, Report, RunError, State,
};
use onlyonce_sqs::{Config, SqsSink, SqsSource, aws_sdk_sqs};
use onlyonce_testkit::proxy::{Direction, Fault};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use Emulator::{LocalStack, MiniStack};

const PATIENCE: Duration = Duration::from_secs(90);
/// A busy emulator takes a while to hand out what is there.
const IDLE: Duration = Duration::from_secs(2);
/// Long enough that a machine which is busy with other things renews it in time.
const LEASE: Duration = Duration::from_secs(10);

async fn receive(source: &dyn Source, many: usize) -> Vec<Delivery> {
    let deadline = Instant::now() + PATIENCE;
    let mut all = Vec::new();
    while all.len() < many {
        assert!(Instant::now() < deadline, "{} of {many} came", all.len());
        let more = source.receive(limit(many - all.len(), Duration::from_secs(1)));
        all.extend(more.await.unwrap());
    }
    all
}

async fn ack(source: &dyn Source, deliveries: &[Delivery]) {
    let settlements: Vec<_> = deliveries
        .iter()
        .map(|delivery| Settlement::new(delivery.receipt.clone(), Disposition::Ack))
        .collect();
    for answer in source.settle(&settlements).await {
        assert!(matches!(answer, SettleResult::Applied), "{answer:?}");
    }
}

#[tokio::test]
#[ignore = "needs both emulators: ./tests/run sqs"]
async fn a_queue_is_reached_by_url_by_name_and_by_arn() {
    for emulator in [MiniStack, LocalStack] {
        let queue = Queue::create(emulator, Kind::Fifo, 30).await;
        let endpoint = emulator.endpoint();
        for address in [
            format!("{}?region=us-east-1", queue.url),
            format!("sqs://{}?endpoint={endpoint}", queue.name),
            format!(
                "arn:aws:sqs:us-east-1:{ACCOUNT}:{}?endpoint={endpoint}",
                queue.name
            ),
        ] {
            let message = Message::new("hello").with_dedup_id(address.as_str());
            let config: Config = address.parse().unwrap();
            let sink = SqsSink::new(config.clone()).unwrap();
            sink.publish(&[message]).await.pop().unwrap().unwrap();
            let source = SqsSource::new(config).unwrap();
            ack(&source, &receive(&source, 1).await).await;
            source.close().await.unwrap();
        }
    }
}

#[tokio::test]
#[ignore = "needs both emulators: ./tests/run sqs"]
async fn a_queue_that_does_not_exist_is_said_to() {
    for emulator in [MiniStack, LocalStack] {
        let endpoint = emulator.endpoint();
        for address in [
            format!("{endpoint}/{ACCOUNT}/nowhere"),
            format!("sqs://nowhere?endpoint={endpoint}"),
        ] {
            let source = SqsSource::new(address.parse().unwrap()).unwrap();
            let received = source.receive(limit(1, PATIENCE)).await;
            let error = received.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
            assert!(
                !error.is_retryable() && error.to_string().contains("nowhere"),
                "{error}"
            );
            let sink = SqsSink::new(address.parse().unwrap()).unwrap();
            let error = sink.publish(&[Message::new("x")]).await.pop().unwrap();
            assert_eq!(error.unwrap_err().kind(), ErrorKind::NotFound);
        }
    }
}

#[tokio::test]
#[ignore = "needs both emulators: ./tests/run sqs"]
async fn queue_info_tells_what_decides_how_a_queue_behaves() {
    for emulator in [MiniStack, LocalStack] {
        let more = [
            (Attribute::MessageRetentionPeriod, "86400"),
            (Attribute::ContentBasedDeduplication, "true"),
            (Attribute::DeduplicationScope, "messageGroup"),
            (Attribute::FifoThroughputLimit, "perMessageGroupId"),
        ];
        let queue = Queue::with(emulator, Kind::Fifo, 33, &more).await;
        let info = queue.source().queue_info().await.unwrap();
        assert_eq!(info.lease, Some(Duration::from_secs(33)));
        // With the four days of the dead-letter queue, and a redrive.
        assert_eq!(info.retention, Some(Duration::from_secs(6 * 86_400)));
        assert_eq!(info.max_deliveries, Some(1_000));
        let dead = format!(":dead-{}", queue.name);
        assert!(info.dead_letter.unwrap().ends_with(&dead));
        assert_eq!(info.dedup_window, Some(Duration::from_secs(300)));
        assert_eq!(
            info.capabilities.ordering,
            onlyonce_core::driver::Ordering::Group
        );
        let settings: BTreeMap<_, _> = info.settings.into_iter().collect();
        for (name, value) in [
            ("Type", "FIFO"),
            ("ContentBasedDeduplication", "true"),
            ("DeduplicationScope", "messageGroup"),
            ("FifoThroughputLimit", "perMessageGroupId"),
            ("InFlightLimit", "120000"),
        ] {
            assert_eq!(
                settings.get(name).map(String::as_str),
                Some(value),
                "{name}"
            );
        }
        let mut shorter = queue.config();
        shorter.visibility_timeout = Some(Duration::from_secs(7));
        let info = SqsSource::new(shorter).unwrap().queue_info().await.unwrap();
        assert_eq!(
            info.lease,
            Some(Duration::from_secs(7)),
            "the URL's comes first"
        );

        let standard = Queue::create(emulator, Kind::Standard, 30).await;
        let info = standard.source().queue_info().await.unwrap();
        assert_eq!(
            info.capabilities.ordering,
            onlyonce_core::driver::Ordering::None
        );
        assert_eq!(info.dedup_window, None);
    }
}

#[tokio::test]
#[ignore = "needs both emulators: ./tests/run sqs"]
async fn a_closing_source_gives_back_what_its_long_polls_still_bring() {
    for emulator in [MiniStack, LocalStack] {
        let queue = Queue::create(emulator, Kind::Fifo, 30).await;
        let source = Arc::new(queue.source());
        // A receive that was dropped leaves its poll of two seconds.
        let receive_one = source.receive(limit(1, Duration::from_secs(2)));
        assert!(
            timeout(Duration::from_millis(300), receive_one)
                .await
                .is_err()
        );
        let closing = tokio::spawn({
            let source = source.clone();
            async move { source.close().await }
        });
        queue
            .publish(&[Message::new("late").with_dedup_id("late")])
            .await;
        closing.await.unwrap().unwrap();
        let other = queue.source();
        let began = Instant::now();
        let late = receive(&other, 1).await;
        assert!(
            began.elapsed() < Duration::from_secs(15),
            "long before its lease would end"
        );
        ack(&other, &late).await;
    }
}

/// A transactional pipeline in a task of its own; its effects are the bodies of the messages.
struct Worker {
    store: MemoryStore,
    counters: Arc<Counters>,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<Report, RunError>>,
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

async fn paced(body: Bytes, State(pace): State<Pace>, tx: &mut MemoryTx) {
    let run = pace.runs.fetch_add(1, Ordering::Relaxed);
    pace.started.notify_one();
    tx.push(body);
    sleep(pace.takes[run.min(pace.takes.len() - 1)]).await;
}

impl Worker {
    fn start(source: SqsSource, pace: &Pace) -> Self {
        let store = MemoryStore::new();
        let (stop, stopped) = oneshot::channel();
        let pipeline = Pipeline::transactional(source, store.clone())
            .allow(ConfigRisk::StoreForgets)
            .claim_lease(LEASE)
            .state(pace.clone())
            .shutdown(async {
                let _ = stopped.await;
            });
        Self {
            store,
            counters: pipeline.counters(),
            stop,
            running: tokio::spawn(pipeline.run(paced)),
        }
    }

    async fn until(&self, what: &str, is: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is(self) {
            assert!(
                Instant::now() < deadline,
                "{what}: {:?}",
                self.counters.report()
            );
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn finish(self) -> Report {
        self.stop.send(()).unwrap();
        timeout(PATIENCE, self.running)
            .await
            .unwrap()
            .unwrap()
            .unwrap()
    }
}

#[tokio::test]
#[ignore = "needs both emulators: ./tests/run sqs"]
async fn a_handler_of_three_visibility_timeouts_finishes_once() {
    tokio::join!(outlasts(MiniStack), outlasts(LocalStack));
}

async fn outlasts(emulator: Emulator) {
    let queue = Queue::create(emulator, Kind::Fifo, LEASE.as_secs()).await;
    queue
        .publish(&[Message::new("slow").with_dedup_id("slow")])
        .await;
    let pace = Pace::of(&[LEASE * 3]);
    let requests = Requests::default();
    let source = SqsSource::with_client(queue.config(), requests.of(&queue.client));
    let worker = Worker::start(source.unwrap(), &pace);
    worker
        .until("it takes effect", |w| !w.store.effects().is_empty())
        .await;
    let report = worker.finish().await;
    assert_eq!(pace.runs.load(Ordering::Relaxed), 1, "it ran once");
    assert_eq!(
        (report.received, report.applied, report.cancelled),
        (1, 1, 0)
    );
    assert_eq!(queue.counts().await, (0, 0));
    // One each time a third of the lease has passed, seen at the next ninth of it: every 4/9, or 6.75 in three leases.
    let heartbeats = requests.count("ChangeMessageVisibilityBatch");
    assert!((5..=9).contains(&heartbeats), "{heartbeats} heartbeats");
    assert_eq!(requests.count("DeleteMessageBatch"), 1);
}

#[tokio::test]
#[ignore = "needs both emulators: ./tests/run sqs"]
async fn a_handler_whose_heartbeats_are_blocked_is_cancelled_before_its_lease_ends() {
    tokio::join!(is_cut_off(MiniStack), is_cut_off(LocalStack));
}

async fn is_cut_off(emulator: Emulator) {
    let queue = Queue::create(emulator, Kind::Fifo, LEASE.as_secs()).await;
    let proxy = emulator.proxy().await;
    queue
        .publish(&[Message::new("once").with_dedup_id("once")])
        .await;
    let mut config = queue.through(&proxy);
    config.timeout = Duration::from_millis(500);
    let pace = Pace::of(&[LEASE * 3, Duration::ZERO]);
    let worker = Worker::start(SqsSource::new(config).unwrap(), &pace);
    let other = queue.source();

    pace.started.notified().await;
    proxy.set(Direction::ToServer, Fault::BlackHole);
    let cancelled = async {
        worker
            .until("the handler is cancelled", |w| {
                w.counters.report().cancelled > 0
            })
            .await;
        Instant::now()
    };
    let received = async { (receive(&other, 1).await, Instant::now()) };
    let (cancelled, (next, received)) = tokio::join!(cancelled, received);
    // The simulation looks at the moment itself (`lease-end-not-watched`); a busy machine is late for both.
    assert!(
        cancelled < received + LEASE / 4,
        "{:?} after somebody else got the message",
        cancelled - received
    );
    assert!(
        worker.store.effects().is_empty(),
        "its effect must not be committed"
    );
    assert_eq!(next[0].attempt, Some(2), "nobody had it in between");
    let back = Settlement::new(
        next[0].receipt.clone(),
        Disposition::Nack {
            delay: Duration::ZERO,
        },
    );
    assert!(other.settle(&[back]).await[0].is_applied());

    proxy.heal();
    worker
        .until("it takes effect", |w| !w.store.effects().is_empty())
        .await;
    let store = worker.store.clone();
    worker.finish().await;
    assert_eq!(store.effects(), ["once"]);
    assert_eq!(queue.counts().await, (0, 0));
}

async fn fails(body: Bytes) -> Result<(), Failure> {
    Err(Failure::dead_letter(format!("no use for {body:?}")))
}

#[tokio::test]
#[ignore = "needs both emulators: ./tests/run sqs"]
async fn a_dead_letter_that_is_redriven_at_once_is_not_dropped_as_a_duplicate() {
    for emulator in [MiniStack, LocalStack] {
        let queue = Queue::create(emulator, Kind::Fifo, LEASE.as_secs()).await;
        let sent = Message::new("twice")
            .with_dedup_id("payment-1")
            .with_group("account-1");
        queue.publish(std::slice::from_ref(&sent)).await;
        let dead = |config: &str| SqsSource::new(config.parse().unwrap()).unwrap();
        // It is set aside, put back, set aside again and put back again, all within the five minutes.
        for _ in 0..2 {
            let pipeline = Pipeline::idempotent(queue.source(), MemoryStore::new())
                .allow(ConfigRisk::StoreForgets);
            let pipeline = pipeline.stop_when_idle(IDLE);
            let report = pipeline.run(fails).await.unwrap();
            assert_eq!(report.dead_lettered, 1);
            let dead = dead(&queue.dead_url);
            let letters = receive(&dead, 1).await;
            let letter = &letters[0].message;
            assert_eq!(letter.dedup_id, sent.dedup_id);
            assert_eq!(letter.group, sent.group);
            let reason = letter.attributes.get(DEAD_LETTER_REASON).unwrap();
            assert!(reason.contains("no use for"), "{reason}");
            queue.publish(&[Message::clone(letter)]).await;
            ack(&dead, &letters).await;
            dead.close().await.unwrap();
        }
        let source = queue.source();
        let back = receive(&source, 1).await;
        assert_eq!(back[0].message.dedup_id, sent.dedup_id);
        ack(&source, &back).await;
    }
}

/// What SNS sends for `hello`, published to a FIFO topic with content-based deduplication.
async fn notify(queue: &Queue, at: &str) {
    let body = format!(
        r#"{{"Type":"Notification","MessageId":"{at}","TopicArn":"arn:aws:sns:us-east-1:{ACCOUNT}:t.fifo","Message":"hello","Timestamp":"{at}"}}"#
    );
    let sent = queue.client.send_message().queue_url(&queue.url);
    let digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
    sent.message_body(body)
        .message_group_id("group")
        .message_deduplication_id(digest)
        .send()
        .await
        .unwrap();
}

#[tokio::test]
#[ignore = "needs both emulators: ./tests/run sqs"]
async fn a_topics_digest_of_what_was_published_is_no_id() {
    for emulator in [MiniStack, LocalStack] {
        let queue = Queue::create(emulator, Kind::Fifo, LEASE.as_secs()).await;
        notify(&queue, "10:00").await;
        let source = queue.source();
        let received = receive(&source, 1).await;
        assert_eq!(received[0].message.dedup_id, None);
        assert_eq!(received[0].message.group.as_deref(), Some("group"));
        ack(&source, &received).await;
        source.close().await.unwrap();
    }
}

/// References to payloads elsewhere, as npm's clients and NServiceBus send them.
#[tokio::test]
#[ignore = "needs both emulators: ./tests/run sqs"]
async fn references_of_other_clients_end_as_dead_letters() {
    for emulator in [MiniStack, LocalStack] {
        let queue = Queue::create(emulator, Kind::Standard, LEASE.as_secs()).await;
        for body in [
            r#"{"S3Payload":{"Id":"1","Bucket":"b","Key":"1.json","Location":"https://b"}}"#,
            r#"{"Headers":{"NServiceBus.MessageId":"1"},"Body":null,"S3BodyKey":"prefix/1"}"#,
        ] {
            let sent = queue.client.send_message().queue_url(&queue.url);
            sent.message_body(body).send().await.unwrap();
        }
        let report = Pipeline::at_least_once(queue.source())
            .stop_when_idle(IDLE)
            .run(async |_: Bytes| {})
            .await
            .unwrap();
        assert_eq!((report.applied, report.dead_lettered), (0, 2));
        let dead = SqsSource::new(queue.dead_url.parse().unwrap()).unwrap();
        let letters = receive(&dead, 2).await;
        for letter in &letters {
            let reason = letter.message.attributes.get(DEAD_LETTER_REASON).unwrap();
            assert!(reason.contains("its payload is in S3"), "{reason}");
        }
        ack(&dead, &letters).await;
    }
}

/// What had taken effect in the queue itself is not run again here. MiniStack does not tell whose dead letters come to a queue.
#[tokio::test]
#[ignore = "needs both emulators: ./tests/run sqs"]
async fn a_worker_does_not_start_on_its_own_dead_letter_queue() {
    let queue = Queue::create(LocalStack, Kind::Standard, 30).await;
    let dead = SqsSource::new(queue.dead_url.parse().unwrap()).unwrap();
    let refused = Pipeline::idempotent(dead, MemoryStore::new())
        .allow(ConfigRisk::StoreForgets)
        .allow(ConfigRisk::NoDeadLetter)
        .run(async || {})
        .await
        .unwrap_err();
    let why = format!("dead-letter queue of {}", queue.name);
    assert!(refused.to_string().contains(&why), "{refused}");
}
