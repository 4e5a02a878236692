use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use onlyonce_core::driver::Sink as _;
use onlyonce_core::handler::Handler;
use onlyonce_core::memory::MemoryQueue;
use onlyonce_core::{Builder, Failure, Message, Pipeline, Report, RetryPolicy};
use onlyonce_postgres::sqlx::{self, AssertSqlSafe, Connection as _, PgConnection};
use onlyonce_postgres::{Config, PgStore, PgTx};
use onlyonce_testkit::proxy::Proxy;
use url::Url;

/// Where the tests find the server.
pub(crate) const URL: &str = "ONLYONCE_POSTGRES_URL";
/// The same server through PgBouncer.
pub(crate) const BOUNCER: &str = "ONLYONCE_PGBOUNCER_URL";
/// The server's superuser.
pub(crate) const ADMIN: &str = "ONLYONCE_POSTGRES_ADMIN";

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
    proxy: Option<Proxy>,
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
        Self::at(&environment(BOUNCER), "pooler=transaction").await
    }

    /// Reached at `url`, on the server that the environment names.
    pub(crate) async fn at(url: &str, more: &str) -> Self {
        Self::made(url, more, &environment(URL)).await
    }

    /// On another server.
    pub(crate) async fn on(url: &str) -> Self {
        Self::made(url, "", url).await
    }

    /// What is on another server now.
    pub(crate) fn moved_to(&self, url: &str) -> Self {
        let mut url: Url = url.parse().unwrap();
        url.set_query(Some(&format!("schema={}", self.schema)));
        Self {
            direct: url.clone(),
            url,
            schema: self.schema.clone(),
            proxy: None,
        }
    }

    async fn made(url: &str, more: &str, direct: &str) -> Self {
        let schema = format!("t{}_{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let mut url: Url = url.parse().unwrap();
        url.set_query(Some(&format!("schema={schema}&{more}")));
        let mut direct: Url = direct.parse().unwrap();
        direct.set_query(Some(&format!("schema={schema}")));
        let scene = Self {
            url,
            schema,
            direct,
            proxy: None,
        };
        let tables = "CREATE TABLE effect (text text);
             CREATE TABLE marked (text text, tx bigint DEFAULT txid_current());
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

impl Scene {
    /// Keeps a proxy for as long as the scene.
    pub(crate) fn keeping(mut self, proxy: Proxy) -> Self {
        self.proxy = Some(proxy);
        self
    }

    pub(crate) async fn sql_at(url: &str, sql: &str) {
        let mut conn = PgConnection::connect(url).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(&mut conn)
            .await
            .unwrap();
        conn.close().await.unwrap();
    }
}

/// Messages `"0"`, `"1"`… that a pipeline handles.
pub(crate) struct Work<'a> {
    scene: &'a Scene,
    messages: u64,
    duplicates: u64,
    config: Config,
    concurrency: usize,
    attempts: u32,
    timeout: Duration,
    lease: Duration,
    state: String,
    store: Option<PgStore>,
}

/// What became of them.
pub(crate) struct Done {
    pub(crate) report: Report,
    /// The bodies of those that were set aside, sorted, and why.
    pub(crate) set_aside: Vec<String>,
    pub(crate) reasons: Vec<String>,
    pub(crate) effects: Vec<String>,
}

/// What is looked at when the pipeline has ended.
pub(crate) struct After<'a> {
    scene: &'a Scene,
    queue: MemoryQueue,
}

impl<'a> Work<'a> {
    pub(crate) fn of(scene: &'a Scene, messages: u64) -> Self {
        let mut config = scene.config();
        config.connect = config
            .connect
            .clone()
            .options([("search_path", &scene.schema)]);
        Self {
            scene,
            messages,
            duplicates: 0,
            config,
            concurrency: 32,
            attempts: 3,
            timeout: Duration::from_secs(60),
            lease: Duration::from_secs(30),
            state: String::new(),
            store: None,
        }
    }

    /// With these settings of the store, besides where names are looked for.
    pub(crate) fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    pub(crate) fn connections(mut self, connections: usize) -> Self {
        self.config.connections = connections;
        self
    }

    pub(crate) fn concurrency(mut self, handlers: usize) -> Self {
        self.concurrency = handlers;
        self
    }

    pub(crate) fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    pub(crate) fn duplicates(mut self, duplicates: u64) -> Self {
        self.duplicates = duplicates;
        self
    }

    pub(crate) fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// Opens the store before there are faults.
    pub(crate) async fn opened(mut self) -> Self {
        self.store = Some(PgStore::open(self.config.clone()).await.unwrap());
        self
    }

    /// What handlers find as `State<String>`.
    pub(crate) fn state(mut self, state: &str) -> Self {
        self.state = state.to_owned();
        self
    }

    pub(crate) fn lease(mut self, seconds: u64) -> Self {
        self.lease = Duration::from_secs(seconds);
        self
    }

    pub(crate) async fn run<H: Handler<PgTx, Args>, Args: Send + 'static>(
        self,
        handler: H,
    ) -> Done {
        let policy = RetryPolicy::default()
            .max_attempts(self.attempts)
            .delays(Duration::from_millis(10), Duration::from_millis(100));
        let (pipeline, after) = self.pipeline(policy).await;
        let report = pipeline.run(handler).await.unwrap();
        after.look(report).await
    }

    /// The settings of the store.
    pub(crate) fn settings(&self) -> Config {
        self.config.clone()
    }

    /// A queue with the messages in it.
    pub(crate) async fn queue(&self) -> MemoryQueue {
        let queue = MemoryQueue::new("orders").with_lease(self.lease);
        let message = |n: u64| Message::new(n.to_string()).with_dedup_id(n.to_string());
        let all = (0..self.messages).chain(0..self.duplicates);
        let all: Vec<Message> = all.map(message).collect();
        for published in queue.publish(&all).await {
            published.unwrap();
        }
        queue
    }

    pub(crate) async fn pipeline(self, policy: RetryPolicy) -> (Builder<PgTx>, After<'a>) {
        let queue = self.queue().await;
        let store = match self.store {
            Some(store) => store,
            None => PgStore::open(self.config).await.unwrap(),
        };
        let pipeline = Pipeline::transactional(queue.clone(), store)
            .consumer("test")
            .concurrency(self.concurrency)
            .claim_lease(self.lease)
            .handler_timeout(self.timeout)
            .state(self.state)
            .retry(policy)
            .stop_when_idle(self.lease.min(Duration::from_secs(4)) + Duration::from_millis(500));
        let after = After {
            scene: self.scene,
            queue,
        };
        (pipeline, after)
    }
}

impl After<'_> {
    pub(crate) async fn look(self, report: Report) -> Done {
        let letters = self.queue.dead_letters();
        let mut letters: Vec<(String, String)> = letters
            .iter()
            .map(|letter| {
                (
                    String::from_utf8(letter.message.body.to_vec()).unwrap(),
                    letter.reason.clone(),
                )
            })
            .collect();
        letters.sort();
        let (set_aside, reasons) = letters.into_iter().unzip();
        Done {
            report,
            set_aside,
            reasons,
            effects: self
                .scene
                .texts(&format!(
                    "SELECT text FROM {} ORDER BY text COLLATE \"C\"",
                    self.scene.name("effect")
                ))
                .await,
        }
    }
}

pub(crate) fn number(body: &str) -> u64 {
    body.parse().unwrap()
}

pub(crate) fn sorted(mut texts: Vec<String>) -> Vec<String> {
    texts.sort();
    texts
}

/// Writes the body as an effect.
pub(crate) async fn write_effect(body: String, tx: &mut PgTx) -> Result<(), Failure> {
    sqlx::query("INSERT INTO effect VALUES ($1)")
        .bind(body)
        .execute(&mut **tx)
        .await?;
    Ok(())
}
