//! Which messages share a commit.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use onlyonce_core::driver::Sink as _;
use onlyonce_core::memory::MemoryQueue;
use onlyonce_core::{Failure, Message, Pipeline, State};
use onlyonce_postgres::sqlx::{self, AssertSqlSafe};
use onlyonce_postgres::{Config, PgStore, PgTx};

use crate::support::{Scene, Work, number, sorted, write_effect};

async fn transactions(scene: &Scene) -> u64 {
    let counts = scene
        .texts(&format!(
            "SELECT count(DISTINCT tx)::text FROM {}",
            scene.name("marked")
        ))
        .await;
    counts[0].parse().unwrap()
}

async fn mark(work: Work<'_>) -> crate::support::Done {
    work.run(async |body: String, tx: &mut PgTx| {
        sqlx::query("INSERT INTO marked (text) VALUES ($1)")
            .bind(body)
            .execute(&mut **tx)
            .await?;
        Ok::<_, Failure>(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn messages_that_wait_for_a_connection_share_commits() {
    let scene = Scene::new().await;
    let done = mark(Work::of(&scene, 2_000).connections(2)).await;
    assert_eq!(done.report.applied, 2_000);
    let transactions = transactions(&scene).await;
    assert!(
        transactions <= 400,
        "{transactions} transactions for 2,000 messages"
    );
    let most = scene
        .texts(&format!(
            "SELECT max(n)::text FROM (SELECT count(*) AS n FROM {} GROUP BY tx) AS t",
            scene.name("marked")
        ))
        .await;
    assert!(
        most[0].parse::<u64>().unwrap() <= 64,
        "{most:?} in one transaction"
    );
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn messages_that_do_not_wait_share_nothing() {
    let scene = Scene::new().await;
    let done = mark(Work::of(&scene, 100).connections(64).concurrency(4)).await;
    assert_eq!(done.report.applied, 100);
    assert_eq!(transactions(&scene).await, 100);
}

/// So many messages that most share a commit.
const MANY: u64 = 600;

/// Each of many once, but for those of which `except` says so.
fn all_once(except: impl Fn(u64) -> bool) -> Vec<String> {
    let all = (0..MANY).filter(|n| !except(*n));
    sorted(all.map(|n| n.to_string()).collect())
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_handler_that_commits_takes_no_neighbour_with_it() {
    fn commits(n: u64) -> bool {
        n % 40 == 39
    }
    for ending in ["COMMIT", "COMMIT; BEGIN", "COMMIT AND CHAIN"] {
        let scene = Scene::new().await;
        let work = Work::of(&scene, MANY).connections(1).attempts(1);
        let handler = async |State(ending): State<String>, body: String, tx: &mut PgTx| {
            let n = number(&body);
            write_effect(body, tx).await?;
            if commits(n) {
                let ending = sqlx::raw_sql(AssertSqlSafe(ending));
                ending.execute(&mut **tx).await?;
            }
            Ok::<_, Failure>(())
        };
        let done = work.state(ending).run(handler).await;
        let expected: Vec<String> = (0..MANY)
            .filter(|n| commits(*n))
            .map(|n| n.to_string())
            .collect();
        assert_eq!(done.set_aside, sorted(expected), "{ending}");
        let mut effects = done.effects;
        effects.retain(|effect| !commits(number(effect)));
        assert_eq!(effects, all_once(commits), "{ending}");
    }
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_handler_that_checks_all_constraints_at_once_passes_by_itself() {
    let scene = Scene::new().await;
    let work = Work::of(&scene, MANY).connections(1).attempts(2);
    let handler = async |body: String, tx: &mut PgTx| {
        let n = number(&body);
        write_effect(body, tx).await?;
        if n % 100 == 99 {
            let check = sqlx::raw_sql("SET CONSTRAINTS ALL IMMEDIATE");
            check.execute(&mut **tx).await?;
        }
        Ok::<_, Failure>(())
    };
    let done = work.run(handler).await;
    assert_eq!(done.report.applied, MANY);
    assert_eq!(done.effects, all_once(|_| false));
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_key_that_comes_twice_is_done_once_also_in_one_commit() {
    let scene = Scene::new().await;
    let work = Work::of(&scene, MANY).duplicates(MANY).connections(1);
    let done = work.run(write_effect).await;
    assert_eq!(done.report.failed, 0);
    assert_eq!(done.effects, all_once(|_| false));
}

/// Handles a message of the same queue in another worker.
async fn handle_elsewhere(config: Config, text: &str) {
    let queue = MemoryQueue::new("orders");
    queue.publish(&[message(text)]).await;
    let store = PgStore::open(config).await.unwrap();
    let pipeline = Pipeline::transactional(queue, store).consumer("test");
    let pipeline = pipeline
        .identity("orders")
        .stop_when_idle(Duration::from_millis(500));
    let report = pipeline.run(write_effect).await.unwrap();
    assert_eq!(report.applied, 1);
}

fn message(text: &str) -> Message {
    Message::new(text.to_owned()).with_dedup_id(text)
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn what_another_worker_has_meanwhile_is_done_once() {
    let scene = Scene::new().await;
    let mut config = Work::of(&scene, 0).settings();
    config.connections = 1;
    let queue = MemoryQueue::new("orders");
    let all: Vec<Message> = (0..MANY).map(|n| message(&n.to_string())).collect();
    queue.publish(&all).await;
    let handler = async |State(config): State<Config>, body: String, tx: &mut PgTx| {
        static MET: AtomicU32 = AtomicU32::new(0);
        if number(&body) % 100 == 50 && MET.fetch_add(1, SeqCst) < 6 {
            handle_elsewhere(config, &body).await;
        }
        write_effect(body, tx).await
    };
    let store = PgStore::open(config.clone()).await.unwrap();
    let report = Pipeline::transactional(queue, store)
        .consumer("test")
        .identity("orders")
        .concurrency(32)
        .state(config)
        .stop_when_idle(Duration::from_secs(1))
        .run(handler)
        .await
        .unwrap();
    assert_eq!((report.applied, report.duplicates), (MANY - 6, 6));
    assert_eq!(report.failed, 0);
    let all = format!(
        "SELECT text FROM {} ORDER BY text COLLATE \"C\"",
        scene.name("effect")
    );
    assert_eq!(scene.texts(&all).await, all_once(|_| false));
}
