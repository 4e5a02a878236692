use std::error::Error as StdError;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use async_trait::async_trait;
use onlyonce_core::driver::{Completion, Fenced, OutboxTransaction, OutgoingId, Transaction};
use onlyonce_core::{Error, ErrorKind, Message};
use rusqlite::{Connection, Params};
use tokio::sync::oneshot;

use crate::database::Database;
use crate::error::DbError;
use crate::messages;
use crate::outbox::check_size;
use crate::outgoing;
use crate::queue::SqliteQueue;
use crate::session::Session;
use crate::turn::{Call, Op, OpError, OpResult, Terms, TxId};

static NEXT: AtomicU64 = AtomicU64::new(1);

/// The transaction that a handler gets: what it does with it takes effect together with the record that it did, or not
/// at all.
///
/// Nothing is locked until its first use. That waits for its *turn*: a file has one writer, so transactions have the
/// connection one after another, each from its first use until it is committed, rolled back or dropped. Those that are
/// committed while others wait for their turn share one commit and one sync with them; a lone one is committed at once.
///
/// A turn keeps every other transaction of every process on this file waiting, so await what is slow *before* the first
/// use. Claims are renewed meanwhile. After [`Config::turn`](crate::Config::turn) the transaction is rolled back.
///
/// Dropping it rolls it back, and nothing of anybody else's. If the future of one of its methods is dropped, it is unknown
/// whether that step was done, so the current savepoint can only be rolled back.
#[derive(Debug)]
pub struct SqliteTx {
    database: Database,
    terms: Terms,
    id: TxId,
    state: State,
    /// How many savepoints are completed.
    savepoints: usize,
    /// Something was written to the outbox.
    published: bool,
}

#[derive(Debug)]
enum State {
    /// Not used yet, or rolled back.
    Idle,
    /// It has its turn.
    Turn,
    /// A step is under way; if it stays so, its future was dropped.
    Unknown,
    /// It had its turn and lost it, for this reason.
    Lost(DbError),
}

impl SqliteTx {
    pub(crate) fn new(database: &Database, terms: Terms) -> Self {
        Self {
            database: database.clone(),
            terms,
            id: TxId(NEXT.fetch_add(1, Relaxed)),
            state: State::Idle,
            savepoints: 0,
            published: false,
        }
    }

    /// Runs `run` within the transaction, on the database thread: it may do any SQL but begin and end transactions, create
    /// temporary objects, set pragmas that outlive it, and write to the tables named `onlyonce_…`. Keep it short, it keeps
    /// everybody waiting.
    ///
    /// ```no_run
    /// # async fn handler(tx: &mut onlyonce_sqlite::SqliteTx) -> Result<(), onlyonce_core::Error> {
    /// let amount = 5;
    /// let left: i64 = tx
    ///     .with(move |conn| {
    ///         conn.query_row(
    ///             "UPDATE account SET balance = balance - ?1 WHERE id = 7 RETURNING balance",
    ///             [amount],
    ///             |row| row.get(0),
    ///         )
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// That of `run`, with the [`rusqlite::Error`] as its source: the statement that failed has done nothing, those
    /// before it still stand. If `run` panics, likewise. Otherwise the transaction is lost and everything in it rolled back,
    /// and so says every later call: [`Refused`](ErrorKind::Refused) if SQL of `run` rolled it back (`OR ROLLBACK`,
    /// `RAISE(ROLLBACK)`) or if it lasted for longer than `turn`, when SQL that is under way is interrupted; otherwise retryable, with the whole message.
    pub async fn with<T, F>(&mut self, run: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let asking = Arc::new(());
        let asker = Arc::downgrade(&asking);
        self.run(move |session| session.guarded(asker, run)).await
    }

    /// Runs one statement and returns how many rows it changed.
    ///
    /// # Errors
    /// As [`with`](Self::with).
    pub async fn execute<P>(&mut self, sql: impl Into<String>, params: P) -> Result<usize, Error>
    where
        P: Params + Send + 'static,
    {
        let sql = sql.into();
        self.with(move |conn| conn.prepare_cached(&sql)?.execute(params))
            .await
    }

    /// Writes a message to the [outbox](crate::SqliteOutbox), as part of the current savepoint: a relay publishes it some time
    /// after the commit, to whatever queue its destination stands for, and never if it is rolled back.
    ///
    /// ```no_run
    /// # use onlyonce_core::Message;
    /// # async fn handler(tx: &mut onlyonce_sqlite::SqliteTx) -> Result<(), onlyonce_core::Error> {
    /// tx.execute("INSERT INTO paid VALUES (?1)", [7]).await?;
    /// tx.publish("mails", Message::new("thank you").with_group("customer-7")).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Of kind [`Message`](ErrorKind::Message): it is too large, and nothing was done. Otherwise as [`with`](Self::with).
    pub async fn publish(
        &mut self,
        destination: &str,
        message: Message,
    ) -> Result<OutgoingId, Error> {
        check_size(&message)?;
        let destination = destination.to_owned();
        let write = move |session: &mut Session| {
            outgoing::write(&session.conn, &destination, &message)
                .map_err(|error| OpError::Failed(DbError::from(error).into()))
        };
        self.published = true;
        self.run(write).await
    }

    /// Publishes to a queue in the same file at once, as part of the transaction: the messages can be received as soon as it is
    /// committed, without a relay, and never if it is not.
    ///
    /// # Errors
    /// The queue is in another file; otherwise as [`with`](Self::with).
    pub async fn enqueue(&mut self, queue: &SqliteQueue, batch: &[Message]) -> Result<(), Error> {
        if !self.database.is_same(queue.database()) {
            return Err(
                Error::config("a transaction can enqueue only to a queue in its own file")
                    .on_queue(onlyonce_core::driver::Sink::name(queue)),
            );
        }
        let (id, batch) = (queue.id(), batch.to_vec());
        self.run(move |session| {
            messages::publish_all(session, id, &batch)
                .map_err(|failure| OpError::Failed(failure.into()))
        })
        .await
    }

    async fn run<T: Send + 'static>(
        &mut self,
        run: impl FnOnce(&mut Session) -> OpResult<T> + Send + 'static,
    ) -> Result<T, Error> {
        self.step(|answer| Op::Run(Box::new(Call { run, answer })))
            .await
    }

    /// Takes a step, waiting for the turn if it is the first.
    async fn step<T>(
        &mut self,
        op: impl FnOnce(oneshot::Sender<OpResult<T>>) -> Op,
    ) -> Result<T, Error> {
        let begun = match &self.state {
            State::Idle => false,
            State::Turn => true,
            State::Unknown => return Err(interrupted()),
            State::Lost(failure) => return Err(failure.clone().into()),
        };
        self.state = State::Unknown;
        let (answer, result) = oneshot::channel();
        if begun {
            self.database.step(self.id, op(answer));
        } else {
            let (tx, terms) = (self.id, self.terms);
            let turn = self.database.take_turn(tx, terms, op(answer)).await;
            if let Err(failure) = turn {
                self.state = State::Idle;
                return Err(failure.into());
            }
        }
        let result = result.await.unwrap_or_else(|_| Err(OpError::closed()));
        self.state = match &result {
            Ok(_) | Err(OpError::Failed(_)) => State::Turn,
            // Nothing was done yet that could be lost.
            Err(OpError::NoTurn(_)) if !begun => State::Idle,
            Err(OpError::Lost(failure) | OpError::NoTurn(failure)) => State::Lost(failure.clone()),
        };
        let has_turn = matches!(self.state, State::Turn);
        self.database.set_locked(has_turn);
        Ok(result?)
    }

    /// Takes the step with which the turn is over. If it could not be taken, dropping the transaction ends the turn.
    async fn last_step<T>(
        &mut self,
        op: impl FnOnce(oneshot::Sender<OpResult<T>>) -> Op,
    ) -> Result<T, Error> {
        let result = self.step(op).await?;
        self.state = State::Idle;
        Ok(result)
    }

    /// What was committed is to leave.
    fn announce(&self) {
        if self.published {
            self.database.announce();
        }
    }

    /// Ends the turn, if there is or may be one, and is as new.
    fn reset(&mut self) {
        if !matches!(self.state, State::Idle) {
            self.database.step(self.id, Op::End);
        }
        self.id = TxId(NEXT.fetch_add(1, Relaxed));
        self.state = State::Idle;
        self.database.set_locked(false);
    }
}

#[async_trait]
impl Transaction for SqliteTx {
    async fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        let completions = completions.to_vec();
        let complete = |answer| Op::Complete(completions, answer);
        let verdict = self.step(complete).await?;
        self.savepoints += usize::from(verdict.is_ok());
        Ok(verdict)
    }

    async fn rollback(&mut self) -> Result<(), Error> {
        if self.savepoints == 0 {
            self.reset();
            return Ok(());
        }
        if matches!(self.state, State::Unknown) {
            // The turn's steps are taken in order, so whatever the interrupted one did is rolled back with the rest.
            self.state = State::Turn;
        }
        self.step(Op::Rollback).await
    }

    /// A file has one writer.
    fn is_conflict(&self, _: &(dyn StdError + 'static)) -> bool {
        false
    }

    async fn commit(mut self) -> Result<(), Error> {
        match self.state {
            State::Idle => Ok(()),
            _ => {
                self.last_step(Op::Commit).await?;
                self.announce();
                Ok(())
            }
        }
    }

    async fn complete_and_commit(
        mut self,
        last: &[Completion],
    ) -> Result<Result<(), Fenced>, Error> {
        let last = last.to_vec();
        let verdict = self.last_step(|answer| Op::Finish(last, answer)).await?;
        self.announce();
        Ok(verdict)
    }
}

#[async_trait]
impl OutboxTransaction for SqliteTx {
    async fn publish(&mut self, destination: &str, message: Message) -> Result<OutgoingId, Error> {
        Self::publish(self, destination, message).await
    }
}

impl Drop for SqliteTx {
    fn drop(&mut self) {
        if matches!(self.state, State::Turn | State::Unknown) {
            self.database.step(self.id, Op::End);
        }
    }
}

fn interrupted() -> Error {
    Error::new(
        ErrorKind::Other,
        "a call on this transaction was dropped before it was answered, so what it did is unknown; roll it back",
    )
    .retryable(true)
}
