use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::Clock;
use crate::error::Failure;
use crate::inbox::{Command, Inbox, Reply};
use crate::session::{Counters, Session};
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
    commands: usize,
    turns: usize,
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
        }
    }

    fn round(&mut self, durable: bool) {
        if let Err(failure) = self.session.begin(durable) {
            return self.inbox.refuse_all(&failure);
        }
        let mut round = Round {
            began: Instant::now(),
            commands: 0,
            turns: 0,
            replies: Vec::new(),
        };
        while self.session.lost.is_none()
            && let Some(command) = self.inbox.next(durable, round.is_full())
        {
            self.execute(command, &mut round);
        }
        let outcome = self.session.commit(Ok(()));
        for reply in round.replies {
            reply(outcome.clone());
        }
    }

    fn execute(&mut self, command: Command, round: &mut Round) {
        round.commands += 1;
        match command {
            Command::Work { run, .. } => round.replies.extend(run(Ok(&mut self.session))),
            Command::Urgent(run) => {
                // A promise outlives a failed commit, so its answer need not wait for one.
                if let Some(reply) = run(Ok(&mut self.session)) {
                    reply(self.session.keep_promises());
                }
            }
            Command::Turn(turn) => {
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
        self.inbox.close(Failure::closed());
        self.inbox.refuse_all(&Failure::closed());
    }
}

impl Round {
    fn is_full(&self) -> bool {
        self.commands >= MAX_COMMANDS || self.turns >= MAX_TURNS || self.began.elapsed() >= MAX_TIME
    }
}
