//! What a dead-letter sink must take, whatever was delivered: `./tests/run rabbitmq`.

use std::time::Duration;

use crate::common::*;
use bytes::Bytes;
use lapin::BasicProperties;
use lapin::options::ConfirmSelectOptions;
use lapin::types::{AMQPValue, ByteArray, FieldTable};
use onlyonce_core::attributes::DEAD_LETTER_REASON;
use onlyonce_core::driver::{Sink as _, Source as _};
use onlyonce_core::memory::{MemoryStore, MemoryTx};
use onlyonce_core::{ConfigRisk, Failure, Message, Pipeline, Report};

async fn apply_the_good(body: Bytes, tx: &mut MemoryTx) -> Result<(), Failure> {
    match &*body {
        b"bad" => Err(Failure::dead_letter("it is bad")),
        _ => {
            tx.push(body);
            Ok(())
        }
    }
}

/// How many messages are held at most: fewer than are bad.
const HELD: usize = 100;
const BAD: u32 = 150;

/// Runs a worker until nothing comes any more.
async fn work(queue: &Queue, dead: &Queue) -> (MemoryStore, Report) {
    let store = MemoryStore::new();
    let pipeline = Pipeline::transactional(queue.source(""), store.clone())
        .allow(ConfigRisk::StoreForgets)
        .dead_letter(dead.sink(""))
        .prefetch(HELD, 64 << 20)
        .stop_when_idle(Duration::from_secs(5));
    let report = pipeline.run(apply_the_good).await.unwrap();
    (store, report)
}

/// Publishes a bad message with these headers, by another client.
async fn publish_bad(queue: &Queue, id: &str, headers: FieldTable) {
    let properties = BasicProperties::default()
        .with_message_id(id.into())
        .with_delivery_mode(2)
        .with_headers(headers);
    let key = queue.name.as_str().into();
    let options = lapin::options::BasicPublishOptions::default();
    let channel = &queue.channel;
    let publish = channel.basic_publish("".into(), key, options, b"bad", properties);
    publish.await.unwrap().await.unwrap();
}

fn headers(pairs: impl IntoIterator<Item = (String, AMQPValue)>) -> FieldTable {
    let mut headers = FieldTable::default();
    for (name, value) in pairs {
        headers.insert(name.into(), value);
    }
    headers
}

fn bytes(many: usize) -> AMQPValue {
    AMQPValue::ByteArray(ByteArray::from(vec![0xff; many]))
}

async fn confirms(queue: &Queue) {
    let confirm = queue
        .channel
        .confirm_select(ConfirmSelectOptions::default());
    confirm.await.unwrap();
}

/// As text the bytes would take 140 kB, and all headers of a message share a frame of 128 KiB.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn bytes_in_a_header_do_not_keep_a_message_from_being_dead_lettered() {
    let queue = Queue::declare("bytes", Kind::Quorum, &[]).await;
    let dead = Queue::declare("bytes.dead", Kind::Quorum, &[]).await;
    confirms(&queue).await;
    for n in 0..BAD {
        let header = ("b".to_owned(), bytes(70_000));
        publish_bad(&queue, &format!("bad {n}"), headers([header])).await;
    }
    queue.fill(100).await;
    let (store, report) = work(&queue, &dead).await;
    assert_eq!((report.applied, report.dead_lettered), (100, BAD.into()));
    assert_eq!(store.effects().len(), 100);
    queue.assert_left(0).await;
    dead.assert_left(BAD).await;
    let source = dead.source("");
    let letters = receive(&source, 1).await;
    let text = letters[0].message.attributes.get("b").unwrap();
    assert_eq!(
        *text,
        format!("hex:{}", "ff".repeat(70_000)),
        "nothing is lost"
    );
    source.close().await.unwrap();
}

/// What grows on the way: JSON of tables and arrays, and the reason that is added to headers that just fitted.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_dead_letter_goes_without_what_does_not_fit_and_says_so() {
    let queue = Queue::declare("left-out", Kind::Classic, &[]).await;
    let dead = Queue::declare("left-out.dead", Kind::Classic, &[]).await;
    confirms(&queue).await;
    let text = AMQPValue::LongString("t".repeat(131_000).into());
    let few = ("k".to_owned(), AMQPValue::LongString("v".into()));
    let short = AMQPValue::LongString("t".repeat(20).into());
    let many = (0..4_403).map(|n| (n.to_string(), short.clone()));
    publish_bad(&queue, "text", headers([few, ("a".to_owned(), text)])).await;
    publish_bad(&queue, "many", headers(many)).await;
    let nested = AMQPValue::FieldTable(headers([("b".to_owned(), bytes(70_000))]));
    publish_bad(&queue, "nested", headers([("a".to_owned(), nested)])).await;
    queue.fill(1).await;
    let (_, report) = work(&queue, &dead).await;
    assert_eq!((report.applied, report.dead_lettered), (1, 3));
    let source = dead.source("");
    let letters = receive(&source, 3).await;
    for letter in &letters {
        let attribute = |name| letter.message.attributes.get(name);
        let left_out = attribute("onlyonce-left-out");
        let left_out = left_out.unwrap_or_else(|| panic!("{:?}", letter.message.dedup_id));
        match letter.message.dedup_id.as_deref() {
            Some("many") => assert!(left_out.len() <= 1_000, "{left_out}"),
            _ => assert_eq!(left_out, "a"),
        }
        assert_eq!(attribute(DEAD_LETTER_REASON), Some("it is bad"));
    }
    assert!(
        letters
            .iter()
            .any(|letter| letter.message.attributes.get("k") == Some("v"))
    );
    ack(&source, &letters).await;
    source.close().await.unwrap();
}

/// A `message_id` takes 255 bytes; other brokers take more.
#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn the_long_id_of_a_dead_letter_from_another_broker_comes_through() {
    let dead = Queue::declare("long-id", Kind::Classic, &[]).await;
    let sink = dead.sink("");
    let id = "i".repeat(5_000);
    let letter = Message::new("x")
        .with_dedup_id(&id)
        .with_attribute(DEAD_LETTER_REASON, "why");
    assert!(sink.publish(&[letter]).await[0].is_ok());
    sink.close().await.unwrap();
    let source = dead.source("");
    let letters = receive(&source, 1).await;
    assert_eq!(letters[0].message.dedup_id, Some(id));
    ack(&source, &letters).await;
    source.close().await.unwrap();
}
