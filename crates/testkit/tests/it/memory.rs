//! The in-memory queue, store and outbox pass every check.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::Message;
use onlyonce_core::driver::{Outbox, OutgoingId, Receipt, Sink, Source, Store};
use onlyonce_core::memory::{MemoryQueue, MemoryReceipt, MemoryStore, MemoryTx};
use onlyonce_testkit::outbox::OutboxHarness;
use onlyonce_testkit::source::{DeadLettered, SourceHarness};
use onlyonce_testkit::store::StoreHarness;
use onlyonce_testkit::transactional_store::TransactionalStoreHarness;
use onlyonce_testkit::{outbox_suite, source_suite, store_suite, transactional_store_suite};

/// Short for those suites that run in real time, and long enough for a machine that is busy.
const LEASE: Duration = Duration::from_millis(800);

struct Queue(MemoryQueue);

impl Queue {
    fn new() -> Self {
        Self(MemoryQueue::new("orders").with_lease(LEASE))
    }
}

#[async_trait]
impl SourceHarness for Queue {
    async fn source(&self) -> Arc<dyn Source> {
        Arc::new(self.0.clone())
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        Arc::new(self.0.clone())
    }

    async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>) {
        let other = MemoryQueue::new("orders");
        (Arc::new(other.clone()), Arc::new(other))
    }

    fn made_up(&self, receipt: &Receipt) -> Vec<Receipt> {
        let MemoryReceipt { consumer, tag } = *receipt.get().expect("it is of a queue in memory");
        let other = |consumer, tag| Receipt::new(MemoryReceipt { consumer, tag });
        vec![
            other(consumer, tag + 1_000_000),
            other(consumer + 1_000_000, tag),
        ]
    }

    fn lease(&self) -> Duration {
        LEASE
    }

    async fn dead_letters(&self) -> Vec<DeadLettered> {
        let dead = self.0.dead_letters().into_iter();
        dead.map(|dead| DeadLettered {
            body: dead.message.body.clone(),
            reason: dead.reason,
        })
        .collect()
    }
}

source_suite!(
    #[tokio::test(start_paused = true)]
    Queue::new()
);

const REFUSED: &str = "refused";

struct Records(MemoryStore);

impl Default for Records {
    fn default() -> Self {
        Self(MemoryStore::new().refusing(|effect| effect == REFUSED.as_bytes()))
    }
}

#[async_trait]
impl StoreHarness for Records {
    async fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.0.clone())
    }

    fn lease(&self) -> Duration {
        LEASE
    }

    async fn crash(&self) {
        self.0.forget_claims();
    }
}

#[async_trait]
impl TransactionalStoreHarness for Records {
    type Store = MemoryStore;

    async fn transactional(&self) -> MemoryStore {
        self.0.clone()
    }

    async fn write(&self, tx: &mut MemoryTx, effect: &str) {
        tx.push(effect.to_owned());
    }

    async fn break_constraint(&self, tx: &mut MemoryTx) {
        tx.push(REFUSED);
    }

    async fn effects(&self) -> Vec<String> {
        let text = |effect: bytes::Bytes| String::from_utf8_lossy(&effect).into_owned();
        self.0.effects().into_iter().map(text).collect()
    }
}

#[async_trait]
impl OutboxHarness for Records {
    async fn outbox(&self) -> Arc<dyn Outbox> {
        Arc::new(self.0.outbox())
    }

    async fn publish(&self, destination: &str, message: Message) -> OutgoingId {
        self.0.outbox().publish(destination, message)
    }
}

store_suite!(
    #[tokio::test(start_paused = true)]
    Records::default()
);
outbox_suite!(
    #[tokio::test(start_paused = true)]
    Records::default()
);
transactional_store_suite!(
    #[tokio::test(start_paused = true)]
    Records::default()
);

/// The same on several threads and the real clock.
mod real_time {
    use super::*;

    source_suite!(
        #[tokio::test(flavor = "multi_thread")]
        Queue::new()
    );
    store_suite!(
        #[tokio::test(flavor = "multi_thread")]
        Records::default()
    );
    transactional_store_suite!(
        #[tokio::test(flavor = "multi_thread")]
        Records::default()
    );
    outbox_suite!(
        #[tokio::test(flavor = "multi_thread")]
        Records::default()
    );
}
