//! The simulated broker, where nothing goes wrong, passes every check, whatever kind of broker it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{Capabilities, Ordering, Receipt, Sink, SinkInfo, Source};
use onlyonce_core::{Error, ErrorKind, Message};
use onlyonce_testkit::simulated::{Broker, Faults, Mix, SimulatedReceipt};
use onlyonce_testkit::source::{DeadLettered, SourceHarness};
use onlyonce_testkit::{Gap, source_suite};

const LEASE: Duration = Duration::from_secs(2);

struct Simulated(Broker);

impl Simulated {
    fn new() -> Self {
        let faults = Faults::new(1, Mix::nothing(), Duration::ZERO);
        Self(Broker::new("orders", &faults).with_lease(LEASE))
    }

    fn with_sessions() -> Self {
        Self(Self::new().0.with_sessions())
    }

    fn with_connection_leases() -> Self {
        let mut capabilities = Capabilities::default();
        capabilities.confirms_settle = true;
        capabilities.dead_letter = true;
        capabilities.ordering = Ordering::Group;
        Self(Self::new().0.with_capabilities(capabilities))
    }
}

/// A way to publish to the queue itself.
struct Publisher {
    broker: Broker,
    closed: AtomicBool,
}

impl Publisher {
    fn to(broker: &Broker) -> Arc<dyn Sink> {
        Arc::new(Self {
            broker: broker.clone(),
            closed: AtomicBool::new(false),
        })
    }
}

#[async_trait]
impl Sink for Publisher {
    fn name(&self) -> &str {
        "orders"
    }

    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        self.broker.dead_letters().connect(0).sink_info().await
    }

    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        if self.closed.load(Atomic::Acquire) {
            let error = || Error::new(ErrorKind::Closed, "it was closed");
            return batch.iter().map(|_| Err(error())).collect();
        }
        for message in batch {
            self.broker.publish(message.clone()).await;
        }
        batch.iter().map(|_| Ok(())).collect()
    }

    async fn close(&self) -> Result<(), Error> {
        self.closed.store(true, Atomic::Release);
        Ok(())
    }
}

#[async_trait]
impl SourceHarness for Simulated {
    async fn source(&self) -> Arc<dyn Source> {
        Arc::new(self.0.connect(1))
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        Publisher::to(&self.0)
    }

    async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>) {
        let other = Self::new().0;
        (Arc::new(other.connect(1)), Publisher::to(&other))
    }

    fn made_up(&self, receipt: &Receipt) -> Vec<Receipt> {
        let SimulatedReceipt { channel, tag } = *receipt.get().expect("it is of this broker");
        let other = |channel, tag| Receipt::new(SimulatedReceipt { channel, tag });
        vec![
            other(channel, tag + 1_000_000),
            other(channel + 1_000_000, tag),
        ]
    }

    fn lease(&self) -> Duration {
        LEASE
    }

    async fn dead_letters(&self) -> Vec<DeadLettered> {
        let dead = self.0.given_up().into_iter();
        dead.map(|dead| DeadLettered {
            body: dead.message.body.clone(),
            reason: dead.reason,
        })
        .collect()
    }

    fn gaps(&self) -> &'static [Gap] {
        &[Gap {
            check: "namesake_is_another_queue",
            why: "its identity is its name, so that a seed gives the same keys every time",
        }]
    }
}

source_suite!(
    #[tokio::test(start_paused = true)]
    Simulated::new()
);

mod with_sessions {
    use super::*;

    source_suite!(
        #[tokio::test(start_paused = true)]
        Simulated::with_sessions()
    );
}

mod with_connection_leases {
    use super::*;

    source_suite!(
        #[tokio::test(start_paused = true)]
        Simulated::with_connection_leases()
    );
}
