use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::DbError;
use crate::session::Session;
use crate::turn::{Op, Turn, TxId};

/// How many commands may wait in a line; who sends more waits before sending.
const CAPACITY: usize = 4_096;

/// Which line a command waits in: the thread reads only the urgent one while a transaction has its turn.
#[derive(Clone, Copy)]
pub(crate) enum Line {
    Work,
    Urgent,
}

/// Tells the caller how it ended, after the commit.
pub(crate) type Reply = Box<dyn FnOnce(Result<(), DbError>) + Send>;

/// A call that runs on the database thread: more than once, where what it did was rolled back with others'.
pub(crate) trait Job: Send {
    /// Whether the one who asked has gone away.
    fn is_abandoned(&self) -> bool;
    /// Does nothing if it has failed before by itself.
    fn run(&mut self, session: &mut Session);
    /// Tells what came of it, once it is known whether that was committed.
    fn answer(self: Box<Self>, committed: Result<(), DbError>);
}

/// What the database thread is asked to do.
pub(crate) enum Command {
    /// Something that runs within a savepoint of its own.
    Work {
        /// Whether its commit has to be synced to disk.
        durable: bool,
        /// Whether its commit serves nobody else.
        alone: bool,
        job: Box<dyn Job>,
    },
    /// A transaction's wish to have the connection to itself.
    Turn(Turn),
    /// Something that is answered even while a transaction has its turn.
    Urgent(Box<dyn Job>),
    /// The next step of the transaction that has its turn.
    Op { tx: TxId, op: Op },
}

impl Command {
    pub(crate) fn is_durable(&self) -> bool {
        match self {
            Self::Work { durable, .. } => *durable,
            Self::Turn(_) => true,
            Self::Urgent(_) | Self::Op { .. } => false,
        }
    }

    pub(crate) fn is_alone(&self) -> bool {
        match self {
            Self::Work { alone, .. } => *alone,
            Self::Turn(turn) => turn.terms.alone,
            Self::Urgent(_) | Self::Op { .. } => false,
        }
    }

    fn is_urgent(&self) -> bool {
        matches!(self, Self::Urgent(_) | Self::Op { .. })
    }

    /// Answers that it could not be done.
    pub(crate) fn refuse(self, failure: &DbError) {
        match self {
            Self::Work { job, .. } | Self::Urgent(job) => job.answer(Err(failure.clone())),
            Self::Turn(turn) => turn.first.refuse(failure.clone()),
            Self::Op { op, .. } => op.refuse(failure.clone()),
        }
    }
}

/// Where commands wait for the database thread.
pub(crate) struct Inbox {
    lines: Mutex<Lines>,
    arrived: Condvar,
    /// Apart, so that work which waits for a turn to end does not keep renewals out.
    work_places: Arc<Semaphore>,
    urgent_places: Arc<Semaphore>,
}

#[derive(Default)]
struct Lines {
    work: VecDeque<Command>,
    urgent: VecDeque<Command>,
    /// How many in `work` are durable.
    durable: usize,
    closed: Option<DbError>,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            lines: Mutex::default(),
            arrived: Condvar::new(),
            work_places: Arc::new(Semaphore::new(CAPACITY)),
            urgent_places: Arc::new(Semaphore::new(CAPACITY)),
        }
    }

    /// Waits for a place; the command keeps it until it is answered.
    pub(crate) async fn place(&self, line: Line) -> Option<OwnedSemaphorePermit> {
        let places = match line {
            Line::Work => &self.work_places,
            Line::Urgent => &self.urgent_places,
        };
        // They are never closed, so it is always `Some`.
        Arc::clone(places).acquire_owned().await.ok()
    }

    /// Puts a command in line, or refuses it if nobody will come for it.
    pub(crate) fn send(&self, command: Command) {
        let mut lines = self.lock();
        if let Some(failure) = lines.closed.clone() {
            drop(lines);
            return command.refuse(&failure);
        }
        lines.durable += usize::from(command.is_durable());
        let line = if command.is_urgent() {
            &mut lines.urgent
        } else {
            &mut lines.work
        };
        line.push_back(command);
        drop(lines);
        self.arrived.notify_one();
    }

    /// Refuses everything from now on; the thread still does what is in line.
    pub(crate) fn close(&self, why: DbError) {
        self.lock().closed.get_or_insert(why);
        self.arrived.notify_one();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed.is_some()
    }

    /// Blocks until something is in line, and says whether any of it must be durable; `None`: closed, and empty.
    pub(crate) fn wait(&self) -> Option<bool> {
        let mut lines = self.lock();
        loop {
            if !lines.work.is_empty() || !lines.urgent.is_empty() {
                return Some(lines.durable > 0);
            }
            if lines.closed.is_some() {
                return None;
            }
            lines = self
                .arrived
                .wait(lines)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next command, urgent ones first; of the others only one that `accepts` takes.
    pub(crate) fn next(&self, accepts: impl FnOnce(&Command) -> bool) -> Option<Command> {
        let mut lines = self.lock();
        if let Some(command) = lines.urgent.pop_front() {
            return Some(command);
        }
        if !accepts(lines.work.front()?) {
            return None;
        }
        let command = lines.work.pop_front()?;
        lines.durable -= usize::from(command.is_durable());
        Some(command)
    }

    /// Blocks until something urgent is in line; `None`: not before `deadline`.
    pub(crate) fn next_urgent(&self, deadline: Instant) -> Option<Command> {
        let mut lines = self.lock();
        loop {
            if let Some(command) = lines.urgent.pop_front() {
                return Some(command);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            lines = self
                .arrived
                .wait_timeout(lines, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Refuses all that is in line.
    pub(crate) fn refuse_all(&self, failure: &DbError) {
        let (work, urgent) = {
            let mut lines = self.lock();
            lines.durable = 0;
            (
                std::mem::take(&mut lines.work),
                std::mem::take(&mut lines.urgent),
            )
        };
        for command in urgent.into_iter().chain(work) {
            command.refuse(failure);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
