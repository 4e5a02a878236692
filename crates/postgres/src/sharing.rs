//! Which transactions share a commit.
//!
//! There are so many connections, and as long as one is free each transaction has its own. The others wait. Whoever is done on a
//! connection while others wait hands it on with its transaction open, and the last of them commits for all: so commits are shared
//! when they are what everybody waits for. The records of all are made with the commit, in one statement. A transaction that does more
//! also locks more: what conflicts change is in `contention`.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use onlyonce_core::driver::{Completion, KeyDigest};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, timeout};

use crate::connections::{Connections, Lent};
use crate::contention::{Contention, MOST, Mode, STALLED};

/// For how long a transaction that is shared takes in more.
const OPEN: Duration = Duration::from_millis(20);
/// How many records, and how many bytes of outcomes, are made with one commit, about.
const RECORDS: usize = 512;
const BYTES: usize = 1 << 20;

/// The connections for handlers' transactions, and who waits for one.
#[derive(Clone, Debug)]
pub(crate) struct Sharing {
    pub(crate) connections: Connections,
    /// One for each transaction that may be shared now.
    places: Arc<Semaphore>,
    waiting: Arc<Mutex<Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    queue: VecDeque<oneshot::Sender<Carrier>>,
    contention: Contention,
    /// How many places were taken away, and how many of these are still in use.
    closed: usize,
    owed: usize,
}

/// The right to run a transaction that may be shared.
#[derive(Debug)]
pub(crate) struct Place {
    permit: Option<OwnedSemaphorePermit>,
    waiting: Arc<Mutex<Waiting>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiting = lock(&self.waiting);
        if waiting.owed > 0 {
            waiting.owed -= 1;
            if let Some(permit) = self.permit.take() {
                permit.forget();
            }
        }
    }
}

/// What became of a shared commit.
pub(crate) type Outcome = Result<(), onlyonce_core::Error>;

/// A connection with a transaction that is handed from one to the next.
#[derive(Debug)]
pub(crate) struct Carrier {
    pub(crate) lent: Lent,
    /// Of one that may be shared.
    pub(crate) place: Option<Place>,
    /// Those who are done and wait for the commit.
    pub(crate) joined: Vec<oneshot::Sender<Outcome>>,
    /// Their records, which are made with the commit.
    pub(crate) records: Vec<Completion>,
    /// The keys of all records in the transaction.
    pub(crate) keys: HashSet<KeyDigest>,
    /// The number of the open transaction, and of its last savepoint: 0 before the first.
    pub(crate) transaction: u64,
    pub(crate) savepoint: usize,
    pub(crate) began: Instant,
}

/// How one gets a connection.
#[derive(Debug)]
pub(crate) enum Turn {
    /// For itself, at first.
    Own(Box<Lent>, Option<Place>),
    /// With a transaction that others have written to.
    Shared(Box<Carrier>),
}

impl Sharing {
    pub(crate) fn new(connections: Connections) -> Self {
        let waiting = Waiting {
            queue: VecDeque::new(),
            contention: Contention::new(Instant::now()),
            closed: 0,
            owed: 0,
        };
        Self {
            places: Arc::new(Semaphore::new(connections.most())),
            connections,
            waiting: Arc::new(Mutex::new(waiting)),
        }
    }

    /// Waits for a connection, or with `alone` for one that nobody shares. Dropping the future loses nothing.
    pub(crate) async fn turn(&self, alone: bool) -> Result<Turn, sqlx::Error> {
        if alone {
            return Ok(Turn::Own(Box::new(self.connections.lend().await?), None));
        }
        loop {
            let (sender, mut handed) = oneshot::channel();
            {
                let mut waiting = lock(&self.waiting);
                waiting.queue.retain(|sender| !sender.is_closed());
                waiting.queue.push_back(sender);
            }
            let (place, permit) = tokio::select! {
                biased;
                carrier = &mut handed => match carrier {
                    Ok(carrier) => return Ok(Turn::Shared(Box::new(carrier))),
                    // Whoever wanted to hand one on could not.
                    Err(_) => continue,
                },
                own = self.own() => own?,
            };
            // It may have been handed on in this moment.
            handed.close();
            if let Ok(carrier) = handed.try_recv() {
                return Ok(Turn::Shared(Box::new(carrier)));
            }
            let lent = self.connections.open(permit).await?;
            return Ok(Turn::Own(Box::new(lent), Some(place)));
        }
    }

    async fn own(&self) -> Result<(Place, OwnedSemaphorePermit), sqlx::Error> {
        let permit = loop {
            let permit = Arc::clone(&self.places).acquire_owned();
            match timeout(STALLED, permit).await {
                Ok(permit) => break permit.map_err(|_| sqlx::Error::PoolClosed)?,
                Err(_) => self.learn(|waiting| waiting.contention.waits(Instant::now())),
            }
        };
        let place = Place {
            permit: Some(permit),
            waiting: Arc::clone(&self.waiting),
        };
        Ok((place, self.connections.permit().await?))
    }

    /// How many may share a commit now.
    pub(crate) fn most(&self) -> usize {
        lock(&self.waiting).contention.most()
    }

    /// Who is to go on in a transaction of which so much has happened, with so many more records, if anybody.
    pub(crate) fn successor(
        &self,
        carrier: &Carrier,
        more: &[Completion],
    ) -> Option<oneshot::Sender<Carrier>> {
        let mut waiting = lock(&self.waiting);
        if carrier.joined.len() + 1 >= waiting.contention.most_since(carrier.began)
            || carrier.savepoint + 1 >= MOST
            || carrier.began.elapsed() >= OPEN
            || carrier.is_full(more)
        {
            return None;
        }
        loop {
            let next = waiting.queue.pop_front()?;
            if !next.is_closed() {
                return Some(next);
            }
        }
    }

    /// A transaction was committed.
    pub(crate) fn committed(&self, carrier: &Carrier) {
        self.learn(|waiting| {
            waiting.queue.retain(|sender| !sender.is_closed());
            let messages = u32::try_from(carrier.keys.len()).unwrap_or(u32::MAX);
            let others_wait = !waiting.queue.is_empty();
            let (now, took) = (Instant::now(), carrier.began.elapsed());
            waiting
                .contention
                .committed(now, messages, took, others_wait);
        });
    }

    /// Another transaction was in the way.
    pub(crate) fn conflicted(&self) {
        self.learn(|waiting| waiting.contention.conflicted(Instant::now()));
    }

    fn learn(&self, what: impl FnOnce(&mut Waiting)) {
        let mut waiting = lock(&self.waiting);
        what(&mut waiting);
        let all = self.connections.most();
        let closed = match waiting.contention.mode() {
            Mode::OneShared => all - 1,
            Mode::Single | Mode::AllShared => 0,
        };
        if waiting.closed < closed {
            let more = closed - waiting.closed;
            waiting.owed += more - self.places.forget_permits(more);
        } else {
            let back = waiting.closed - closed;
            let never_closed = back.min(waiting.owed);
            waiting.owed -= never_closed;
            self.places.add_permits(back - never_closed);
        }
        waiting.closed = closed;
    }
}

impl Carrier {
    pub(crate) fn new(lent: Lent, place: Option<Place>, transaction: u64) -> Self {
        Self {
            lent,
            place,
            joined: Vec::new(),
            records: Vec::new(),
            keys: HashSet::new(),
            transaction,
            savepoint: 0,
            began: Instant::now(),
        }
    }

    /// Whether there is a record of one of these in it.
    pub(crate) fn has_any(&self, records: &[Completion]) -> bool {
        let mut keys = records.iter().map(|one| one.precondition.key());
        keys.any(|key| self.keys.contains(&key))
    }

    /// Notes that these have their records in it.
    pub(crate) fn note(&mut self, records: &[Completion]) {
        let keys = records.iter().map(|one| one.precondition.key());
        self.keys.extend(keys);
    }

    fn is_full(&self, more: &[Completion]) -> bool {
        let all = || self.records.iter().chain(more);
        let bytes = all().map(|one| one.outcome.as_ref().map_or(0, |outcome| outcome.len()));
        all().count() >= RECORDS || bytes.sum::<usize>() >= BYTES
    }

    /// Tells all who wait for the commit.
    pub(crate) fn tell(&mut self, outcome: &Outcome) {
        for joined in self.joined.drain(..) {
            let _ = joined.send(outcome.clone());
        }
    }

    /// It is over: the connection can be used again.
    pub(crate) fn give_back(self) {
        let Self { lent, place, .. } = self;
        lent.give_back();
        drop(place);
    }
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}
