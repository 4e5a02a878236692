use std::collections::HashSet;
use std::error::Error as StdError;

use async_trait::async_trait;
use bytes::Bytes;

use super::MemoryStore;
use crate::driver::{Completion, Fenced, Transaction};
use crate::{Error, ErrorKind};

/// A transaction of a [`MemoryStore`]. It is optimistic: nobody waits for it, and its preconditions are verified again, all at
/// once, when it commits.
#[derive(Debug)]
pub struct MemoryTx {
    store: MemoryStore,
    savepoints: Vec<Savepoint>,
    /// Effects of the savepoint that has not ended.
    open: Vec<Bytes>,
}

#[derive(Debug)]
struct Savepoint {
    completions: Vec<Completion>,
    effects: Vec<Bytes>,
}

impl MemoryTx {
    pub(super) fn new(store: MemoryStore) -> Self {
        Self {
            store,
            savepoints: Vec::new(),
            open: Vec::new(),
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
        self.open.push(effect.into());
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
        self.open.clear();
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
                .flat_map(|savepoint| &savepoint.effects),
        )?;
        for savepoint in self.savepoints {
            for completion in &savepoint.completions {
                let completed = records.complete(completion);
                debug_assert_eq!(completed, Ok(()), "verified under the same lock");
            }
            records.effects.extend(savepoint.effects);
        }
        Ok(())
    }
}
