use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use std::time::Duration;

use onlyonce_core::{Error, ErrorKind};
use rusqlite::Connection;
use tokio::sync::{Notify, OwnedSemaphorePermit, oneshot};

use crate::config::{Clock, Config};
use crate::error::Failure;
use crate::inbox::{Command, Inbox, Line, Reply, Run};
use crate::session::{Counters, Session};
use crate::turn::{Op, Turn, TxId};
use crate::worker::Worker;

/// The files that this process has open.
static OPEN: LazyLock<Mutex<HashMap<PathBuf, Weak<Inner>>>> = LazyLock::new(Mutex::default);

/// An open database file: a handle to the thread that owns the one connection to it.
///
/// Cloning is cheap. Opening the same file again in this process gives another handle to the same thread, because SQLite
/// has a single writer (<https://www.sqlite.org/wal.html#concurrency>) and two connections would only wait for each other.
/// Other processes may open the file at the same time. The thread ends after the last handle, store, queue and
/// transaction is dropped.
#[derive(Clone)]
pub struct Database {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    inbox: Arc<Inbox>,
    commits: Arc<Counters>,
    /// Something may have become ready to be received.
    arrivals: Notify,
}

/// How many transactions a [`Database`] handle's thread has committed since the file was opened in this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Commits {
    /// Synced to disk before they were answered: they survive a power failure.
    pub full: u64,
    /// Written but not synced: they survive the end of this process, not a power failure.
    pub normal: u64,
}

impl Database {
    /// Opens the file of `config`, creating it and its tables (all named `onlyonce_…`) if they do not exist.
    ///
    /// Does not block the thread. Dropping the future is harmless.
    ///
    /// # Errors
    /// The directory does not exist or may not be written to; the file is no database, or cannot be in WAL mode.
    pub async fn open(config: &Config) -> Result<Self, Error> {
        config.check()?;
        let path = canonical(&config.path)?;
        let inner = {
            let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
            open.retain(|_, inner| inner.strong_count() > 0);
            let running = open.get(&path).and_then(Weak::upgrade);
            match running.filter(|inner| !inner.inbox.is_closed()) {
                Some(inner) => inner,
                None => {
                    let inner = Inner::spawn(&path, config.clock.clone())?;
                    open.insert(path, Arc::downgrade(&inner));
                    inner
                }
            }
        };
        let database = Self { inner };
        // The thread answers nothing before it has opened the file.
        database.work(false, |_| Ok(())).await?;
        Ok(database)
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// How many commits there were, by this process.
    #[must_use]
    pub fn commits(&self) -> Commits {
        Commits {
            full: self.inner.commits.full.load(Relaxed),
            normal: self.inner.commits.normal.load(Relaxed),
        }
    }

    /// Runs `run` in a savepoint of its own and commits it durably, with whatever else waits: to create tables, or to
    /// look at them. Handlers use [`SqliteTx::with`](crate::SqliteTx::with) instead; called from within a handler that
    /// has used its transaction already, this waits for that very transaction until its turn ends.
    ///
    /// `run` blocks the database thread, so keep it short. It cannot begin or end transactions. If the future is dropped,
    /// `run` has been committed as a whole or not at all.
    ///
    /// # Errors
    /// That of `run`, with the [`rusqlite::Error`] as its source, after undoing what it did; or the commit failed.
    pub async fn with<T, F>(&self, run: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let outcome = self.work(true, move |session| {
            let mut failed = None;
            let done = session.savepoint(|session| {
                session.guarded(run).map_err(|error| {
                    failed = Some(error);
                    Failure::closed()
                })
            });
            match (done, failed) {
                (Ok(value), _) => Ok(Ok(value)),
                (Err(_), Some(error)) => Ok(Err(error)),
                (Err(failure), None) => Err(failure),
            }
        });
        outcome.await?
    }

    /// Runs `run` on the database thread, in the next transaction, and answers after its commit. If it fails, so do all
    /// that share the transaction: our own SQL fails only when the disk or the file does.
    ///
    /// If the future is dropped, `run` has been committed as a whole or not at all.
    pub(crate) async fn work<T: Send + 'static>(
        &self,
        durable: bool,
        run: impl FnOnce(&mut Session) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        self.work_then(durable, run, |value| value).await
    }

    /// As [`work`](Self::work), and makes of the result what `then` does, once it is committed.
    pub(crate) async fn work_then<T: Send + 'static, U: Send + 'static>(
        &self,
        durable: bool,
        run: impl FnOnce(&mut Session) -> Result<T, Failure> + Send + 'static,
        then: impl FnOnce(T) -> U + Send + 'static,
    ) -> Result<U, Failure> {
        let place = self.inner.inbox.place(Line::Work).await;
        let (run, result) = call(place, |session| session.or_lose(run), then);
        self.send(Command::Work { durable, run });
        result.await.unwrap_or_else(|_| Err(Failure::closed()))
    }

    /// Runs `run` even while a transaction has its turn. It may read, and promise.
    pub(crate) async fn urgent<T: Send + 'static>(
        &self,
        run: impl FnOnce(&mut Session) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let place = self.inner.inbox.place(Line::Urgent).await;
        let (run, result) = call(place, run, |value| value);
        self.send(Command::Urgent(run));
        result.await.unwrap_or_else(|_| Err(Failure::closed()))
    }

    /// Waits for a turn and takes the first step of it.
    pub(crate) async fn take_turn(&self, tx: TxId, limit: Duration, first: Op) {
        let place = self.inner.inbox.place(Line::Work).await;
        self.send(Command::Turn(Turn {
            tx,
            first,
            limit,
            _place: place,
        }));
    }

    /// Takes a further step of a turn.
    pub(crate) fn step(&self, tx: TxId, op: Op) {
        self.send(Command::Op { tx, op });
    }

    pub(crate) fn arrivals(&self) -> &Notify {
        &self.inner.arrivals
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    fn send(&self, command: Command) {
        self.inner.inbox.send(command);
    }
}

/// What answers a call.
type Answered<T> = oneshot::Receiver<Result<T, Failure>>;

/// Makes a command of `run`. It keeps its place in line until it is answered, and is skipped if the one who asked has
/// gone away by the time it would run.
fn call<T: Send + 'static, U: Send + 'static>(
    place: Option<OwnedSemaphorePermit>,
    run: impl FnOnce(&mut Session) -> Result<T, Failure> + Send + 'static,
    then: impl FnOnce(T) -> U + Send + 'static,
) -> (Run, Answered<U>) {
    let (answer, answered) = oneshot::channel();
    let run = move |session: Result<&mut Session, Failure>| -> Option<Reply> {
        if answer.is_closed() {
            return None;
        }
        let done = session.and_then(run);
        Some(Box::new(move |committed: Result<(), Failure>| {
            let result = done.and_then(|value| committed.map(|()| then(value)));
            // Nobody may be listening any more: then dropping the result is all there is to do.
            drop(answer.send(result));
            drop(place);
        }))
    };
    (Box::new(run), answered)
}

impl Inner {
    fn spawn(path: &Path, clock: Clock) -> Result<Arc<Self>, Error> {
        let inner = Arc::new(Self {
            path: path.to_owned(),
            inbox: Arc::new(Inbox::new()),
            commits: Arc::default(),
            arrivals: Notify::new(),
        });
        let inbox = Arc::clone(&inner.inbox);
        let commits = Arc::clone(&inner.commits);
        let path = path.to_owned();
        std::thread::Builder::new()
            .name("onlyonce-sqlite".into())
            .spawn(move || Worker::run(&path, clock, commits, inbox))
            .map_err(|error| {
                Error::new(ErrorKind::Other, "could not start the database thread")
                    .retryable(true)
                    .caused_by(error)
            })?;
        Ok(inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.inbox.close(Failure::closed());
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database")
            .field("path", &self.inner.path)
            .finish_non_exhaustive()
    }
}

/// One name per file, also for a file that does not exist yet.
fn canonical(path: &Path) -> Result<PathBuf, Error> {
    let cannot = |error: std::io::Error| {
        Error::new(
            ErrorKind::NotFound,
            format!(
                "could not find the directory of the database {}",
                path.display()
            ),
        )
        .caused_by(error)
    };
    if path.exists() {
        return path.canonicalize().map_err(cannot);
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path
        .file_name()
        .ok_or_else(|| Error::config(format!("{} is not a file's name", path.display())))?;
    Ok(parent.canonicalize().map_err(cannot)?.join(name))
}
