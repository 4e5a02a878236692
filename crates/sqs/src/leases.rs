use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::Message;
use onlyonce_core::driver::{Delivery, Receipt};
use tokio::time::Instant;

/// SQS ends a lease 12 hours after the receive, however often it is extended:
/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-visibility-timeout.html>
pub(crate) const LONGEST: Duration = Duration::from_secs(12 * 3_600);

/// SQS's own view of a delivery: what its receipt holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SqsReceipt {
    /// The receipt handle.
    pub handle: Arc<str>,
}

/// What is received and not settled, by receipt handle. SQS lets a handle be used after its lease has ended, as long as
/// nobody else got the message, and some say that it worked even then: so the deadlines are kept here.
#[derive(Default)]
pub(crate) struct Leases {
    held: HashMap<Arc<str>, Visibility>,
    /// Of how many deliveries there were before.
    count: u64,
}

#[derive(Clone)]
pub(crate) struct Visibility {
    /// Its place in the order of arrival.
    pub(crate) seq: u64,
    pub(crate) received: Instant,
    pub(crate) until: Instant,
    /// Somebody has it; before that it waits to be received.
    out: bool,
    /// To be dead-lettered, should it come to that.
    pub(crate) message: Arc<Message>,
}

impl Visibility {
    /// For how many whole seconds it can be held from now on.
    pub(crate) fn rest(&self) -> u64 {
        let end = self.received + LONGEST;
        end.saturating_duration_since(Instant::now()).as_secs()
    }
}

impl Leases {
    /// Of what was received by a request sent at `received`. Forgets those that have ended.
    pub(crate) fn begin(&mut self, deliveries: &[Delivery], received: Instant) {
        let now = Instant::now();
        self.held.retain(|_, lease| lease.until > now);
        for delivery in deliveries {
            let (Some(SqsReceipt { handle }), Some(until)) =
                (delivery.receipt.get(), delivery.lease.until)
            else {
                continue;
            };
            let lease = Visibility {
                seq: self.count,
                received,
                until,
                out: false,
                message: delivery.message.clone(),
            };
            self.count += 1;
            self.held.insert(handle.clone(), lease);
        }
    }

    /// Receives have returned these.
    pub(crate) fn are_out(&mut self, deliveries: &[Delivery]) {
        for delivery in deliveries {
            if let Some(SqsReceipt { handle }) = delivery.receipt.get()
                && let Some(lease) = self.held.get_mut(handle)
            {
                lease.out = true;
            }
        }
    }

    /// The groups of which somebody has a message.
    pub(crate) fn groups_out(&self) -> HashSet<&str> {
        let now = Instant::now();
        let out = self
            .held
            .values()
            .filter(|lease| lease.out && lease.until > now);
        out.filter_map(|lease| lease.message.group.as_deref())
            .collect()
    }

    /// The lease, if it lasts.
    pub(crate) fn lasting(&self, receipt: &Receipt) -> Option<(Arc<str>, Visibility)> {
        let SqsReceipt { handle } = receipt.get()?;
        let lease = self.held.get(handle)?;
        (lease.until > Instant::now()).then(|| (handle.clone(), lease.clone()))
    }

    pub(crate) fn extended(&mut self, handle: &Arc<str>, until: Instant) {
        if let Some(lease) = self.held.get_mut(handle) {
            lease.until = until;
        }
    }

    pub(crate) fn end(&mut self, handle: &Arc<str>) {
        self.held.remove(handle);
    }

    pub(crate) fn handles(&self) -> Vec<Arc<str>> {
        self.held.keys().cloned().collect()
    }

    pub(crate) fn end_all(&mut self) {
        self.held.clear();
    }
}
