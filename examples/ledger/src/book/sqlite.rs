//! The ledger in a SQLite file.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use crate::audit::{Audit, Entries};
use crate::worker::Transfer;

/// `entries` has no key on purpose: a transfer that is applied twice must show.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS entries (
        transfer_id TEXT NOT NULL, account TEXT NOT NULL, amount INTEGER NOT NULL
    );
    CREATE TABLE IF NOT EXISTS balances (
        account TEXT PRIMARY KEY, balance INTEGER NOT NULL, sent INTEGER NOT NULL
    );
";

/// Opens the file beside the store's own connection, with the tables in it.
pub fn open(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open(path)?;
    db.busy_timeout(Duration::from_secs(30))?;
    db.execute_batch(TABLES)?;
    Ok(db)
}

/// Books a transfer: two entries and two balances. Returns its number among those that its account has sent.
pub fn post(db: &Connection, transfer: &Transfer) -> rusqlite::Result<i64> {
    let mut entry = db.prepare_cached("INSERT INTO entries VALUES (?1, ?2, ?3)")?;
    let mut balance = db.prepare_cached(
        "INSERT INTO balances VALUES (?1, ?2, ?3)
         ON CONFLICT DO UPDATE SET balance = balance + excluded.balance, sent = sent + excluded.sent
         RETURNING sent",
    )?;
    let Transfer {
        transfer_id,
        from,
        to,
        amount,
    } = transfer;
    for (account, amount) in [(from, -amount), (to, *amount)] {
        entry.execute((transfer_id, account, amount))?;
    }
    let number = balance.query_one((from, -amount, 1), |row| row.get(0))?;
    balance.query_one((to, amount, 0), |_| Ok(()))?;
    Ok(number)
}

/// Opens the file without making tables in it.
fn open_to_read(path: &Path) -> rusqlite::Result<Connection> {
    // Not read-only: reading a file in WAL mode may need its index rebuilt after a crash.
    Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE)
}

/// What the tables say.
pub fn audit(path: &Path) -> rusqlite::Result<Audit> {
    let db = open_to_read(path)?;
    let transfers =
        "SELECT transfer_id, COUNT(*) AS n, SUM(amount) AS sum FROM entries GROUP BY transfer_id";
    let wrong = "n <> 2 OR sum <> 0";
    let (count, entries, applied_twice, half_applied) = db.query_row(
        &format!(
            "SELECT COUNT(*), IFNULL(SUM(n), 0), IFNULL(SUM(n > 2), 0), IFNULL(SUM(n <= 2 AND ({wrong})), 0)
             FROM ({transfers})"
        ),
        [],
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
    )?;
    let examples = db
        .prepare(&format!(
            "SELECT transfer_id FROM ({transfers}) WHERE {wrong} LIMIT 10"
        ))?
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    let (booked, kept) = (
        "SELECT account, SUM(amount) FROM entries GROUP BY account",
        "SELECT account, balance FROM balances",
    );
    let differing: i64 = db.query_row(
        &format!(
            "SELECT (SELECT COUNT(*) FROM ({booked} EXCEPT {kept})) + (SELECT COUNT(*) FROM ({kept} EXCEPT {booked}))"
        ),
        [],
        |row| row.get(0),
    )?;
    Ok(Audit {
        transfers: count,
        entries,
        applied_twice,
        half_applied,
        examples,
        sum_of_balances: db.query_row(
            "SELECT IFNULL(SUM(balance), 0) FROM balances",
            [],
            |row| row.get(0),
        )?,
        balances_match_entries: differing == 0,
    })
}

/// All of them, for a comparison with what was sent.
pub fn entries(path: &Path) -> rusqlite::Result<Entries> {
    let mut entries = Entries::new();
    let db = open_to_read(path)?;
    let mut statement = db.prepare("SELECT transfer_id, account, amount FROM entries")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let of_transfer = entries.entry(row.get(0)?).or_default();
        of_transfer.push((row.get(1)?, row.get(2)?));
    }
    Ok(entries)
}
