use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use onlyonce_core::{Error, ErrorKind};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::claims;
use crate::error::{DbError, user};
use crate::file::{self, File};
use crate::guard::{Guard, Until};
use crate::messages;
use crate::records::{Mark, Records};
use crate::time::{Clock, FileTime};
use crate::turn::{OpError, OpResult, no_turn};

/// How often another process's lock is tried again: one millisecond apart, for five seconds.
const BUSY_TRIES: i32 = 5_000;
const BUSY_PAUSE: Duration = Duration::from_millis(1);

/// Of the epoch and the count that make up a token, the bits of the count.
const COUNT_BITS: u32 = 32;

/// The one connection, and what belongs to it. It lives on the database thread.
pub(crate) struct Session {
    pub(crate) conn: Connection,
    file: File,
    clock: Clock,
    time: FileTime,
    pub(crate) records: Records,
    /// Claims that the running transaction completes.
    pub(crate) completing: HashSet<claims::Row>,
    /// The running transaction was rolled back under us, for this reason.
    pub(crate) lost: Option<DbError>,
    /// The file is gone, so nothing can be committed any more.
    pub(crate) gone: Option<DbError>,
    promises: Vec<Promise>,
    /// How many of `promises` the running transaction has carried out.
    kept: usize,
    durable: bool,
    commits: Arc<Counters>,
    guard: Guard,
    /// When the running turn must be over.
    pub(crate) deadline: Option<Instant>,
}

/// The statements of a kind of savepoint.
#[derive(Debug)]
pub(crate) struct Level {
    open: &'static str,
    release: &'static str,
    roll_back: &'static str,
}

// The comment keeps a user's closure from getting them out of the cache by their text, past the authorizer, which SQLite asks
// when a statement is prepared (https://www.sqlite.org/c3ref/set_authorizer.html).
macro_rules! level {
    ($name:literal) => {
        Level {
            open: concat!("SAVEPOINT ", $name, " -- the store's own"),
            release: concat!("RELEASE ", $name, " -- the store's own"),
            roll_back: concat!("ROLLBACK TO ", $name, " -- the store's own"),
        }
    };
}

/// A handler's transaction.
pub(crate) const TX: Level = level!("onlyonce_tx");
/// A savepoint of one.
pub(crate) const SAVEPOINT: Level = level!("onlyonce_savepoint");
/// Work of the store's own.
pub(crate) const WORK: Level = level!("onlyonce_work");

const BEGIN: &str = "BEGIN IMMEDIATE -- the store's own";
const COMMIT: &str = "COMMIT -- the store's own";
const READ: &str = "BEGIN -- the store's own";
const END: &str = "ROLLBACK -- the store's own";

/// A savepoint that is open.
#[derive(Clone, Copy)]
pub(crate) struct Savepoint {
    level: &'static Level,
    mark: Mark,
}

/// What was answered with yes and is written when it can be.
pub(crate) enum Promise {
    /// A claim lasts until then.
    Renew { claim: claims::Row, until: i64 },
    /// A lease lasts until then.
    Extend {
        lease: messages::SqliteReceipt,
        until: i64,
    },
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) full: AtomicU64,
    pub(crate) normal: AtomicU64,
}

impl Session {
    pub(crate) fn open(path: &Path, clock: Clock, commits: Arc<Counters>) -> Result<Self, DbError> {
        let doing = format!("could not open the database {}", path.display());
        Self::try_open(path, clock, commits).map_err(|failure| failure.while_(&doing))
    }

    fn try_open(path: &Path, clock: Clock, commits: Arc<Counters>) -> Result<Self, DbError> {
        // Without URI names, so that a path is nothing but a path.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        file::create(path);
        let mut conn = Connection::open_with_flags(path, flags)?;
        let file = File::at(path);
        configure(&mut conn)?;
        set_up(&conn)?;
        conn.set_prepared_statement_cache_capacity(128);
        let guard = Guard::default();
        guard.install(&mut conn)?;
        let mut session = Self {
            conn,
            file,
            clock,
            time: FileTime::default(),
            records: Records::default(),
            completing: HashSet::new(),
            lost: None,
            gone: None,
            promises: Vec::new(),
            kept: 0,
            durable: true,
            commits,
            guard,
            deadline: None,
        };
        session.conn.execute_batch("BEGIN IMMEDIATE")?;
        let ready = session.create_tables();
        session.commit(ready)?;
        Ok(session)
    }

    /// Creates what is missing and jumps to the next epoch of tokens.
    ///
    /// Claims are committed without an fsync, so a power failure may take back the highest tokens given. The jump is
    /// synced before the first token of its epoch is given, hence every later token is higher than all that were lost.
    fn create_tables(&mut self) -> Result<(), DbError> {
        self.conn.execute_batch(include_str!("schema.sql"))?;
        self.conn.execute(
            "INSERT INTO onlyonce_meta VALUES ('token', ?1)
             ON CONFLICT DO UPDATE SET value = ((value >> ?2) + 1) << ?2",
            (1_i64 << COUNT_BITS, COUNT_BITS),
        )?;
        self.conn.execute(
            "INSERT INTO onlyonce_meta VALUES ('rewrites', 0) ON CONFLICT DO NOTHING",
            [],
        )?;
        self.conn.execute(
            "INSERT INTO onlyonce_time SELECT 0, 0, 0 WHERE NOT EXISTS (SELECT 1 FROM onlyonce_time)",
            [],
        )?;
        Ok(())
    }

    /// Takes `n` tokens and returns the first; the others follow it.
    pub(crate) fn tokens(&self, n: usize) -> Result<i64, DbError> {
        let n = n as i64;
        let last: i64 = self
            .conn
            .prepare_cached(
                "UPDATE onlyonce_meta SET value = value + ?1 WHERE name = 'token' RETURNING value",
            )?
            .query_row([n], |row| row.get(0))?;
        Ok(last - n + 1)
    }

    /// The file's time.
    pub(crate) fn now(&self) -> i64 {
        self.time.now(&self.clock)
    }

    /// What the machine's clock says.
    pub(crate) fn wall(&self) -> i64 {
        self.clock.wall()
    }

    /// Begins a transaction as the only writer of the file; `durable`: its commit is synced to disk.
    pub(crate) fn begin(&mut self, durable: bool) -> Result<(), DbError> {
        // In WAL mode NORMAL never syncs at a commit, FULL always does, with all that was committed before
        // (https://www.sqlite.org/pragma.html#pragma_synchronous). It cannot be changed within a transaction.
        if durable != self.durable {
            let level = if durable { "FULL" } else { "NORMAL" };
            self.conn
                .execute_batch(&format!("PRAGMA synchronous = {level}"))?;
            self.durable = durable;
        }
        self.records.read_ahead(&self.conn)?;
        self.execute(BEGIN)?;
        self.kept = 0;
        self.completing.clear();
        self.refresh().inspect_err(|_| self.abandon())
    }

    /// Learns what others have done, and does what was promised.
    fn refresh(&mut self) -> Result<(), DbError> {
        self.time.refresh(&self.conn, &self.clock)?;
        self.records.refresh(&self.conn)?;
        self.keep_promises()
    }

    /// Ends the transaction; rolls it back where `so_far` is an error already.
    pub(crate) fn commit(&mut self, so_far: Result<(), DbError>) -> Result<(), DbError> {
        let result = so_far.and_then(|()| {
            self.check_lost()?;
            self.keep_promises()?;
            self.seal_if_full();
            self.check_file()?;
            self.execute(COMMIT).map_err(not_committed)
        });
        if result.is_err() {
            self.abandon();
            return result;
        }
        self.promises.clear();
        let counter = if self.durable {
            &self.commits.full
        } else {
            &self.commits.normal
        };
        counter.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Reads what is committed; `None` where that would have to wait for another process, or fails, or where another process has
    /// written what is not known here yet.
    pub(crate) fn read<T>(&mut self, read: impl FnOnce(&Self) -> Result<T, DbError>) -> Option<T> {
        if !self.promises.is_empty() || self.file.check().is_err() {
            return None;
        }
        self.conn.busy_handler(None::<fn(i32) -> bool>).ok()?;
        // A reader and a writer do not wait for each other (https://www.sqlite.org/wal.html#concurrency).
        let result = self.execute(READ).map_err(DbError::from).and_then(|()| {
            let known = self.records.are_known(&self.conn)?;
            known.then(|| read(self)).transpose()
        });
        if !self.conn.is_autocommit() && self.execute(END).is_err() {
            self.abandon();
        }
        configure(&mut self.conn).ok()?;
        result.ok().flatten()
    }

    fn check_file(&mut self) -> Result<(), DbError> {
        let checked = self.file.check();
        self.gone = checked.clone().err();
        checked
    }

    fn seal_if_full(&mut self) {
        if !self.records.is_full() {
            return;
        }
        let sealed = self.savepoint(|session| session.records.seal(&session.conn));
        if let Err(failure) = sealed {
            // The next commit tries again.
            tracing::warn!(error = %Error::from(failure), "could not seal a full log of records");
        }
    }

    fn abandon(&mut self) {
        self.lost = None;
        self.records.forget();
        if !self.conn.is_autocommit()
            && let Err(error) = self.conn.execute_batch("ROLLBACK")
        {
            tracing::error!(%error, "SQLite could not roll back");
        }
    }

    /// Runs `run`; if it fails, the whole transaction is lost.
    pub(crate) fn or_lose<T>(
        &mut self,
        run: impl FnOnce(&mut Self) -> Result<T, DbError>,
    ) -> Result<T, DbError> {
        self.check_lost()?;
        run(self).inspect_err(|failure| {
            self.lose(failure.clone().of_another());
        })
    }

    /// Runs `run` so that it leaves nothing behind if it fails.
    pub(crate) fn savepoint<T>(
        &mut self,
        run: impl FnOnce(&mut Self) -> Result<T, DbError>,
    ) -> Result<T, DbError> {
        self.check_lost()?;
        let savepoint = self.open_savepoint(&WORK)?;
        let result = run(self);
        match &result {
            Ok(_) => self.release(savepoint)?,
            Err(_) => self.roll_back(savepoint),
        }
        result
    }

    pub(crate) fn open_savepoint(&mut self, level: &'static Level) -> Result<Savepoint, DbError> {
        self.execute(level.open)?;
        let mark = self.records.mark();
        Ok(Savepoint { level, mark })
    }

    pub(crate) fn release(&mut self, savepoint: Savepoint) -> Result<(), DbError> {
        let released = self.execute(savepoint.level.release);
        released.map_err(|error| self.lose(error.into()))
    }

    /// Rolls back everything since the savepoint, and ends it. If that fails, the whole transaction is lost.
    pub(crate) fn roll_back(&mut self, savepoint: Savepoint) {
        self.roll_back_to(savepoint);
        // If it fails, the transaction is lost.
        let _ = self.release(savepoint);
    }

    /// Rolls back everything since the savepoint, which stays. If that fails, the whole transaction is lost.
    pub(crate) fn roll_back_to(&mut self, savepoint: Savepoint) {
        let Savepoint { level, mark } = savepoint;
        let rolled_back = self
            .execute(level.roll_back)
            .map_err(DbError::from)
            .and_then(|()| self.records.take_back(&self.conn, mark));
        if let Err(failure) = rolled_back {
            self.lose(failure);
        }
    }

    /// Runs one of the statements above.
    fn execute(&self, sql: &str) -> rusqlite::Result<()> {
        self.conn.prepare_cached(sql)?.execute([]).map(drop)
    }

    pub(crate) fn lose(&mut self, failure: DbError) -> DbError {
        self.lost.get_or_insert(failure).clone()
    }

    /// Some errors (disk full, I/O) make SQLite roll back the whole transaction by itself:
    /// <https://www.sqlite.org/lang_transaction.html>.
    pub(crate) fn check_lost(&mut self) -> Result<(), DbError> {
        if self.lost.is_none() && self.conn.is_autocommit() {
            self.lose(DbError::new(
                ErrorKind::Store,
                true,
                "the transaction that this shared with others was rolled back",
            ));
        }
        self.lost.clone().map_or(Ok(()), Err)
    }

    /// Runs a user's closure: it cannot commit, whatever it changes of the connection is put back, and its panic does not
    /// end the thread. SQL that is under way when the turn must be over, or when nobody is left who asked, is interrupted.
    /// If its SQL rolls back the transaction, that is lost to all who share it.
    pub(crate) fn guarded<T>(
        &mut self,
        asker: Weak<()>,
        run: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> OpResult<T> {
        let deadline = self.deadline;
        self.guard.begin(Until { deadline, asker });
        let result = catch_unwind(AssertUnwindSafe(|| run(&self.conn)));
        let interrupted = self.guard.end();
        configure(&mut self.conn).map_err(|error| OpError::Lost(self.lose(error.into())))?;
        let rolled_back = self.conn.is_autocommit();
        if interrupted || rolled_back {
            let error = result.ok().and_then(Result::err);
            let failure = match interrupted {
                true => no_turn(),
                false => rolled_back_by(error),
            };
            if rolled_back {
                self.lose(failure.clone().of_another());
            }
            return Err(OpError::Lost(failure));
        }
        match result {
            Ok(result) => result.map_err(|error| OpError::Failed(user(error))),
            Err(_) => Err(OpError::Failed(Error::new(
                ErrorKind::Other,
                "the closure given to the database panicked",
            ))),
        }
    }

    /// Notes a promise, to be carried out by [`keep_promises`](Self::keep_promises) and again in the next transaction
    /// if this one fails.
    pub(crate) fn promise(&mut self, promise: Promise) {
        self.promises.push(promise);
    }

    /// Carries out what was promised. Outside of every savepoint of a user's, so that none of their rollbacks takes it
    /// back.
    pub(crate) fn keep_promises(&mut self) -> Result<(), DbError> {
        for promise in &self.promises[self.kept..] {
            match promise {
                Promise::Renew { claim, until } => claims::renew_now(&self.conn, claim, *until)?,
                Promise::Extend { lease, until } => {
                    messages::extend_now(&self.conn, lease, *until)?
                }
            }
        }
        self.kept = self.promises.len();
        Ok(())
    }
}

/// What a user's closure could change without SQL.
fn configure(conn: &mut Connection) -> rusqlite::Result<()> {
    conn.busy_handler(Some(|tries| {
        std::thread::sleep(BUSY_PAUSE);
        tries < BUSY_TRIES
    }))?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_FKEY, true)?;
    // Otherwise every statement with `LIMIT ?` is prepared anew whenever it is bound, to look at the limit.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    Ok(())
}

/// Why a COMMIT failed.
fn not_committed(error: rusqlite::Error) -> DbError {
    match error.sqlite_error_code() {
        // A deferred foreign key. The transaction is still open, and is rolled back.
        Some(ErrorCode::ConstraintViolation) => {
            DbError::refused("SQLite refused the commit").caused_by(error)
        }
        _ => error.into(),
    }
}

/// Why a user's closure left no transaction behind; `error` is what it returned.
fn rolled_back_by(error: Option<rusqlite::Error>) -> DbError {
    match error {
        // SQLite does that by itself (https://www.sqlite.org/lang_transaction.html), whatever the closure was about.
        Some(error) if is_of_the_system(&error) => error.into(),
        error => {
            let failure = DbError::refused(
                "SQL in the transaction rolled all of it back (OR ROLLBACK, ON CONFLICT ROLLBACK or RAISE(ROLLBACK)); \
                 use ABORT in its place",
            );
            error.into_iter().fold(failure, DbError::caused_by)
        }
    }
}

fn is_of_the_system(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DiskFull | ErrorCode::SystemIoFailure | ErrorCode::OutOfMemory)
    )
}

fn set_up(conn: &Connection) -> Result<(), DbError> {
    let mut tries = 0;
    let mode: String = loop {
        // Another process that is just opening the file holds a lock which the busy handler is not asked about.
        match conn.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)) {
            Err(error) if tries < BUSY_TRIES && DbError::from_busy(&error) => {
                std::thread::sleep(BUSY_PAUSE);
                tries += 1;
            }
            other => break other?,
        }
    };
    if mode != "wal" {
        return Err(DbError::new(
            ErrorKind::Config,
            false,
            format!(
                "the file cannot be in WAL mode (it is in `{mode}`); is it on a network file system?"
            ),
        ));
    }
    // A larger cache costs more than it saves: at nearly every commit to a file of less than 1 GiB SQLite looks through all
    // of it (`pcache1TruncateUnsafe`, after `balance_nonroot` has used the number of a page beyond the end).
    Ok(conn.execute_batch(
        "PRAGMA synchronous = FULL;
         PRAGMA cache_size = -16384;
         PRAGMA wal_autocheckpoint = 4000;
         PRAGMA journal_size_limit = 67108864;
         PRAGMA temp_store = MEMORY;
         PRAGMA foreign_keys = ON;",
    )?)
}

#[cfg(test)]
mod tests {
    use onlyonce_core::driver::{HeldClaim, KeyDigest, Token};

    use super::*;

    fn open(path: &Path) -> Session {
        Session::open(path, Clock::default(), Arc::default()).unwrap()
    }

    fn round(session: &mut Session) {
        session.begin(false).unwrap();
        session.commit(Ok(())).unwrap();
    }

    fn read(session: &mut Session) -> Option<()> {
        session.read(|_| Ok(()))
    }

    #[test]
    fn a_read_waits_for_no_other_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.db");
        let mut session = open(&path);
        round(&mut session);
        let other = Connection::open(&path).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        assert!(read(&mut session).is_some());
        assert!(
            session.conn.is_autocommit(),
            "and leaves no transaction open"
        );
    }

    #[test]
    fn a_read_knows_all_that_is_committed_or_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.db");
        let (mut session, mut other) = (open(&path), open(&path));
        round(&mut session);
        assert!(read(&mut session).is_some());
        other.begin(false).unwrap();
        other.tokens(1).unwrap();
        assert!(read(&mut session).is_some(), "nothing is committed yet");
        other.commit(Ok(())).unwrap();
        assert!(read(&mut session).is_none(), "it has to be read first");
        round(&mut session);
        assert!(read(&mut session).is_some());
        session.promise(Promise::Renew {
            claim: HeldClaim::new(KeyDigest([0; 16]), Token(1)).into(),
            until: 0,
        });
        assert!(read(&mut session).is_none(), "a promise is not written yet");
    }

    #[test]
    fn nothing_is_read_from_a_file_that_was_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.db");
        let mut session = open(&path);
        round(&mut session);
        std::fs::remove_file(&path).unwrap();
        assert!(read(&mut session).is_none());
    }
}
