use std::time::{Duration, Instant};

use onlyonce_core::driver::{Completion, Fenced, Waiting};
use onlyonce_core::{Error, ErrorKind};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::claims;
use crate::config::after;
use crate::error::DbError;
use crate::inbox::{Command, Inbox, Reply};
use crate::session::{SAVEPOINT, Savepoint, Session, TX};

/// Names one transaction within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TxId(pub(crate) u64);

/// A transaction's wish to have the connection to itself, with what it wants to do first.
pub(crate) struct Turn {
    pub(crate) tx: TxId,
    pub(crate) first: Op,
    pub(crate) terms: Terms,
    /// The handler's time-out does not run until the turn begins.
    pub(crate) waiting: Option<Waiting>,
    pub(crate) _place: Option<OwnedSemaphorePermit>,
}

/// On what terms a transaction has its turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// How long it may last.
    pub(crate) limit: Duration,
    /// Its commit serves nobody else.
    pub(crate) alone: bool,
}

/// Why a step of a transaction has no result.
#[derive(Debug)]
pub(crate) enum OpError {
    /// The step failed; the turn goes on.
    Failed(Error),
    /// The turn has ended with the step, and everything done in it is rolled back.
    Lost(DbError),
    /// There is no turn: the step was not taken, and everything done before is rolled back.
    NoTurn(DbError),
}

impl OpError {
    /// The thread has ended without an answer.
    pub(crate) fn closed() -> Self {
        Self::NoTurn(DbError::closed())
    }
}

impl From<OpError> for Error {
    fn from(error: OpError) -> Self {
        match error {
            OpError::Failed(error) => error,
            OpError::Lost(failure) | OpError::NoTurn(failure) => failure.into(),
        }
    }
}

pub(crate) type OpResult<T> = Result<T, OpError>;

/// Something that runs within the current savepoint.
pub(crate) trait Step: Send {
    /// Whether the one who asked has gone away.
    fn is_abandoned(&self) -> bool;
    /// Runs and answers.
    fn run(self: Box<Self>, session: &mut Session);
    /// Answers that there is no turn.
    fn refuse(self: Box<Self>, failure: DbError);
}

/// A closure as a [`Step`].
pub(crate) struct Call<T, F> {
    pub(crate) run: F,
    pub(crate) answer: oneshot::Sender<OpResult<T>>,
}

impl<T, F> Step for Call<T, F>
where
    T: Send,
    F: FnOnce(&mut Session) -> OpResult<T> + Send,
{
    fn is_abandoned(&self) -> bool {
        self.answer.is_closed()
    }

    fn run(self: Box<Self>, session: &mut Session) {
        let Self { run, answer } = *self;
        let result = run(session);
        tell(answer, session, result);
    }

    fn refuse(self: Box<Self>, failure: DbError) {
        drop(self.answer.send(Err(OpError::NoTurn(failure))));
    }
}

/// Answers `result`, unless the transaction was lost in getting it. Whether anybody still listens is theirs to decide.
fn tell<T>(answer: oneshot::Sender<OpResult<T>>, session: &mut Session, result: OpResult<T>) {
    let lost = session.check_lost().map_err(OpError::Lost);
    let result = match result {
        // Its own reason tells more.
        Err(OpError::Lost(_)) => result,
        _ => lost.and(result),
    };
    drop(answer.send(result));
}

/// One step of a transaction.
pub(crate) enum Op {
    /// Runs something within the current savepoint.
    Run(Box<dyn Step>),
    /// Ends the savepoint with its records.
    Complete(
        Vec<Completion>,
        oneshot::Sender<OpResult<Result<(), Fenced>>>,
    ),
    /// Rolls back to the savepoint.
    Rollback(oneshot::Sender<OpResult<()>>),
    /// Hands the completed savepoints over to the shared transaction; answered after its commit.
    Commit(oneshot::Sender<OpResult<()>>),
    /// `Complete`, then `Commit`.
    Finish(
        Vec<Completion>,
        oneshot::Sender<OpResult<Result<(), Fenced>>>,
    ),
    /// Rolls back everything.
    End,
}

impl Op {
    pub(crate) fn refuse(self, failure: DbError) {
        match self {
            Self::Run(step) => step.refuse(failure),
            Self::Complete(_, answer) | Self::Finish(_, answer) => {
                drop(answer.send(Err(OpError::NoTurn(failure))));
            }
            Self::Rollback(answer) | Self::Commit(answer) => {
                drop(answer.send(Err(OpError::NoTurn(failure))));
            }
            Self::End => {}
        }
    }

    fn is_abandoned(&self) -> bool {
        match self {
            Self::Run(step) => step.is_abandoned(),
            Self::Complete(_, answer) | Self::Finish(_, answer) => answer.is_closed(),
            Self::Rollback(answer) => answer.is_closed(),
            Self::Commit(answer) => answer.is_closed(),
            Self::End => true,
        }
    }
}

/// Why a transaction has no turn any more.
pub(crate) fn no_turn() -> DbError {
    DbError::new(
        ErrorKind::Refused,
        true,
        "the transaction was rolled back: it kept others waiting for longer than `turn` allows; await what is slow before its \
         first use",
    )
}

/// A transaction's time alone with the connection. Nothing but renewals is answered meanwhile.
pub(crate) struct Running<'a> {
    session: &'a mut Session,
    inbox: &'a Inbox,
    /// Who is told after the shared transaction's commit.
    replies: &'a mut Vec<Reply>,
    /// All of it. As long as no savepoint of it is completed, this is also the first one.
    tx: Savepoint,
    /// Whether a savepoint is completed.
    completed: bool,
    /// A later one that has begun and not ended.
    savepoint: Option<Savepoint>,
}

impl<'a> Running<'a> {
    /// Lets a transaction have its turn, to the end.
    pub(crate) fn run(
        session: &'a mut Session,
        inbox: &'a Inbox,
        replies: &'a mut Vec<Reply>,
        turn: Turn,
    ) {
        if turn.first.is_abandoned() {
            return;
        }
        drop(turn.waiting);
        let tx = match session.open_savepoint(&TX) {
            Ok(tx) => tx,
            Err(failure) => return turn.first.refuse(failure),
        };
        let mut running = Self {
            session,
            inbox,
            replies,
            tx,
            completed: false,
            savepoint: None,
        };
        let deadline = after(turn.terms.limit).into_std();
        running.session.deadline = Some(deadline);
        let mut op = Some(turn.first);
        loop {
            match op {
                Some(Op::Commit(answer)) => break running.commit(answer, ()),
                Some(Op::Finish(last, answer)) => match running.complete(&last) {
                    Ok(verdict) => break running.commit(answer, verdict),
                    Err(failure) => {
                        drop(answer.send(Err(OpError::Lost(failure))));
                        break running.session.roll_back(tx);
                    }
                },
                Some(Op::End) | None => break running.session.roll_back(tx),
                Some(Op::Run(step)) => running.run_step(step),
                Some(Op::Rollback(answer)) => {
                    running.roll_back_savepoint();
                    tell(answer, running.session, Ok(()));
                }
                Some(Op::Complete(completions, answer)) => {
                    let result = running.complete(&completions).map_err(failed);
                    tell(answer, running.session, result);
                }
            }
            if running.session.lost.is_some() {
                break;
            }
            op = running.next(turn.tx, deadline);
        }
        running.session.deadline = None;
        // Before anything else runs: a claim must not find that a lease has ended which was renewed meanwhile. If it
        // fails, the commit tries again.
        if let Err(failure) = running.session.keep_promises() {
            tracing::warn!(error = %Error::from(failure), "could not write renewals yet");
        }
    }

    /// Waits for the next step, answering renewals meanwhile; `None`: the turn has lasted too long.
    fn next(&mut self, tx: TxId, deadline: Instant) -> Option<Op> {
        loop {
            match self.inbox.next_urgent(deadline)? {
                Command::Op { tx: of, op } if of == tx => return Some(op),
                // While this turn lasts, this process holds SQLite's write lock: no other can take a claim over, so
                // what the running transaction reads is how things stand, and a renewal may be answered before it is
                // committed. It must be, since turns may outlast a lease.
                Command::Urgent(mut job) => {
                    if !job.is_abandoned() {
                        job.run(self.session);
                        job.answer(Ok(()));
                    }
                }
                other => other.refuse(&no_turn()),
            }
        }
    }

    fn run_step(&mut self, step: Box<dyn Step>) {
        match self.begin_savepoint() {
            Ok(()) => step.run(self.session),
            Err(failure) => step.refuse(self.session.lose(failure)),
        }
    }

    fn begin_savepoint(&mut self) -> Result<(), DbError> {
        if self.completed && self.savepoint.is_none() {
            self.savepoint = Some(self.session.open_savepoint(&SAVEPOINT)?);
        }
        Ok(())
    }

    fn roll_back_savepoint(&mut self) {
        match self.savepoint.take() {
            Some(savepoint) => self.session.roll_back(savepoint),
            None if !self.completed => self.session.roll_back_to(self.tx),
            None => {}
        }
    }

    fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, DbError> {
        self.begin_savepoint()?;
        let result = claims::complete_or_none(self.session, completions);
        if !matches!(result, Ok(Ok(()))) {
            self.roll_back_savepoint();
            return result;
        }
        if let Some(savepoint) = self.savepoint.take() {
            self.session.release(savepoint)?;
        }
        self.completed = true;
        result
    }

    /// Hands over to the shared transaction, whose commit answers with `result`.
    fn commit<T>(&mut self, answer: oneshot::Sender<OpResult<T>>, result: T)
    where
        T: Send + 'static,
    {
        self.roll_back_savepoint();
        if let Err(failure) = self.session.release(self.tx) {
            drop(answer.send(Err(OpError::Lost(failure))));
            return;
        }
        self.replies.push(Box::new(|committed| {
            let result = committed.map(|()| result).map_err(OpError::Lost);
            drop(answer.send(result));
        }));
    }
}

fn failed(failure: DbError) -> OpError {
    OpError::Failed(failure.into())
}
