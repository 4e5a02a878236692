//! Messages that are made to hurt whoever reads them, against a live broker: `./tests/run rabbitmq`. Each is published
//! as raw bytes, on a runtime of one thread.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use crate::common::*;
use crate::raw::{RawPublisher, long, short};
use bytes::Bytes;
use fastrand::Rng;
use lapin::types::AMQPValue;
use onlyonce_core::ConfigRisk;
use onlyonce_core::Pipeline;
use onlyonce_core::driver::{Delivery, Disposition, SettleResult, Source as _};
use onlyonce_core::memory::{MemoryStore, MemoryTx};
use onlyonce_rabbitmq::filter::{FACTOR, MAX_DEPTH, SLACK};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

const HEADERS: u16 = 1 << 13;
const CORRELATION_ID: u16 = 1 << 10;
const MESSAGE_ID: u16 = 1 << 7;
/// Of a message, beside its headers and its id.
const OVERHEAD: usize = 100;

/// A header: its name, and its value, which begins with its type.
fn entry(name: impl AsRef<[u8]>, value: &[u8]) -> Vec<u8> {
    [&short(name), value].concat()
}

/// A value whose length comes before it.
fn sized(kind: u8, content: &[u8]) -> Vec<u8> {
    [&[kind], &long(content)[..]].concat()
}

/// Properties of these headers and this id.
fn properties(table: &[u8], id: &[u8]) -> Vec<u8> {
    let flags = (HEADERS | MESSAGE_ID).to_be_bytes();
    [&flags[..], &long(table), &short(id)].concat()
}

fn nested(depth: usize, kind: u8) -> Vec<u8> {
    // The outermost first, which has to know how long all within it is.
    let per_level = if kind == b'F' { 6 } else { 5 };
    let mut value = Vec::with_capacity(depth * per_level + 1);
    for level in (0..depth).rev() {
        value.push(kind);
        let content = u32::try_from(level * per_level + usize::from(kind == b'F') + 1).unwrap();
        value.extend(content.to_be_bytes());
        if kind == b'F' {
            value.push(0);
        }
    }
    value.push(b'V');
    entry("deep", &value)
}

fn many(element: &[u8], bytes: usize) -> Vec<u8> {
    entry("many", &sized(b'A', &element.repeat(bytes / element.len())))
}

/// Makes properties of every kind, the same for the same seed.
struct Hostile {
    random: Rng,
    /// Of a content header's payload.
    most: usize,
}

impl Hostile {
    fn properties(&mut self, id: &str) -> Vec<u8> {
        let room = self.most - OVERHEAD;
        // Few of the largest: the broker itself takes seconds for one that is nested as deep as a frame allows.
        let size = match self.random.u8(..30) {
            0 => room,
            1 => self.random.usize(..room),
            _ => self.random.usize(..8_000),
        };
        let table = match self.random.u8(..8) {
            0 => nested(1 + size / 7, b'F'),
            1 => nested(1 + size / 7, b'A'),
            2 => many(&self.element(), size),
            3 => self.names(size),
            4 => entry(self.bytes(255), b"V"),
            5 => entry("text", &sized(b'S', &self.bytes(size))),
            6 => return self.texts(id),
            _ => {
                let mut table = Vec::new();
                self.table(5, size, &mut table);
                table
            }
        };
        properties(&table, id.as_bytes())
    }

    /// Small, and much larger once it is parsed.
    fn element(&mut self) -> Vec<u8> {
        let inner = match self.random.bool() {
            true => sized(b'F', &entry("", b"V")),
            false => sized(b'A', b"V"),
        };
        let elements = [b"V", &b"t\x01"[..], b"A\0\0\0\0", b"F\0\0\0\0", &inner];
        self.random.choice(elements).unwrap().to_vec()
    }

    fn names(&mut self, size: usize) -> Vec<u8> {
        let names = (0..).map(|n: u32| entry(format!("{n:x}"), b"V"));
        let mut table = Vec::new();
        for name in names.take_while(|_| true) {
            if table.len() + name.len() > size {
                return table;
            }
            table.extend(name);
        }
        table
    }

    /// Properties that need not be UTF-8; some ids, too.
    fn texts(&mut self, id: &str) -> Vec<u8> {
        let flags = (CORRELATION_ID | MESSAGE_ID).to_be_bytes();
        let correlation = self.bytes(255);
        let id = match self.random.bool() {
            true => id.as_bytes().to_vec(),
            false => [id.as_bytes(), &[0xff].repeat(self.random.usize(1..200))].concat(),
        };
        [&flags[..], &short(correlation), &short(id)].concat()
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = self.random.usize(..=most);
        (0..length).map(|_| self.random.u8(..)).collect()
    }

    fn table(&mut self, depth: usize, size: usize, output: &mut Vec<u8>) {
        while output.len() + 600 < size && self.random.u8(..20) > 0 {
            let name: Vec<u8> = self.bytes(20).iter().map(|byte| b'a' + byte % 26).collect();
            output.extend(short(name));
            self.value(depth, size - output.len(), output);
        }
    }

    fn value(&mut self, depth: usize, size: usize, output: &mut Vec<u8>) {
        // Of the types that RabbitMQ takes.
        let kind = *self.random.choice(b"tbBsuIilfdDSxTVFAVFA").unwrap();
        let mut inner = Vec::new();
        match kind {
            b'F' if depth > 0 => self.table(depth - 1, size / 2, &mut inner),
            b'A' if depth > 0 => {
                for _ in 0..self.random.usize(..6) {
                    self.value(depth - 1, size / 8, &mut inner);
                }
            }
            b'S' | b'x' => inner = self.bytes(100),
            _ => {}
        }
        output.push(kind);
        match kind {
            b'F' | b'A' | b'S' | b'x' => output.extend(long(inner)),
            b'V' => {}
            b't' | b'b' | b'B' => output.push(1),
            b's' | b'u' => output.extend([0, 9]),
            b'I' | b'i' | b'f' => output.extend([0x41; 4]),
            b'D' => output.extend([2, 0, 0, 1, 0]),
            _ => output.extend([0x41; 8]),
        }
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn every_message_is_handled_or_dead_lettered_whatever_its_headers() {
    for kind in [Kind::Classic, Kind::Quorum] {
        let seed = seed();
        let (queue, dead) = (
            Queue::declare("hostile", kind, &[]).await,
            Queue::declare("hostile.dead", kind, &[]).await,
        );
        publish_hostile(&queue, seed).await;
        let store = MemoryStore::new();
        let (stop, stopped) = oneshot::channel::<()>();
        let pipeline = Pipeline::transactional(queue.source(""), store.clone())
            .allow(ConfigRisk::StoreForgets)
            .dead_letter(dead.sink(""))
            .shutdown(async {
                let _ = stopped.await;
            });
        let counters = pipeline.counters();
        let running = tokio::spawn(pipeline.run(record));
        let done = || store.effects().len() as u64 + counters.report().dead_lettered;
        let deadline = Instant::now() + 10 * PATIENCE;
        while done() < MANY {
            assert!(Instant::now() < deadline, "{} of {MANY}", done());
            sleep(Duration::from_millis(20)).await;
        }
        stop.send(()).unwrap();
        timeout(PATIENCE, running).await.unwrap().unwrap().unwrap();
        let handled: BTreeSet<_> = store.effects().iter().map(text).collect();
        let letters = receive(
            &dead.source(""),
            counters.report().dead_lettered.try_into().unwrap(),
        )
        .await;
        let set_aside: BTreeSet<_> = letters.iter().map(|d| text(&d.message.body)).collect();
        assert_eq!(
            handled.len() + set_aside.len(),
            store.effects().len() + letters.len()
        );
        let all: BTreeSet<_> = handled.union(&set_aside).cloned().collect();
        assert_eq!(all, (0..MANY).map(|n| n.to_string()).collect());
        assert!(
            handled.len() > 50 && set_aside.len() > 50,
            "one of each kind"
        );
        letters.iter().for_each(assert_letter);
        queue.assert_left(0).await;
    }
}

const MANY: u64 = 300;

async fn publish_hostile(queue: &Queue, seed: u64) {
    let mut publisher = RawPublisher::connect().await;
    for n in 0..MANY {
        let mut hostile = Hostile {
            random: Rng::with_seed(seed.wrapping_add(n)),
            // The broker takes frames of eight bytes more than it says.
            most: publisher.frame_max,
        };
        let (id, key) = (n.to_string(), queue.name.as_bytes());
        let properties = match n % 10 {
            0 => properties(b"", id.as_bytes()),
            _ => hostile.properties(&id),
        };
        publisher.publish("", key, &properties, &id).await;
        if n % 50 == 0 {
            publisher.confirm().await;
        }
    }
    publisher.confirm().await;
}

/// It can be read, tells why it is there, and has its id unless that was the reason.
fn assert_letter(letter: &Delivery) {
    let (message, body) = (&letter.message, text(&letter.message.body));
    assert_eq!(letter.malformed, None, "{body}");
    let reason = message.attributes.get("onlyonce-reason").unwrap();
    let no_id = reason.contains("message_id");
    assert!(
        no_id || message.dedup_id.as_ref() == Some(&body),
        "{reason}"
    );
}

async fn record(body: Bytes, tx: &mut MemoryTx) {
    tx.push(body);
}

fn text(body: &Bytes) -> String {
    String::from_utf8(body.to_vec()).unwrap()
}

fn seed() -> u64 {
    let seed = std::env::var("ONLYONCE_SEED").map_or_else(
        |_| fastrand::u64(..),
        |seed| seed.parse().expect("ONLYONCE_SEED is a number"),
    );
    eprintln!("to replay these messages: ONLYONCE_SEED={seed}");
    seed
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_binary_property_does_not_stop_the_messages_behind_it() {
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("binary", kind, &[]).await;
        let mut publisher = RawPublisher::connect().await;
        let key = queue.name.as_bytes();
        let flags = CORRELATION_ID | MESSAGE_ID;
        let binary = [&flags.to_be_bytes()[..], &short([0xff, 1]), &short([0xfe])].concat();
        publisher.publish("", key, &binary, "0").await;
        let name = properties(&entry([0xfd], b"V"), b"id");
        publisher.publish("", key, &name, "1").await;
        publisher.publish("", key, &[0, 0], "2").await;
        publisher.confirm().await;
        let source = queue.source("");
        let held = receive(&source, 3).await;
        assert_eq!(bodies(&held), numbers(0..3));
        let message = &held[0].message;
        assert_eq!(held[0].malformed, None);
        let correlation = message.attributes.get("amqp-correlation-id");
        assert_eq!(correlation, Some("hex:ff01"));
        assert_eq!(message.dedup_id.as_deref(), Some("hex:fe"));
        assert!(held[1].malformed.as_ref().unwrap().contains("hex:fd"));
        assert_eq!(held[1].message.dedup_id.as_deref(), Some("id"));
        assert_eq!(held[2].malformed, None);
        ack(&source, &held).await;
        source.close().await.unwrap();
        queue.assert_left(0).await;
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_binary_routing_key_does_not_stop_the_messages_behind_it() {
    let queue = Queue::declare("binarykey", Kind::Classic, &[]).await;
    let mut publisher = RawPublisher::connect().await;
    let exchange = format!("{}.exchange", queue.name);
    queue.bind_by_header(&exchange, "to", "here").await;
    let here = properties(&entry("to", &sized(b'S', b"here")), b"id");
    publisher.publish(&exchange, &[0xff], &here, "0").await;
    publisher.publish(&exchange, b"key", &here, "1").await;
    publisher.confirm().await;
    let source = queue.source("");
    let held = receive(&source, 2).await;
    assert_eq!(bodies(&held), numbers(0..2));
    let key = |n: usize| held[n].message.attributes.get("amqp-routing-key");
    assert_eq!((key(0), key(1)), (Some("hex:ff"), Some("key")));
    ack(&source, &held).await;
    source.close().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_delayed_copy_of_a_malformed_message_is_malformed() {
    let queue = Queue::declare("malformedcopy", Kind::Quorum, &[]).await;
    let mut publisher = RawPublisher::connect().await;
    let deep = properties(&nested(1_172, b'F'), b"id");
    publisher
        .publish("", queue.name.as_bytes(), &deep, "0")
        .await;
    publisher.confirm().await;
    let source = queue.source("");
    for _ in 0..3 {
        let held = receive(&source, 1).await;
        assert!(held[0].malformed.as_ref().unwrap().contains("deep"));
        assert_eq!(held[0].message.dedup_id.as_deref(), Some("id"));
        let raw = held[0].message.attributes.get("amqp-unreadable-headers");
        assert!(raw.unwrap().starts_with("hex:0464656570460000"), "{raw:?}");
        let delay = Duration::from_millis(100);
        let answers = settle(&source, &held, &Disposition::Nack { delay }).await;
        assert!(matches!(answers[0], SettleResult::Applied), "{answers:?}");
    }
    let held = receive(&source, 1).await;
    ack(&source, &held).await;
    source.close().await.unwrap();
}

/// A redelivered message of a quorum queue has one header more than it was published with, and then does not fit.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_message_that_the_broker_makes_too_long_for_a_frame_is_malformed() {
    let queue = Queue::declare("toolong", Kind::Quorum, &[]).await;
    let mut publisher = RawPublisher::connect().await;
    let fixed = properties(&entry("a", &sized(b'S', b"")), b"id").len() + 12;
    let longest = vec![b'x'; publisher.frame_max - 8 - fixed];
    let longest = properties(&entry("a", &sized(b'S', &longest)), b"id");
    publisher
        .publish("", queue.name.as_bytes(), &longest, "0")
        .await;
    publisher.confirm().await;
    let source = queue.source("");
    let held = receive(&source, 1).await;
    assert_eq!(held[0].malformed, None);
    let delay = Duration::ZERO;
    settle(&source, &held, &Disposition::Nack { delay }).await;
    let held = receive(&source, 1).await;
    let malformed = held[0].malformed.as_ref().unwrap();
    assert!(malformed.contains("do not fit"), "{malformed}");
    assert_eq!(held[0].message.dedup_id.as_deref(), Some("id"));
    ack(&source, &held).await;
    source.close().await.unwrap();
}

/// What a plain connection gives is filtered as well.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_plain_connection_survives_such_messages() {
    let queue = Queue::declare("plain", Kind::Classic, &[]).await;
    let mut publisher = RawPublisher::connect().await;
    let deep = properties(&nested(10_000, b'A'), b"id");
    publisher
        .publish("", queue.name.as_bytes(), &deep, "0")
        .await;
    publisher.confirm().await;
    let connection = queue.config("").connect().await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let got = channel.basic_get(queue.name.as_str().into(), Default::default());
    let got = got.await.unwrap().unwrap();
    let headers = got.delivery.properties.headers().as_ref().unwrap();
    let why = headers.inner().get("x-onlyonce-unreadable");
    assert!(matches!(why, Some(AMQPValue::LongString(_))), "{why:?}");
    connection.close(200, "done".into()).await.unwrap();
}

/// Enough to show what each takes, and few enough for the broker, which takes a second for some of them.
const HELD: usize = 150;
/// The client's buffers.
const BUFFERS: usize = 16 << 20;
const CHILD: &str = "ONLYONCE_TEST_QUEUE";

/// In a process of its own, whose memory is not that of other tests.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_worker_takes_no_more_memory_than_the_crates_page_says() {
    if let Ok(name) = std::env::var(CHILD) {
        return hold(&name).await;
    }
    let frame = RawPublisher::connect().await.frame_max - OVERHEAD;
    // The most that passes of the smallest values: 64 bytes a value are counted, and 160 of the array.
    let passes = SLACK / (32 - FACTOR) - 500;
    for (table, passing, bound) in [
        (many(b"V", frame), false, 3),
        (many(&sized(b'F', &entry("", b"V")), frame), false, 3),
        (nested(MAX_DEPTH, b'F'), true, FACTOR + 4),
        (many(b"t\x01", passes), true, FACTOR + 4),
        (
            entry("text", &sized(b'S', &[0xff].repeat(frame - 50))),
            true,
            FACTOR + 4,
        ),
    ] {
        let queue = Queue::declare("memory", Kind::Classic, &[]).await;
        let mut publisher = RawPublisher::connect().await;
        for n in 0..HELD {
            let properties = properties(&table, n.to_string().as_bytes());
            publisher
                .publish("", queue.name.as_bytes(), &properties, "x")
                .await;
        }
        publisher.confirm().await;
        let name = "hostile::a_worker_takes_no_more_memory_than_the_crates_page_says";
        let mut child = Command::new(std::env::current_exe().unwrap());
        child
            .args(["--exact", "--ignored", "--nocapture", name])
            .env(CHILD, &queue.name);
        let output = tokio::task::spawn_blocking(move || child.output().unwrap());
        let output = output.await.unwrap();
        let shown = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        let number = |label: &str| -> usize {
            let (_, rest) = shown.split_once(label).unwrap();
            rest.split_whitespace().next().unwrap().parse().unwrap()
        };
        assert_eq!(number("malformed:"), if passing { 0 } else { HELD });
        let received = HELD * (table.len() + OVERHEAD);
        let most = number("before:") + BUFFERS + bound * received + HELD * SLACK;
        let peak = number("peak:");
        eprintln!("{received} bytes received: {peak} at most in memory, of {most}");
        assert!(peak <= most, "{peak} of {most}");
        queue.purge().await;
    }
}

async fn hold(queue: &str) {
    let config = format!("{}?queue={queue}&prefetch={HELD}&heartbeat=300s", url());
    let source = onlyonce_rabbitmq::RabbitSource::new(config.parse().unwrap()).unwrap();
    let before = most_memory();
    // The broker takes a while for messages with that number of values, and may say nothing meanwhile.
    let (mut held, deadline) = (Vec::new(), Instant::now() + 10 * PATIENCE);
    while held.len() < HELD {
        assert!(Instant::now() < deadline, "{} of {HELD}", held.len());
        match source.receive(limit(HELD)).await {
            Ok(more) => held.extend(more),
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
    }
    let malformed = held.iter().filter(|d| d.malformed.is_some()).count();
    let peak = most_memory();
    println!("malformed: {malformed} before: {before} peak: {peak} ");
    source.close().await.unwrap();
}

/// The most that this process has had so far, in bytes.
fn most_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let (_, peak) = status.split_once("VmHWM:").unwrap();
    let kibibytes: usize = peak.split_whitespace().next().unwrap().parse().unwrap();
    kibibytes << 10
}
