//! What takes the messages and makes effects of them: an ordinary pipeline, before the power fails as after it.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use onlyonce_core::driver::{KeyDigest, Scope, Transaction};
use onlyonce_core::{
    Builder, Context, DedupKey, Error, Failure, Json, Message, Pipeline, Relay, Report,
    RetryPolicy, State,
};
use onlyonce_sqlite::rusqlite::{self, Connection, TransactionBehavior};
use onlyonce_sqlite::{Config, Database, SqliteOutbox, SqliteQueue, SqliteStore, SqliteTx};
use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::notes::{Notebook, Watched};
use super::trace::Note;
use crate::error::failed;

pub const QUEUE: &str = "work";
/// Where a handler publishes in its transaction, at once or through the outbox.
pub const OUTBOX: &str = "out";
const CONSUMER: &str = "power";
/// Of claims and of the queue.
pub const LEASE: Duration = Duration::from_secs(1);

/// How often a relay looks.
const POLL: Duration = Duration::from_millis(4);

const BALLAST: u8 = 0xff;

/// No key on purpose: an effect that happens twice must show.
const EFFECTS: &str = "CREATE TABLE IF NOT EXISTS effects (message INTEGER NOT NULL)";

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum Mode {
    Transactional,
    Idempotent,
    AtMostOnce,
}

pub fn message(id: u32) -> Message {
    let message = Message::new(id.to_string()).with_dedup_id(dedup_id(id));
    match id % 3 {
        0 => message.with_group(format!("group-{}", id % 4)),
        _ => message,
    }
}

pub fn dedup_id(id: u32) -> String {
    format!("message-{id}")
}

/// Under which the store keeps that this message took effect.
pub fn key(id: u32) -> KeyDigest {
    let scope = Scope::new(CONSUMER, QUEUE);
    KeyDigest::new(&scope, &DedupKey::new(dedup_id(id)))
}

/// A record that is there for its weight: with this number of them, the log of records is sealed under the traffic's eyes.
pub fn ballast(n: u32) -> KeyDigest {
    let mut key = [BALLAST; 16];
    key[12..].copy_from_slice(&n.to_be_bytes());
    KeyDigest(key)
}

pub fn is_ballast(key: &[u8; 16]) -> bool {
    key[..12] == [BALLAST; 12]
}

/// A message that never succeeds.
pub fn is_poison(id: u32) -> bool {
    id % 11 == 7
}

/// A message whose handler publishes another.
pub fn has_follower(id: u32) -> bool {
    id.is_multiple_of(5)
}

/// Whether it goes through the outbox.
pub fn is_relayed(id: u32) -> bool {
    id.is_multiple_of(10)
}

fn fails_once(id: u32) -> bool {
    id % 7 == 3
}

pub fn config(file: &Path, durable_acks: bool) -> Config {
    let mut config = Config::new(file).queue(QUEUE);
    config.lease = LEASE;
    config.durable_acks = durable_acks;
    config
}

/// Makes the table of effects.
pub async fn prepare(database: &Database) -> Result<(), Error> {
    database.with(|db| db.execute_batch(EFFECTS)).await
}

/// Runs until nothing has come for `idle`.
pub async fn run(
    mode: Mode,
    config: &Config,
    idle: Duration,
    notebook: &Notebook,
) -> Result<(), Error> {
    let source = Watched::new(SqliteQueue::open(config.clone()).await?, notebook);
    let store = Watched::new(SqliteStore::open(config.clone()).await?, notebook);
    let ended = match mode {
        Mode::Transactional => {
            let outbox = SqliteQueue::open(config.clone().queue(OUTBOX)).await?;
            let builder = Pipeline::transactional(source, store).state(Arc::new(outbox));
            let work = settings(builder, idle).run(in_transaction);
            beside_relay(config, work).await?
        }
        Mode::Idempotent => {
            let bank = Bank::open(&config.path).map_err(|error| failed("the bank", error))?;
            let builder = Pipeline::idempotent(source, store).state(bank);
            settings(builder, idle).run(at_bank).await
        }
        Mode::AtMostOnce => {
            let builder = Pipeline::at_most_once(source).state(notebook.clone());
            settings(builder, idle).run(noted).await
        }
    };
    let _: Report = ended?;
    Ok(())
}

/// Does this work with a relay beside it, and ends when the outbox is empty.
async fn beside_relay<T>(config: &Config, work: impl Future<Output = T>) -> Result<T, Error> {
    let outbox = SqliteOutbox::open(config.clone()).await?;
    let sink = SqliteQueue::open(config.clone().queue(OUTBOX)).await?;
    let database = outbox.database().clone();
    let stop = CancellationToken::new();
    let relay = Relay::new(outbox)
        .to(OUTBOX, sink)
        .lease(LEASE)
        .poll(POLL)
        .shutdown(stop.clone().cancelled_owned());
    let relay = tokio::spawn(relay.run());
    let ended = work.await;
    while !relay.is_finished() && is_waiting(&database).await? {
        sleep(POLL).await;
    }
    stop.cancel();
    let relayed = relay.await;
    relayed.map_err(|error| failed("the relay", error))??;
    Ok(ended)
}

/// Whether something is in the outbox.
async fn is_waiting(database: &Database) -> Result<bool, Error> {
    let any = "SELECT EXISTS (SELECT 1 FROM onlyonce_outbox)";
    let any = move |db: &Connection| db.query_row(any, [], |row| row.get(0));
    database.with(any).await
}

fn settings<Tx: Transaction>(builder: Builder<Tx>, idle: Duration) -> Builder<Tx> {
    let delays = RetryPolicy::default().delays(Duration::from_millis(4), Duration::from_millis(20));
    builder
        .consumer(CONSUMER)
        .identity(QUEUE)
        .concurrency(16)
        .prefetch(32, 1 << 20)
        .claim_lease(LEASE)
        // So that what fails is given back.
        .retry(delays.in_place(Duration::from_millis(1)))
        .stop_when_idle(idle)
}

fn overcome(id: u32, context: &Context) -> Result<(), Failure> {
    match () {
        () if is_poison(id) => Err(Failure::dead_letter("poison")),
        () if fails_once(id) && context.attempt == 1 => Err(Failure::retry("it fails once")),
        () => Ok(()),
    }
}

async fn in_transaction(
    Json(id): Json<u32>,
    context: Context,
    State(outbox): State<Arc<SqliteQueue>>,
    tx: &mut Watched<SqliteTx>,
) -> Result<(), Failure> {
    overcome(id, &context)?;
    let sql = "INSERT INTO effects VALUES (?1)";
    tx.inner.execute(sql, [id]).await?;
    if has_follower(id) {
        if is_relayed(id) {
            tx.inner.publish(OUTBOX, message(id)).await?;
        } else {
            tx.inner.enqueue(&outbox, &[message(id)]).await?;
        }
    }
    Ok(())
}

async fn at_bank(
    Json(id): Json<u32>,
    context: Context,
    State(bank): State<Bank>,
) -> Result<(), Failure> {
    overcome(id, &context)?;
    let booked = tokio::task::spawn_blocking(move || bank.book(id)).await;
    booked.map_err(Failure::retry)?.map_err(Failure::retry)
}

/// Its effect is the note: somewhere where no power fails.
async fn noted(message: Arc<Message>, State(notebook): State<Notebook>) -> Result<(), Failure> {
    let id = message.broker_id.as_deref().unwrap_or_default();
    notebook.note(&Note::Ran(id.parse().map_err(Failure::dead_letter)?));
    Ok(())
}

/// A downstream service that does nothing twice, with a connection of its own.
#[derive(Clone)]
struct Bank(Arc<Mutex<Connection>>);

impl Bank {
    fn open(file: &Path) -> rusqlite::Result<Self> {
        let db = Connection::open(file)?;
        db.busy_timeout(Duration::from_secs(30))?;
        Ok(Self(Arc::new(Mutex::new(db))))
    }

    fn book(&self, id: u32) -> rusqlite::Result<()> {
        let mut db = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        tx.execute(
            "INSERT INTO effects SELECT ?1 WHERE NOT EXISTS (SELECT 1 FROM effects WHERE message = ?1)",
            [id],
        )?;
        tx.commit()
    }
}
