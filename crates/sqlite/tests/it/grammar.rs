//! Handlers whose SQL is made by a grammar: conflicts that abort, fail, replace or roll back, foreign keys that are checked
//! at the commit, triggers that raise, statements that are not allowed; their errors swallowed or not, in one call or in
//! several, many messages to a commit. A message has its effect if and only if it has its record; the innocent are done,
//! the guilty are dead-lettered for what they did.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use onlyonce_core::driver::Sink;
use onlyonce_core::memory::MemoryQueue;
use onlyonce_core::{Error, Message, Pipeline, Report, RetryPolicy, State};
use onlyonce_sqlite::{Database, SqliteStore, SqliteTx};
use rusqlite::Connection;

use crate::support::*;

const SCHEMA: &str = "
    CREATE TABLE effect (message INTEGER, step INTEGER);
    CREATE TABLE taken (id INTEGER PRIMARY KEY, message INTEGER);
    INSERT INTO taken VALUES (1, 0), (2, 0);
    CREATE TABLE rolling (id INTEGER PRIMARY KEY ON CONFLICT ROLLBACK, message INTEGER);
    INSERT INTO rolling VALUES (1, 0);
    CREATE TABLE positive (n INTEGER CHECK (n > 0), message INTEGER);
    CREATE TABLE parent (id INTEGER PRIMARY KEY);
    CREATE TABLE eager (parent INTEGER REFERENCES parent, message INTEGER);
    CREATE TABLE deferred (parent INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED, message INTEGER);
    CREATE TABLE raising (how TEXT, message INTEGER);
    CREATE TRIGGER raise BEFORE INSERT ON raising BEGIN
        SELECT RAISE(ABORT, 'raised') WHERE NEW.how = 'abort';
        SELECT RAISE(FAIL, 'raised') WHERE NEW.how = 'fail';
        SELECT RAISE(IGNORE) WHERE NEW.how = 'ignore';
        SELECT RAISE(ROLLBACK, 'raised') WHERE NEW.how = 'rollback';
    END;";

/// The tables that name the message which wrote a row.
const TABLES: [&str; 7] = [
    "effect", "taken", "rolling", "positive", "eager", "deferred", "raising",
];

/// What a statement does to the transaction.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Does {
    /// Nothing but its work.
    Work,
    /// It fails, and the transaction goes on.
    Fail,
    /// It fails, and rolls back the transaction.
    RollBack,
    /// It breaks a deferred key, unless the parent is there.
    AddChild,
    AddParent,
    DropChildren,
}

/// `?` stands for the message.
const STATEMENTS: &[(Does, &str)] = &[
    (Does::Work, "INSERT INTO effect VALUES (?, 1)"),
    (
        Does::Work,
        "INSERT OR REPLACE INTO taken VALUES (1000 + ?, ?)",
    ),
    (Does::Work, "INSERT OR IGNORE INTO taken VALUES (1, ?)"),
    (
        Does::Work,
        "INSERT INTO taken VALUES (1, ?) ON CONFLICT DO NOTHING",
    ),
    (
        Does::Work,
        "INSERT OR ROLLBACK INTO taken VALUES (2000 + ?, ?) ON CONFLICT DO NOTHING",
    ),
    (
        Does::Work,
        "INSERT INTO raising VALUES ('ignore', ?), ('nothing', ?)",
    ),
    (
        Does::Work,
        "UPDATE OR ROLLBACK effect SET step = 2 WHERE message = ?",
    ),
    (Does::Work, "PRAGMA table_info(effect)"),
    (Does::Fail, "INSERT INTO taken VALUES (1, ?)"),
    (
        Does::Fail,
        "INSERT OR ABORT INTO taken VALUES (3000 + ?, ?), (1, ?)",
    ),
    (
        Does::Fail,
        "INSERT OR FAIL INTO taken SELECT 4000 + ?, ? UNION ALL SELECT 1, ?",
    ),
    (Does::Fail, "INSERT OR REPLACE INTO positive VALUES (0, ?)"),
    (
        Does::Fail,
        "INSERT INTO raising VALUES ('nothing', ?), ('fail', ?)",
    ),
    (
        Does::Fail,
        "INSERT INTO raising VALUES ('nothing', ?), ('abort', ?)",
    ),
    (Does::Fail, "INSERT INTO eager VALUES (-?, ?)"),
    (Does::Fail, "INSERT INTO nowhere VALUES (?)"),
    (Does::Fail, "INSERT INTO effect VALUES (?, 3); COMMIT"),
    (Does::Fail, "ROLLBACK"),
    (Does::Fail, "BEGIN"),
    (Does::Fail, "SAVEPOINT mine"),
    (Does::Fail, "RELEASE onlyonce_savepoint"),
    (Does::Fail, "ROLLBACK TO onlyonce_tx"),
    (Does::Fail, "PRAGMA foreign_keys = OFF"),
    (Does::Fail, "PRAGMA defer_foreign_keys = ON"),
    (Does::Fail, "PRAGMA busy_timeout = 1"),
    (Does::Fail, "DELETE FROM onlyonce_recent"),
    (
        Does::RollBack,
        "INSERT OR ROLLBACK INTO taken VALUES (1, ?)",
    ),
    (
        Does::RollBack,
        "INSERT OR ROLLBACK INTO taken VALUES (5000 + ?, ?), (1, ?)",
    ),
    (
        Does::RollBack,
        "UPDATE OR ROLLBACK taken SET id = 1 WHERE id = 2",
    ),
    (Does::RollBack, "INSERT INTO rolling VALUES (1, ?)"),
    (
        Does::RollBack,
        "INSERT OR ROLLBACK INTO positive VALUES (0, ?)",
    ),
    (Does::RollBack, "INSERT INTO raising VALUES ('rollback', ?)"),
    (
        Does::RollBack,
        "INSERT OR IGNORE INTO raising VALUES ('rollback', ?)",
    ),
    (Does::AddChild, "INSERT INTO deferred VALUES (?, ?)"),
    (
        Does::AddChild,
        "INSERT OR ROLLBACK INTO deferred VALUES (?, ?)",
    ),
    (Does::AddParent, "INSERT OR IGNORE INTO parent VALUES (?)"),
    (Does::DropChildren, "DELETE FROM deferred WHERE message = ?"),
];

#[derive(Clone, Debug)]
struct Step {
    does: Does,
    sql: String,
    /// The handler goes on when it fails.
    swallowed: bool,
    /// While another statement is being read.
    reading: bool,
}

/// What a handler does for one message: calls of some steps each.
#[derive(Clone, Debug)]
struct Script(Vec<Vec<Step>>);

/// What must become of a message.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Done,
    /// Dead-lettered, and its reason says this.
    Dead(&'static str),
}

impl Script {
    fn random(random: &mut fastrand::Rng, message: u32, may_fail: bool) -> Self {
        let mut script = Self((0..random.usize(1..4)).map(|_| Vec::new()).collect());
        let effect = Step::new(Does::Work, "INSERT INTO effect VALUES (?, 0)", message);
        script.0[0].push(effect);
        for call in &mut script.0 {
            for _ in 0..random.usize(0..4) {
                let (does, sql) = STATEMENTS[random.usize(..STATEMENTS.len())];
                let mut step = Step::new(does, sql, message);
                step.swallowed = random.u8(..10) > 0;
                step.reading = random.u8(..4) == 0;
                call.push(step);
            }
        }
        match may_fail || script.fate() == Fate::Done {
            true => script,
            false => Self::random(random, message, false),
        }
    }

    fn fate(&self) -> Fate {
        let (mut parent, mut orphans) = (false, false);
        for step in self.0.iter().flatten() {
            match step.does {
                Does::Work => {}
                Does::Fail if step.swallowed => {}
                Does::Fail => return Fate::Dead(""),
                Does::RollBack => return Fate::Dead("rolled all of it back"),
                Does::AddChild => orphans = !parent,
                Does::AddParent => (parent, orphans) = (true, false),
                Does::DropChildren => orphans = false,
            }
        }
        match orphans {
            true => Fate::Dead("refused the commit: FOREIGN KEY constraint failed"),
            false => Fate::Done,
        }
    }
}

impl Step {
    fn new(does: Does, sql: &str, message: u32) -> Self {
        Self {
            does,
            sql: sql.replace('?', &message.to_string()),
            swallowed: false,
            reading: false,
        }
    }

    fn run(&self, conn: &Connection) -> rusqlite::Result<()> {
        let mut read = conn.prepare("SELECT id FROM taken")?;
        let mut rows = read.query([])?;
        if self.reading {
            rows.next()?;
        }
        match conn.execute_batch(&self.sql) {
            Err(_) if self.swallowed => Ok(()),
            result => result,
        }
    }
}

type Scripts = Arc<BTreeMap<u32, Script>>;

async fn follow(
    body: Bytes,
    State(scripts): State<Scripts>,
    tx: &mut SqliteTx,
) -> Result<(), Error> {
    let message: u32 = std::str::from_utf8(&body).unwrap().parse().unwrap();
    for call in scripts[&message].0.clone() {
        let swallowed = call.last().is_some_and(|step| step.swallowed);
        let run = move |conn: &Connection| call.iter().try_for_each(|step| step.run(conn));
        match tx.with(run).await {
            // What its own SQL refuses is swallowed within; only the loss of the transaction can be swallowed here.
            Err(error) if swallowed && error.kind() == onlyonce_core::ErrorKind::Refused => {}
            result => result?,
        }
    }
    Ok(())
}

async fn run(store: &SqliteStore, queue: &MemoryQueue, scripts: &Scripts) -> Report {
    Pipeline::transactional(queue.clone(), store.clone())
        .state(Arc::clone(scripts))
        .concurrency(8)
        .retry(
            RetryPolicy::default()
                .max_attempts(2)
                .delays(Duration::from_millis(1), Duration::from_millis(2)),
        )
        .stop_when_idle(Duration::from_millis(200))
        .run(follow)
        .await
        .expect("no message ends a pipeline")
}

async fn publish(queue: &MemoryQueue, scripts: &Scripts, random: &mut fastrand::Rng) {
    let messages = scripts.keys().map(|n| {
        let message = Message::new(n.to_string()).with_dedup_id(format!("m{n}"));
        match random.bool() {
            true => message.with_group(format!("g{}", n % 5)),
            false => message,
        }
    });
    for result in Sink::publish(queue, &messages.collect::<Vec<_>>()).await {
        result.unwrap();
    }
}

async fn written_by(database: &Database) -> BTreeSet<u32> {
    let read = |conn: &Connection| {
        let mut messages = BTreeSet::new();
        for table in TABLES {
            let mut read = conn.prepare(&format!("SELECT message FROM {table}"))?;
            let rows = read.query_map([], |row| row.get(0))?;
            messages.extend(rows.collect::<rusqlite::Result<Vec<u32>>>()?);
        }
        messages.remove(&0);
        Ok(messages)
    };
    database.with(read).await.unwrap()
}

async fn follow_seed(seed: u64) {
    let random = &mut fastrand::Rng::with_seed(seed);
    let scene = Scene::new();
    let store = SqliteStore::open(scene.config()).await.unwrap();
    let create = |conn: &Connection| conn.execute_batch(SCHEMA);
    store.database().with(create).await.unwrap();
    let mut scripts = |messages: std::ops::Range<u32>, may_fail| -> Scripts {
        let script = |n| (n, Script::random(random, n, may_fail));
        Arc::new(messages.map(script).collect())
    };
    let (mixed, innocent) = (scripts(1..41, true), scripts(41..61, false));
    let (one, other) = (MemoryQueue::new("mixed"), MemoryQueue::new("innocent"));
    publish(&one, &mixed, random).await;
    publish(&other, &innocent, random).await;
    let (first, second) = tokio::join!(run(&store, &one, &mixed), run(&store, &other, &innocent));

    let reasons: BTreeMap<u32, String> = (one.dead_letters().iter().chain(&other.dead_letters()))
        .map(|dead| {
            let message = std::str::from_utf8(&dead.message.body).unwrap();
            (message.parse().unwrap(), dead.reason.clone())
        })
        .collect();
    let mut done = BTreeSet::new();
    for (message, script) in mixed.iter().chain(&*innocent) {
        let reason = reasons.get(message);
        match script.fate() {
            Fate::Done => {
                assert_eq!(reason, None, "seed {seed}, message {message}: {script:#?}");
                done.insert(*message);
            }
            Fate::Dead(why) => assert!(
                reason.is_some_and(|reason| reason.contains(why)),
                "seed {seed}, message {message}: {reason:?}, not {why}: {script:#?}"
            ),
        }
    }
    assert_eq!(written_by(store.database()).await, done, "seed {seed}");
    assert_eq!((first.applied + second.applied) as usize, done.len());
    // Each has its record, and nobody else.
    publish(&one, &mixed, random).await;
    publish(&other, &innocent, random).await;
    let (first, second) = tokio::join!(run(&store, &one, &mixed), run(&store, &other, &innocent));
    assert_eq!(
        (
            (first.duplicates + second.duplicates) as usize,
            first.applied + second.applied
        ),
        (done.len(), 0),
        "seed {seed}"
    );
    assert_eq!(written_by(store.database()).await, done, "seed {seed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_effect_is_there_if_and_only_if_its_record_is_whatever_the_sql() {
    for seed in 0..10 {
        follow_seed(seed).await;
    }
}
