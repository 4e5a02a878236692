//! The records of what took effect.
//!
//! Keys are random, and a B-tree in the order of random keys dirties a page of 4 KiB for every key of some 60 bytes. So
//! new records go to the end of a log, and every process keeps the keys of the log in memory. A full log is sealed: moved
//! in one sorted run into a segment, which never changes again until it is dropped whole. A filter per segment says for
//! nearly all others' keys that they are not in it; memory holds all filters so that they are asked at once.
//!
//! Memory is a cache of the tables, and they change only under SQLite's write lock. Whoever has it first learns what
//! others have done meanwhile ([`Records::refresh`]), and forgets what it did itself and was rolled back.

use std::collections::{BTreeMap, HashMap};

use rusqlite::{Connection, OptionalExtension, Row};

use crate::error::DbError;
use crate::filter::{Filter, Filters, KEYS};

/// How many records, or bytes of outcomes, make a log full. Sealing it keeps everybody waiting, so it is not large.
const FULL: usize = KEYS;
const FULL_BYTES: i64 = 16 << 20;

/// How many filters are read at once.
const BATCH: usize = 64;

type Key = [u8; 16];

/// What this process knows of the records.
#[derive(Default)]
pub(crate) struct Records {
    /// Where in the log each of its keys is.
    recent: HashMap<Key, i64>,
    /// The last row of the log.
    last: i64,
    /// Bytes of outcomes in the log.
    bytes: i64,
    /// No record of the log expires before.
    soonest: i64,
    /// When the last record of each segment expires.
    segments: BTreeMap<i64, i64>,
    filters: Filters,
    /// No segment after this one was there when the running transaction began.
    began_at: i64,
    /// What the running transaction has appended, to take it back.
    appended: Vec<(Key, i64)>,
    /// How often this process has set about anything but an append.
    rewrites: u64,
    /// Up to which change by others all this is known, and how often anything but an append had happened by then; `None`:
    /// none of it is.
    known: Option<Known>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Known {
    version: i64,
    rewrites: i64,
}

/// A point in a transaction.
#[derive(Clone, Copy)]
pub(crate) struct Mark {
    appended: usize,
    rewrites: u64,
}

/// One record.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) key: Key,
    pub(crate) fingerprint: [u8; 16],
    pub(crate) outcome: Option<Vec<u8>>,
    pub(crate) expires: i64,
}

impl Records {
    /// Learns what other processes have done. To be called at the beginning of every transaction, under the write lock.
    pub(crate) fn refresh(&mut self, conn: &Connection) -> Result<(), DbError> {
        self.catch_up(conn)?;
        self.appended.clear();
        self.began_at = self.segments.keys().next_back().copied().unwrap_or(0);
        Ok(())
    }

    /// Whether all records are known, so that finding one needs nothing but a look.
    pub(crate) fn are_known(&self, conn: &Connection) -> Result<bool, DbError> {
        let version = version(conn)?;
        Ok(self.known.is_some_and(|known| known.version == version))
    }

    /// Reads the filters of what others have sealed, while they may write. To be called before a transaction, which then has
    /// little left to read under the lock.
    pub(crate) fn read_ahead(&mut self, conn: &Connection) -> Result<(), DbError> {
        let version = version(conn)?;
        if self.known.is_some_and(|known| known.version == version) {
            return Ok(());
        }
        let rewrites = rewrites(conn)?;
        if self.known.is_none_or(|known| known.rewrites != rewrites) {
            self.read_segments(conn)?;
        }
        Ok(())
    }

    fn catch_up(&mut self, conn: &Connection) -> Result<(), DbError> {
        let version = version(conn)?;
        if self.known.is_some_and(|known| known.version == version) {
            return Ok(());
        }
        let rewrites = rewrites(conn)?;
        if self.known.is_none_or(|known| known.rewrites != rewrites) {
            self.known = None;
            self.read_segments(conn)?;
            self.appended.clear();
            self.recent.clear();
            (self.last, self.bytes, self.soonest) = (0, 0, i64::MAX);
        }
        self.read_log(conn)?;
        self.known = Some(Known { version, rewrites });
        Ok(())
    }

    /// Learns which segments there are. A segment never changes and its id is never given again, so only new ones are
    /// read.
    fn read_segments(&mut self, conn: &Connection) -> Result<(), DbError> {
        let mut find = conn.prepare_cached("SELECT id, expires FROM onlyonce_segment")?;
        let present = find.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let mut present = present.collect::<Result<BTreeMap<i64, i64>, _>>()?;
        self.keep_segments(|id| present.contains_key(&id));
        present.retain(|id, _| !self.segments.contains_key(id));
        let new: Vec<(i64, i64)> = present.into_iter().collect();
        self.filters.reserve(new.len());
        for batch in new.chunks(BATCH) {
            let filters = batch
                .iter()
                .map(|(id, _)| Ok((*id, read_filter(conn, *id)?)));
            self.filters
                .add(&filters.collect::<Result<Vec<_>, DbError>>()?);
            self.segments.extend(batch.iter().copied());
        }
        Ok(())
    }

    fn keep_segments(&mut self, keep: impl Fn(i64) -> bool) {
        self.segments.retain(|id, _| keep(*id));
        self.filters.retain(keep);
    }

    /// Reads what was appended to the log since the last look.
    fn read_log(&mut self, conn: &Connection) -> Result<(), DbError> {
        let mut find = conn.prepare_cached(
            "SELECT id, key, expires, ifnull(length(outcome), 0) FROM onlyonce_recent WHERE id > ?1 ORDER BY id",
        )?;
        let mut rows = find.query([self.last])?;
        while let Some(row) = rows.next()? {
            self.note(row.get(1)?, row.get(0)?, row.get(2)?, row.get(3)?);
        }
        Ok(())
    }

    fn note(&mut self, key: Key, id: i64, expires: i64, bytes: i64) {
        self.recent.insert(key, id);
        self.last = id;
        self.bytes += bytes;
        self.soonest = self.soonest.min(expires);
    }

    /// Where the running transaction is, for [`take_back`](Self::take_back).
    pub(crate) fn mark(&self) -> Mark {
        Mark {
            appended: self.appended.len(),
            rewrites: self.rewrites,
        }
    }

    /// Everything since `mark` was rolled back.
    pub(crate) fn take_back(&mut self, conn: &Connection, mark: Mark) -> Result<(), DbError> {
        if mark.rewrites != self.rewrites {
            self.forget();
            return self.catch_up(conn);
        }
        for (key, id) in self.appended.drain(mark.appended..).rev() {
            self.recent.remove(&key);
            self.last = id - 1;
        }
        Ok(())
    }

    /// The transaction failed: what is known may be wrong. The id of a segment that was rolled back is given again.
    pub(crate) fn forget(&mut self) {
        self.known = None;
        let began_at = self.began_at;
        self.keep_segments(|id| id <= began_at);
    }

    /// The segments in which each key may be. Asking for many at once is faster, since the processor waits for the memory
    /// of several at the same time.
    pub(crate) fn candidates<'a>(&self, keys: impl Iterator<Item = &'a Key>) -> Vec<Vec<i64>> {
        keys.map(|key| self.filters.candidates(key)).collect()
    }

    pub(crate) fn find(&self, conn: &Connection, key: &Key) -> Result<Option<Record>, DbError> {
        self.find_among(conn, key, self.filters.candidates(key))
    }

    /// As [`find`](Self::find), where the key's `candidates` are known.
    pub(crate) fn find_among(
        &self,
        conn: &Connection,
        key: &Key,
        candidates: impl IntoIterator<Item = i64>,
    ) -> Result<Option<Record>, DbError> {
        if let Some(id) = self.recent.get(key) {
            let mut find = conn.prepare_cached(
                "SELECT key, fingerprint, outcome, expires FROM onlyonce_recent WHERE id = ?1",
            )?;
            return Ok(find.query_row([id], Record::read).optional()?);
        }
        for segment in candidates {
            let mut find = conn.prepare_cached(
                "SELECT key, fingerprint, outcome, expires FROM onlyonce_done WHERE segment = ?1 AND key = ?2",
            )?;
            let record = find.query_row((segment, key), Record::read).optional()?;
            if record.is_some() {
                return Ok(record);
            }
        }
        Ok(None)
    }

    pub(crate) fn insert(&mut self, conn: &Connection, record: &Record) -> Result<(), DbError> {
        let id = self.last + 1;
        conn.prepare_cached("INSERT INTO onlyonce_recent VALUES (?1, ?2, ?3, ?4, ?5)")?
            .execute((
                id,
                record.key,
                record.fingerprint,
                &record.outcome,
                record.expires,
            ))?;
        let bytes = record.outcome.as_ref().map_or(0, |o| o.len() as i64);
        self.note(record.key, id, record.expires, bytes);
        self.appended.push((record.key, id));
        Ok(())
    }

    pub(crate) fn is_full(&self) -> bool {
        self.recent.len() >= FULL || self.bytes >= FULL_BYTES
    }

    /// Moves the log into a new segment. To be called within a savepoint of its own.
    pub(crate) fn seal(&mut self, conn: &Connection) -> Result<(), DbError> {
        self.rewrites += 1;
        let id = self.rewritten(conn)?;
        let filter = Filter::new(self.recent.keys());
        // In the order of keys and after all other segments, every row goes to the end of the table.
        conn.execute(
            "INSERT INTO onlyonce_done
             SELECT ?1, key, fingerprint, outcome, expires FROM onlyonce_recent ORDER BY key",
            [id],
        )?;
        let expires = conn.query_row(
            "INSERT INTO onlyonce_segment
             SELECT ?1, max(expires), ?2 FROM onlyonce_recent RETURNING expires",
            (id, filter.to_bytes()),
            |row| row.get(0),
        )?;
        conn.execute("DELETE FROM onlyonce_recent", [])?;
        self.segments.insert(id, expires);
        self.filters.add(&[(id, filter)]);
        self.recent.clear();
        (self.last, self.bytes, self.soonest) = (0, 0, i64::MAX);
        Ok(())
    }

    /// Tells other processes that appends are not all that happened. What was appended before can be taken back only with
    /// the whole transaction from now on. Returns a number that was never returned before, but by what was rolled back.
    fn rewritten(&mut self, conn: &Connection) -> Result<i64, DbError> {
        let rewrites = conn
            .prepare_cached(
                "UPDATE onlyonce_meta SET value = value + 1 WHERE name = 'rewrites' RETURNING value",
            )?
            .query_row([], |row| row.get(0))?;
        self.appended.clear();
        if let Some(known) = &mut self.known {
            known.rewrites = rewrites;
        }
        Ok(rewrites)
    }

    /// Removes at most `limit` records that have expired by `now`: single ones from the log, and whole segments, once
    /// the last of their records has expired. To be called within a savepoint of its own.
    pub(crate) fn prune(
        &mut self,
        conn: &Connection,
        now: i64,
        limit: usize,
    ) -> Result<usize, DbError> {
        self.rewrites += 1;
        let mut removed = 0;
        if self.soonest <= now {
            removed += self.prune_log(conn, now, limit)?;
        }
        while removed < limit
            && let Some((&id, _)) = self.segments.iter().find(|(_, expires)| **expires <= now)
        {
            removed += self.prune_segment(conn, id, limit - removed)?;
        }
        Ok(removed)
    }

    fn prune_log(&mut self, conn: &Connection, now: i64, limit: usize) -> Result<usize, DbError> {
        let removed = {
            let mut delete = conn.prepare_cached(
                "DELETE FROM onlyonce_recent WHERE id IN
                 (SELECT id FROM onlyonce_recent WHERE expires <= ?1 LIMIT ?2)
                 RETURNING key, ifnull(length(outcome), 0)",
            )?;
            let rows =
                delete.query_map((now, limit as i64), |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect::<Result<Vec<(Key, i64)>, _>>()?
        };
        for (key, bytes) in &removed {
            self.recent.remove(key);
            self.bytes -= bytes;
        }
        (self.last, self.soonest) = conn.query_row(
            "SELECT ifnull(max(id), 0), ifnull(min(expires), ?1) FROM onlyonce_recent",
            [i64::MAX],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?;
        self.rewritten(conn)?;
        Ok(removed.len())
    }

    /// Removes records of a segment, and the segment with the last of them.
    fn prune_segment(
        &mut self,
        conn: &Connection,
        id: i64,
        limit: usize,
    ) -> Result<usize, DbError> {
        let removed = conn
            .prepare_cached(
                "DELETE FROM onlyonce_done WHERE segment = ?1 AND key IN
                 (SELECT key FROM onlyonce_done WHERE segment = ?1 LIMIT ?2)",
            )?
            .execute((id, limit as i64))?;
        if removed < limit {
            conn.execute("DELETE FROM onlyonce_segment WHERE id = ?1", [id])?;
            self.keep_segments(|other| other != id);
            self.rewritten(conn)?;
        }
        Ok(removed)
    }
}

/// Changes whenever another connection has committed something, and only then:
/// <https://www.sqlite.org/pragma.html#pragma_data_version>.
pub(crate) fn version(conn: &Connection) -> Result<i64, DbError> {
    let mut version = conn.prepare_cached("PRAGMA data_version")?;
    Ok(version.query_row([], |row| row.get(0))?)
}

/// Changes whenever anything but an append has happened.
fn rewrites(conn: &Connection) -> Result<i64, DbError> {
    let mut find =
        conn.prepare_cached("SELECT value FROM onlyonce_meta WHERE name = 'rewrites'")?;
    Ok(find.query_row([], |row| row.get(0))?)
}

fn read_filter(conn: &Connection, segment: i64) -> Result<Filter, DbError> {
    let mut find = conn.prepare_cached("SELECT filter FROM onlyonce_segment WHERE id = ?1")?;
    let filter = find.query_row([segment], |row| {
        Ok(Filter::from_bytes(row.get_ref(0)?.as_blob()?))
    });
    if let Some(filter) = filter.optional()?.flatten() {
        return Ok(filter);
    }
    // Of another size, or dropped by another process just now: the keys say the same.
    let mut find = conn.prepare_cached("SELECT key FROM onlyonce_done WHERE segment = ?1")?;
    let keys = find.query_map([segment], |row| row.get(0))?;
    Ok(Filter::new(keys.collect::<Result<Vec<Key>, _>>()?.iter()))
}

impl Record {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            key: row.get(0)?,
            fingerprint: row.get(1)?,
            outcome: row.get(2)?,
            expires: row.get(3)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::collections::btree_map::{BTreeMap, Entry};

    use super::*;

    /// One process: a connection and what it knows.
    struct Process {
        conn: Connection,
        records: Records,
    }

    impl Process {
        fn open(path: &std::path::Path) -> Self {
            let conn = Connection::open(path).unwrap();
            conn.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF")
                .unwrap();
            conn.execute_batch(include_str!("schema.sql")).unwrap();
            conn.execute_batch("INSERT OR IGNORE INTO onlyonce_meta VALUES ('rewrites', 0)")
                .unwrap();
            Self {
                conn,
                records: Records::default(),
            }
        }

        fn sql(&self, sql: &str) {
            self.conn.execute_batch(sql).unwrap();
        }

        fn insert(&mut self, key: u8, expires: i64) {
            self.insert_key([key; 16], expires);
        }

        fn insert_key(&mut self, key: Key, expires: i64) {
            let record = Record {
                key,
                fingerprint: [0; 16],
                outcome: Some(vec![key[0]]),
                expires,
            };
            self.records.insert(&self.conn, &record).unwrap();
        }
    }

    /// What the tables should hold: keys, and when they expire at least.
    type Model = BTreeMap<u8, i64>;

    /// One transaction of one process, at random; returns what the records are after it.
    fn transaction(
        process: &mut Process,
        random: &mut fastrand::Rng,
        now: i64,
        before: &Model,
    ) -> Model {
        let mut model = before.clone();
        if random.bool() {
            process.records.read_ahead(&process.conn).unwrap();
        }
        process.sql("BEGIN IMMEDIATE");
        process.records.refresh(&process.conn).unwrap();
        for _ in 0..random.usize(1..5) {
            step(process, random, now, &mut model);
            agree(process, &model, now);
        }
        if random.u8(..10) == 0 {
            process.records.forget();
            process.sql("ROLLBACK");
            return before.clone();
        }
        process.sql("COMMIT");
        model
    }

    fn step(process: &mut Process, random: &mut fastrand::Rng, now: i64, model: &mut Model) {
        let before = model.clone();
        process.sql("SAVEPOINT s");
        let mark = process.records.mark();
        match random.u8(..20) {
            0..14 => {
                for _ in 0..random.usize(1..4) {
                    let key = random.u8(..);
                    let expires = now + random.i64(1..30);
                    if let Entry::Vacant(absent) = model.entry(key) {
                        absent.insert(expires);
                        process.insert(key, expires);
                    }
                }
            }
            14..16 if !process.records.recent.is_empty() => {
                process.records.seal(&process.conn).unwrap();
            }
            _ => {
                let limit = random.usize(0..20);
                let removed = process.records.prune(&process.conn, now, limit).unwrap();
                assert!(removed <= limit);
                let gone = missing(process, model);
                assert_eq!(gone.len(), removed);
                assert!(gone.iter().all(|key| model[key] <= now), "too early");
                model.retain(|key, _| !gone.contains(key));
            }
        }
        if random.u8(..4) == 0 {
            process.sql("ROLLBACK TO s");
            process.records.take_back(&process.conn, mark).unwrap();
            *model = before;
        }
        process.sql("RELEASE s");
    }

    fn missing(process: &Process, model: &Model) -> BTreeSet<u8> {
        let find = |key: u8| process.records.find(&process.conn, &[key; 16]).unwrap();
        let keys = model.keys().copied();
        keys.filter(|key| find(*key).is_none()).collect()
    }

    fn agree(process: &Process, model: &Model, now: i64) {
        for key in 0..=255 {
            let found = process.records.find(&process.conn, &[key; 16]).unwrap();
            let outcome = found.as_ref().map(|r| (r.outcome.clone(), r.expires));
            let expected = model.get(&key).map(|at| (Some(vec![key]), *at));
            assert_eq!(outcome, expected, "key {key} at {now}");
        }
    }

    #[test]
    fn processes_agree_whatever_is_rolled_back() {
        for seed in 0..12 {
            let mut random = fastrand::Rng::with_seed(seed);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("records.db");
            let mut processes = [Process::open(&path), Process::open(&path)];
            let mut model = Model::new();
            for now in 0..80 {
                let process = &mut processes[random.usize(..2)];
                model = transaction(process, &mut random, now, &model);
            }
            let mut later = Process::open(&path);
            later.records.refresh(&later.conn).unwrap();
            agree(&later, &model, 80);
        }
    }

    /// Random keys in more segments than a row has bits at first, of which some expire and some are rolled back; processes
    /// come and go.
    #[test]
    fn no_record_is_forgotten_before_it_expires() {
        for seed in 0..2 {
            let mut random = fastrand::Rng::with_seed(seed);
            let dir = tempfile::tempdir().unwrap();
            let open = || Process::open(&dir.path().join("records.db"));
            let mut processes = [open(), open()];
            let mut expires = BTreeMap::<Key, i64>::new();
            for now in 0..110 {
                if random.u8(..20) == 0 {
                    processes[random.usize(..2)] = open();
                }
                let process = &mut processes[random.usize(..2)];
                expires.extend(a_segment(process, &mut random, now));
                expires.retain(|_, expires| *expires > now);
                let found = |key| process.records.find(&process.conn, key).unwrap().is_some();
                assert!(expires.keys().all(found), "seed {seed} at {now}");
            }
            let later = &mut processes[0];
            later.records.refresh(&later.conn).unwrap();
            assert!(later.records.segments.len() > 64);
        }
    }

    /// Seals some records and prunes, in one transaction; returns what it has committed, and when that expires.
    fn a_segment(process: &mut Process, random: &mut fastrand::Rng, now: i64) -> Vec<(Key, i64)> {
        let lasts = [10, 1_000, 1_000, 1_000][random.usize(..4)];
        let keys = random.usize(1..6);
        let new = (0..keys).map(|_| (random.u128(..).to_le_bytes(), now + lasts));
        let new: Vec<(Key, i64)> = new.collect();
        process.records.read_ahead(&process.conn).unwrap();
        process.sql("BEGIN IMMEDIATE");
        process.records.refresh(&process.conn).unwrap();
        for (key, expires) in &new {
            process.insert_key(*key, *expires);
        }
        process.records.seal(&process.conn).unwrap();
        process.records.prune(&process.conn, now, 10).unwrap();
        if random.u8(..10) == 0 {
            process.records.forget();
            process.sql("ROLLBACK");
            // Before anything is looked up.
            process.records.refresh(&process.conn).unwrap();
            return Vec::new();
        }
        process.sql("COMMIT");
        new
    }

    /// The id of a segment that was rolled back is given again, perhaps by another process.
    #[test]
    fn a_segment_that_was_rolled_back_is_not_taken_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("records.db");
        let [mut first, mut second] = [Process::open(&path), Process::open(&path)];
        for (process, key, end) in [(&mut first, 1, "ROLLBACK"), (&mut second, 2, "COMMIT")] {
            process.sql("BEGIN IMMEDIATE");
            process.records.refresh(&process.conn).unwrap();
            process.insert(key, 10);
            process.records.seal(&process.conn).unwrap();
            process.sql(end);
        }
        first.records.forget();
        first.records.refresh(&first.conn).unwrap();
        agree(&first, &Model::from([(2, 10)]), 0);
    }

    #[test]
    fn a_filter_of_another_size_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("records.db");
        let mut process = Process::open(&path);
        process.records.refresh(&process.conn).unwrap();
        process.insert(1, 10);
        process.records.seal(&process.conn).unwrap();
        process.sql("UPDATE onlyonce_segment SET filter = x'00'");
        let mut later = Process::open(&path);
        later.records.refresh(&later.conn).unwrap();
        agree(&later, &Model::from([(1, 10)]), 0);
    }

    #[test]
    fn everything_that_expires_is_pruned_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = Process::open(&dir.path().join("records.db"));
        process.records.refresh(&process.conn).unwrap();
        for key in 0..200 {
            process.insert(key, 10);
            if key % 60 == 0 {
                process.records.seal(&process.conn).unwrap();
            }
        }
        let mut removed = 0;
        for _ in 0..20 {
            removed += process.records.prune(&process.conn, 10, 17).unwrap();
        }
        assert_eq!(removed, 200);
        assert!(process.records.segments.is_empty() && process.records.recent.is_empty());
        let left: i64 = process
            .conn
            .query_row(
                "SELECT (SELECT count(*) FROM onlyonce_done) + (SELECT count(*) FROM onlyonce_recent)
                 + (SELECT count(*) FROM onlyonce_segment)",
                [],
                |row| row.get(0),
            )
            .unwrap();
        assert_eq!(left, 0);
    }
}
