//! What every source, every store and every outbox promises.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::Message;
use onlyonce_core::attributes::DEAD_LETTER_REASON;
use onlyonce_core::driver::{Outbox, OutgoingId, Receipt, ReceiveLimits, Sink, Source, Store};
use onlyonce_sqlite::{Config, SqliteOutbox, SqliteQueue, SqliteReceipt, SqliteStore, SqliteTx};
use onlyonce_testkit::outbox::OutboxHarness;
use onlyonce_testkit::source::{DeadLettered, SourceHarness};
use onlyonce_testkit::store::StoreHarness;
use onlyonce_testkit::transactional_store::TransactionalStoreHarness;

use crate::support::Scene;

const LEASE: Duration = Duration::from_secs(1);

/// A queue on the machine's clock.
struct Queue {
    dir: tempfile::TempDir,
}

impl Queue {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    async fn open(&self, name: &str) -> Arc<SqliteQueue> {
        self.open_in("queue.db", name).await
    }

    async fn open_in(&self, file: &str, name: &str) -> Arc<SqliteQueue> {
        let mut config = Config::new(self.dir.path().join(file)).queue(name);
        config.lease = LEASE;
        Arc::new(SqliteQueue::open(config).await.unwrap())
    }
}

#[async_trait]
impl SourceHarness for Queue {
    async fn source(&self) -> Arc<dyn Source> {
        self.open("orders").await
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        self.open("orders").await
    }

    async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>) {
        let other = self.open_in("other.db", "orders").await;
        (other.clone(), other)
    }

    fn made_up(&self, receipt: &Receipt) -> Vec<Receipt> {
        let SqliteReceipt { id, token } = *receipt.get().expect("it is SQLite's");
        let other = |id, token| Receipt::new(SqliteReceipt { id, token });
        vec![other(id + 1_000_000, token), other(id, token + 1_000_000)]
    }

    fn lease(&self) -> Duration {
        LEASE
    }

    fn refused_message(&self) -> Option<Message> {
        let most = 64 << 20;
        Some(Message::new(vec![0; most + 1]))
    }

    async fn dead_letters(&self) -> Vec<DeadLettered> {
        let limit = ReceiveLimits::new(1000, Duration::ZERO);
        let dead = self.open("orders.dead").await;
        let letters = dead.receive(limit).await.unwrap();
        Source::close(&*dead).await.unwrap();
        let letters = letters.iter().map(|letter| DeadLettered {
            body: letter.message.body.clone(),
            reason: letter
                .message
                .attributes
                .get(DEAD_LETTER_REASON)
                .unwrap()
                .into(),
        });
        letters.collect()
    }
}

onlyonce_testkit::source_suite!(Queue::new());

#[async_trait]
impl StoreHarness for Scene {
    async fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.transactional().await)
    }

    async fn expire(&self, time: Duration) {
        self.pass(time);
    }
}

#[async_trait]
impl TransactionalStoreHarness for Scene {
    type Store = SqliteStore;

    async fn transactional(&self) -> SqliteStore {
        let store = SqliteStore::open(self.config()).await.unwrap();
        let create = |conn: &rusqlite::Connection| {
            conn.execute_batch(
                "CREATE TABLE IF NOT EXISTS effect (text);
                 CREATE TABLE IF NOT EXISTS parent (id PRIMARY KEY);
                 CREATE TABLE IF NOT EXISTS child (id REFERENCES parent DEFERRABLE INITIALLY DEFERRED)",
            )
        };
        store.database().with(create).await.unwrap();
        store
    }

    async fn write(&self, tx: &mut SqliteTx, effect: &str) {
        let effect = effect.to_owned();
        let written = tx.execute("INSERT INTO effect VALUES (?1)", [effect]);
        written.await.unwrap();
    }

    async fn break_constraint(&self, tx: &mut SqliteTx) {
        let orphan = tx.execute("INSERT INTO child VALUES (1)", []);
        orphan.await.unwrap();
    }

    async fn effects(&self) -> Vec<String> {
        let conn = rusqlite::Connection::open(self.config().path).unwrap();
        let mut all = conn.prepare("SELECT text FROM effect").unwrap();
        let all = all.query_map([], |row| row.get(0)).unwrap();
        all.collect::<Result<_, _>>().unwrap()
    }
}

#[async_trait]
impl OutboxHarness for Scene {
    async fn outbox(&self) -> Arc<dyn Outbox> {
        Arc::new(SqliteOutbox::open(self.config()).await.unwrap())
    }

    async fn publish(&self, destination: &str, message: Message) -> OutgoingId {
        let outbox = SqliteOutbox::open(self.config()).await.unwrap();
        outbox.publish(destination, message).await.unwrap()
    }
}

onlyonce_testkit::store_suite!(Scene::new());
onlyonce_testkit::transactional_store_suite!(Scene::new());
onlyonce_testkit::outbox_suite!(Scene::new());
