use async_trait::async_trait;
use bytes::Bytes;
use onlyonce_core::memory::MemoryTx;
use onlyonce_core::{Completion, Error, Fenced, Transaction};

use super::faults::Call;
use super::store::Connection;

/// A transaction of a [`Storage`](super::Storage).
#[derive(Debug)]
pub struct Tx {
    inner: MemoryTx,
    connection: Connection,
}

impl Tx {
    pub(super) fn new(inner: MemoryTx, connection: Connection) -> Self {
        Self { inner, connection }
    }

    /// Adds an effect to the current part.
    pub fn push(&mut self, effect: impl Into<Bytes>) {
        self.inner.push(effect);
    }
}

#[async_trait]
impl Transaction for Tx {
    async fn complete(&mut self, completion: &Completion) -> Result<Result<(), Fenced>, Error> {
        if let Err(error) = self.connection.pass(Call::CompletePart).await {
            self.inner.undo().await?;
            return Err(error);
        }
        self.inner.complete(completion).await
    }

    async fn undo(&mut self) -> Result<(), Error> {
        self.connection.pass(Call::Undo).await?;
        self.inner.undo().await
    }

    /// A commit that is under way arrives even if its worker is gone.
    async fn commit(self) -> Result<(), Error> {
        let inner = self.inner;
        self.connection
            .call(Call::Commit, async move { inner.commit().await })
            .await
    }
}
