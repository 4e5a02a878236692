use async_trait::async_trait;
use bytes::Bytes;
use onlyonce_core::driver::{
    Completion, Fenced, OutboxTransaction, OutgoingId, Precondition, Transaction,
};
use onlyonce_core::memory::MemoryTx;
use onlyonce_core::{Error, Message};

use super::faults::Call;
use super::outgoing::Written;
use super::store::Connection;

/// A transaction of a [`Storage`](super::Storage).
#[derive(Debug)]
pub struct Tx {
    inner: MemoryTx,
    connection: Connection,
    completed: Vec<Precondition>,
    /// Whether the current savepoint has written anything.
    open: bool,
    /// Messages of the current savepoint.
    written: Vec<Written>,
    /// Messages of those that have ended.
    kept: Vec<Written>,
}

impl Tx {
    pub(super) fn new(inner: MemoryTx, connection: Connection) -> Self {
        Self {
            inner,
            connection,
            completed: Vec::new(),
            open: false,
            written: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// Adds an effect to the current savepoint.
    pub fn push(&mut self, effect: impl Into<Bytes>) {
        self.open = true;
        self.inner.push(effect);
    }

    /// Writes a message to the storage's outbox, as part of the current savepoint.
    ///
    /// # Errors
    /// The request was lost: nothing was written.
    pub async fn publish(
        &mut self,
        destination: &str,
        message: Message,
    ) -> Result<OutgoingId, Error> {
        self.connection.pass(Call::PublishPart).await?;
        self.open = true;
        let id = self.inner.publish(destination, message.clone()).await?;
        let mut outgoing = self.connection.storage().outgoing();
        self.written.push(outgoing.write(id, destination, &message));
        Ok(id)
    }
}

#[async_trait]
impl Transaction for Tx {
    async fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        let passed = self.connection.pass(Call::CompletePart).await;
        self.open = false;
        let written = std::mem::take(&mut self.written);
        if let Err(error) = passed {
            self.inner.rollback().await?;
            return Err(error);
        }
        let verdict = self.inner.complete(completions).await?;
        if verdict.is_ok() {
            let preconditions = completions.iter().map(|one| one.precondition);
            self.completed.extend(preconditions);
            self.kept.extend(written);
        }
        Ok(verdict)
    }

    async fn rollback(&mut self) -> Result<(), Error> {
        self.connection.pass(Call::Rollback).await?;
        self.open = false;
        self.written.clear();
        self.inner.rollback().await
    }

    fn is_conflict(&self, error: &(dyn std::error::Error + 'static)) -> bool {
        self.inner.is_conflict(error)
    }

    /// A commit that is under way arrives even if its worker is gone.
    async fn commit(self) -> Result<(), Error> {
        let (inner, completed, kept) = (self.inner, self.completed, self.kept);
        let storage = self.connection.storage().clone();
        if self.open {
            storage.breach("a transaction was committed with a savepoint that had not ended");
        }
        self.connection
            .call(Call::Commit, async move {
                inner.commit().await?;
                storage.outgoing().commit(kept);
                completed
                    .iter()
                    .for_each(|precondition| storage.recorded("commit", precondition));
                Ok(())
            })
            .await
    }
}

#[async_trait]
impl OutboxTransaction for Tx {
    async fn publish(&mut self, destination: &str, message: Message) -> Result<OutgoingId, Error> {
        Self::publish(self, destination, message).await
    }
}
