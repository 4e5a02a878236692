//! Closures and handlers that do not come to an end, and those who wait for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use onlyonce_core::driver::{Owner, Sink, Store, Transaction, TransactionalStore};
use onlyonce_core::memory::MemoryQueue;
use onlyonce_core::{Builder, Error, ErrorKind, Message, Pipeline, RetryPolicy, State};
use onlyonce_sqlite::{Config, SqliteQueue, SqliteStore, SqliteTx};
use rusqlite::Connection;
use tokio::time::{sleep, timeout};

use crate::support::*;

const ENDLESS: &str = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) ";

/// Longer than anything here takes, and shorter than a turn's usual limit.
const SOON: Duration = Duration::from_secs(15);

async fn store(config: Config) -> SqliteStore {
    let store = SqliteStore::open(config).await.unwrap();
    let create = |conn: &Connection| conn.execute_batch("CREATE TABLE effect (n)");
    store.database().with(create).await.unwrap();
    store
}

async fn effects(store: &SqliteStore) -> Vec<i64> {
    let read = |conn: &Connection| {
        let mut all = conn.prepare("SELECT n FROM effect ORDER BY n")?;
        let all = all.query_map([], |row| row.get(0))?;
        all.collect::<rusqlite::Result<Vec<i64>>>()
    };
    let read = timeout(SOON, store.database().with(read)).await;
    read.expect("the file is free").unwrap()
}

async fn endless(tx: &mut SqliteTx, write: bool) -> Result<i64, Error> {
    let sql = match write {
        true => format!("INSERT INTO effect {ENDLESS} SELECT x FROM n WHERE x < 0"),
        false => format!("{ENDLESS} SELECT count(*) FROM n"),
    };
    tx.with(move |conn| conn.query_row(&sql, [], |row| row.get(0)).or(Ok(0)))
        .await
}

#[tokio::test]
async fn sql_without_end_is_interrupted_when_its_turn_is_over() {
    for write in [false, true] {
        let scene = Scene::new();
        let mut config = scene.config();
        config.turn = Duration::from_millis(100);
        let store = store(config).await;
        let claimed = store.claim(Owner::random(), &[claim(1)], LEASE).await;
        let token = token(&claimed.unwrap()[0]);
        let mut first = store.begin().await.unwrap();
        first
            .execute("INSERT INTO effect VALUES (1)", [])
            .await
            .unwrap();
        let mut second = store.begin().await.unwrap();
        // In line behind the first, so that both share a commit.
        let second = tokio::spawn(async move {
            let error = endless(&mut second, write).await.unwrap_err();
            assert!(second.commit().await.is_err());
            error
        });
        tokio::task::yield_now().await;
        let committed = first.complete_and_commit(&[completion(1, token)]).await;
        let error = timeout(SOON, second).await.expect("it ends").unwrap();
        assert_eq!(
            (error.kind(), error.is_retryable()),
            (ErrorKind::Refused, true)
        );
        assert!(error.to_string().contains("`turn`"), "{error}");
        // A write that is interrupted rolls back all that shared its transaction; a read takes nobody with it.
        assert!(write || committed.is_ok(), "{committed:?}");
        let expected: &[i64] = if committed.is_ok() { &[1] } else { &[] };
        assert_eq!(effects(&store).await, expected);
    }
}

#[tokio::test]
async fn sql_for_which_nobody_waits_is_interrupted() {
    let scene = Scene::new();
    let store = store(scene.config()).await;
    let mut tx = store.begin().await.unwrap();
    let dropped = timeout(Duration::from_millis(50), endless(&mut tx, false)).await;
    assert!(dropped.is_err());
    drop(tx);
    assert!(effects(&store).await.is_empty());
}

async fn published(messages: usize) -> MemoryQueue {
    let queue = MemoryQueue::new("source");
    let messages: Vec<_> = (0..messages)
        .map(|n| Message::new(n.to_string()).with_dedup_id(n.to_string()))
        .collect();
    let published = Sink::publish(&queue, &messages).await;
    published.into_iter().for_each(Result::unwrap);
    queue
}

fn pipeline(queue: &MemoryQueue, store: &SqliteStore) -> Builder<SqliteTx> {
    Pipeline::transactional(queue.clone(), store.clone())
        .retry(
            RetryPolicy::default()
                .max_attempts(2)
                .delays(Duration::from_millis(10), Duration::from_millis(20)),
        )
        .stop_when_idle(Duration::from_millis(300))
}

async fn slow(number: String, tx: &mut SqliteTx) -> Result<(), Error> {
    let insert = move |conn: &Connection| {
        std::thread::sleep(Duration::from_millis(20));
        conn.execute(
            "INSERT INTO effect VALUES (?1)",
            [number.parse::<i64>().unwrap()],
        )
    };
    tx.with(insert).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handlers_time_out_does_not_run_while_it_waits_for_its_turn() {
    let scene = Scene::new();
    let (store, queue) = (store(scene.config()).await, published(40).await);
    let report = pipeline(&queue, &store)
        .concurrency(40)
        // The last one waits for the 39 before it, which takes longer.
        .handler_timeout(Duration::from_millis(500))
        .run(slow)
        .await
        .unwrap();
    assert_eq!((report.applied, report.failed), (40, 0), "{report:?}");
    assert_eq!(effects(&store).await.len(), 40);
}

async fn outlasts_its_turn(
    State(runs): State<Arc<AtomicUsize>>,
    tx: &mut SqliteTx,
) -> Result<(), Error> {
    runs.fetch_add(1, SeqCst);
    tx.execute("INSERT INTO effect VALUES (1)", []).await?;
    sleep(Duration::from_millis(300)).await;
    Ok(())
}

#[tokio::test]
async fn a_handler_that_outlasts_its_turn_has_failed() {
    let scene = Scene::new();
    let mut config = scene.config();
    config.turn = Duration::from_millis(50);
    let (store, queue) = (store(config).await, published(1).await);
    let runs = Arc::new(AtomicUsize::new(0));
    let running = pipeline(&queue, &store)
        .state(runs.clone())
        .run(outlasts_its_turn);
    let report = timeout(SOON, running).await.expect("it ends").unwrap();
    assert_eq!((report.failed, report.dead_lettered), (2, 1));
    let reason = queue.dead_letters()[0].reason.clone();
    assert!(reason.contains("longer than `turn`"), "{reason}");
    // Once more than the attempts: the first time another might have been the cause.
    assert_eq!(runs.load(SeqCst), 3);
    assert!(effects(&store).await.is_empty());
}

async fn never_ends(tx: &mut SqliteTx) -> Result<(), Error> {
    endless(tx, false).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_ends_whatever_its_closures_do() {
    let scene = Scene::new();
    let store = store(scene.config()).await;
    let source = SqliteQueue::open(scene.config()).await.unwrap();
    let message = Message::new("one").with_dedup_id("1");
    let published = source.publish(&[message]).await;
    published.into_iter().for_each(Result::unwrap);
    let began = Instant::now();
    let running = Pipeline::transactional(source, store.clone())
        .drain_timeout(Duration::from_millis(100))
        .shutdown(sleep(Duration::from_millis(300)))
        .run(never_ends);
    let ended = timeout(SOON, running).await.expect("it ends");
    assert!(ended.is_ok(), "{ended:?}");
    assert!(began.elapsed() < Duration::from_secs(8));
    assert!(effects(&store).await.is_empty());
}
