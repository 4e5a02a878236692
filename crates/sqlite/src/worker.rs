use std::path::Path;
use std::sync::Arc;
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

/// The database thread: takes whatever waits, does it in one transaction, commits once, answers all.
pub(crate) struct Worker {
    session: Session,
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
    pub(crate) fn run(path: &Path, clock: Clock, commits: Arc<Counters>, inbox: Arc<Inbox>) {
        match Session::open(path, clock, commits) {
            Ok(session) => Self {
                session,
                inbox: Arc::clone(&inbox),
            }
            .serve(),
            Err(failure) => {
                inbox.close(failure.clone());
                inbox.refuse_all(&failure);
            }
        }
    }

    fn serve(mut self) {
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
            self.round(durable);
            if let Some(failure) = self.session.gone.take() {
                return self.inbox.refuse_all(&failure);
            }
        }
    }

    fn round(&mut self, durable: bool) {
        if let Err(failure) = self.session.begin(durable) {
            return self.inbox.refuse_all(&failure);
        }
        let mut round = Round::new(durable);
        while self.session.lost.is_none()
            && let Some(command) = self.inbox.next(|command| round.accepts(command))
        {
            self.execute(command, &mut round);
        }
        let outcome = self.session.commit(Ok(()));
        if let Some(failure) = &self.session.gone {
            tracing::error!(error = %Error::from(failure.clone()), "the database thread ends");
            self.inbox.close(failure.clone());
        }
        for reply in round.replies {
            reply(outcome.clone());
        }
        let outcome = match outcome {
            Err(failure) if failure.may_be_redone() => self.redo(durable, &mut round.jobs),
            other => other,
        };
        for job in round.jobs {
            job.answer(outcome.clone());
        }
    }

    /// Does calls again, apart from the transactions with which they were rolled back.
    fn redo(&mut self, durable: bool, jobs: &mut [Box<dyn Job>]) -> Result<(), DbError> {
        if jobs.is_empty() {
            return Ok(());
        }
        self.session.begin(durable)?;
        jobs.iter_mut().for_each(|job| job.run(&mut self.session));
        self.session.commit(Ok(()))
    }

    fn execute(&mut self, command: Command, round: &mut Round) {
        round.alone |= command.is_alone();
        match command {
            Command::Work { mut job, .. } => {
                round.commands += 1;
                if !job.is_abandoned() {
                    job.run(&mut self.session);
                    round.jobs.push(job);
                }
            }
            Command::Urgent(mut job) => {
                // A promise outlives a failed commit, so its answer need not wait for one.
                if !job.is_abandoned() {
                    job.run(&mut self.session);
                    job.answer(self.session.keep_promises());
                }
            }
            Command::Turn(turn) => {
                round.commands += 1;
                round.turns += 1;
                Running::run(&mut self.session, &self.inbox, &mut round.replies, turn);
            }
            Command::Op { op, .. } => op.refuse(no_turn()),
        }
    }
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
