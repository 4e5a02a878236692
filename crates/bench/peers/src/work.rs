//! What every handler does, whatever calls it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::store::{Settings, Store};

/// A message. What fills it up to its length is not read.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Job {
    pub(crate) id: String,
}

pub(crate) fn decode(body: &[u8]) -> Result<Job, Error> {
    Ok(serde_json::from_slice(body)?)
}

/// What a message's effect is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Effect {
    /// None: the job is decoded and counted.
    Nothing,
    /// A row in SQLite, and nothing that would notice a redelivery.
    Row,
    /// A row and an inbox record, in one transaction.
    RowAndInbox,
}

pub(crate) struct Work {
    store: Option<Store>,
    pub(crate) database: PathBuf,
    pub(crate) slow: Duration,
    wanted: usize,
    handled: AtomicUsize,
    last: Mutex<Instant>,
    done: CancellationToken,
}

impl Work {
    /// Ends when this number of messages has been handled.
    pub(crate) fn new(
        effect: Effect,
        database: PathBuf,
        slow: Duration,
        wanted: usize,
    ) -> Result<Self, Error> {
        let settings = Settings {
            inbox: effect == Effect::RowAndInbox,
            slow,
        };
        let store = match effect {
            Effect::Nothing => None,
            Effect::Row | Effect::RowAndInbox => Some(Store::open(&database, settings)?),
        };
        Ok(Self {
            store,
            database,
            slow,
            wanted,
            handled: AtomicUsize::new(0),
            last: Mutex::new(Instant::now()),
            done: CancellationToken::new(),
        })
    }

    pub(crate) async fn one(&self, job: &Job) -> Result<(), Error> {
        self.many(vec![job.id.clone()]).await
    }

    /// All in one transaction.
    pub(crate) async fn many(&self, ids: Vec<String>) -> Result<(), Error> {
        let count = ids.len();
        if let Some(store) = &self.store {
            store.commit(ids).await?;
        }
        self.handled(count);
        Ok(())
    }

    pub(crate) fn handled(&self, count: usize) {
        self.note_time();
        if self.handled.fetch_add(count, Ordering::Relaxed) + count >= self.wanted {
            self.done.cancel();
        }
    }

    pub(crate) fn note_time(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub(crate) fn count(&self) -> usize {
        self.handled.load(Ordering::Relaxed)
    }

    /// When the last message was handled, or later, where a peer can say when it was settled.
    pub(crate) fn last(&self) -> Instant {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_done(&self) -> bool {
        self.done.is_cancelled()
    }

    pub(crate) fn all_done(&self) -> impl Future<Output = ()> + Send + use<> {
        self.done.clone().cancelled_owned()
    }
}
