use std::collections::HashMap;
use std::slice::from_ref;

use onlyonce_core::driver::{
    Delivery, Disposition, ExtendResult, Receipt, SettleResult, Settlement, Source as _,
};
use onlyonce_core::memory::{MemoryQueue, MemoryReceipt};
use onlyonce_core::{Error, ErrorKind};
use tokio::time::{Duration, Instant};

use super::broker::Broker;

/// What is out of each group, in order, and until when by its own lease.
#[derive(Debug, Default)]
pub(super) struct Outstanding(HashMap<String, Vec<(Receipt, Instant)>>);

impl Outstanding {
    /// These have gone out. Nothing else is out of their groups: it would have withheld them.
    pub(super) fn deliver(&mut self, deliveries: &[Delivery]) {
        let groups = || {
            deliveries
                .iter()
                .filter_map(|one| one.message.group.clone())
        };
        for group in groups() {
            self.0.remove(&group);
        }
        for delivery in deliveries {
            if let (Some(group), Some(until)) = (&delivery.message.group, delivery.lease.until) {
                let out = self.0.entry(group.clone()).or_default();
                out.push((delivery.receipt.clone(), until));
            }
        }
    }

    fn extended(&mut self, receipt: &Receipt, until: Instant) {
        let mut all = self.0.values_mut().flatten();
        if let Some((_, end)) = all.find(|(other, _)| other == receipt) {
            *end = until;
        }
    }

    fn acked(&mut self, receipt: &Receipt) {
        for out in self.0.values_mut() {
            out.retain(|(other, _)| other != receipt);
        }
    }

    /// What is out of the group of `receipt`, in order, and until when: a message that comes back brings back all behind it, so
    /// no lease outlasts one before it. Empty where it has no group.
    fn ends(&self, receipt: &Receipt) -> Vec<(Receipt, Instant)> {
        let mut groups = self.0.values();
        let found = groups.find(|out| out.iter().any(|(other, _)| other == receipt));
        let mut out = found.cloned().unwrap_or_default();
        for n in 1..out.len() {
            out[n].1 = out[n].1.min(out[n - 1].1);
        }
        out
    }
}

/// What a server does that [replays](Broker::with_replay).
impl Broker {
    /// Acks are taken in the order of delivery, and what goes back all at once: so the adapter sends them.
    pub(super) async fn settle_replaying(
        &self,
        queue: &MemoryQueue,
        batch: &[Settlement],
    ) -> Vec<SettleResult> {
        let place = |at: &usize| {
            let tag = batch[*at].receipt.get::<MemoryReceipt>();
            let tag = tag.map_or(0, |receipt| receipt.tag);
            match batch[*at].disposition {
                Disposition::Ack => (false, tag),
                // Last first: none takes the lease of one that is given back with it.
                _ => (true, u64::MAX - tag),
            }
        };
        let mut order: Vec<usize> = (0..batch.len()).collect();
        order.sort_by_key(place);
        let mut answers = Vec::with_capacity(batch.len());
        for at in order {
            answers.push((at, self.settle_one(queue, &batch[at]).await));
        }
        answers.sort_by_key(|(at, _)| *at);
        answers.into_iter().map(|(_, answer)| answer).collect()
    }

    pub(super) async fn extend_replaying(
        &self,
        queue: &MemoryQueue,
        receipts: &[Receipt],
        lease: Duration,
    ) -> Vec<SettleResult> {
        let mut answers = Vec::with_capacity(receipts.len());
        for receipt in receipts {
            let answer = self.set_lease(queue, receipt, lease).await;
            if answer.is_applied() {
                self.lease(receipt, Instant::now() + lease);
            }
            answers.push(answer);
        }
        answers
    }

    async fn settle_one(&self, queue: &MemoryQueue, settlement: &Settlement) -> SettleResult {
        let receipt = &settlement.receipt;
        if let Disposition::Nack { delay } = settlement.disposition {
            // It stays out for so long.
            return self.set_lease(queue, receipt, delay).await;
        }
        let out = self.outstanding().ends(receipt);
        let behind = out.iter().skip(1).find(|(other, _)| other == receipt);
        match behind {
            Some((_, end)) if *end > Instant::now() => return transient(),
            Some(_) => return SettleResult::LeaseLost,
            None => {}
        }
        let answer = queue.settle(from_ref(settlement)).await.remove(0);
        if answer.is_applied() {
            self.outstanding().acked(receipt);
            if let Some((next, _)) = out.get(1) {
                self.limit(queue, next).await;
            }
        }
        answer
    }

    /// The lease of `receipt` now ends after this time: at once gives it back.
    async fn set_lease(
        &self,
        queue: &MemoryQueue,
        receipt: &Receipt,
        lease: Duration,
    ) -> SettleResult {
        let answer = queue.extend(from_ref(receipt), lease).await.remove(0);
        if let ExtendResult::Extended(until) = answer {
            self.outstanding().extended(receipt, until);
            self.limit(queue, receipt).await;
        }
        answer.into()
    }

    /// Tells the queue when the leases of this group end.
    async fn limit(&self, queue: &MemoryQueue, receipt: &Receipt) {
        let now = Instant::now();
        let ends = self.outstanding().ends(receipt);
        for (one, end) in ends {
            queue
                .extend(&[one], end.saturating_duration_since(now))
                .await;
        }
    }
}

fn transient() -> SettleResult {
    let error = Error::new(ErrorKind::Timeout, "simulated: not now");
    SettleResult::Unknown(error)
}
