use async_trait::async_trait;
use bytes::Bytes;

use super::MemoryStore;
use crate::driver::{Completion, Fenced, Transaction};
use crate::{Error, ErrorKind};

/// A transaction of a [`MemoryStore`]. It is optimistic: no claim waits for it, and its tokens are verified again, all at
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
        let key = completion.held.key;
        let again = self.savepoints.iter().any(|p| p.completion.held.key == key);
        if again || self.store.lock().verify(&completion.held).is_err() {
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
        let held = |savepoint: &Savepoint| savepoint.completion.held;
        if let Some(savepoint) =
            (self.savepoints.iter()).find(|p| records.verify(&held(p)).is_err())
        {
            let what = format!("{:?} was taken over before the commit", held(savepoint).key);
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
