//! The outbox in the file: what the suite cannot see.

use std::time::Duration;

use onlyonce_core::driver::{
    Fetch, FetchResult, Outbox, Owner, ReceiveLimits, Sink, Source, Transaction, TransactionalStore,
};
use onlyonce_core::{ErrorKind, Failure, Message, Pipeline, Relay, RetryPolicy};
use onlyonce_sqlite::{Config, SqliteOutbox, SqliteQueue, SqliteStore, SqliteTx, rusqlite};
use tokio::time::Instant;

use crate::support::Scene;

const LONG: Duration = Duration::from_secs(3600);

async fn fetch(outbox: &SqliteOutbox, messages: usize) -> (Vec<Message>, u64) {
    let fetch = Fetch::new(Owner(1), messages, LONG);
    match outbox.fetch("out", fetch).await.unwrap() {
        FetchResult::Fetched { messages, mark, .. } => {
            (messages.into_iter().map(|one| one.message).collect(), mark)
        }
        FetchResult::Busy { .. } => panic!("nobody else is here"),
    }
}

#[tokio::test]
async fn a_users_own_transaction_publishes_if_and_only_if_it_commits() {
    let scene = Scene::new();
    let outbox = SqliteOutbox::open(scene.config()).await.unwrap();
    let mut conn = rusqlite::Connection::open(scene.config().path).unwrap();
    let message = |body: &'static str| Message::new(body).with_group("g").with_attribute("a", "1");
    let tx = conn.transaction().unwrap();
    SqliteOutbox::publish_in(&tx, "out", &message("rolled back")).unwrap();
    tx.rollback().unwrap();
    let (none, mark) = fetch(&outbox, 10).await;
    assert!(none.is_empty());
    let began = Instant::now();
    let wait = outbox.wait("out", mark, LONG);
    let commit = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let tx = conn.transaction().unwrap();
        SqliteOutbox::publish_in(&tx, "out", &message("kept")).unwrap();
        tx.commit().unwrap();
    };
    let (waited, ()) = tokio::join!(wait, commit);
    waited.unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "it was noticed");
    assert_eq!(fetch(&outbox, 10).await.0, [message("kept")]);
    let large = Message::new(vec![0; (64 << 20) + 1]);
    let error = SqliteOutbox::publish_in(&conn, "out", &large).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Message);
}

#[tokio::test]
async fn a_handlers_connection_is_shared_and_writes_to_no_outbox() {
    let scene = Scene::new();
    let store = SqliteStore::open(scene.config()).await.unwrap();
    let outbox = SqliteOutbox::open(scene.config()).await.unwrap();
    let mut tx = store.begin().await.unwrap();
    let refused = tx.with(|conn| {
        let published = SqliteOutbox::publish_in(conn, "out", &Message::new("beside"));
        Ok(published.unwrap_err().to_string())
    });
    assert!(refused.await.unwrap().contains("onlyonce_"));
    let large = tx
        .publish("out", Message::new(vec![0; (64 << 20) + 1]))
        .await;
    assert_eq!(large.unwrap_err().kind(), ErrorKind::Message);
    tx.publish("out", Message::new("with it")).await.unwrap();
    tx.complete(&[]).await.unwrap().unwrap();
    tx.commit().await.unwrap();
    assert_eq!(fetch(&outbox, 10).await.0, [Message::new("with it")]);
}

#[tokio::test]
async fn a_row_that_cannot_be_read_is_set_aside_and_holds_up_nobody() {
    let scene = Scene::new();
    let outbox = SqliteOutbox::open(scene.config()).await.unwrap();
    let conn = rusqlite::Connection::open(scene.config().path).unwrap();
    let uuid = "00000000-0000-0000-0000-00000000000";
    for (n, column, value) in [
        (1, "id", "'no uuid'"),
        (2, "aggregateid", "CAST(x'ff' AS TEXT)"),
        (3, "dedup_id", "CAST(x'ff' AS TEXT)"),
        (4, "attributes", "'{\"a\": 1}'"),
    ] {
        let sql = "INSERT INTO onlyonce_outbox (id, aggregatetype, type, payload) VALUES (?1, 'out', '', x'')";
        conn.execute(sql, [format!("{uuid}{n}")]).unwrap();
        let sql = format!("UPDATE onlyonce_outbox SET {column} = {value} WHERE seq = {n}");
        conn.execute_batch(&sql).unwrap();
    }
    outbox.publish("out", Message::new("good")).await.unwrap();
    let mut found = Vec::new();
    while found.is_empty() {
        found = fetch(&outbox, 3).await.0;
    }
    assert_eq!(found, [Message::new("good")]);
    let sql = "SELECT count(*) FROM onlyonce_outbox WHERE set_aside AND reason LIKE 'it cannot be read: its %'";
    let count: i64 = conn.query_row(sql, [], |row| row.get(0)).unwrap();
    assert_eq!(count, 4);
}

#[tokio::test]
async fn the_columns_are_those_that_debezium_reads() {
    let scene = Scene::new();
    let outbox = SqliteOutbox::open(scene.config()).await.unwrap();
    let message = Message::new("{}")
        .with_group("order-7")
        .with_attribute("type", "Paid");
    let id = outbox.publish("orders", message).await.unwrap();
    let conn = rusqlite::Connection::open(scene.config().path).unwrap();
    let sql =
        "SELECT id, aggregatetype, aggregateid, type, CAST(payload AS TEXT) FROM onlyonce_outbox";
    let text = |row: &rusqlite::Row<'_>, at| row.get::<_, String>(at);
    let row = conn.query_row(sql, [], |row| (0..5).map(|at| text(row, at)).collect());
    let row: Vec<String> = row.unwrap();
    assert_eq!(
        row,
        [id.to_string().as_str(), "orders", "order-7", "Paid", "{}"]
    );
}

async fn handle(body: String, tx: &mut SqliteTx) -> Result<(), Failure> {
    tx.execute("INSERT INTO effect VALUES (?1)", [body.clone()])
        .await?;
    let group = format!("g{}", body.len());
    tx.publish("out", Message::new(body.clone()).with_group(group))
        .await?;
    match body.ends_with('3') {
        true => Err(Failure::dead_letter("it is refused")),
        false => Ok(()),
    }
}

/// Pipeline, relay and queue, on two files.
#[tokio::test]
async fn what_handlers_publish_arrives_if_and_only_if_their_effect_stayed() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| Config::new(dir.path().join(name));
    let orders = SqliteQueue::open(file("app.db").queue("orders"))
        .await
        .unwrap();
    let store = SqliteStore::open(file("app.db")).await.unwrap();
    let create = |conn: &rusqlite::Connection| conn.execute_batch("CREATE TABLE effect (text)");
    store.database().with(create).await.unwrap();
    let sent: Vec<Message> = (0..100)
        .map(|n| Message::new(n.to_string()).with_dedup_id(n.to_string()))
        .collect();
    orders.publish(&sent).await;
    let out = SqliteQueue::open(file("other.db").queue("out"))
        .await
        .unwrap();
    let outbox = SqliteOutbox::open(file("app.db")).await.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let relay = Relay::new(outbox.clone())
        .to("out", out)
        .shutdown(async move { drop(stopped.await) });
    let relay = tokio::spawn(relay.run());
    let pipeline = Pipeline::transactional(orders, store)
        .retry(RetryPolicy::default().max_attempts(1))
        .stop_when_idle(Duration::from_secs(1));
    let report = pipeline.run(handle).await.unwrap();
    assert_eq!((report.applied, report.dead_lettered), (90, 10));
    while !is_empty(&dir).await {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    stop.send(()).unwrap();
    assert_eq!(relay.await.unwrap().unwrap().sent, 90);
    let out = SqliteQueue::open(file("other.db").queue("out"))
        .await
        .unwrap();
    let limits = ReceiveLimits::new(1000, Duration::ZERO);
    let mut arrived = Vec::new();
    loop {
        let deliveries = out.receive(limits).await.unwrap();
        if deliveries.is_empty() {
            break;
        }
        arrived.extend(deliveries);
    }
    let mut bodies: Vec<u32> = arrived
        .iter()
        .map(|one| String::from_utf8_lossy(&one.message.body).parse().unwrap())
        .collect();
    assert!(arrived.iter().all(|one| one.message.dedup_id.is_some()));
    bodies.sort_unstable();
    let kept: Vec<u32> = (0..100).filter(|n| n % 10 != 3).collect();
    assert_eq!(bodies, kept);
}

/// Whether the outbox is empty.
async fn is_empty(dir: &tempfile::TempDir) -> bool {
    let conn = rusqlite::Connection::open(dir.path().join("app.db")).unwrap();
    let sql = "SELECT count(*) FROM onlyonce_outbox";
    let count: i64 = conn.query_row(sql, [], |row| row.get(0)).unwrap();
    count == 0
}
