//! The public conformance suite, on every kind of queue: `./tests/run rabbitmq`.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{End, Kind, Proxy, Queue};
use async_trait::async_trait;
use lapin::types::AMQPValue;
use onlyonce_core::Message;
use onlyonce_core::driver::{Receipt, Sink, Source};
use onlyonce_rabbitmq::{Config, RabbitReceipt, RabbitSink, RabbitSource};
use onlyonce_testkit::source::SourceHarness;
use onlyonce_testkit::source_suite;

/// Sources go through a proxy that can cut their connections; sinks go straight to the broker.
struct Harness {
    queue: Queue,
    kind: Kind,
    proxy: Proxy,
    parameters: String,
}

impl Harness {
    /// Leases are those of the channel here; the broker's clock has a test of its own, since it is one for all queues.
    async fn new(kind: Kind, parameters: &str) -> Self {
        // Without it, a second consumer would take part of each group.
        let single = [("x-single-active-consumer", AMQPValue::Boolean(true))];
        let more = &single[..usize::from(parameters.contains("group_header"))];
        let queue = Queue::declare("conformance", kind, more).await;
        Self {
            queue,
            kind,
            proxy: crate::common::proxy().await,
            parameters: format!("&consumer_timeout=0s{parameters}"),
        }
    }
}

#[async_trait]
impl SourceHarness for Harness {
    async fn source(&self) -> Arc<dyn Source> {
        let config = crate::common::through(&self.proxy, &self.queue.name, &self.parameters);
        Arc::new(RabbitSource::new(config).unwrap())
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        let config: Config = self.queue.config(&self.parameters);
        Arc::new(RabbitSink::new(config).unwrap())
    }

    async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>) {
        let config = self
            .queue
            .in_another_vhost(self.kind, &self.parameters)
            .await;
        let sink = RabbitSink::new(config.clone()).unwrap();
        (Arc::new(RabbitSource::new(config).unwrap()), Arc::new(sink))
    }

    fn made_up(&self, receipt: &Receipt) -> Vec<Receipt> {
        let real = receipt.get::<RabbitReceipt>().expect("it is RabbitMQ's");
        let (mut tag, mut channel) = (real.clone(), real.clone());
        tag.tag += 1_000_000;
        channel.channel += 1_000_000;
        vec![Receipt::new(tag), Receipt::new(channel)]
    }

    fn lease(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn large_body(&self) -> usize {
        12 << 20
    }

    fn refused_message(&self) -> Option<Message> {
        Some(Message::new("refused").with_dedup_id("x".repeat(256)))
    }

    async fn break_connection(&self) -> bool {
        self.proxy.cut(End::Reset).await;
        true
    }
}

mod classic {
    use super::*;
    source_suite!(
        ignore = "needs a RabbitMQ: ./tests/run rabbitmq",
        Harness::new(Kind::Classic, "").await
    );
}

mod quorum {
    use super::*;
    source_suite!(
        ignore = "needs a RabbitMQ: ./tests/run rabbitmq",
        Harness::new(Kind::Quorum, "").await
    );
}

mod classic_groups {
    use super::*;
    source_suite!(
        ignore = "needs a RabbitMQ: ./tests/run rabbitmq",
        Harness::new(Kind::Classic, "&group_header=x-group").await
    );
}

mod quorum_groups {
    use super::*;
    source_suite!(
        ignore = "needs a RabbitMQ: ./tests/run rabbitmq",
        Harness::new(Kind::Quorum, "&group_header=x-group").await
    );
}
