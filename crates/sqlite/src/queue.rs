use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{
    Acks, Capabilities, Delivery, Disposition, ExtendResult, Ordering, QueueInfo, Receipt,
    ReceiveLimits, SettleResult, Settlement, Sink, SinkInfo, Source,
};
use onlyonce_core::{Error, ErrorKind, Message};
use tokio::time::Instant;

use crate::config::{Config, DEAD, after};
use crate::database::Database;
use crate::error::DbError;
use crate::messages::{self, Look, Rules, SqliteReceipt};
use crate::open_leases::{Arriving, OpenLeases, leased};

/// How long an empty queue is left alone before it is looked at again, for what *other* processes publish; what this
/// process publishes wakes it at once.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
/// How long closing may take.
const CLOSE: Duration = Duration::from_secs(5);

/// A durable queue in a SQLite file, for any number of processes on one machine: a [`Source`] and a [`Sink`] in one.
///
/// Its dead-letter queue is named like it, with `.dead` at the end, and is a queue like any other: open it to read,
/// settle or publish again what is in it. The reason is in the attribute
/// [`onlyonce-reason`](onlyonce_core::attributes::DEAD_LETTER_REASON).
#[derive(Debug)]
pub struct SqliteQueue {
    database: Database,
    name: String,
    identity: String,
    dead: String,
    rules: Arc<Rules>,
    durable_acks: bool,
    held: Arc<OpenLeases>,
    /// As a source, and as a sink: one may be closed while the other is used.
    closed: AtomicBool,
    sink_closed: AtomicBool,
}

/// What can be done with each of its queues.
fn capabilities() -> Capabilities {
    let mut can = Capabilities::default();
    can.acks = Acks::Confirmed;
    can.extend = true;
    can.timed_lease = true;
    can.delayed_nack = true;
    can.dead_letter = true;
    can.counts_attempts = true;
    can.ordering = Ordering::Group;
    can
}

impl SqliteQueue {
    /// Opens the queue that `config` names, creating it if it does not exist.
    ///
    /// # Errors
    /// `config` names no queue; otherwise as [`Database::open`].
    pub async fn open(config: Config) -> Result<Self, Error> {
        let Some(name) = config.queue.clone() else {
            return Err(Error::config(
                "the SQLite URL names no queue: write `sqlite:path?queue=name`",
            ));
        };
        let database = Database::open(config.clone()).await?;
        let dead = format!("{name}{DEAD}");
        let names = (name.clone(), dead.clone());
        let queues = database.work(true, move |session| {
            let queue = messages::queue(session, &names.0)?;
            Ok((queue, messages::queue(session, &names.1)?))
        });
        let ((queue, identity), (dead_id, _)) = queues.await?;
        Ok(Self {
            database,
            identity: format!("sqlite:{identity}/{name}"),
            name,
            dead,
            rules: Arc::new(Rules {
                queue,
                dead: dead_id,
                lease: config.lease,
                max_deliveries: config.max_deliveries,
                retention: config.retention,
            }),
            durable_acks: config.durable_acks,
            held: Arc::default(),
            closed: AtomicBool::new(false),
            sink_closed: AtomicBool::new(false),
        })
    }

    /// The file it is in.
    pub fn database(&self) -> &Database {
        &self.database
    }

    pub(crate) fn id(&self) -> i64 {
        self.rules.queue
    }

    /// The queue whose dead letters come here.
    async fn dead_letters_of(&self) -> Result<Vec<String>, Error> {
        let Some(source) = self.name.strip_suffix(DEAD).map(str::to_owned) else {
            return Ok(Vec::new());
        };
        let found = self.database.work(false, move |session| {
            let exists = messages::exists(session, &source)?;
            Ok(exists.then(|| source.clone()).into_iter().collect())
        });
        found.await.map_err(|failure| self.error(failure))
    }

    /// Leases what is there; if there is nothing, says when a lease or delay will end.
    async fn look(&self, limits: ReceiveLimits) -> Result<(Arriving, Option<Duration>), DbError> {
        // Before the request, so that we never believe in a lease for longer than the database does.
        let until = after(self.rules.lease);
        let (rules, held) = (Arc::clone(&self.rules), Arc::clone(&self.held));
        self.database
            .work_then(
                false,
                move |session| messages::receive(session, &rules, limits),
                move |look| match look {
                    Look::Empty(wait) => (Arriving::new(Vec::new(), until, held), wait),
                    Look::Received(received) => (Arriving::new(received, until, held), None),
                },
            )
            .await
    }

    fn check_open(&self) -> Result<(), Error> {
        if self.closed.load(SeqCst) {
            return Err(self.closed_error());
        }
        Ok(())
    }

    fn closed_error(&self) -> Error {
        Error::new(ErrorKind::Closed, "the queue was closed").on_queue(&self.name)
    }

    fn error(&self, failure: DbError) -> Error {
        Error::from(failure).on_queue(&self.name)
    }
}

#[async_trait]
impl Source for SqliteQueue {
    fn name(&self) -> &str {
        &self.name
    }

    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        let deadline = after(limits.wait);
        let mut pause = FIRST_PAUSE;
        loop {
            // Before the look, so that nothing arrives unnoticed between it and the wait.
            let mut arrival = pin!(self.database.arrivals().notified());
            arrival.as_mut().enable();
            self.check_open()?;
            let unclaimed = self.held.take_unclaimed(limits.messages);
            if !unclaimed.is_empty() {
                return Ok(unclaimed);
            }
            let (arriving, wait) = self.look(limits).await.map_err(|f| self.error(f))?;
            if !arriving.is_empty() {
                let deliveries = arriving.arrive();
                if self.check_open().is_err() {
                    // It was closed meanwhile, without giving these back.
                    Source::close(self).await?;
                }
                self.check_open()?;
                return Ok(deliveries);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Vec::new());
            }
            let pause_now = left.min(pause).min(wait.unwrap_or(Duration::MAX));
            tokio::select! {
                () = arrival => {}
                () = tokio::time::sleep(pause_now) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let durable = self.durable_acks && batch.iter().any(|s| s.disposition == Disposition::Ack);
        let rules = Arc::clone(&self.rules);
        let settlements: Vec<_> = batch
            .iter()
            .map(|s| (leased(&s.receipt), s.disposition.clone()))
            .collect();
        let settled = self.database.work(durable, move |session| {
            let settle = |(leased, disposition): &(Option<SqliteReceipt>, Disposition)| match leased
            {
                Some(leased) => messages::settle(session, &rules, *leased, disposition),
                None => Ok(false),
            };
            settlements.iter().map(settle).collect()
        });
        let answers = self.answers(batch.len(), settled.await);
        self.held.forget(batch, &answers);
        // What was given back is ready, and so is what stood behind it.
        self.database.arrivals().notify_waiters();
        answers
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        let until = after(lease);
        let leases: Vec<_> = batch.iter().map(leased).collect();
        let asked = leases.clone();
        let extended = self
            .database
            .urgent(move |session| messages::extend(session, &asked, lease))
            .await;
        let answers = self.answers(batch.len(), extended);
        self.held.extend(&leases, &answers, until);
        let extended = answers.into_iter().map(|answer| answer.extended(until));
        extended.collect()
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let mut info = QueueInfo::default();
        info.dead_letters_of = self.dead_letters_of().await?;
        info.identity = Some(self.identity.clone());
        info.lease = Some(self.rules.lease);
        info.retention = self.rules.retention;
        info.max_deliveries = self.rules.max_deliveries;
        info.dead_letter = Some(self.dead.clone());
        info.capabilities = capabilities();
        let dead = format!(
            "kept in {} until somebody takes them; redriven after the retention of dedup records, they are new messages",
            self.dead
        );
        info.settings.push(("dead letters".into(), dead));
        Ok(info)
    }

    async fn close(&self) -> Result<(), Error> {
        self.closed.store(true, SeqCst);
        let leases = self.held.take_all();
        let rules = Arc::clone(&self.rules);
        let given_back = self.database.work(false, move |session| {
            let back = Disposition::Nack {
                delay: Duration::ZERO,
            };
            for leased in &leases {
                messages::settle(session, &rules, *leased, &back)?;
            }
            Ok(())
        });
        let given_back = tokio::time::timeout(CLOSE, given_back).await;
        self.database.arrivals().notify_waiters();
        match given_back {
            Ok(given_back) => given_back.map_err(|failure| self.error(failure)),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                "the database did not answer, so leases were not given back; they end by themselves",
            )
            .on_queue(&self.name)),
        }
    }
}

#[async_trait]
impl Sink for SqliteQueue {
    fn name(&self) -> &str {
        &self.name
    }

    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        if self.sink_closed.load(SeqCst) {
            return Err(self.closed_error());
        }
        let mut found = SinkInfo::default();
        found.identity = Some(self.identity.clone());
        found.stops_groups = true;
        Ok(found)
    }

    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        if self.sink_closed.load(SeqCst) {
            return batch.iter().map(|_| Err(self.closed_error())).collect();
        }
        let (queue, messages) = (self.rules.queue, batch.to_vec());
        let published = self.database.work(true, move |session| {
            messages::publish(session, queue, &messages)
        });
        let results = published
            .await
            .unwrap_or_else(|failure| vec![Err(failure); batch.len()]);
        self.database.arrivals().notify_waiters();
        let named = results.into_iter().zip(batch).map(|(result, message)| {
            result.map_err(|failure| self.error(failure).on_message(message))
        });
        named.collect()
    }

    async fn close(&self) -> Result<(), Error> {
        // Whatever is under way answers by itself.
        self.sink_closed.store(true, SeqCst);
        Ok(())
    }
}

impl SqliteQueue {
    fn answers(&self, len: usize, applied: Result<Vec<bool>, DbError>) -> Vec<SettleResult> {
        match applied {
            Ok(applied) => applied
                .into_iter()
                .map(|applied| match applied {
                    true => SettleResult::Applied,
                    false => SettleResult::LeaseLost,
                })
                .collect(),
            Err(failure) => (0..len)
                .map(|_| SettleResult::Unknown(self.error(failure.clone())))
                .collect(),
        }
    }
}
