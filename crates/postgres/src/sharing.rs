//! Which transactions share a commit.
//!
//! There are so many connections, and as long as one is free each transaction has its own. The others wait. Whoever is done on a
//! connection while others wait hands it on with its transaction open, and the last of them commits for all: so commits are shared
//! when they are what everybody waits for. It is given up at the first conflict, since a transaction that does more also locks more.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::connections::{Connections, Lent};

/// How many may share a commit. PostgreSQL keeps the numbers of 64 subtransactions of each backend where others can see them at once:
/// <https://www.postgresql.org/docs/current/subxacts.html>.
const MOST: usize = 64;
/// For how long a transaction that is shared takes in more.
const OPEN: Duration = Duration::from_millis(20);
/// A shared transaction of this length keeps others waiting, and holds its locks, for too long.
const LONG: Duration = Duration::from_millis(100);
/// For how long nothing is shared after a conflict, at first and at most.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The connections for handlers' transactions, and who waits for one.
#[derive(Clone, Debug)]
pub(crate) struct Sharing {
    pub(crate) connections: Connections,
    waiting: Arc<Mutex<Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    queue: VecDeque<oneshot::Sender<Carrier>>,
    /// How many may share a commit now.
    most: usize,
    /// Nothing more is shared until then.
    paused_until: Option<Instant>,
    pause: Duration,
}

impl Waiting {
    fn is_paused(&self) -> bool {
        self.paused_until
            .is_some_and(|until| Instant::now() < until)
    }
}

/// What became of a shared commit.
pub(crate) type Outcome = Result<(), onlyonce_core::Error>;

/// A connection with a transaction that is handed from one to the next.
#[derive(Debug)]
pub(crate) struct Carrier {
    pub(crate) lent: Lent,
    /// Those who are done and wait for the commit.
    pub(crate) joined: Vec<oneshot::Sender<Outcome>>,
    /// The number of the open transaction, and of its last savepoint: 0 before the first.
    pub(crate) transaction: u64,
    pub(crate) savepoint: usize,
    pub(crate) began: Instant,
}

/// How one gets a connection.
#[derive(Debug)]
pub(crate) enum Turn {
    /// For itself.
    Own(Box<Lent>),
    /// With a transaction that others have written to.
    Shared(Box<Carrier>),
}

impl Sharing {
    pub(crate) fn new(connections: Connections) -> Self {
        let waiting = Waiting {
            queue: VecDeque::new(),
            most: 1,
            paused_until: None,
            pause: PAUSE,
        };
        Self {
            connections,
            waiting: Arc::new(Mutex::new(waiting)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a connection, or with `alone` for one that nobody shares. Dropping the future loses nothing.
    pub(crate) async fn turn(&self, alone: bool) -> Result<Turn, sqlx::Error> {
        if alone {
            return Ok(Turn::Own(Box::new(self.connections.lend().await?)));
        }
        loop {
            let (sender, mut handed) = oneshot::channel();
            {
                let mut waiting = self.lock();
                waiting.queue.retain(|sender| !sender.is_closed());
                waiting.queue.push_back(sender);
            }
            let permit = tokio::select! {
                biased;
                carrier = &mut handed => match carrier {
                    Ok(carrier) => return Ok(Turn::Shared(Box::new(carrier))),
                    // Whoever wanted to hand one on could not.
                    Err(_) => continue,
                },
                permit = self.connections.permit() => permit?,
            };
            // It may have been handed on in this moment.
            handed.close();
            if let Ok(carrier) = handed.try_recv() {
                return Ok(Turn::Shared(Box::new(carrier)));
            }
            return Ok(Turn::Own(Box::new(self.connections.open(permit).await?)));
        }
    }

    /// How many may share a commit now.
    pub(crate) fn most(&self) -> usize {
        self.lock().most
    }

    /// Who is to go on in a transaction of which so much has happened, if anybody.
    pub(crate) fn successor(&self, carrier: &Carrier) -> Option<oneshot::Sender<Carrier>> {
        let most = self.most();
        if carrier.joined.len() + 1 >= most
            || carrier.savepoint + 1 >= MOST
            || carrier.began.elapsed() >= OPEN
        {
            return None;
        }
        self.next_waiting()
    }

    fn next_waiting(&self) -> Option<oneshot::Sender<Carrier>> {
        let mut waiting = self.lock();
        loop {
            let next = waiting.queue.pop_front()?;
            if !next.is_closed() {
                return Some(next);
            }
        }
    }

    /// A transaction was committed: more may share the next one if somebody waits for a connection.
    pub(crate) fn committed(&self, carrier: &Carrier) {
        let mut waiting = self.lock();
        waiting.queue.retain(|sender| !sender.is_closed());
        if carrier.began.elapsed() >= LONG && !carrier.joined.is_empty() {
            waiting.most = (waiting.most / 2).max(1);
        } else if !waiting.is_paused() && !waiting.queue.is_empty() {
            waiting.most = (waiting.most * 2).min(MOST);
            if waiting.most == MOST {
                waiting.pause = PAUSE;
            }
        }
    }

    /// Another transaction was in the way.
    pub(crate) fn conflicted(&self) {
        let mut waiting = self.lock();
        if waiting.most > 1 {
            waiting.pause = (waiting.pause * 2).min(LONGEST_PAUSE);
        }
        waiting.most = 1;
        waiting.paused_until = Some(Instant::now() + waiting.pause);
    }
}

impl Carrier {
    /// Tells all who wait for the commit.
    pub(crate) fn tell(&mut self, outcome: &Outcome) {
        for joined in self.joined.drain(..) {
            let _ = joined.send(outcome.clone());
        }
    }
}
