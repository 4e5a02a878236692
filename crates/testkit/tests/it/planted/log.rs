//! Bugs of sources whose acks are cumulative, planted into the log in memory.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::Error;
use onlyonce_core::driver::{
    Acks, Delivery, Disposition, ExtendResult, QueueInfo, Receipt, ReceiveLimits, SettleResult,
    Settlement, Sink, Source,
};
use onlyonce_testkit::simulated::{Log, LogConsumer, LogReceipt};
use onlyonce_testkit::source::SourceHarness;
use onlyonce_testkit::source_suite;

use super::{Gaps, noticed_by, plant};
use crate::log::{made_up, namesake};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bug {
    /// The last offset that was acked is committed, whatever is still out below it.
    CommitsTheLast,
    /// Nothing is ever committed.
    CommitsNothing,
    /// It claims that each ack is confirmed by itself.
    ClaimsToConfirm,
    /// What is given back waits until the partition moves.
    RewindsNothing,
    /// A receipt of an older delivery settles the newer one.
    IgnoresGenerations,
}

struct Buggy {
    log: LogConsumer,
    bug: Bug,
    given: Mutex<Vec<Receipt>>,
}

impl Buggy {
    async fn one(&self, receipt: &Receipt, disposition: &Disposition) -> SettleResult {
        let settlement = Settlement::new(receipt.clone(), disposition.clone());
        self.log.settle(&[settlement]).await.remove(0)
    }

    /// What was given for the same partition and passes `which`, the latest first.
    fn given(&self, receipt: &Receipt, which: fn(u64, u64) -> bool) -> Vec<Receipt> {
        let Some(own) = receipt.get::<LogReceipt>() else {
            return Vec::new();
        };
        let given = self.given.lock().expect("no panic");
        let same = |other: &&Receipt| {
            let other = other.get::<LogReceipt>().expect("it is of a log");
            other.partition == own.partition && which(other.offset, own.offset)
        };
        given.iter().rev().filter(same).cloned().collect()
    }

    async fn settle_one(&self, settlement: &Settlement) -> SettleResult {
        let Settlement {
            receipt,
            disposition,
            ..
        } = settlement;
        match (self.bug, disposition) {
            (Bug::CommitsTheLast, Disposition::Ack) => {
                let answer = self.one(receipt, disposition).await;
                if answer.is_applied() {
                    for lower in self.given(receipt, |other, own| other < own) {
                        self.one(&lower, disposition).await;
                    }
                }
                answer
            }
            (Bug::CommitsNothing, Disposition::Ack) => SettleResult::Applied,
            (Bug::RewindsNothing, Disposition::Nack { delay }) if delay.is_zero() => {
                SettleResult::Applied
            }
            (Bug::IgnoresGenerations, _) => {
                let newest = self.given(receipt, |other, own| other == own);
                let newest = newest.first().unwrap_or(receipt);
                self.one(newest, disposition).await
            }
            _ => self.one(receipt, disposition).await,
        }
    }
}

#[async_trait]
impl Source for Buggy {
    fn name(&self) -> &str {
        self.log.name()
    }

    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        let got = self.log.receive(limits).await?;
        let receipts = got.iter().map(|one| one.receipt.clone());
        self.given.lock().expect("no panic").extend(receipts);
        Ok(got)
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let mut answers = Vec::new();
        for settlement in batch {
            answers.push(self.settle_one(settlement).await);
        }
        answers
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        self.log.extend(batch, lease).await
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let mut info = self.log.queue_info().await?;
        if self.bug == Bug::ClaimsToConfirm {
            info.capabilities.acks = Acks::Confirmed;
        }
        Ok(info)
    }

    async fn close(&self) -> Result<(), Error> {
        self.log.close().await
    }
}

struct Planted {
    log: Log,
    bug: Bug,
    noticed_by: Gaps,
}

impl Planted {
    fn new(bug: Bug, noticed_by: Gaps) -> Self {
        let log = Log::new("orders");
        Self {
            log,
            bug,
            noticed_by,
        }
    }
}

#[async_trait]
impl SourceHarness for Planted {
    async fn source(&self) -> Arc<dyn Source> {
        Arc::new(Buggy {
            log: self.log.connect(),
            bug: self.bug,
            given: Mutex::default(),
        })
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        Arc::new(self.log.producer())
    }

    async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>) {
        namesake()
    }

    fn made_up(&self, receipt: &Receipt) -> Vec<Receipt> {
        made_up(receipt)
    }

    fn lease(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn gaps(&self) -> Gaps {
        self.noticed_by
    }
}

plant! {
    source_suite;
    commits_the_last: CommitsTheLast [
        acks_settle_nothing_but_themselves
        random_histories_lose_nothing
    ]
    commits_nothing: CommitsNothing [
        ack_removes
        bad_receipt_affects_only_itself
        close_gives_back
        random_histories_lose_nothing
    ]
    claims_to_confirm: ClaimsToConfirm [
        acks_settle_nothing_but_themselves
        random_histories_lose_nothing
    ]
    rewinds_nothing: RewindsNothing [
        failed_head_comes_back_first
        nack_redelivers
    ]
    ignores_generations: IgnoresGenerations [
        bad_receipt_affects_only_itself
        random_histories_lose_nothing
    ]
}
