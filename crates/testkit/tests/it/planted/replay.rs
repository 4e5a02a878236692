//! Bugs of adapters for a broker that brings a group back from one message on and answers for each ack id, planted on the
//! simulated one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::Error;
use onlyonce_core::driver::{
    Delivery, Disposition, ExtendResult, QueueInfo, Receipt, ReceiveLimits, SettleResult,
    Settlement, Sink, Source,
};
use onlyonce_testkit::simulated::Consumer;
use onlyonce_testkit::source::SourceHarness;
use onlyonce_testkit::source_suite;

use super::{Gaps, noticed_by, plant};
use crate::simulated::Simulated;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bug {
    /// A message is acked by the id of its first delivery.
    AcksTheFirstId,
    /// The acks of one call are sent one by one, last first.
    AcksLastFirst,
    /// A head is given back in a request of its own, without what follows it.
    GivesBackOneByOne,
    /// That an id is refused for good counts as done.
    TakesRefusalForDone,
}

struct Buggy {
    consumer: Consumer,
    bug: Bug,
    /// Of each message, by the broker's id.
    first: Mutex<HashMap<String, Receipt>>,
    /// The first receipt of the same message.
    first_of: Mutex<HashMap<Receipt, Receipt>>,
}

impl Buggy {
    fn remember(&self, delivery: &Delivery) {
        let id = delivery.message.broker_id.clone().expect("it gives ids");
        let mut first = self.first.lock().expect("no panic");
        let first = first.entry(id).or_insert(delivery.receipt.clone()).clone();
        let mut first_of = self.first_of.lock().expect("no panic");
        first_of.insert(delivery.receipt.clone(), first);
    }

    fn by_first_id(&self, settlement: &Settlement) -> Settlement {
        let mut changed = settlement.clone();
        let first_of = self.first_of.lock().expect("no panic");
        if let (Disposition::Ack, Some(first)) =
            (&changed.disposition, first_of.get(&changed.receipt))
        {
            changed.receipt = first.clone();
        }
        changed
    }

    async fn one(&self, settlement: &Settlement) -> SettleResult {
        let one = std::slice::from_ref(settlement);
        self.consumer.settle(one).await.remove(0)
    }
}

#[async_trait]
impl Source for Buggy {
    fn name(&self) -> &str {
        self.consumer.name()
    }

    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        let got = self.consumer.receive(limits).await?;
        got.iter().for_each(|delivery| self.remember(delivery));
        Ok(got)
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let mut answers = Vec::new();
        match self.bug {
            Bug::AcksTheFirstId => {
                let changed = batch.iter().map(|one| self.by_first_id(one));
                let changed: Vec<_> = changed.collect();
                return self.consumer.settle(&changed).await;
            }
            Bug::AcksLastFirst => {
                for settlement in batch.iter().rev() {
                    answers.push(self.one(settlement).await);
                }
                answers.reverse();
            }
            Bug::GivesBackOneByOne => {
                for settlement in batch {
                    answers.push(self.one(settlement).await);
                }
            }
            Bug::TakesRefusalForDone => {
                let answered = self.consumer.settle(batch).await.into_iter();
                answers.extend(answered.map(|answer| match answer {
                    SettleResult::LeaseLost => SettleResult::Applied,
                    other => other,
                }));
            }
        }
        answers
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        self.consumer.extend(batch, lease).await
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        self.consumer.queue_info().await
    }

    async fn close(&self) -> Result<(), Error> {
        self.consumer.close().await
    }
}

struct Planted {
    simulated: Simulated,
    bug: Bug,
    noticed_by: Gaps,
}

impl Planted {
    fn new(bug: Bug, noticed_by: Gaps) -> Self {
        Self {
            simulated: Simulated::with_replay(),
            bug,
            noticed_by,
        }
    }
}

#[async_trait]
impl SourceHarness for Planted {
    async fn source(&self) -> Arc<dyn Source> {
        Arc::new(Buggy {
            consumer: self.simulated.0.connect(1),
            bug: self.bug,
            first: Mutex::default(),
            first_of: Mutex::default(),
        })
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        self.simulated.sink().await
    }

    async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>) {
        self.simulated.namesake().await
    }

    fn made_up(&self, receipt: &Receipt) -> Vec<Receipt> {
        self.simulated.made_up(receipt)
    }

    fn lease(&self) -> Duration {
        self.simulated.lease()
    }

    fn gaps(&self) -> Gaps {
        self.noticed_by
    }
}

// The simulated broker's identity is its name, without any bug.
plant! {
    source_suite;
    acks_the_first_id: AcksTheFirstId [
        blocked_group_stalls_no_other
        delayed_nack_waits
        failed_head_comes_back_first
        late_settlement_disturbs_nobody
        namesake_is_another_queue
        nack_redelivers
    ]
    acks_last_first: AcksLastFirst [
        blocked_group_stalls_no_other
        close_gives_back
        failed_head_comes_back_first
        group_waits_while_its_head_is_leased
        groups_are_delivered_in_order
        namesake_is_another_queue
        random_histories_lose_nothing
    ]
    gives_back_one_by_one: GivesBackOneByOne [
        failed_head_comes_back_first
        namesake_is_another_queue
    ]
    takes_refusal_for_done: TakesRefusalForDone [
        bad_receipt_affects_only_itself
        close_gives_back
        late_settlement_disturbs_nobody
        namesake_is_another_queue
        random_histories_lose_nothing
    ]
}
