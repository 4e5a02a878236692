//! What the tables say, and nothing but the tables.

use std::collections::HashMap;
use std::path::Path;

use rusqlite::{Connection, OpenFlags};
use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct Audit {
    /// Different transfers that have entries.
    pub transfers: i64,
    pub entries: i64,
    /// Transfers with more than their two entries.
    pub applied_twice: i64,
    /// Transfers with fewer, or whose entries do not cancel out.
    pub half_applied: i64,
    /// Some of the transfers that are wrong.
    pub examples: Vec<String>,
    /// Money is moved, never made: 0.
    pub sum_of_balances: i64,
    pub balances_match_entries: bool,
}

impl Audit {
    /// Whether every transfer in the tables is there once and whole.
    pub fn is_sound(&self) -> bool {
        self.applied_twice == 0
            && self.half_applied == 0
            && self.sum_of_balances == 0
            && self.balances_match_entries
    }

    /// Whether it has as many transfers as were expected, if something was.
    pub fn has(&self, expected: Option<u64>) -> bool {
        expected.is_none_or(|expected| i64::try_from(expected) == Ok(self.transfers))
    }
}

/// Opens the ledger without writing to it.
fn open(path: &Path) -> rusqlite::Result<Connection> {
    // Not read-only: reading a file in WAL mode may need its index rebuilt after a crash.
    Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE)
}

pub fn of(path: &Path) -> rusqlite::Result<Audit> {
    let db = open(path)?;
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

/// The entries of each transfer: account and amount.
pub type Entries = HashMap<String, Vec<(String, i64)>>;

/// All of them, for a comparison with what was sent.
pub fn entries(path: &Path) -> rusqlite::Result<Entries> {
    let mut entries = Entries::new();
    let db = open(path)?;
    let mut statement = db.prepare("SELECT transfer_id, account, amount FROM entries")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let of_transfer = entries.entry(row.get(0)?).or_default();
        of_transfer.push((row.get(1)?, row.get(2)?));
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_number_of_transfers_is_noticed() {
        let audit = Audit {
            transfers: 3,
            entries: 6,
            applied_twice: 0,
            half_applied: 0,
            examples: Vec::new(),
            sum_of_balances: 0,
            balances_match_entries: true,
        };
        assert!(audit.has(None) && audit.has(Some(3)));
        assert!(!audit.has(Some(2)) && !audit.has(Some(4)) && !audit.has(Some(u64::MAX)));
    }
}
