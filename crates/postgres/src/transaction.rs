use std::error::Error as StdError;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{Completion, Fenced, OutboxTransaction, OutgoingId, Transaction};
use onlyonce_core::{Error, ErrorKind, Message};
use sqlx::postgres::{PgConnection, PgRow};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::claims;
use crate::config::Config;
use crate::connections::{Failed, Lent, run};
use crate::error::{self, of_end};
use crate::names::Names;
use crate::outbox;
use crate::sharing::{Carrier, Place, Sharing, Turn};

/// In a transaction that others may share nobody waits longer for a lock: two that lock the same rows in opposite orders would
/// wait for each other until the server looks for deadlocks, after a second.
const SHARED_LOCK_TIMEOUT_MILLIS: u128 = 50;

/// What a statement may take besides.
const GRACE: Duration = Duration::from_secs(1);

static NEXT: AtomicU64 = AtomicU64::new(1);

/// What all transactions of a store have in common.
#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) names: Names,
    pub(crate) sharing: Sharing,
    isolation: &'static str,
    lock_timeout: u128,
    idle_timeout: u128,
    commit: &'static str,
    roll_back: &'static str,
}

impl Home {
    pub(crate) fn new(config: &Config, sharing: Sharing) -> Self {
        Self {
            names: config.names(),
            sharing,
            isolation: config.isolation.sql(),
            lock_timeout: config.lock_timeout.as_millis(),
            idle_timeout: config.idle_timeout.as_millis(),
            commit: match config.transaction_pooler {
                true => "DEALLOCATE ALL; COMMIT",
                false => "COMMIT",
            },
            roll_back: match config.transaction_pooler {
                true => "ROLLBACK; DEALLOCATE ALL",
                false => "ROLLBACK",
            },
        }
    }

    /// For how long a statement that waits for a lock can be under way.
    fn longest_wait(&self) -> Duration {
        Duration::from_millis(u64::try_from(self.lock_timeout).unwrap_or(u64::MAX))
            .saturating_add(GRACE)
    }

    /// Begins transaction `number`. Everything is set for it alone, which PgBouncer bears too.
    fn begin(&self, number: u64, alone: bool) -> String {
        let lock_timeout = match alone || self.sharing.most() == 1 {
            true => self.lock_timeout,
            false => self.lock_timeout.min(SHARED_LOCK_TIMEOUT_MILLIS),
        };
        format!(
            "BEGIN ISOLATION LEVEL {} READ WRITE; SET LOCAL lock_timeout = {lock_timeout}; \
             SET LOCAL idle_in_transaction_session_timeout = {}; SET LOCAL onlyonce.transaction = '{number}'",
            self.isolation, self.idle_timeout
        )
    }
}

/// The transaction that a handler gets: what it does with it takes effect together with the record that it did, or not at
/// all.
///
/// It is sqlx's connection with a transaction begun on it: give `&mut **tx` to whatever takes a
/// [`PgConnection`] or an executor. To [begin](sqlx::Connection::begin) a transaction on it makes a savepoint.
///
/// ```no_run
/// # async fn handler(tx: &mut onlyonce_postgres::PgTx) -> Result<(), onlyonce_postgres::sqlx::Error> {
/// use onlyonce_postgres::sqlx;
///
/// sqlx::query("UPDATE account SET cents = cents + $1 WHERE id = $2")
///     .bind(500_i64)
///     .bind(7_i64)
///     .execute(&mut **tx)
///     .await?;
/// # Ok(())
/// # }
/// ```
///
/// Others may have written in the transaction before, and may do so later: messages that are handled at the same time share
/// commits where that pays, each in a savepoint of its own. So `COMMIT` and `ROLLBACK` are not the handler's to give. One that
/// gives them is found out before its message is acked, and fails; what it has committed by itself stays, and runs again.
/// What outlives a transaction (`SET` without `LOCAL`, temporary tables, session locks) is seen by the next handler on that
/// connection.
///
/// A statement that fails spoils the transaction up to the savepoint, as always in PostgreSQL: return its error. Where one
/// may fail, begin a savepoint before it.
///
/// Dropping it rolls back what it did, and nothing of anybody else's.
pub struct PgTx {
    home: Arc<Home>,
    carrier: Option<Carrier>,
    state: State,
    /// Nobody shares it.
    alone: bool,
    /// What of this one is recorded already: it is committed even if what comes later is not.
    completed: bool,
    /// It was dropped, and is being ended.
    leaving: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing was done since the last savepoint.
    Clean,
    /// Something may have been.
    Used,
}

impl fmt::Debug for PgTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PgTx")
            .field("state", &self.state)
            .field("alone", &self.alone)
            .finish_non_exhaustive()
    }
}

impl Deref for PgTx {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.carrier().lent.conn
    }
}

impl DerefMut for PgTx {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.state = State::Used;
        &mut self.carrier_mut().lent.conn
    }
}

impl PgTx {
    pub(crate) async fn begin(home: &Arc<Home>, alone: bool) -> Result<Self, Error> {
        let turn = home.sharing.turn(alone).await;
        let carrier = match turn.map_err(|error| error::of_call("open a connection", error))? {
            Turn::Shared(carrier) => *carrier,
            Turn::Own(lent, place) => begin_on(home, *lent, place).await?,
        };
        Ok(Self {
            home: Arc::clone(home),
            carrier: Some(carrier),
            state: State::Clean,
            alone,
            completed: false,
            leaving: false,
        })
    }

    #[expect(
        clippy::expect_used,
        reason = "it is taken only by what consumes the transaction"
    )]
    fn carrier(&self) -> &Carrier {
        self.carrier.as_ref().expect("it is not over")
    }

    #[expect(
        clippy::expect_used,
        reason = "it is taken only by what consumes the transaction"
    )]
    fn carrier_mut(&mut self) -> &mut Carrier {
        self.carrier.as_mut().expect("it is not over")
    }

    /// Whether somebody's savepoint before the present one is to be committed.
    fn has_more(&self) -> bool {
        self.completed || !self.carrier().joined.is_empty()
    }

    async fn run(&mut self, sql: String) -> Result<Vec<PgRow>, Failed> {
        // Should nobody wait for the answer.
        self.state = State::Used;
        run(&mut self.carrier_mut().lent.conn, sql).await
    }

    /// What failed at the end of a savepoint, as those see it who only shared the transaction.
    fn failed(&self, failed: Failed) -> Error {
        if error::is_conflict(&failed.error) {
            self.home.sharing.conflicted();
        }
        of_end("end a handler's transaction", failed.error)
    }

    /// No record was made, so there is no savepoint after it either: because it is fenced, or for another reason.
    fn not_recorded(&mut self, savepoint: usize, failed: Failed) -> Result<Fenced, Error> {
        self.carrier_mut().savepoint = savepoint;
        match error::is(&failed.error, error::FENCED) {
            true => Ok(Fenced),
            false => Err(self.failed(failed)),
        }
    }

    /// The end of the savepoint of this carrier, and the begin of another.
    fn next_savepoint(&mut self) -> String {
        let carrier = self.carrier_mut();
        let release = match carrier.savepoint {
            0 => String::new(),
            last => format!("RELEASE SAVEPOINT onlyonce_{last}; "),
        };
        carrier.savepoint += 1;
        format!("{release}SAVEPOINT onlyonce_{}", carrier.savepoint)
    }

    /// Rolls back to the last savepoint, or begins anew where there is none.
    async fn roll_back(&mut self) -> Result<(), Error> {
        let (home, alone) = (Arc::clone(&self.home), self.alone);
        let carrier = self.carrier_mut();
        let sql = match carrier.savepoint {
            0 => {
                carrier.transaction = NEXT.fetch_add(1, Relaxed);
                carrier.began = Instant::now();
                format!("ROLLBACK; {}", home.begin(carrier.transaction, alone))
            }
            last => format!("ROLLBACK TO SAVEPOINT onlyonce_{last}"),
        };
        let rolled_back = self.run(sql).await;
        rolled_back.map_err(|failed| self.failed(failed))?;
        self.state = State::Clean;
        Ok(())
    }

    /// Commits with all records that were to be made with it; all who share it are told.
    async fn commit_all(mut self) -> Result<(), Error> {
        let records = self.carrier().records.clone();
        let commit = self.commit_with(&records);
        match self.run(commit).await {
            Err(failed) if is_of_records(&failed, &records) => self.not_committed(failed).await,
            result => self.committed(result.map(drop)),
        }
    }

    /// Makes these records, if any, and commits.
    fn commit_with(&self, records: &[Completion]) -> String {
        let record = match records {
            [] => String::new(),
            records => format!("{}; ", self.record(records)),
        };
        // Else the server refuses the commit: see `keep`.
        let recorded = match self.carrier().records.is_empty() {
            true => "",
            false => "SET LOCAL onlyonce.recorded = 'yes'; ",
        };
        format!("{record}{recorded}{}", self.home.commit)
    }

    /// Tells all who share it what became of the commit, and gives the connection back.
    fn committed(mut self, result: Result<(), Failed>) -> Result<(), Error> {
        let is_answered = match &result {
            Ok(()) => true,
            Err(failed) => failed.error.as_database_error().is_some(),
        };
        let result = result.map_err(|failed| self.failed(failed));
        if let Some(mut carrier) = self.carrier.take() {
            if result.is_ok() {
                self.home.sharing.committed(&carrier);
            }
            carrier.tell(&result);
            // After a refused commit there is no transaction any more.
            if is_answered {
                carrier.give_back();
            }
        }
        result
    }

    /// The records of several messages could not be made: nothing is kept, and all are told.
    async fn not_committed(mut self, failed: Failed) -> Result<(), Error> {
        let error = match error::is(&failed.error, error::FENCED) {
            true => recorded_by_another(),
            false => self.failed(failed),
        };
        let is_over = self.run(self.home.roll_back.into()).await.is_ok();
        if let Some(mut carrier) = self.carrier.take() {
            carrier.tell(&Err(error.clone()));
            if is_over {
                carrier.give_back();
            }
        }
        Err(error)
    }

    /// Hands the transaction on to somebody who goes on in it, and waits for the commit.
    async fn hand_on(mut self, successor: oneshot::Sender<Carrier>) -> Result<(), Error> {
        let (sender, outcome) = oneshot::channel();
        if let Some(mut carrier) = self.carrier.take() {
            carrier.joined.push(sender);
            if let Err(carrier) = successor.send(carrier) {
                // Nobody waits any more.
                self.carrier = Some(carrier);
                self.state = State::Clean;
                drop(self);
            }
        }
        outcome.await.unwrap_or_else(|_| Err(unknown()))
    }

    async fn keep_and_hand_on(
        mut self,
        last: &[Completion],
        successor: oneshot::Sender<Carrier>,
    ) -> Result<(), Error> {
        let before = self.carrier().savepoint;
        let keep = self.keep();
        if let Err(failed) = self.run(keep).await {
            self.carrier_mut().savepoint = before;
            return Err(self.failed(failed));
        }
        let carrier = self.carrier_mut();
        carrier.note(last);
        carrier.records.extend_from_slice(last);
        self.hand_on(successor).await
    }

    async fn record_and_commit(mut self, last: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        let records = [&*self.carrier().records, last].concat();
        let commit = self.commit_with(&records);
        self.carrier_mut().note(last);
        match self.run(commit).await {
            Err(failed) if is_of_records(&failed, &records) => {
                if !self.carrier().records.is_empty() {
                    return self.not_committed(failed).await.map(Ok);
                }
                let savepoint = self.carrier().savepoint;
                let Fenced = self.not_recorded(savepoint, failed)?;
                self.commit_without_last().await?;
                Ok(Err(Fenced))
            }
            result => self.committed(result.map(drop)).map(Ok),
        }
    }

    /// The last savepoint cannot be kept, and those before it are committed.
    async fn commit_without_last(mut self) -> Result<(), Error> {
        if !self.has_more() {
            return self.roll_back_all().await;
        }
        self.roll_back().await?;
        self.commit_all().await
    }

    async fn roll_back_all(mut self) -> Result<(), Error> {
        let rolled_back = self.run(self.home.roll_back.into()).await;
        rolled_back.map_err(|failed| self.failed(failed))?;
        if let Some(carrier) = self.carrier.take() {
            carrier.give_back();
        }
        Ok(())
    }

    /// Ends the savepoint of what is recorded with the commit. From the first one on, the server refuses to commit without the
    /// records.
    fn keep(&mut self) -> String {
        let carrier = self.carrier();
        let share = match carrier.records.is_empty() {
            true => format!(
                "SELECT {}('{}'); ",
                self.home.names.of("share"),
                carrier.transaction
            ),
            false => String::new(),
        };
        format!("{share}{}", self.next_savepoint())
    }

    fn record(&self, completions: &[Completion]) -> String {
        let number = self.carrier().transaction;
        claims::complete(&self.home.names, completions, Some(number))
    }
}

async fn begin_on(home: &Home, mut lent: Lent, place: Option<Place>) -> Result<Carrier, Error> {
    let number = NEXT.fetch_add(1, Relaxed);
    let begin = home.begin(number, place.is_none());
    if let Err(failed) = run(&mut lent.conn, begin).await {
        if failed.error.as_database_error().is_none() {
            home.sharing.connections.forget_idle();
        }
        return Err(error::of_call("begin a transaction", failed.error));
    }
    Ok(Carrier::new(lent, place, number))
}

#[async_trait]
impl Transaction for PgTx {
    async fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        if self.carrier().has_any(completions) {
            self.roll_back().await?;
            return Ok(Err(Fenced));
        }
        let record = self.record(completions);
        let before = self.carrier().savepoint;
        let savepoint = self.next_savepoint();
        let Err(failed) = self.run(format!("{record}; {savepoint}")).await else {
            self.carrier_mut().note(completions);
            self.completed = true;
            self.state = State::Clean;
            return Ok(Ok(()));
        };
        let Fenced = self.not_recorded(before, failed)?;
        self.roll_back().await?;
        Ok(Err(Fenced))
    }

    async fn rollback(&mut self) -> Result<(), Error> {
        match self.state {
            State::Clean => Ok(()),
            State::Used => self.roll_back().await,
        }
    }

    async fn commit(mut self) -> Result<(), Error> {
        self.rollback().await?;
        match self.has_more() {
            true => self.commit_all().await,
            false => self.roll_back_all().await,
        }
    }

    async fn complete_and_commit(
        mut self,
        last: &[Completion],
    ) -> Result<Result<(), Fenced>, Error> {
        if self.carrier().has_any(last) {
            self.commit_without_last().await?;
            return Ok(Err(Fenced));
        }
        let successor = match self.alone {
            true => None,
            false => self.home.sharing.successor(self.carrier(), last),
        };
        match successor {
            Some(successor) => self.keep_and_hand_on(last, successor).await.map(Ok),
            None => self.record_and_commit(last).await,
        }
    }

    fn is_conflict(&self, error: &(dyn StdError + 'static)) -> bool {
        let is_conflict = error.downcast_ref().is_some_and(error::is_conflict);
        if is_conflict {
            self.home.sharing.conflicted();
        }
        is_conflict
    }
}

#[async_trait]
impl OutboxTransaction for PgTx {
    async fn publish(&mut self, destination: &str, message: Message) -> Result<OutgoingId, Error> {
        self.state = State::Used;
        let home = Arc::clone(&self.home);
        outbox::publish(
            &home.names,
            &mut self.carrier_mut().lent.conn,
            destination,
            &message,
        )
        .await
    }
}

impl Drop for PgTx {
    /// What others share is committed without what this one has not completed.
    fn drop(&mut self) {
        let Some(carrier) = self.carrier.take() else {
            return;
        };
        let rest = Self {
            home: Arc::clone(&self.home),
            carrier: Some(carrier),
            state: self.state,
            alone: self.alone,
            completed: false,
            leaving: true,
        };
        // Without a runtime the connection is closed, and who shared the transaction asks again.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) if !self.leaving => drop(runtime.spawn(rest.leave_in_time())),
            _ => rest.close(),
        }
    }
}

impl PgTx {
    /// A statement that was under way may go on for long: the connection is closed then, and the server ends the transaction when
    /// the statement is over.
    async fn leave_in_time(self) {
        let longest = self.home.longest_wait();
        let _ = tokio::time::timeout(longest, self.leave()).await;
    }

    /// Ends what was dropped: there are at most as many of these as connections.
    async fn leave(mut self) {
        if self.carrier().joined.is_empty() {
            let _ = self.roll_back_all().await;
            return;
        }
        if self.rollback().await.is_err() {
            return self.close();
        }
        // Whoever waits goes on, or else it is committed.
        while let Some(successor) = self.home.sharing.successor(self.carrier(), &[]) {
            let Some(carrier) = self.carrier.take() else {
                return;
            };
            let Err(carrier) = successor.send(carrier) else {
                return;
            };
            self.carrier = Some(carrier);
        }
        let _ = self.commit_all().await;
    }

    /// Closes the connection: the server rolls back.
    fn close(mut self) {
        self.carrier = None;
    }
}

/// Whether it was the making of these records that the server refused, not the commit behind it.
fn is_of_records(failed: &Failed, records: &[Completion]) -> bool {
    !records.is_empty() && failed.done == 0 && failed.error.as_database_error().is_some()
}

/// It is not known whose message it was. Each is done again in a commit of its own, which tells.
fn recorded_by_another() -> Error {
    Error::new(
        ErrorKind::Conflict,
        "another worker has recorded one of the messages that shared the commit: nothing was committed",
    )
    .retryable(true)
}

fn unknown() -> Error {
    Error::new(
        ErrorKind::Connection,
        "the connection that shared the commit broke: it may or may not have happened",
    )
}
