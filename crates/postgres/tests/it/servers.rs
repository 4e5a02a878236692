//! Servers that restart, are killed, have no connection left, or fail over to a standby. Each test has servers of its own.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use onlyonce_core::driver::{Claim, ClaimResult, Fingerprint, KeyDigest, Owner, Store, Token};
use onlyonce_core::memory::MemoryQueue;
use onlyonce_core::{Builder, ConfigRisk, Counters, Pipeline, RetryPolicy};
use onlyonce_postgres::sqlx::{self, Connection as _, PgConnection};
use onlyonce_postgres::{Config, PgStore, PgTx};
use tokio::process::Command;

use crate::support::{Scene, Work, write_effect};

/// That of the version which the environment names.
fn path_of_script() -> PathBuf {
    std::env::var_os("ONLYONCE_POSTGRES_SCRIPT").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../localstack/postgres"),
        PathBuf::from,
    )
}

/// A server in a folder of its own. It is stopped when this is dropped.
pub(crate) struct Server {
    pub(crate) dir: PathBuf,
    pub(crate) url: String,
    pub(crate) admin: String,
    /// Where the clients are that know it.
    pub(crate) clients: PathBuf,
}

async fn script(arguments: &[&str]) -> String {
    let output = Command::new(path_of_script()).args(arguments).output();
    let output = output.await.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Server {
    pub(crate) async fn start(folder: &tempfile::TempDir, name: &str, settings: &str) -> Self {
        let dir = folder.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("settings.conf"), settings).unwrap();
        script(&["start", text(&dir)]).await;
        Self::at(dir).await
    }

    async fn at(dir: PathBuf) -> Self {
        let variables = script(&["env", text(&dir)]).await;
        let value = |name: &str| {
            let prefix = format!("export {name}=");
            let line = variables
                .lines()
                .find_map(|line| line.strip_prefix(&prefix));
            line.unwrap().to_owned()
        };
        Self {
            url: value("ONLYONCE_POSTGRES_URL"),
            admin: value("ONLYONCE_POSTGRES_ADMIN"),
            clients: value("ONLYONCE_POSTGRES_CLIENTS").into(),
            dir,
        }
    }

    async fn standby(&self, folder: &tempfile::TempDir) -> Self {
        let dir = folder.path().join("standby");
        script(&["standby", text(&self.dir), text(&dir)]).await;
        Self::at(dir).await
    }

    pub(crate) async fn call(&self, command: &str) {
        script(&[command, text(&self.dir)]).await;
    }

    pub(crate) async fn scene(&self) -> Scene {
        Scene::on(&self.url).await
    }

    /// The superuser's URL of the database in which scenes are.
    pub(crate) fn database(&self) -> String {
        let (server, _) = self.admin.rsplit_once('/').unwrap();
        let (_, database) = self.url.rsplit_once('/').unwrap();
        format!("{server}/{database}")
    }

    /// Waits until a standby has no connection to its primary.
    async fn is_alone(&self) {
        let mut conn = PgConnection::connect(&self.admin).await.unwrap();
        loop {
            let receivers = "SELECT count(*) FROM pg_stat_wal_receiver";
            let receivers: i64 = sqlx::query_scalar(receivers)
                .fetch_one(&mut conn)
                .await
                .unwrap();
            if receivers == 0 {
                return conn.close().await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let stop = std::process::Command::new(path_of_script())
            .args(["stop", text(&self.dir)])
            .status();
        assert!(stop.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

pub(crate) fn once(effects: &[String]) -> HashSet<&String> {
    let once: HashSet<&String> = effects.iter().collect();
    assert_eq!(once.len(), effects.len(), "an effect is there twice");
    once
}

async fn survives(trouble: &str) {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder, "server", "").await;
    let scene = server.scene().await;
    let work = Work::of(&scene, 4_000)
        .connections(4)
        .duplicates(400)
        .lease(6)
        .opened()
        .await;
    let (pipeline, after) = work.pipeline(RetryPolicy::default()).await;
    let counters = pipeline.counters();
    let troubles = async {
        for part in [800, 2_400] {
            applied(&counters, part).await;
            server.call(trouble).await;
        }
    };
    let (report, ()) = tokio::join!(pipeline.run(write_effect), troubles);
    let done = after.look(report.unwrap()).await;
    assert_eq!(once(&done.effects).len(), 4_000, "{:?}", done.report);
    assert_eq!(
        (done.set_aside.len(), done.report.failed),
        (0, 0),
        "{:?}",
        done.reasons
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: ./tests/run postgres"]
async fn a_server_that_restarts_loses_and_doubles_nothing() {
    survives("restart").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: ./tests/run postgres"]
async fn a_server_that_is_killed_loses_and_doubles_nothing() {
    survives("crash").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: ./tests/run postgres"]
async fn a_server_without_connections_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder, "server", "max_connections = 15\n").await;
    let scene = server.scene().await;
    let work = Work::of(&scene, 2_000)
        .connections(6)
        .lease(6)
        .opened()
        .await;
    let others = async {
        let mut taken = Vec::new();
        while let Ok(conn) = PgConnection::connect(&server.url).await {
            taken.push(conn);
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        for conn in taken {
            conn.close().await.unwrap();
        }
    };
    let (done, ()) = tokio::join!(work.run(write_effect), others);
    assert_eq!(once(&done.effects).len(), 2_000, "{:?}", done.report);
    assert!(done.set_aside.is_empty(), "{:?}", done.reasons);
}

fn some_claim() -> Claim {
    Claim::new(KeyDigest([9; 16]), Fingerprint::of(b"payload"))
}

pub(crate) async fn token(store: &PgStore) -> Token {
    let claimed = store
        .claim(Owner::random(), &[some_claim()], Duration::from_millis(1))
        .await;
    match claimed.unwrap()[0] {
        ClaimResult::Acquired { token, .. } => token,
        ref other => panic!("it is nobody's: {other:?}"),
    }
}

/// Commits of claims are not waited for, so a crash can take tokens back that were given.
#[tokio::test]
#[ignore = "needs PostgreSQL: ./tests/run postgres"]
async fn tokens_rise_across_a_crash_of_the_server() {
    let folder = tempfile::tempdir().unwrap();
    // Nothing is written for as long as the test lasts, but what a commit waits for.
    let server = Server::start(&folder, "server", "wal_writer_delay = 10s\n").await;
    let scene = server.scene().await;
    let store = scene.store().await;
    let mut last = token(&store).await;
    for _ in 0..3 {
        for _ in 0..50 {
            tokio::time::sleep(Duration::from_millis(2)).await;
            let next = token(&store).await;
            assert!(next > last, "{next:?} after {last:?}");
            last = next;
        }
        server.call("crash").await;
        // The connections that broke are told of once each.
        while store.renew(&[], Duration::ZERO).await.is_err() || store.store_info().await.is_err() {
        }
    }
}

/// A pipeline that takes what is in the queue, until nothing is left.
async fn taking(queue: &MemoryQueue, config: Config) -> Builder<PgTx> {
    let store = PgStore::open(config).await.unwrap();
    Pipeline::transactional(queue.clone(), store)
        .consumer("test")
        .concurrency(32)
        .claim_lease(Duration::from_secs(4))
        .drain_timeout(Duration::from_secs(2))
        .stop_when_idle(Duration::from_secs(5))
}

/// Waits until so many messages took effect.
async fn applied(counters: &Counters, messages: u64) {
    while counters.report().applied < messages {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// The primary dies in the middle of the work, and its standby takes its place; what is there then, of so many messages.
async fn fail_over(is_synchronous: bool) -> (usize, Vec<String>) {
    const MESSAGES: u64 = 20_000;
    let folder = tempfile::tempdir().unwrap();
    let primary = Server::start(&folder, "primary", "").await;
    let scene = primary.scene().await;
    let standby = primary.standby(&folder).await;
    if is_synchronous {
        script(&["sync", text(&primary.dir), "on"]).await;
    }
    let work = Work::of(&scene, MESSAGES);
    let (config, queue) = (work.settings(), work.queue().await);
    let before = token(&scene.store().await).await;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let first = taking(&queue, config.clone()).await.shutdown(async {
        let _ = stopped.await;
    });
    let first = match is_synchronous {
        true => first,
        false => first.allow(ConfigRisk::StoreForgets),
    };
    let counters = first.counters();
    let end = async {
        applied(&counters, 500).await;
        if !is_synchronous {
            // The standby hears nothing more.
            Scene::sql_at(&standby.admin, "ALTER SYSTEM SET primary_conninfo = ''").await;
            Scene::sql_at(&standby.admin, "SELECT pg_reload_conf()").await;
            standby.is_alone().await;
            applied(&counters, counters.report().applied + 500).await;
        }
        primary.call("kill").await;
        standby.call("promote").await;
        let _ = stop.send(());
    };
    let (first, ()) = tokio::join!(first.run(write_effect), end);
    let first = first.unwrap();
    assert!(first.applied < MESSAGES, "it was over before: {first:?}");

    let there = scene.moved_to(&standby.url);
    let mut moved = config;
    moved.connect = moved.connect.port(there.config().connect.get_port());
    taking(&queue, moved).await.run(write_effect).await.unwrap();
    assert_eq!(queue.depth(), 0);
    let after = token(&there.store().await).await;
    assert!(after > before, "{after:?} after {before:?}");
    let effects = format!("SELECT text FROM {}", there.name("effect"));
    (
        usize::try_from(MESSAGES).unwrap(),
        there.texts(&effects).await,
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: ./tests/run postgres"]
async fn a_synchronous_standby_that_is_promoted_loses_and_doubles_nothing() {
    let (messages, effects) = fail_over(true).await;
    assert_eq!(once(&effects).len(), messages);
}

/// Effect and record are lost together, after the message was acked: so it is lost, and never doubled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: ./tests/run postgres"]
async fn an_asynchronous_standby_that_is_promoted_loses_what_it_had_not_received() {
    let (messages, effects) = fail_over(false).await;
    let lost = messages - once(&effects).len();
    assert!(lost > 0, "there was nothing to see");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: ./tests/run postgres"]
async fn a_standby_and_a_primary_that_waits_for_none_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let primary = Server::start(&folder, "primary", "").await;
    let scene = primary.scene().await;
    let store = scene.store().await;
    assert_eq!(store.store_info().await.unwrap().lags, None);
    let standby = primary.standby(&folder).await;
    let lags = store.store_info().await.unwrap().lags.unwrap();
    assert!(lags.contains("synchronous_standby_names"), "{lags}");
    let there = scene.moved_to(&standby.url);
    let error = there
        .store()
        .await
        .store_info()
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("is a standby"), "{error}");
    script(&["sync", text(&primary.dir), "on"]).await;
    assert_eq!(scene.store().await.store_info().await.unwrap().lags, None);
}
