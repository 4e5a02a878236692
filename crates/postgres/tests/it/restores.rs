//! A backup is restored: what was committed after it is gone, while queues and consumers have gone on.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use onlyonce_core::driver::{OutboxTransaction as _, Sink as _};
use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::{Failure, Message, Pipeline, Relay, RelayReport, Report};
use onlyonce_postgres::{PgStore, PgTx};
use tokio::process::Command;

use crate::servers::{Server, once, token};
use crate::support::{Scene, Work, number, write_effect};

#[derive(Clone, Copy)]
enum Backup {
    /// `pg_dump` while the server runs.
    Dump,
    /// A copy of its files while it is stopped.
    Files,
}

async fn call(command: &mut Command) {
    let output = command.output().await.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
}

impl Backup {
    fn place(self, server: &Server) -> PathBuf {
        server.dir.join("backup")
    }

    async fn take(self, server: &Server) {
        let place = self.place(server);
        match self {
            Self::Dump => {
                let mut dump = Command::new(server.clients.join("pg_dump"));
                dump.arg("--format=custom").arg("--file").arg(&place);
                call(dump.arg("--dbname").arg(server.database())).await;
            }
            Self::Files => {
                server.call("stop").await;
                let data = server.dir.join("data");
                call(Command::new("cp").arg("-a").arg(data).arg(place)).await;
                server.call("start").await;
            }
        }
    }

    async fn restore(self, server: &Server) {
        let place = self.place(server);
        match self {
            Self::Dump => {
                for sql in [
                    "DROP DATABASE onlyonce WITH (FORCE)",
                    "CREATE DATABASE onlyonce OWNER onlyonce",
                ] {
                    Scene::sql_at(&server.admin, sql).await;
                }
                let mut restore = Command::new(server.clients.join("pg_restore"));
                restore.arg("--exit-on-error").arg("--dbname");
                call(restore.arg(server.database()).arg(place)).await;
            }
            Self::Files => {
                server.call("stop").await;
                let data = server.dir.join("data");
                std::fs::remove_dir_all(&data).unwrap();
                std::fs::rename(place, data).unwrap();
                server.call("start").await;
            }
        }
    }
}

/// Orders become effects in the database and events for a consumer, whose records are elsewhere.
struct Shop {
    url: String,
    scene: Scene,
    orders: MemoryQueue,
    events: MemoryQueue,
    consumer: MemoryStore,
}

/// The events of even orders have a dedup id of their own, those of odd ones have what the outbox gives them.
async fn sell(order: String, tx: &mut PgTx) -> Result<(), Failure> {
    write_effect(order.clone(), tx).await?;
    let event = Message::new(order.clone());
    let event = match number(&order) % 2 {
        0 => event.with_dedup_id(format!("sold-{order}")),
        _ => event,
    };
    tx.publish("events", event).await?;
    Ok(())
}

async fn take_notice(order: String, tx: &mut MemoryTx) -> Result<(), Failure> {
    tx.push(order);
    Ok(())
}

async fn is_empty(queue: MemoryQueue) {
    while queue.depth() + queue.in_flight() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

impl Shop {
    async fn on(server: &Server) -> Self {
        Self {
            url: server.url.clone(),
            scene: server.scene().await,
            orders: MemoryQueue::new("orders"),
            events: MemoryQueue::new("events"),
            consumer: MemoryStore::new(),
        }
    }

    /// The broker delivers these orders, for the first time or again.
    async fn deliver(&self, orders: Range<u64>) -> Report {
        let message = |n: u64| Message::new(n.to_string()).with_dedup_id(n.to_string());
        let messages: Vec<Message> = orders.map(message).collect();
        for published in self.orders.publish(&messages).await {
            published.unwrap();
        }
        let config = Work::of(&self.scene, 0).settings();
        let store = PgStore::open(config).await.unwrap();
        Pipeline::transactional(self.orders.clone(), store)
            .shutdown(is_empty(self.orders.clone()))
            .run(sell)
            .await
            .unwrap()
    }

    /// Publishes all that waits in the outbox.
    async fn relay(&self) -> RelayReport {
        let scene = self.scene.moved_to(&self.url);
        let none_waits = async move {
            while !scene.texts(&waiting(&scene)).await.is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        Relay::new(self.scene.store().await.outbox())
            .to("events", self.events.clone())
            .shutdown(none_waits)
            .run()
            .await
            .unwrap()
    }

    async fn consume(&self) -> Report {
        Pipeline::transactional(self.events.clone(), self.consumer.clone())
            .shutdown(is_empty(self.events.clone()))
            .run(take_notice)
            .await
            .unwrap()
    }

    /// The orders whose effects are there, each once.
    async fn sold(&self) -> usize {
        let effects = format!("SELECT text FROM {}", self.scene.name("effect"));
        once(&self.scene.texts(&effects).await).len()
    }

    /// The orders of which the consumer has taken notice, each as often as it has.
    fn noticed(&self) -> Vec<u64> {
        let effects = self.consumer.effects();
        let order = |effect| number(std::str::from_utf8(effect).unwrap());
        let mut orders: Vec<u64> = effects.iter().map(|effect| order(effect)).collect();
        orders.sort_unstable();
        orders
    }
}

fn waiting(scene: &Scene) -> String {
    format!("SELECT id::text FROM {}", scene.name("onlyonce_outbox"))
}

async fn restored(backup: Backup) {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder, "server", "").await;
    let shop = Shop::on(&server).await;
    // When the backup is taken half of the events were published.
    shop.deliver(0..20).await;
    assert_eq!(shop.relay().await.sent, 20);
    shop.deliver(20..40).await;
    backup.take(&server).await;
    assert_eq!(shop.relay().await.sent, 20);
    shop.deliver(40..60).await;
    assert_eq!(shop.relay().await.sent, 20);
    assert_eq!(shop.consume().await.applied, 60);

    backup.restore(&server).await;
    assert_eq!(shop.sold().await, 40);
    let waiting = shop.scene.texts(&waiting(&shop.scene)).await;
    assert_eq!(waiting.len(), 20);
    // They leave once more, and the consumer knows them.
    assert_eq!(shop.relay().await.sent, 20);
    let consumed = shop.consume().await;
    assert_eq!((consumed.applied, consumed.duplicates), (0, 20));
    assert_eq!(shop.noticed(), (0..60).collect::<Vec<_>>());

    // What the broker delivers again takes effect if its effect was lost, and only then.
    let delivered = shop.deliver(0..60).await;
    assert_eq!((delivered.applied, delivered.duplicates), (20, 40));
    assert_eq!(shop.sold().await, 60);
    // Those effects have events of their own, which the consumer knows by their own dedup ids, if they have some.
    assert_eq!(shop.relay().await.sent, 20);
    let consumed = shop.consume().await;
    assert_eq!((consumed.applied, consumed.duplicates), (10, 10));
    let mut expected: Vec<u64> = (0..60).chain((41..60).step_by(2)).collect();
    expected.sort_unstable();
    assert_eq!(shop.noticed(), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: ./tests/run postgres"]
async fn restored_backup_republishes_only_what_consumers_recognise() {
    restored(Backup::Files).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: ./tests/run postgres"]
async fn restored_dump_republishes_only_what_consumers_recognise() {
    restored(Backup::Dump).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: ./tests/run postgres"]
async fn tokens_rise_over_a_restored_backup() {
    for backup in [Backup::Files, Backup::Dump] {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::start(&folder, "server", "").await;
        let scene = server.scene().await;
        token(&scene.store().await).await;
        backup.take(&server).await;
        let before = token(&scene.store().await).await;
        backup.restore(&server).await;
        let after = token(&scene.store().await).await;
        assert!(after > before, "{after:?} after {before:?}");
    }
}
