//! Notes of what a worker was promised, and the source, store and transaction that write them when an answer is there.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::Error;
use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, Delivery, Disposition, ExtendResult, Fenced, HeldClaim, LookUp,
    Owner, QueueInfo, Receipt, ReceiveLimits, SettleResult, Settlement, Source, Store, StoreInfo,
    Transaction, TransactionalStore, Verdicts,
};

use onlyonce_sqlite::SqliteReceipt;

use super::trace::{NOTES, Note};

#[derive(Clone, Debug)]
pub struct Notebook(Arc<Mutex<fs::File>>);

impl Notebook {
    pub fn open(folder: &Path) -> std::io::Result<Self> {
        let mut options = fs::OpenOptions::new();
        let file = options.append(true).create(true).open(folder.join(NOTES))?;
        Ok(Self(Arc::new(Mutex::new(file))))
    }

    /// A note that is missing would be a promise that nobody asks for, so the worker ends if it cannot write one.
    pub fn note(&self, note: &Note) {
        // A struct of numbers is always JSON.
        let line = serde_json::to_vec(note).unwrap_or_default();
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = file.write_all(&line) {
            eprintln!("a note could not be written: {error}");
            std::process::exit(1);
        }
    }
}

pub struct Watched<T> {
    pub inner: T,
    notebook: Notebook,
    /// Of a transaction: what it has completed.
    completed: Vec<[u8; 16]>,
}

fn keys(completions: &[Completion]) -> impl Iterator<Item = [u8; 16]> {
    completions.iter().map(|one| one.precondition.key().0)
}

impl<T> Watched<T> {
    pub fn new(inner: T, notebook: &Notebook) -> Self {
        Self {
            inner,
            notebook: notebook.clone(),
            completed: Vec::new(),
        }
    }
}

/// The queue's own id of the message that this delivers.
fn id(receipt: &Receipt) -> Option<i64> {
    receipt.get().map(|&SqliteReceipt { id, .. }| id)
}

#[async_trait]
impl<S: Source> Source for Watched<S> {
    fn name(&self) -> &str {
        self.inner.name()
    }
    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        self.inner.receive(limits).await
    }
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let answers = self.inner.settle(batch).await;
        let acked = |(settlement, answer): (&Settlement, &SettleResult)| {
            let acked = settlement.disposition == Disposition::Ack && answer.is_applied();
            acked.then(|| id(&settlement.receipt)).flatten()
        };
        let acked = batch.iter().zip(&answers).filter_map(acked);
        self.notebook.note(&Note::Acked(acked.collect()));
        answers
    }
    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        self.inner.extend(batch, lease).await
    }
    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        self.inner.queue_info().await
    }
    async fn close(&self) -> Result<(), Error> {
        self.inner.close().await
    }
}

#[async_trait]
impl<S: Store> Store for Watched<S> {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        self.inner.store_info().await
    }
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        let claimed = self.inner.claim(owner, batch, lease).await?;
        let token = |claimed: &ClaimResult| match claimed {
            ClaimResult::Acquired { token, .. } => Some(token.0),
            _ => None,
        };
        if let Some(highest) = claimed.iter().filter_map(token).max() {
            self.notebook.note(&Note::Token(highest));
        }
        Ok(claimed)
    }
    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        self.inner.renew(batch, lease).await
    }
    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        self.inner.start(batch).await
    }
    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        let verdicts = self.inner.complete(batch).await?;
        let recorded = batch.iter().zip(&verdicts).filter(|(_, v)| v.is_ok());
        let recorded = recorded.map(|(completion, _)| completion.precondition.key().0);
        self.notebook.note(&Note::Recorded(recorded.collect()));
        Ok(verdicts)
    }
    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        self.inner.release(batch).await
    }
    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        self.inner.prune(limit).await
    }
}

#[async_trait]
impl<S: TransactionalStore> TransactionalStore for Watched<S> {
    type Tx = Watched<S::Tx>;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        self.inner.look_up(batch).await
    }
    async fn begin(&self) -> Result<Self::Tx, Error> {
        Ok(Watched::new(self.inner.begin().await?, &self.notebook))
    }
    async fn begin_alone(&self) -> Result<Self::Tx, Error> {
        let tx = self.inner.begin_alone().await?;
        Ok(Watched::new(tx, &self.notebook))
    }
}

#[async_trait]
impl<T: Transaction> Transaction for Watched<T> {
    async fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        let verdict = self.inner.complete(completions).await?;
        if verdict.is_ok() {
            self.completed.extend(keys(completions));
        }
        Ok(verdict)
    }
    async fn rollback(&mut self) -> Result<(), Error> {
        self.inner.rollback().await
    }
    fn is_conflict(&self, error: &(dyn std::error::Error + 'static)) -> bool {
        self.inner.is_conflict(error)
    }
    async fn commit(self) -> Result<(), Error> {
        self.inner.commit().await?;
        self.notebook.note(&Note::Recorded(self.completed));
        Ok(())
    }
    async fn complete_and_commit(
        mut self,
        last: &[Completion],
    ) -> Result<Result<(), Fenced>, Error> {
        let verdict = self.inner.complete_and_commit(last).await?;
        if verdict.is_ok() {
            self.completed.extend(keys(last));
        }
        self.notebook.note(&Note::Recorded(self.completed));
        Ok(verdict)
    }
}
