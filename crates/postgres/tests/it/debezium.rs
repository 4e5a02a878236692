//! What Debezium's outbox event router is told of the outbox: the change stream in the format that its connector reads, `pgoutput`
//! (<https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>).

use std::collections::HashMap;

use onlyonce_core::driver::OutboxTransaction as _;
use onlyonce_core::{Failure, Message};
use onlyonce_postgres::sqlx::{self, AssertSqlSafe, Connection as _, PgConnection};
use onlyonce_postgres::{PgOutbox, PgTx};

use crate::servers::Server;
use crate::support::{Scene, Work, number, sorted, write_effect};

/// One message of the stream, as far as it is not read yet.
struct Unread<'a>(&'a [u8]);

impl<'a> Unread<'a> {
    fn take(&mut self, bytes: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(bytes);
        self.0 = rest;
        taken
    }

    fn letter(&mut self) -> char {
        self.take(1)[0].into()
    }

    fn number(&mut self, bytes: usize) -> usize {
        let digits = self.take(bytes).iter();
        digits.fold(0, |number, digit| number << 8 | usize::from(*digit))
    }

    /// Up to the NUL that ends it.
    fn name(&mut self) -> String {
        let length = self.0.iter().position(|byte| *byte == 0).unwrap();
        let name = String::from_utf8(self.take(length).to_vec()).unwrap();
        self.take(1);
        name
    }

    fn value(&mut self) -> Option<String> {
        match self.letter() {
            'n' => None,
            't' => {
                let length = self.number(4);
                Some(String::from_utf8(self.take(length).to_vec()).unwrap())
            }
            other => panic!("a value of the kind {other}"),
        }
    }
}

type Row = HashMap<String, Option<String>>;

/// What was told of one table.
#[derive(Default)]
struct Changes {
    inserted: Vec<Row>,
    /// What was done besides, by its letters.
    others: String,
}

impl Changes {
    /// What was committed since the last time.
    async fn next(conn: &mut PgConnection) -> Self {
        let sql = "SELECT data FROM pg_logical_slot_get_binary_changes('outbox', NULL, NULL,
            'proto_version', '1', 'publication_names', 'outbox')";
        let stream: Vec<Vec<u8>> = sqlx::query_scalar(sql).fetch_all(conn).await.unwrap();
        let (mut changes, mut columns) = (Self::default(), Vec::new());
        for message in &stream {
            let mut unread = Unread(message);
            match unread.letter() {
                'B' | 'C' | 'Y' => {}
                'R' => columns = relation(&mut unread),
                'I' => changes.inserted.push(insert(&mut unread, &columns)),
                other => changes.others.push(other),
            }
        }
        changes
    }

    fn values(&self, column: &str) -> Vec<&str> {
        let value = |row: &'_ Row| row[column].is_some();
        assert!(self.inserted.iter().all(value), "{column} has no value");
        let rows = self.inserted.iter();
        rows.filter_map(|row| row[column].as_deref()).collect()
    }
}

/// The names of the columns of the table that the next rows are of.
fn relation(unread: &mut Unread<'_>) -> Vec<String> {
    unread.number(4);
    unread.name();
    assert_eq!(unread.name(), "onlyonce_outbox");
    unread.letter();
    let columns = 0..unread.number(2);
    let column = |_| {
        unread.number(1);
        let name = unread.name();
        unread.number(8);
        name
    };
    columns.map(column).collect()
}

fn insert(unread: &mut Unread<'_>, columns: &[String]) -> Row {
    unread.number(4);
    assert_eq!(unread.letter(), 'N', "a new row");
    assert_eq!(unread.number(2), columns.len());
    let names = columns.iter().cloned();
    names.map(|name| (name, unread.value())).collect()
}

/// As the router wants them by its defaults: the event's id, the topic, the key, and what is in it.
fn as_routed(row: &Row) -> [Option<&str>; 5] {
    ["id", "aggregatetype", "aggregateid", "type", "payload"].map(|name| row[name].as_deref())
}

fn bytes(text: &str) -> String {
    let digits: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("\\x{digits}")
}

/// A connection to the scene's database on which changes of its outbox can be asked for.
async fn followed(server: &Server, scene: &Scene) -> PgConnection {
    let mut conn = PgConnection::connect(&server.database()).await.unwrap();
    let outbox = scene.name("onlyonce_outbox");
    for sql in [
        format!("CREATE PUBLICATION outbox FOR TABLE {outbox}"),
        "SELECT pg_create_logical_replication_slot('outbox', 'pgoutput')".into(),
    ] {
        let made = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut conn).await;
        made.unwrap();
    }
    conn
}

async fn write(outbox: &PgOutbox, conn: &mut PgConnection, text: &'static str) -> String {
    let message = Message::new(text)
        .with_group("order-7")
        .with_attribute("type", "Paid");
    let id = outbox.publish(conn, "orders", &message).await.unwrap();
    id.to_string()
}

/// Two transactions that write by turns, with a savepoint and a third one that are rolled back.
async fn write_by_turns(scene: &Scene) -> [(String, &'static str); 3] {
    let outbox = scene.store().await.outbox();
    let (mut first, mut second) = (scene.connect().await, scene.connect().await);
    let mut late = first.begin().await.unwrap();
    let late_1 = write(&outbox, &mut late, "late 1").await;
    let mut early = second.begin().await.unwrap();
    let early_1 = write(&outbox, &mut early, "early").await;
    early.commit().await.unwrap();
    let mut dropped = late.begin().await.unwrap();
    write(&outbox, &mut dropped, "dropped").await;
    dropped.rollback().await.unwrap();
    let late_2 = write(&outbox, &mut late, "late 2").await;
    late.commit().await.unwrap();
    let mut never = second.begin().await.unwrap();
    write(&outbox, &mut never, "never").await;
    never.rollback().await.unwrap();
    [(early_1, "early"), (late_1, "late 1"), (late_2, "late 2")]
}

/// Handlers of which some fail.
async fn handle(scene: &Scene) -> Vec<String> {
    let handler = async |body: String, tx: &mut PgTx| {
        write_effect(body.clone(), tx).await?;
        let message = Message::new(body.clone()).with_dedup_id(format!("of {body}"));
        tx.publish("orders", message).await?;
        match number(&body) % 5 {
            3 => Err(Failure::dead_letter("it is refused")),
            _ => Ok(()),
        }
    };
    let work = Work::of(scene, 200).connections(2);
    let done = work.run(handler).await;
    assert_eq!((done.effects.len(), done.set_aside.len()), (160, 40));
    done.effects
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: ./tests/run postgres"]
async fn change_stream_has_what_was_committed_in_the_order_of_commits() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder, "server", "wal_level = logical\n").await;
    let scene = server.scene().await;
    drop(scene.store().await);
    let mut conn = followed(&server, &scene).await;

    let written = write_by_turns(&scene).await;
    let changes = Changes::next(&mut conn).await;
    let found: Vec<_> = changes.inserted.iter().map(as_routed).collect();
    let payloads = written.each_ref().map(|(_, text)| bytes(text));
    let expected = written.iter().zip(&payloads).map(|((id, _), payload)| {
        let columns = [id, "orders", "order-7", "Paid", payload];
        columns.map(Some)
    });
    assert_eq!(found, expected.collect::<Vec<_>>());
    assert_eq!(changes.others, "");

    let effects = handle(&scene).await;
    let changes = Changes::next(&mut conn).await;
    let payloads: Vec<String> = effects.iter().map(|body| bytes(body)).collect();
    let found = changes.values("payload").into_iter().map(str::to_owned);
    assert_eq!(sorted(found.collect()), sorted(payloads));
    let dedup_ids: Vec<String> = effects.iter().map(|body| format!("of {body}")).collect();
    let found = changes.values("dedup_id").into_iter().map(str::to_owned);
    assert_eq!(sorted(found.collect()), sorted(dedup_ids));
    assert_eq!(changes.others, "");

    // Nobody else touches the rows. The router takes no notice of it when they are deleted.
    let outbox = scene.name("onlyonce_outbox");
    scene.sql(&format!("DELETE FROM {outbox}")).await;
    let changes = Changes::next(&mut conn).await;
    assert_eq!(changes.inserted.len(), 0);
    assert_eq!(changes.others, "D".repeat(163));
}
