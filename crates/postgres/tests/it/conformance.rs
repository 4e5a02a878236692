//! What every store promises: on the server, through PgBouncer, in other settings.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::Message;
use onlyonce_core::driver::{Outbox, OutgoingId, Store};
use onlyonce_postgres::sqlx::{self, AssertSqlSafe};
use onlyonce_postgres::{PgStore, PgTx};
use onlyonce_testkit::outbox::OutboxHarness;
use onlyonce_testkit::store::StoreHarness;
use onlyonce_testkit::transactional_store::TransactionalStoreHarness;
use onlyonce_testkit::{outbox_suite, store_suite, transactional_store_suite};

use crate::support::Scene;

#[async_trait]
impl StoreHarness for Scene {
    async fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.store().await)
    }

    fn lease(&self) -> Duration {
        Duration::from_millis(1_500)
    }

    /// Partitions are emptied as a whole.
    fn prunes_by_itself(&self) -> bool {
        true
    }
}

#[async_trait]
impl TransactionalStoreHarness for Scene {
    type Store = PgStore;

    async fn transactional(&self) -> PgStore {
        self.store().await
    }

    async fn write(&self, tx: &mut PgTx, effect: &str) {
        let insert = format!("INSERT INTO {} VALUES ($1)", self.name("effect"));
        let written = sqlx::query(AssertSqlSafe(insert))
            .bind(effect)
            .execute(&mut **tx);
        written.await.unwrap();
    }

    async fn break_constraint(&self, tx: &mut PgTx) {
        let insert = format!("INSERT INTO {} VALUES (1)", self.name("child"));
        let orphan = sqlx::query(AssertSqlSafe(insert)).execute(&mut **tx);
        orphan.await.unwrap();
    }

    async fn effects(&self) -> Vec<String> {
        self.texts(&format!("SELECT text FROM {}", self.name("effect")))
            .await
    }
}

#[async_trait]
impl OutboxHarness for Scene {
    async fn outbox(&self) -> Arc<dyn Outbox> {
        Arc::new(self.store().await.outbox())
    }

    async fn publish(&self, destination: &str, message: Message) -> OutgoingId {
        let outbox = self.store().await.outbox();
        let mut conn = self.connect().await;
        outbox
            .publish(&mut conn, destination, &message)
            .await
            .unwrap()
    }
}

mod direct {
    use super::*;
    store_suite!(
        ignore = "needs a server: ./tests/run postgres",
        Scene::new().await
    );
    transactional_store_suite!(
        ignore = "needs a server: ./tests/run postgres",
        Scene::new().await
    );
    outbox_suite!(
        ignore = "needs a server: ./tests/run postgres",
        Scene::new().await
    );
}

mod through_bouncer {
    use super::*;
    store_suite!(
        ignore = "needs a server: ./tests/run postgres",
        Scene::through_bouncer().await
    );
    transactional_store_suite!(
        ignore = "needs a server: ./tests/run postgres",
        Scene::through_bouncer().await
    );
    outbox_suite!(
        ignore = "needs a server: ./tests/run postgres",
        Scene::through_bouncer().await
    );
}

mod serializable {
    use super::*;
    transactional_store_suite!(
        ignore = "needs a server: ./tests/run postgres",
        Scene::with("isolation=serializable").await
    );
}
