use std::time::Duration;

use async_trait::async_trait;
use onlyonce::{
    Answer, Capabilities, Delivery, Error, Inspection, Limit, Receipt, Settlement, Source,
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
    fn instead(&self, fate: Fate, answer: Answer) -> Answer {
        match fate {
            Fate::Works => answer,
            // Sent again, until it works or the pipeline gives up.
            Fate::AnswerLost => Answer::Unknown(no_answer(fate)),
            Fate::NotMade if self.dice.hits(500) => Answer::LeaseLost,
            // Not sent again: the message is delivered again.
            Fate::NotMade => Answer::Unknown(no_answer(fate).retryable(false)),
        }
    }
}

#[async_trait]
impl<S: Source> Source for FaultySource<S> {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn receive(&self, limit: Limit) -> Result<Vec<Delivery>, Error> {
        match self.dice.hits(5) {
            true => Err(no_answer(Fate::NotMade)),
            false => self.inner.receive(limit).await,
        }
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<Answer> {
        let fates: Vec<Fate> = batch.iter().map(|_| self.dice.fate(20)).collect();
        let made: Vec<Settlement> = batch
            .iter()
            .zip(&fates)
            .filter(|(_, fate)| **fate != Fate::NotMade)
            .map(|(settlement, _)| settlement.clone())
            .collect();
        let mut answers = self.inner.settle(&made).await.into_iter();
        let mut answer = |fate| match fate {
            Fate::NotMade => Answer::LeaseLost,
            _ => answers.next().unwrap_or(Answer::LeaseLost),
        };
        fates
            .into_iter()
            .map(|fate| self.instead(fate, answer(fate)))
            .collect()
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<Answer> {
        if self.dice.hits(50) {
            let lost = |_| Answer::Unknown(no_answer(Fate::NotMade));
            return batch.iter().map(lost).collect();
        }
        self.inner.extend(batch, lease).await
    }

    async fn inspect(&self) -> Result<Inspection, Error> {
        self.inner.inspect().await
    }

    async fn close(&self) -> Result<(), Error> {
        self.inner.close().await
    }
}
