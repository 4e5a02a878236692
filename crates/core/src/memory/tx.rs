use std::collections::HashSet;
use std::error::Error as StdError;

use async_trait::async_trait;
use bytes::Bytes;

use super::MemoryStore;
use super::outbox::Written;
use crate::driver::{Completion, Fenced, OutboxTransaction, OutgoingId, Transaction};
use crate::{Error, ErrorKind, Message};

/// A transaction of a [`MemoryStore`]. It is optimistic: nobody waits for it, and its preconditions are verified again, all at
/// once, when it commits.
#[derive(Debug)]
pub struct MemoryTx {
    store: MemoryStore,
    savepoints: Vec<Savepoint>,
    /// What was done since the last savepoint ended.
    open: Effects,
}

/// What takes effect with the commit.
#[derive(Debug, Default)]
struct Effects {
    pushed: Vec<Bytes>,
    published: Vec<Written>,
}

#[derive(Debug)]
struct Savepoint {
    completions: Vec<Completion>,
    effects: Effects,
}

impl MemoryTx {
    pub(super) fn new(store: MemoryStore) -> Self {
        Self {
            store,
            savepoints: Vec::new(),
            open: Effects::default(),
        }
    }

    /// What is recorded so far.
    fn completions(&self) -> impl Iterator<Item = &Completion> {
        self.savepoints
            .iter()
            .flat_map(|savepoint| &savepoint.completions)
    }

    /// Adds an effect to the current savepoint.
    pub fn push(&mut self, effect: impl Into<Bytes>) {
        self.open.pushed.push(effect.into());
    }

    /// Writes a message to the store's [`outbox`](MemoryStore::outbox), as part of the current savepoint.
    ///
    /// # Errors
    /// None: this is in memory.
    pub async fn publish(
        &mut self,
        destination: &str,
        message: Message,
    ) -> Result<OutgoingId, Error> {
        let written = self.store.lock().outgoing.write(destination, message);
        let id = written.id();
        self.open.published.push(written);
        Ok(id)
    }
}

#[async_trait]
impl Transaction for MemoryTx {
    async fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        let effects = std::mem::take(&mut self.open);
        let mut records = self.store.lock();
        let mut keys: HashSet<_> = self
            .completions()
            .map(|one| one.precondition.key())
            .collect();
        for completion in completions {
            if !keys.insert(completion.precondition.key()) || records.verify(completion).is_err() {
                return Ok(Err(Fenced));
            }
        }
        drop(records);
        self.savepoints.push(Savepoint {
            completions: completions.to_vec(),
            effects,
        });
        Ok(Ok(()))
    }

    async fn rollback(&mut self) -> Result<(), Error> {
        self.open = Effects::default();
        Ok(())
    }

    /// Its conflicts show when it commits.
    fn is_conflict(&self, _: &(dyn StdError + 'static)) -> bool {
        false
    }

    async fn commit(self) -> Result<(), Error> {
        let mut records = self.store.lock();
        if let Some(fenced) = self.completions().find(|one| records.verify(one).is_err()) {
            let key = fenced.precondition.key();
            let what = format!("{key:?} was taken over, or recorded, before the commit");
            return Err(Error::new(ErrorKind::Store, what).retryable(true));
        }
        records.accept(
            self.savepoints
                .iter()
                .flat_map(|savepoint| &savepoint.effects.pushed),
        )?;
        for savepoint in self.savepoints {
            for completion in &savepoint.completions {
                let completed = records.complete(completion);
                debug_assert_eq!(completed, Ok(()), "verified under the same lock");
            }
            let Effects { pushed, published } = savepoint.effects;
            records.effects.extend(pushed);
            for written in published {
                records.outgoing.commit(written);
            }
        }
        drop(records);
        self.store.committed.notify_waiters();
        Ok(())
    }
}

#[async_trait]
impl OutboxTransaction for MemoryTx {
    async fn publish(&mut self, destination: &str, message: Message) -> Result<OutgoingId, Error> {
        Self::publish(self, destination, message).await
    }
}
