use std::time::Duration;

use async_trait::async_trait;
use onlyonce::Error;
use onlyonce::driver::{
    Delivery, ExtendResult, QueueInfo, Receipt, ReceiveLimits, SettleResult, Settlement, Source,
};

use super::dice::{Dice, Fate, no_answer};

/// A source that loses settlements, extensions and now and then its connection.
pub struct FaultySource<S> {
    inner: S,
    dice: Dice,
}

impl<S> FaultySource<S> {
    pub fn new(inner: S, dice: Dice) -> Self {
        Self { inner, dice }
    }

    /// What the pipeline is told instead of the broker's answer.
    fn instead(&self, fate: Fate, answer: SettleResult) -> SettleResult {
        match fate {
            Fate::Works => answer,
            // Sent again, until it works or the pipeline gives up.
            Fate::AnswerLost => SettleResult::Unknown(no_answer(fate)),
            Fate::NotMade if self.dice.hits(500) => SettleResult::LeaseLost,
            // Not sent again: the message is delivered again.
            Fate::NotMade => SettleResult::Unknown(no_answer(fate).retryable(false)),
        }
    }
}

#[async_trait]
impl<S: Source> Source for FaultySource<S> {
    fn name(&self) -> &str {
        self.inner.name()
    }

    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        match self.dice.hits(5) {
            true => Err(no_answer(Fate::NotMade)),
            false => self.inner.receive(limits).await,
        }
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let fates: Vec<Fate> = batch.iter().map(|_| self.dice.fate(20)).collect();
        let made: Vec<Settlement> = batch
            .iter()
            .zip(&fates)
            .filter(|(_, fate)| **fate != Fate::NotMade)
            .map(|(settlement, _)| settlement.clone())
            .collect();
        let mut answers = self.inner.settle(&made).await.into_iter();
        let mut answer = |fate| match fate {
            Fate::NotMade => SettleResult::LeaseLost,
            _ => answers.next().unwrap_or(SettleResult::LeaseLost),
        };
        fates
            .into_iter()
            .map(|fate| self.instead(fate, answer(fate)))
            .collect()
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        if self.dice.hits(50) {
            let lost = |_| ExtendResult::Unknown(no_answer(Fate::NotMade));
            return batch.iter().map(lost).collect();
        }
        self.inner.extend(batch, lease).await
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        self.inner.queue_info().await
    }

    async fn close(&self) -> Result<(), Error> {
        self.inner.close().await
    }
}
