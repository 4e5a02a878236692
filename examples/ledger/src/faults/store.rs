use std::error::Error as StdError;
use std::time::Duration;

use async_trait::async_trait;
use onlyonce::Error;
use onlyonce::driver::{
    Claim, ClaimResult, Completion, Fenced, HeldClaim, LookUp, Owner, Store, StoreInfo,
    Transaction, TransactionalStore, Verdicts,
};

use super::dice::{Dice, Fate, no_answer};

/// How often a call to the store is not made, and how often its answer is lost, in a thousand.
const CALLS: u32 = 10;

/// A store that is at times not reached, and at times does what it is told but cannot say so.
pub struct FaultyStore<S> {
    inner: S,
    dice: Dice,
}

impl<S> FaultyStore<S> {
    pub fn new(inner: S, dice: Dice) -> Self {
        Self { inner, dice }
    }
}

/// Makes the call, or not, and hands back its answer, or not.
async fn call<T>(dice: &Dice, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match dice.fate(CALLS) {
        Fate::Works => call.await,
        fate @ Fate::NotMade => Err(no_answer(fate)),
        fate @ Fate::AnswerLost => {
            call.await?;
            Err(no_answer(fate))
        }
    }
}

#[async_trait]
impl<S: Store> Store for FaultyStore<S> {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        self.inner.store_info().await
    }
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        call(&self.dice, self.inner.claim(owner, batch, lease)).await
    }

    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        call(&self.dice, self.inner.renew(batch, lease)).await
    }

    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        call(&self.dice, self.inner.start(batch)).await
    }

    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        call(&self.dice, self.inner.complete(batch)).await
    }

    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        call(&self.dice, self.inner.release(batch)).await
    }

    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        self.inner.prune(limit).await
    }
}

#[async_trait]
impl<S: TransactionalStore> TransactionalStore for FaultyStore<S> {
    type Tx = FaultyTx<S::Tx>;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        call(&self.dice, self.inner.look_up(batch)).await
    }

    async fn begin(&self) -> Result<Self::Tx, Error> {
        let inner = call(&self.dice, self.inner.begin()).await?;
        let dice = self.dice.clone();
        Ok(FaultyTx { inner, dice })
    }

    async fn begin_alone(&self) -> Result<Self::Tx, Error> {
        let inner = call(&self.dice, self.inner.begin_alone()).await?;
        let dice = self.dice.clone();
        Ok(FaultyTx { inner, dice })
    }
}

/// A transaction some of whose commits fail, before or after they were made.
pub struct FaultyTx<Tx> {
    inner: Tx,
    dice: Dice,
}

impl<Tx> FaultyTx<Tx> {
    /// The transaction itself.
    pub fn inner(&mut self) -> &mut Tx {
        &mut self.inner
    }
}

#[async_trait]
impl<Tx: Transaction> Transaction for FaultyTx<Tx> {
    async fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        self.inner.complete(completions).await
    }

    async fn rollback(&mut self) -> Result<(), Error> {
        self.inner.rollback().await
    }

    fn is_conflict(&self, error: &(dyn StdError + 'static)) -> bool {
        self.inner.is_conflict(error)
    }

    async fn commit(self) -> Result<(), Error> {
        call(&self.dice, self.inner.commit()).await
    }

    // Handed on too: it is here that PostgreSQL's transactions share a commit.
    async fn complete_and_commit(self, last: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        call(&self.dice, self.inner.complete_and_commit(last)).await
    }
}
