//! The ledger's tables. `entries` has no key on purpose: a transfer that is applied twice must show.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use onlyonce_core::{BoxError, DedupKey};
use onlyonce_sqlite::rusqlite::{self, Connection, TransactionBehavior};

use super::traffic::Transfer;

/// `calls` is what the downstream service was asked, `keys` what it has carried out.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS entries (transfer INTEGER NOT NULL, account INTEGER NOT NULL, amount INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS balances (account INTEGER PRIMARY KEY, balance INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS calls (key TEXT NOT NULL, transfer INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS keys (key TEXT PRIMARY KEY) WITHOUT ROWID;
";

/// Opens the file beside the store's own connection, with the tables in it.
pub fn open(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open(path)?;
    db.busy_timeout(Duration::from_secs(30))?;
    db.execute_batch(TABLES)?;
    Ok(db)
}

/// Books a transfer: two entries and two balances.
pub fn post(db: &Connection, transfer: &Transfer) -> rusqlite::Result<()> {
    let mut entry = db.prepare_cached("INSERT INTO entries VALUES (?1, ?2, ?3)")?;
    let mut balance = db.prepare_cached(
        "INSERT INTO balances VALUES (?1, ?2)
         ON CONFLICT DO UPDATE SET balance = balance + excluded.balance",
    )?;
    let booked = [
        (transfer.from, -transfer.amount),
        (transfer.to, transfer.amount),
    ];
    for (account, amount) in booked {
        entry.execute((transfer.id, account, amount))?;
        balance.execute((account, amount))?;
    }
    Ok(())
}

/// A downstream service that honours idempotency keys.
#[derive(Clone)]
pub struct Bank(Arc<Mutex<Connection>>);

impl Bank {
    pub fn open(path: &Path) -> rusqlite::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(open(path)?))))
    }

    /// Books the transfer unless the key was used before.
    pub async fn transfer(&self, key: DedupKey, transfer: Transfer) -> Result<(), BoxError> {
        let bank = self.clone();
        let booked = tokio::task::spawn_blocking(move || bank.book(key.as_str(), &transfer));
        Ok(booked.await??)
    }

    fn book(&self, key: &str, transfer: &Transfer) -> rusqlite::Result<()> {
        let mut db = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        tx.execute("INSERT INTO calls VALUES (?1, ?2)", (key, transfer.id))?;
        if tx.execute("INSERT INTO keys VALUES (?1) ON CONFLICT DO NOTHING", [key])? == 1 {
            post(&tx, transfer)?;
        }
        tx.commit()
    }
}
