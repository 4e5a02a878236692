//! The ledger's tables, and the one way to write them.

use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;

use crate::worker::Transfer;

/// `entries` has no key on purpose: a transfer that is applied twice must show.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS entries (
        transfer_id TEXT NOT NULL, account TEXT NOT NULL, amount INTEGER NOT NULL
    );
    CREATE TABLE IF NOT EXISTS balances (account TEXT PRIMARY KEY, balance INTEGER NOT NULL);
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
    let Transfer {
        transfer_id,
        from,
        to,
        amount,
    } = transfer;
    for (account, amount) in [(from, -amount), (to, *amount)] {
        entry.execute((transfer_id, account, amount))?;
        balance.execute((account, amount))?;
    }
    Ok(())
}
