use onlyonce_core::KeyDigest;
use rusqlite::{Connection, OptionalExtension, Row};

use crate::error::Failure;

/// The records of what took effect.
#[derive(Default)]
pub(crate) struct Records {}

/// One of them.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) key: KeyDigest,
    pub(crate) fingerprint: [u8; 16],
    pub(crate) outcome: Option<Vec<u8>>,
    pub(crate) expires: i64,
}

impl Records {
    /// Learns what other processes have done.
    pub(crate) fn refresh(&mut self, _conn: &Connection) -> Result<(), Failure> {
        Ok(())
    }

    /// Something was rolled back: what is known may be wrong.
    pub(crate) fn forget(&mut self) {}

    pub(crate) fn find(
        &self,
        conn: &Connection,
        key: KeyDigest,
    ) -> Result<Option<Record>, Failure> {
        let mut find = conn.prepare_cached(
            "SELECT key, fingerprint, outcome, expires FROM onlyonce_done WHERE key = ?1",
        )?;
        Ok(find.query_row([key.0], read).optional()?)
    }

    pub(crate) fn insert(&mut self, conn: &Connection, record: &Record) -> Result<(), Failure> {
        conn.prepare_cached("INSERT INTO onlyonce_done VALUES (?1, ?2, ?3, ?4)")?
            .execute((
                record.key.0,
                record.fingerprint,
                &record.outcome,
                record.expires,
            ))?;
        Ok(())
    }

    /// Removes at most `limit` records that expired before `now`.
    pub(crate) fn prune(
        &mut self,
        conn: &Connection,
        now: i64,
        limit: usize,
    ) -> Result<usize, Failure> {
        let removed = conn
            .prepare_cached(
                "DELETE FROM onlyonce_done WHERE key IN
                 (SELECT key FROM onlyonce_done WHERE expires <= ?1 LIMIT ?2)",
            )?
            .execute((now, limit as i64))?;
        Ok(removed)
    }
}

fn read(row: &Row<'_>) -> rusqlite::Result<Record> {
    Ok(Record {
        key: KeyDigest(row.get(0)?),
        fingerprint: row.get(1)?,
        outcome: row.get(2)?,
        expires: row.get(3)?,
    })
}
