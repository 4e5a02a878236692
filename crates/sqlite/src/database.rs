use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use onlyonce_core::driver::Running;
use onlyonce_core::{Error, ErrorKind};
use rusqlite::Connection;
use tokio::sync::{Notify, OwnedSemaphorePermit, oneshot};

use crate::config::Config;
use crate::error::DbError;
use crate::inbox::{Command, Inbox, Job, Line};
use crate::session::{Counters, Session, WORK};
use crate::time::Clock;
use crate::turn::{Op, OpError, Terms, Turn, TxId};
use crate::worker::{Shared, Worker};

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
    session: Arc<Shared>,
    inbox: Arc<Inbox>,
    commits: Arc<Counters>,
    /// Something may have become ready to be received.
    arrivals: Notify,
    /// Something is in the outbox that was not.
    announcements: Notify,
    announced: AtomicU32,
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
    pub async fn open(config: Config) -> Result<Self, Error> {
        config.check()?;
        let path = canonical(&config.path)?;
        let inner = {
            let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
            open.retain(|_, inner| inner.strong_count() > 0);
            let running = open.get(&path).and_then(Weak::upgrade);
            match running.filter(|inner| !inner.inbox.is_closed()) {
                Some(inner) => inner,
                None => {
                    let inner = Inner::spawn(&path, config.clock)?;
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

    /// Runs `run` in a transaction of its own and commits it durably: to create tables, or to look at them. Handlers use [`SqliteTx::with`](crate::SqliteTx::with) instead; called from within a handler that
    /// has used its transaction already, this waits for that very transaction until its turn ends.
    ///
    /// `run` blocks the database thread, so keep it short. It cannot begin or end transactions. If the future is dropped,
    /// SQL that is under way is interrupted, and `run` has been committed as a whole or not at all.
    ///
    /// # Errors
    /// That of `run`, with the [`rusqlite::Error`] as its source, after undoing what it did;
    /// [`Refused`](ErrorKind::Refused) if `run` rolled back the transaction or SQLite refused to commit it; or the commit
    /// failed.
    pub async fn with<T, F>(&self, run: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let asking = Arc::new(());
        let (asker, mut unused) = (Arc::downgrade(&asking), Some(run));
        let mut once = move |session: &mut Session| {
            // It has its commit alone, so there is nobody for whose sake it would run again.
            let run = unused.take().ok_or_else(DbError::closed)?;
            let savepoint = session.open_savepoint(&WORK)?;
            match session.guarded(asker.clone(), run) {
                Ok(value) => session.release(savepoint).map(|()| Ok(value)),
                Err(OpError::Failed(error)) => {
                    session.roll_back(savepoint);
                    Ok(Err(error))
                }
                Err(OpError::Lost(failure) | OpError::NoTurn(failure)) => Err(failure),
            }
        };
        let place = self.place().await?;
        let run = move |session: &mut Session| session.or_lose(&mut once);
        let (job, result) = call(place, run, |value| value);
        self.send(Command::Work {
            durable: true,
            alone: true,
            job,
        });
        let result = result.await;
        drop(asking);
        result.unwrap_or_else(|_| Err(DbError::closed()))?
    }

    /// Runs `run` on the database thread, in the next transaction, and answers after its commit. If it fails, so do all
    /// that share the transaction: our own SQL fails only when the disk or the file does. It runs again if the transaction
    /// was rolled back because of another's doing.
    ///
    /// If the future is dropped, `run` has been committed as a whole or not at all.
    pub(crate) async fn work<T: Send + 'static>(
        &self,
        durable: bool,
        run: impl FnMut(&mut Session) -> Result<T, DbError> + Send + 'static,
    ) -> Result<T, DbError> {
        self.work_then(durable, run, |value| value).await
    }

    /// As [`work`](Self::work), and makes of the result what `then` does, once it is committed.
    pub(crate) async fn work_then<T: Send + 'static, U: Send + 'static>(
        &self,
        durable: bool,
        mut run: impl FnMut(&mut Session) -> Result<T, DbError> + Send + 'static,
        then: impl FnOnce(T) -> U + Send + 'static,
    ) -> Result<U, DbError> {
        let place = self.place().await?;
        let (job, result) = call(place, move |session| session.or_lose(&mut run), then);
        self.send(Command::Work {
            durable,
            alone: false,
            job,
        });
        result.await.unwrap_or_else(|_| Err(DbError::closed()))
    }

    /// Reads at once on this thread, if the database thread is idle: to be used for what is soon read. `None`: it is to be
    /// asked of that thread, or failed.
    pub(crate) fn read<T>(&self, read: impl FnOnce(&Session) -> Result<T, DbError>) -> Option<T> {
        let session = self.inner.session.get()?;
        let mut session = session.try_lock().ok()?;
        // A session that has ended knows nothing of what is in the file now.
        if self.inner.inbox.is_closed() {
            return None;
        }
        session.read(read)
    }

    /// Runs `run` even while a transaction has its turn. It may read, and promise.
    pub(crate) async fn urgent<T: Send + 'static>(
        &self,
        run: impl FnMut(&mut Session) -> Result<T, DbError> + Send + 'static,
    ) -> Result<T, DbError> {
        let place = self.inner.inbox.place(Line::Urgent).await;
        let (job, result) = call(place, run, |value| value);
        self.send(Command::Urgent(job));
        result.await.unwrap_or_else(|_| Err(DbError::closed()))
    }

    /// Waits for a turn and takes the first step of it.
    pub(crate) async fn take_turn(&self, tx: TxId, terms: Terms, first: Op) -> Result<(), DbError> {
        let waiting = Running::current().map(|running| running.wait());
        let place = self.place().await?;
        self.set_locked(true);
        self.send(Command::Turn(Turn {
            tx,
            first,
            terms,
            waiting,
            _place: place,
        }));
        Ok(())
    }

    /// A place in line, but not for a handler whose own transaction is what everybody waits for.
    async fn place(&self) -> Result<Option<OwnedSemaphorePermit>, DbError> {
        if Running::current().is_some_and(|running| running.has_locked(self.resource())) {
            return Err(DbError::refused(
                "this would wait for the handler's own transaction in the same file, for ever: do it with the \
                 transaction (`SqliteTx::enqueue`, `SqliteTx::publish`, `SqliteTx::with`) or before its first use",
            ));
        }
        Ok(self.inner.inbox.place(Line::Work).await)
    }

    /// Notes whether the transaction of the handler that runs has its turn.
    pub(crate) fn set_locked(&self, locked: bool) {
        if let Some(running) = Running::current() {
            running.set_locked(self.resource(), locked);
        }
    }

    /// What a turn keeps others from.
    fn resource(&self) -> usize {
        Arc::as_ptr(&self.inner).addr()
    }

    /// Takes a further step of a turn.
    pub(crate) fn step(&self, tx: TxId, op: Op) {
        self.send(Command::Op { tx, op });
    }

    pub(crate) fn arrivals(&self) -> &Notify {
        &self.inner.arrivals
    }

    /// Wakes the relays of this process: something was committed to the outbox.
    pub(crate) fn announce(&self) {
        self.inner.announced.fetch_add(1, SeqCst);
        self.inner.announcements.notify_waiters();
    }

    pub(crate) fn announced(&self) -> u32 {
        self.inner.announced.load(SeqCst)
    }

    pub(crate) fn announcements(&self) -> &Notify {
        &self.inner.announcements
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    fn send(&self, command: Command) {
        self.inner.inbox.send(command);
    }
}

/// What answers a call.
type Answered<T> = oneshot::Receiver<Result<T, DbError>>;

/// One call. It keeps its place in line until it is answered, and is skipped if the one who asked has gone away by the
/// time it would run.
struct Call<T, U, R, M> {
    run: R,
    done: Option<Result<T, DbError>>,
    /// Makes the answer of the result, once it is committed.
    then: M,
    answer: oneshot::Sender<Result<U, DbError>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl<T, U, R, M> Job for Call<T, U, R, M>
where
    T: Send,
    U: Send,
    R: FnMut(&mut Session) -> Result<T, DbError> + Send,
    M: FnOnce(T) -> U + Send,
{
    fn is_abandoned(&self) -> bool {
        self.answer.is_closed()
    }

    fn run(&mut self, session: &mut Session) {
        if !matches!(self.done, Some(Err(_))) {
            self.done = Some((self.run)(session));
        }
    }

    fn answer(self: Box<Self>, committed: Result<(), DbError>) {
        let result = match (self.done, committed) {
            (Some(Err(failure)), _) | (_, Err(failure)) => Err(failure),
            (Some(Ok(value)), Ok(())) => Ok((self.then)(value)),
            (None, Ok(())) => Err(DbError::closed()),
        };
        // Nobody may be listening any more: then dropping the result is all there is to do.
        drop(self.answer.send(result));
    }
}

/// Makes a job of `run`.
fn call<T: Send + 'static, U: Send + 'static>(
    place: Option<OwnedSemaphorePermit>,
    run: impl FnMut(&mut Session) -> Result<T, DbError> + Send + 'static,
    then: impl FnOnce(T) -> U + Send + 'static,
) -> (Box<dyn Job>, Answered<U>) {
    let (answer, answered) = oneshot::channel();
    let call = Call {
        run,
        done: None,
        then,
        answer,
        _place: place,
    };
    (Box::new(call), answered)
}

impl Inner {
    fn spawn(path: &Path, clock: Clock) -> Result<Arc<Self>, Error> {
        let inner = Arc::new(Self {
            path: path.to_owned(),
            session: Arc::default(),
            inbox: Arc::new(Inbox::new()),
            commits: Arc::default(),
            arrivals: Notify::new(),
            announcements: Notify::new(),
            announced: AtomicU32::new(0),
        });
        let inbox = Arc::clone(&inner.inbox);
        let commits = Arc::clone(&inner.commits);
        let (session, path) = (Arc::clone(&inner.session), path.to_owned());
        std::thread::Builder::new()
            .name("onlyonce-sqlite".into())
            .spawn(move || Worker::run(&path, clock, commits, inbox, &session))
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
        self.inbox.close(DbError::closed());
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
