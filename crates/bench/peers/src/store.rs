//! The effects in SQLite, as a careful user writes them by hand: a row and an inbox record in one transaction, on a thread of
//! its own, so that no sync of the disk stops the runtime.

use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _, Transaction, TransactionBehavior};
use tokio::sync::oneshot;

use crate::Error;

/// `effects` is not unique on purpose: what happens twice is to be seen.
pub(crate) const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS effects (id TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS inbox (id TEXT NOT NULL PRIMARY KEY) WITHOUT ROWID;
";

pub(crate) const EFFECT: &str = "INSERT INTO effects (id) VALUES (?1)";

pub(crate) struct Store {
    commits: mpsc::Sender<Commit>,
}

/// The messages of one transaction, and whom to tell.
struct Commit {
    ids: Vec<String>,
    done: oneshot::Sender<rusqlite::Result<()>>,
}

/// What a transaction does for each of its messages.
#[derive(Clone, Copy)]
pub(crate) struct Settings {
    /// With a record of the message in the inbox, which a redelivery finds.
    pub(crate) inbox: bool,
    /// How long each effect takes.
    pub(crate) slow: Duration,
}

/// As durable as it gets, so that what is acknowledged has happened.
pub(crate) fn open(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open(path)?;
    db.busy_timeout(Duration::from_secs(30))?;
    db.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))
        .optional()?;
    db.execute_batch("PRAGMA synchronous = FULL;")?;
    db.execute_batch(TABLES)?;
    Ok(db)
}

impl Store {
    pub(crate) fn open(path: &Path, settings: Settings) -> Result<Self, Error> {
        let mut db = open(path)?;
        let (commits, queue) = mpsc::channel::<Commit>();
        thread::Builder::new()
            .name("sqlite".into())
            .spawn(move || {
                for Commit { ids, done } in queue {
                    // Whoever asked may be gone.
                    let _ = done.send(commit(&mut db, &ids, settings));
                }
            })?;
        Ok(Self { commits })
    }

    /// Returns when the effects of all these messages are on disk.
    pub(crate) async fn commit(&self, ids: Vec<String>) -> Result<(), Error> {
        let (done, answer) = oneshot::channel();
        self.commits.send(Commit { ids, done })?;
        Ok(answer.await??)
    }
}

fn commit(db: &mut Connection, ids: &[String], settings: Settings) -> rusqlite::Result<()> {
    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for id in ids {
        if settings.inbox && !is_new(&tx, id)? {
            continue;
        }
        effect(&tx, id, settings.slow)?;
    }
    tx.commit()
}

fn is_new(tx: &Transaction<'_>, id: &str) -> rusqlite::Result<bool> {
    let mut insert = tx.prepare_cached("INSERT OR IGNORE INTO inbox (id) VALUES (?1)")?;
    Ok(insert.execute([id])? == 1)
}

/// The same for all peers, in whosever transaction.
pub(crate) fn effect(db: &Connection, id: &str, slow: Duration) -> rusqlite::Result<()> {
    if !slow.is_zero() {
        thread::sleep(slow);
    }
    db.prepare_cached(EFFECT)?.execute([id])?;
    Ok(())
}
