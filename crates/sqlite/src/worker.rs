use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use onlyonce_core::Error;

use crate::error::DbError;
use crate::inbox::{Command, Inbox, Job, Reply};
use crate::session::{Counters, Session};
use crate::time::Clock;
use crate::turn::{Running, no_turn};

/// What one commit serves at most, so that the first who waits for it does not wait for ever.
const MAX_COMMANDS: usize = 4_096;
const MAX_TURNS: usize = 512;
const MAX_TIME: Duration = Duration::from_millis(20);

/// SQLite has no queue for its write lock: others poll for it, every millisecond here. A process that is never idle
/// leaves the lock free for longer than that after this much work.
const FAIR_WORK: Duration = Duration::from_millis(50);
const FAIR_PAUSE: Duration = Duration::from_millis(2);

/// The session, once the database thread has opened it. That thread has it for each of its transactions; in between, others
/// may read.
pub(crate) type Shared = OnceLock<Mutex<Session>>;

/// The database thread: takes whatever waits, does it in one transaction, commits once, answers all.
pub(crate) struct Worker {
    inbox: Arc<Inbox>,
}

/// One transaction and who waits for its commit.
struct Round {
    began: Instant,
    durable: bool,
    /// Its one command shares it with nobody.
    alone: bool,
    commands: usize,
    turns: usize,
    jobs: Vec<Box<dyn Job>>,
    replies: Vec<Reply>,
}

impl Worker {
    /// Opens the file and serves the inbox until it is closed and empty.
    pub(crate) fn run(
        path: &Path,
        clock: Clock,
        commits: Arc<Counters>,
        inbox: Arc<Inbox>,
        shared: &Shared,
    ) {
        match Session::open(path, clock, commits) {
            Ok(opened) => Self { inbox }.serve(shared.get_or_init(|| Mutex::new(opened))),
            Err(failure) => {
                inbox.close(failure.clone());
                inbox.refuse_all(&failure);
            }
        }
    }

    fn serve(self, session: &Mutex<Session>) {
        let mut busy_since = Instant::now();
        loop {
            let waited = Instant::now();
            let Some(durable) = self.inbox.wait() else {
                return;
            };
            if waited.elapsed() >= FAIR_PAUSE {
                busy_since = Instant::now();
            } else if busy_since.elapsed() >= FAIR_WORK {
                std::thread::sleep(FAIR_PAUSE);
                busy_since = Instant::now();
            }
            let mut session = lock(session);
            self.round(&mut session, durable);
            if let Some(failure) = session.gone.take() {
                return self.inbox.refuse_all(&failure);
            }
        }
    }

    fn round(&self, session: &mut Session, durable: bool) {
        if let Err(failure) = session.begin(durable) {
            return self.inbox.refuse_all(&failure);
        }
        let mut round = Round::new(durable);
        while session.lost.is_none()
            && let Some(command) = self.inbox.next(|command| round.accepts(command))
        {
            self.execute(session, command, &mut round);
        }
        let outcome = session.commit(Ok(()));
        if let Some(failure) = &session.gone {
            tracing::error!(error = %Error::from(failure.clone()), "the database thread ends");
            self.inbox.close(failure.clone());
        }
        for reply in round.replies {
            reply(outcome.clone());
        }
        let outcome = match outcome {
            Err(failure) if failure.may_be_redone() => {
                Self::redo(session, durable, &mut round.jobs)
            }
            other => other,
        };
        for job in round.jobs {
            job.answer(outcome.clone());
        }
    }

    /// Does calls again, apart from the transactions with which they were rolled back.
    fn redo(
        session: &mut Session,
        durable: bool,
        jobs: &mut [Box<dyn Job>],
    ) -> Result<(), DbError> {
        if jobs.is_empty() {
            return Ok(());
        }
        session.begin(durable)?;
        jobs.iter_mut().for_each(|job| job.run(session));
        session.commit(Ok(()))
    }

    fn execute(&self, session: &mut Session, command: Command, round: &mut Round) {
        round.alone |= command.is_alone();
        match command {
            Command::Work { mut job, .. } => {
                round.commands += 1;
                if !job.is_abandoned() {
                    job.run(session);
                    round.jobs.push(job);
                }
            }
            Command::Urgent(mut job) => {
                // A promise outlives a failed commit, so its answer need not wait for one.
                if !job.is_abandoned() {
                    job.run(session);
                    job.answer(session.keep_promises());
                }
            }
            Command::Turn(turn) => {
                round.commands += 1;
                round.turns += 1;
                Running::run(session, &self.inbox, &mut round.replies, turn);
            }
            Command::Op { op, .. } => op.refuse(no_turn()),
        }
    }
}

fn lock(session: &Mutex<Session>) -> MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Worker {
    /// However the thread ends, nobody is left waiting.
    fn drop(&mut self) {
        self.inbox.close(DbError::closed());
        self.inbox.refuse_all(&DbError::closed());
    }
}

impl Round {
    fn new(durable: bool) -> Self {
        Self {
            began: Instant::now(),
            durable,
            alone: false,
            commands: 0,
            turns: 0,
            jobs: Vec::new(),
            replies: Vec::new(),
        }
    }

    /// Whether `next` may share this round's commit.
    fn accepts(&self, next: &Command) -> bool {
        let company = next.is_alone() && self.commands > 0;
        !self.is_full() && !company && (self.durable || !next.is_durable())
    }

    fn is_full(&self) -> bool {
        self.alone
            || self.commands >= MAX_COMMANDS
            || self.turns >= MAX_TURNS
            || self.began.elapsed() >= MAX_TIME
    }
}
