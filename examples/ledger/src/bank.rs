//! A service that honours idempotency keys, as payment services do; here in the same SQLite file, to be audited with it.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use onlyonce::{BoxError, DedupKey, Failure};
use rusqlite::{Connection, TransactionBehavior};

use crate::book::sqlite;
use crate::worker::Transfer;

/// `calls` has a row for each call that was made, `keys` one for each that was carried out.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS calls (key TEXT NOT NULL, worker INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS keys (key TEXT PRIMARY KEY) WITHOUT ROWID;
";

/// The bank's connection.
#[derive(Clone)]
pub struct Bank(Arc<Mutex<Connection>>);

impl Bank {
    pub fn open(path: &Path) -> rusqlite::Result<Self> {
        let db = sqlite::open(path)?;
        db.execute_batch(TABLES)?;
        Ok(Self(Arc::new(Mutex::new(db))))
    }

    /// Books the transfer unless the key was used before. Like any call to another service it goes on if the caller is
    /// cancelled meanwhile: that is why it needs the key.
    pub async fn transfer(&self, key: DedupKey, transfer: Transfer) -> Result<(), Failure> {
        let bank = self.clone();
        tokio::task::spawn_blocking(move || bank.book(key.as_str(), &transfer)).await??;
        Ok(())
    }

    fn book(&self, key: &str, transfer: &Transfer) -> rusqlite::Result<()> {
        let mut db = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        tx.execute(
            "INSERT INTO calls VALUES (?1, ?2)",
            (key, std::process::id()),
        )?;
        if tx.execute("INSERT INTO keys VALUES (?1) ON CONFLICT DO NOTHING", [key])? == 1 {
            sqlite::post(&tx, transfer)?;
        }
        tx.commit()
    }
}

/// Makes the tables on a thread of its own, since that may wait for another process.
pub async fn open(path: std::path::PathBuf) -> Result<Bank, BoxError> {
    Ok(tokio::task::spawn_blocking(move || Bank::open(&path)).await??)
}
