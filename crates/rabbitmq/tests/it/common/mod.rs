//! What the broker tests share.

use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use lapin::options::{
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use onlyonce_core::Message;
use onlyonce_core::driver::{
    Delivery, Disposition, Receipt, ReceiveLimits, SettleResult, Settlement, Sink as _, Source as _,
};
use onlyonce_rabbitmq::{Config, RabbitSink, RabbitSource};
pub(crate) use onlyonce_testkit::proxy::{End, Proxy};
use tokio::time::Instant;

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The broker's URL, up to the vhost.
pub(crate) fn url() -> String {
    std::env::var("ONLYONCE_RABBITMQ_URL")
        .expect("set ONLYONCE_RABBITMQ_URL, see `./tests/run rabbitmq`")
}

/// The broker's host and port.
pub(crate) fn address() -> String {
    let url = url::Url::parse(&url()).unwrap();
    format!("{}:{}", url.host_str().unwrap(), url.port().unwrap_or(5672))
}

/// Runs rabbitmqctl against the broker and returns what it prints.
pub(crate) fn ctl(arguments: &[&str]) -> String {
    let set = std::env::var_os("ONLYONCE_RABBITMQ_CTL").is_some();
    assert!(
        set,
        "set ONLYONCE_RABBITMQ_CTL to `localstack/rabbitmq-4.0 ctl DIR`"
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", "$ONLYONCE_RABBITMQ_CTL \"$@\"", "sh"]);
    let output = shell.args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A proxy to the broker.
pub(crate) async fn proxy() -> Proxy {
    Proxy::to(address()).await.unwrap()
}

/// The configuration of a client that goes through a proxy.
pub(crate) fn through(proxy: &Proxy, queue: &str, more: &str) -> Config {
    let mut url = url::Url::parse(&url()).unwrap();
    url.set_host(Some("127.0.0.1")).unwrap();
    url.set_port(Some(proxy.port())).unwrap();
    format!("{url}?queue={queue}{more}").parse().unwrap()
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Classic,
    Quorum,
}

/// A queue of a test's own, deleted with the test's process.
pub(crate) struct Queue {
    pub(crate) name: String,
    pub(crate) channel: Channel,
    /// Ends with the queue.
    _connection: Connection,
}

impl Queue {
    pub(crate) async fn declare(test: &str, kind: Kind, more: &[(&str, AMQPValue)]) -> Self {
        let connection = Connection::connect(&url(), ConnectionProperties::default())
            .await
            .unwrap();
        let channel = connection.create_channel().await.unwrap();
        let name = format!("test.{test}.{kind:?}.{:x}", fastrand::u64(..)).to_lowercase();
        let queue = Self {
            name,
            channel,
            _connection: connection,
        };
        queue.declare_again(kind, more).await;
        queue
    }

    pub(crate) async fn declare_again(&self, kind: Kind, more: &[(&str, AMQPValue)]) {
        let mut arguments = FieldTable::default();
        let kind = format!("{kind:?}").to_lowercase();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
        arguments.insert("x-expires".into(), AMQPValue::LongInt(600_000));
        for (name, value) in more {
            arguments.insert((*name).into(), value.clone());
        }
        let durable = QueueDeclareOptions {
            durable: true,
            ..Default::default()
        };
        self.channel
            .queue_declare(self.name.as_str().into(), durable, arguments)
            .await
            .unwrap();
    }

    pub(crate) async fn declare_stream(&self) {
        let mut arguments = FieldTable::default();
        arguments.insert(
            "x-queue-type".into(),
            AMQPValue::LongString("stream".into()),
        );
        let durable = QueueDeclareOptions {
            durable: true,
            ..Default::default()
        };
        let name = self.name.as_str().into();
        let declare = self.channel.queue_declare(name, durable, arguments);
        declare.await.unwrap();
    }

    pub(crate) fn config(&self, more: &str) -> Config {
        format!("{}?queue={}{more}", url(), self.name)
            .parse()
            .unwrap()
    }

    /// A queue of the same name in another vhost.
    pub(crate) async fn in_another_vhost(&self, kind: Kind, more: &str) -> Config {
        const VHOST: &str = "elsewhere";
        static MADE: OnceLock<()> = OnceLock::new();
        let mut url = url::Url::parse(&url()).unwrap();
        MADE.get_or_init(|| {
            if !ctl(&["list_vhosts"]).lines().any(|vhost| vhost == VHOST) {
                ctl(&["add_vhost", VHOST]);
            }
            let all = [".*"; 3];
            let user = url.username();
            ctl(&[&["set_permissions", "-p", VHOST, user], &all[..]].concat());
        });
        url.set_path(VHOST);
        let connection = Connection::connect(url.as_str(), ConnectionProperties::default());
        let connection = connection.await.unwrap();
        let elsewhere = Self {
            name: self.name.clone(),
            channel: connection.create_channel().await.unwrap(),
            _connection: connection,
        };
        elsewhere.declare_again(kind, &[]).await;
        format!("{url}?queue={}{more}", self.name).parse().unwrap()
    }

    pub(crate) fn source(&self, more: &str) -> RabbitSource {
        RabbitSource::new(self.config(more)).unwrap()
    }

    pub(crate) fn sink(&self, more: &str) -> RabbitSink {
        RabbitSink::new(self.config(more)).unwrap()
    }

    /// Messages with the bodies and ids 0, 1, 2…
    pub(crate) async fn fill(&self, many: usize) {
        let sink = self.sink("");
        let messages: Vec<_> = (0..many).map(numbered).collect();
        for result in sink.publish(&messages).await {
            result.unwrap();
        }
        sink.close().await.unwrap();
    }

    /// How many messages wait in the queue, not counting those that are out.
    pub(crate) async fn waiting(&self) -> u32 {
        self.look().await.message_count()
    }

    /// Receives nothing from the empty queue until the source is its `number`th consumer.
    pub(crate) async fn consume(&self, source: &RabbitSource, number: u32) {
        let deadline = Instant::now() + PATIENCE;
        while self.look().await.consumer_count() < number {
            assert!(Instant::now() < deadline, "no consumer {number}");
            assert_silent(source).await;
        }
    }

    async fn look(&self) -> lapin::Queue {
        let passive = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        let name = self.name.as_str().into();
        let declare = self
            .channel
            .queue_declare(name, passive, FieldTable::default());
        declare.await.unwrap()
    }

    pub(crate) async fn purge(&self) {
        self.channel
            .queue_purge(self.name.as_str().into(), QueuePurgeOptions::default())
            .await
            .unwrap();
    }

    /// Binds the queue to a new headers exchange, for messages whose header `name` is `value`.
    pub(crate) async fn bind_by_header(&self, exchange: &str, name: &str, value: &str) {
        let options = ExchangeDeclareOptions {
            auto_delete: true,
            ..Default::default()
        };
        let none = FieldTable::default();
        let declare =
            self.channel
                .exchange_declare(exchange.into(), ExchangeKind::Headers, options, none);
        declare.await.unwrap();
        let mut arguments = FieldTable::default();
        arguments.insert(name.into(), AMQPValue::LongString(value.into()));
        let (queue, options) = (self.name.as_str().into(), QueueBindOptions::default());
        let bind = self
            .channel
            .queue_bind(queue, exchange.into(), "".into(), options, arguments);
        bind.await.unwrap();
    }

    pub(crate) async fn delete(&self) {
        self.channel
            .queue_delete(self.name.as_str().into(), QueueDeleteOptions::default())
            .await
            .unwrap();
    }

    /// Asserts that nothing is left, once every consumer is closed.
    pub(crate) async fn assert_left(&self, expected: u32) {
        let deadline = Instant::now() + PATIENCE;
        let mut left = self.waiting().await;
        // A closed channel's messages take a moment to be back.
        while left != expected && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(50)).await;
            left = self.waiting().await;
        }
        assert_eq!(left, expected, "messages left in {}", self.name);
    }
}

pub(crate) fn numbered(n: usize) -> Message {
    Message::new(n.to_string()).with_dedup_id(n.to_string())
}

pub(crate) fn limit(messages: usize) -> ReceiveLimits {
    ReceiveLimits::new(messages, Duration::from_millis(500))
}

/// Receives until there are `many`; fails after a while.
pub(crate) async fn receive(source: &RabbitSource, many: usize) -> Vec<Delivery> {
    let deadline = Instant::now() + PATIENCE;
    let mut deliveries = Vec::new();
    while deliveries.len() < many {
        assert!(
            Instant::now() < deadline,
            "only {} of {many} came",
            deliveries.len()
        );
        match source.receive(limit(many - deliveries.len())).await {
            Ok(more) => deliveries.extend(more),
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
    }
    deliveries
}

/// Asserts that nothing comes within a while.
pub(crate) async fn assert_silent(source: &RabbitSource) {
    let more = source.receive(limit(10)).await.unwrap();
    assert!(more.is_empty(), "unexpected: {:?}", bodies(&more));
}

pub(crate) fn bodies(deliveries: &[Delivery]) -> Vec<String> {
    let text = |d: &Delivery| String::from_utf8_lossy(&d.message.body).into_owned();
    deliveries.iter().map(text).collect()
}

pub(crate) fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

pub(crate) async fn settle(
    source: &RabbitSource,
    deliveries: &[Delivery],
    disposition: &Disposition,
) -> Vec<SettleResult> {
    let receipts: Vec<_> = deliveries.iter().map(|d| d.receipt.clone()).collect();
    settle_receipts(source, &receipts, disposition).await
}

pub(crate) async fn settle_receipts(
    source: &RabbitSource,
    receipts: &[Receipt],
    disposition: &Disposition,
) -> Vec<SettleResult> {
    let batch: Vec<_> = receipts
        .iter()
        .map(|receipt| Settlement::new(receipt.clone(), disposition.clone()))
        .collect();
    source.settle(&batch).await
}

pub(crate) async fn ack(source: &RabbitSource, deliveries: &[Delivery]) {
    for answer in settle(source, deliveries, &Disposition::Ack).await {
        assert!(answer.is_applied(), "{answer:?}");
    }
}

pub(crate) fn settlement(delivery: &Delivery, disposition: &Disposition) -> Settlement {
    Settlement::new(delivery.receipt.clone(), disposition.clone())
}

pub(crate) fn sorted(mut texts: Vec<String>) -> Vec<String> {
    texts.sort();
    texts
}

/// Receives and acks `many`; their bodies in the order in which they came.
pub(crate) async fn drain(source: &RabbitSource, many: usize) -> Vec<String> {
    let mut all = Vec::new();
    while all.len() < many {
        let some = receive(source, 1).await;
        ack(source, &some).await;
        all.extend(bodies(&some));
    }
    all
}

pub(crate) async fn receive_error(source: &RabbitSource) -> onlyonce_core::Error {
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "no error came");
        if let Err(error) = source.receive(limit(1)).await {
            return error;
        }
    }
}
