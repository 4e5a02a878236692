use std::collections::{HashSet, VecDeque};

use tokio::time::Instant;

use crate::driver::{Delivery, Receipt, ReceiveLimits};

/// What a source's broker has delivered and nobody has received yet, in the order in which it came. Its leases run already.
#[derive(Debug, Default)]
pub struct Ready(VecDeque<Delivery>);

impl Ready {
    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a receive of `limits` may return more than all that wait.
    #[must_use]
    pub fn leave_room(&self, limits: ReceiveLimits) -> bool {
        let bytes = self.0.iter().map(|delivery| delivery.message.size()).sum();
        limits.allows_more(self.0.len(), bytes)
    }

    /// These have come.
    pub fn extend(&mut self, deliveries: impl IntoIterator<Item = Delivery>) {
        self.0.extend(deliveries);
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Takes what `limits` allows, is still leased and not `gone`. What is of one of `groups_out` waits: somebody has an earlier
    /// message of the group, and should that one be given back, its followers must be, too.
    pub fn take(
        &mut self,
        limits: ReceiveLimits,
        groups_out: &HashSet<&str>,
        gone: impl Fn(&Delivery) -> bool,
    ) -> Vec<Delivery> {
        let now = Instant::now();
        let (mut taken, mut left) = (Vec::new(), VecDeque::new());
        let mut bytes = 0;
        for delivery in self.0.drain(..) {
            let more = limits.allows_more(taken.len(), bytes);
            let ended = delivery.lease.until.is_some_and(|until| until <= now);
            if ended || gone(&delivery) {
                continue;
            } else if !more || is_of(&delivery, groups_out) {
                left.push_back(delivery);
            } else {
                bytes += delivery.message.size();
                taken.push(delivery);
            }
        }
        self.0 = left;
        taken
    }

    /// Takes out what has come of these groups.
    pub fn withdraw(&mut self, groups: &HashSet<&str>) -> Vec<Receipt> {
        let ready = std::mem::take(&mut self.0).into_iter();
        let (withdrawn, left): (VecDeque<_>, VecDeque<_>) =
            ready.partition(|delivery| is_of(delivery, groups));
        self.0 = left;
        let receipts = withdrawn.into_iter().map(|delivery| delivery.receipt);
        receipts.collect()
    }
}

fn is_of(delivery: &Delivery, groups: &HashSet<&str>) -> bool {
    let group = delivery.message.group.as_deref();
    group.is_some_and(|group| groups.contains(group))
}
