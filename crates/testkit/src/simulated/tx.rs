use async_trait::async_trait;
use bytes::Bytes;
use onlyonce_core::Error;
use onlyonce_core::driver::{Completion, Fenced, Precondition, Transaction};
use onlyonce_core::memory::MemoryTx;

use super::faults::Call;
use super::store::Connection;

/// A transaction of a [`Storage`](super::Storage).
#[derive(Debug)]
pub struct Tx {
    inner: MemoryTx,
    connection: Connection,
    completed: Vec<Precondition>,
    /// Whether the current savepoint has written anything.
    open: bool,
}

impl Tx {
    pub(super) fn new(inner: MemoryTx, connection: Connection) -> Self {
        Self {
            inner,
            connection,
            completed: Vec::new(),
            open: false,
        }
    }

    /// Adds an effect to the current savepoint.
    pub fn push(&mut self, effect: impl Into<Bytes>) {
        self.open = true;
        self.inner.push(effect);
    }
}

#[async_trait]
impl Transaction for Tx {
    async fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        let passed = self.connection.pass(Call::CompletePart).await;
        self.open = false;
        if let Err(error) = passed {
            self.inner.rollback().await?;
            return Err(error);
        }
        let verdict = self.inner.complete(completions).await?;
        if verdict.is_ok() {
            let preconditions = completions.iter().map(|one| one.precondition);
            self.completed.extend(preconditions);
        }
        Ok(verdict)
    }

    async fn rollback(&mut self) -> Result<(), Error> {
        self.connection.pass(Call::Rollback).await?;
        self.open = false;
        self.inner.rollback().await
    }

    fn is_conflict(&self, error: &(dyn std::error::Error + 'static)) -> bool {
        self.inner.is_conflict(error)
    }

    /// A commit that is under way arrives even if its worker is gone.
    async fn commit(self) -> Result<(), Error> {
        let (inner, completed) = (self.inner, self.completed);
        let storage = self.connection.storage().clone();
        if self.open {
            storage.breach("a transaction was committed with a savepoint that had not ended");
        }
        self.connection
            .call(Call::Commit, async move {
                inner.commit().await?;
                completed
                    .iter()
                    .for_each(|precondition| storage.recorded("commit", precondition));
                Ok(())
            })
            .await
    }
}
