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
    completion: Completion,
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

    /// Adds an effect to the current savepoint.
    pub fn push(&mut self, effect: impl Into<Bytes>) {
        self.open.push(effect.into());
    }
}

#[async_trait]
impl Transaction for MemoryTx {
    async fn complete(&mut self, completion: &Completion) -> Result<Result<(), Fenced>, Error> {
        let effects = std::mem::take(&mut self.open);
        let key = completion.precondition.key();
        let mut same = self.savepoints.iter().map(|p| p.completion.precondition);
        if same.any(|other| other.key() == key) || self.store.lock().verify(completion).is_err() {
            return Ok(Err(Fenced));
        }
        self.savepoints.push(Savepoint {
            completion: completion.clone(),
            effects,
        });
        Ok(Ok(()))
    }

    async fn rollback(&mut self) -> Result<(), Error> {
        self.open.clear();
        Ok(())
    }

    async fn commit(self) -> Result<(), Error> {
        let mut records = self.store.lock();
        if let Some(savepoint) =
            (self.savepoints.iter()).find(|p| records.verify(&p.completion).is_err())
        {
            let key = savepoint.completion.precondition.key();
            let what = format!("{key:?} was taken over, or recorded, before the commit");
            return Err(Error::new(ErrorKind::Store, what).retryable(true));
        }
        records.accept(
            self.savepoints
                .iter()
                .flat_map(|savepoint| &savepoint.effects),
        )?;
        for savepoint in self.savepoints {
            let completed = records.complete(&savepoint.completion);
            debug_assert_eq!(completed, Ok(()), "verified under the same lock");
            records.effects.extend(savepoint.effects);
        }
        Ok(())
    }
}
