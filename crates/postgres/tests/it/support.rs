use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use onlyonce_postgres::sqlx::{self, AssertSqlSafe, Connection as _, PgConnection};
use onlyonce_postgres::{Config, PgStore};
use url::Url;

/// Where the tests find the server.
pub(crate) const URL: &str = "ONLYONCE_POSTGRES_URL";
/// The same server through PgBouncer.
pub(crate) const BOUNCER: &str = "ONLYONCE_PGBOUNCER_URL";

/// What the environment says; a test that needs it is not run without.
pub(crate) fn environment(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set: ./tests/run postgres sets it"))
}

/// A store in a schema of its own, with a place for effects beside it.
pub(crate) struct Scene {
    url: Url,
    pub(crate) schema: String,
    direct: Url,
}

static NEXT: AtomicU64 = AtomicU64::new(1);

impl Scene {
    pub(crate) async fn new() -> Self {
        Self::at(&environment(URL), "").await
    }

    /// The same with these parameters in the URL.
    pub(crate) async fn with(more: &str) -> Self {
        Self::at(&environment(URL), more).await
    }

    pub(crate) async fn through_bouncer() -> Self {
        Self::at(&environment(BOUNCER), "prepared_statements=false").await
    }

    pub(crate) async fn at(url: &str, more: &str) -> Self {
        let schema = format!("t{}_{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let mut url: Url = url.parse().unwrap();
        url.set_query(Some(&format!("schema={schema}&{more}")));
        let mut direct: Url = environment(URL).parse().unwrap();
        direct.set_query(Some(&format!("schema={schema}")));
        let scene = Self {
            url,
            schema,
            direct,
        };
        let tables = "CREATE TABLE effect (text text);
             CREATE TABLE account (id integer PRIMARY KEY, cents bigint NOT NULL);
             CREATE TABLE parent (id integer PRIMARY KEY);
             CREATE TABLE child (id integer REFERENCES parent DEFERRABLE INITIALLY DEFERRED)";
        scene
            .sql(&format!(
                "CREATE SCHEMA {0}; SET search_path = {0}; {tables}",
                scene.schema
            ))
            .await;
        scene
    }

    pub(crate) fn config(&self) -> Config {
        let query = self
            .url
            .query()
            .unwrap_or_default()
            .trim_end_matches('&')
            .to_owned();
        let mut url = self.url.clone();
        url.set_query(Some(&query));
        Config::try_from(&url).unwrap()
    }

    pub(crate) async fn store(&self) -> PgStore {
        PgStore::open(self.config()).await.unwrap()
    }

    /// A connection beside the store's, to the server itself.
    pub(crate) async fn connect(&self) -> PgConnection {
        let config = Config::try_from(&self.direct).unwrap();
        PgConnection::connect_with(&config.connect).await.unwrap()
    }

    /// Runs these statements beside the store.
    pub(crate) async fn sql(&self, sql: &str) {
        let mut conn = self.connect().await;
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(&mut conn)
            .await
            .unwrap();
        conn.close().await.unwrap();
    }

    /// The texts of one column.
    pub(crate) async fn texts(&self, sql: &str) -> Vec<String> {
        let mut conn = self.connect().await;
        let texts = sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_all(&mut conn)
            .await
            .unwrap();
        conn.close().await.unwrap();
        texts
    }

    /// A name in this scene's schema.
    pub(crate) fn name(&self, name: &str) -> String {
        format!("{}.{name}", self.schema)
    }
}
