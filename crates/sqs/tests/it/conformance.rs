//! The public conformance suite, on both kinds of queue of both emulators: `./tests/run sqs`.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{Emulator, Kind, Queue};
use async_trait::async_trait;
use onlyonce_core::Message;
use onlyonce_core::attributes::DEAD_LETTER_REASON;
use onlyonce_core::driver::{Receipt, Sink, Source};
use onlyonce_sqs::{SqsReceipt, SqsSink, SqsSource};
use onlyonce_testkit::Gap;
use onlyonce_testkit::proxy::{End, Proxy};
use onlyonce_testkit::source::{DeadLettered, SourceHarness};
use onlyonce_testkit::source_suite;

/// Sources go through a proxy that can cut their connections; sinks go straight to the emulator.
struct Harness {
    queue: Queue,
    proxy: Proxy,
    gaps: &'static [Gap],
}

impl Harness {
    async fn new(emulator: Emulator, kind: Kind, gaps: &'static [Gap]) -> Self {
        Self {
            queue: Queue::create(emulator, kind, 2).await,
            proxy: emulator.proxy().await,
            gaps,
        }
    }
}

#[async_trait]
impl SourceHarness for Harness {
    async fn source(&self) -> Arc<dyn Source> {
        Arc::new(SqsSource::new(self.queue.through(&self.proxy)).unwrap())
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        Arc::new(SqsSink::new(self.queue.config()).unwrap())
    }

    async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>) {
        let config = self.queue.in_another_region().await;
        let sink = SqsSink::new(config.clone()).unwrap();
        (Arc::new(SqsSource::new(config).unwrap()), Arc::new(sink))
    }

    fn made_up(&self, _: &Receipt) -> Vec<Receipt> {
        let handle = "no-such-handle".into();
        vec![Receipt::new(SqsReceipt { handle })]
    }

    fn lease(&self) -> Duration {
        Duration::from_secs(2)
    }

    /// LocalStack looks for leases that have ended once a second, and is slow on a busy machine.
    fn patience(&self) -> Duration {
        Duration::from_secs(45)
    }

    fn large_body(&self) -> usize {
        // What is not text grows by a third, and 1 MiB is the most.
        780_000
    }

    fn refused_message(&self) -> Option<Message> {
        Some(Message::new("x".repeat((1 << 20) + 1)).with_dedup_id("refused"))
    }

    async fn break_connection(&self) -> bool {
        self.proxy.cut(End::Reset).await;
        true
    }

    async fn dead_letters(&self) -> Vec<DeadLettered> {
        let received = self
            .queue
            .client
            .receive_message()
            .max_number_of_messages(10)
            .queue_url(&self.queue.dead_url)
            .visibility_timeout(0)
            .message_attribute_names("All")
            .send();
        let messages = received.await.unwrap().messages.unwrap_or_default();
        let letter = |message: onlyonce_sqs::aws_sdk_sqs::types::Message| {
            let attributes = message.message_attributes.unwrap_or_default();
            let reason = attributes.get(DEAD_LETTER_REASON).unwrap();
            DeadLettered {
                body: message.body.unwrap().into(),
                reason: reason.string_value.clone().unwrap(),
            }
        };
        messages.into_iter().map(letter).collect()
    }

    fn gaps(&self) -> &'static [Gap] {
        self.gaps
    }
}

mod ministack_fifo {
    use super::*;
    source_suite!(
        ignore = "needs MiniStack: ./tests/run sqs",
        Harness::new(Emulator::MiniStack, Kind::Fifo, &[]).await
    );
}

mod ministack_standard {
    use super::*;
    source_suite!(
        ignore = "needs MiniStack: ./tests/run sqs",
        Harness::new(Emulator::MiniStack, Kind::Standard, &[]).await
    );
}

mod localstack_fifo {
    use super::*;
    source_suite!(
        ignore = "needs LocalStack: ./tests/run sqs",
        Harness::new(Emulator::LocalStack, Kind::Fifo, &[]).await
    );
}

mod localstack_standard {
    use super::*;
    source_suite!(
        ignore = "needs LocalStack: ./tests/run sqs",
        Harness::new(Emulator::LocalStack, Kind::Standard, &[]).await
    );
}
