use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use onlyonce_core::Message;
use onlyonce_core::driver::{Delivery, Receipt};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Pub/Sub's own view of a delivery: what its receipt holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PubSubReceipt {
    /// The ack id. Each delivery of a message has another, and only the newest counts.
    pub ack_id: Arc<str>,
}

/// What is received and not settled, by ack id.
#[derive(Default)]
pub(crate) struct Leases {
    held: HashMap<Arc<str>, Held>,
    /// The newest ack id of each message.
    newest: HashMap<Arc<str>, Arc<str>>,
    /// Of how many deliveries there were before.
    count: u64,
}

/// A delivery whose lease lasts.
#[derive(Clone)]
pub(crate) struct Held {
    pub(crate) ack_id: Arc<str>,
    /// Its place in the order of arrival.
    pub(crate) seq: u64,
    pub(crate) until: Instant,
    /// Somebody has it; before that it waits to be received.
    out: bool,
    message_id: Arc<str>,
    /// To be dead-lettered, should it come to that.
    pub(crate) message: Arc<Message>,
    lost: CancellationToken,
}

impl Held {
    pub(crate) fn group(&self) -> Option<&str> {
        self.message.group.as_deref()
    }

    /// Tells whoever has it.
    pub(crate) fn lose(&self) {
        self.lost.cancel();
    }
}

impl Leases {
    /// Of what a pull has brought. What an older delivery of the same message held is lost. Forgets those that have ended.
    pub(crate) fn begin(&mut self, deliveries: &mut [Delivery]) {
        let now = Instant::now();
        let ended = self.held.extract_if(|_, held| held.until <= now);
        for (_, held) in ended.collect::<Vec<_>>() {
            self.forget_newest(&held);
        }
        for delivery in deliveries {
            let (Some(PubSubReceipt { ack_id }), Some(until)) =
                (delivery.receipt.get(), delivery.lease.until)
            else {
                continue;
            };
            let ack_id = ack_id.clone();
            let id = delivery.message.broker_id.as_deref().unwrap_or(&ack_id);
            let held = Held {
                ack_id: ack_id.clone(),
                seq: self.count,
                until,
                out: false,
                message_id: id.into(),
                message: delivery.message.clone(),
                lost: CancellationToken::new(),
            };
            self.count += 1;
            let lease = std::mem::take(&mut delivery.lease);
            delivery.lease = lease.tied_to(held.lost.clone());
            let older = self.newest.insert(held.message_id.clone(), ack_id.clone());
            if let Some(lost) = older.and_then(|older| self.held.remove(&older)) {
                lost.lose();
            }
            self.held.insert(ack_id, held);
        }
    }

    fn forget_newest(&mut self, held: &Held) {
        if self.newest.get(&held.message_id) == Some(&held.ack_id) {
            self.newest.remove(&held.message_id);
        }
    }

    /// Receives have returned these.
    pub(crate) fn are_out(&mut self, deliveries: &[Delivery]) {
        for delivery in deliveries {
            if let Some(PubSubReceipt { ack_id }) = delivery.receipt.get()
                && let Some(held) = self.held.get_mut(ack_id)
            {
                held.out = true;
            }
        }
    }

    /// Whether a newer delivery of the message has come, or its lease has ended.
    pub(crate) fn is_gone(&self, receipt: &Receipt) -> bool {
        self.lasting(receipt).is_none()
    }

    /// The groups of which somebody has a message.
    pub(crate) fn groups_out(&self) -> HashSet<&str> {
        let now = Instant::now();
        let out = self
            .held
            .values()
            .filter(|held| held.out && held.until > now);
        out.filter_map(Held::group).collect()
    }

    /// The lease, if it lasts.
    pub(crate) fn lasting(&self, receipt: &Receipt) -> Option<&Held> {
        let PubSubReceipt { ack_id } = receipt.get()?;
        self.of_id(ack_id)
    }

    /// The same by its ack id.
    pub(crate) fn of_id(&self, ack_id: &str) -> Option<&Held> {
        let held = self.held.get(ack_id)?;
        (held.until > Instant::now()).then_some(held)
    }

    /// What came of these groups behind the given places, and is not among these ack ids.
    pub(crate) fn followers(&self, heads: &HashMap<&str, u64>, but: &HashSet<&str>) -> Vec<Held> {
        let follows = |held: &&Held| {
            let head = held.group().and_then(|group| heads.get(group));
            head.is_some_and(|head| held.seq > *head) && !but.contains(&*held.ack_id)
        };
        self.held.values().filter(follows).cloned().collect()
    }

    pub(crate) fn extended(&mut self, ack_id: &str, until: Instant) {
        if let Some(held) = self.held.get_mut(ack_id) {
            held.until = until;
        }
    }

    /// It is settled.
    pub(crate) fn end(&mut self, ack_id: &str) {
        if let Some(held) = self.held.remove(ack_id) {
            self.forget_newest(&held);
        }
    }

    /// It is somebody else's now.
    pub(crate) fn lose(&mut self, ack_id: &str) {
        if let Some(held) = self.held.remove(ack_id) {
            self.forget_newest(&held);
            held.lose();
        }
    }

    pub(crate) fn all(&self) -> Vec<Held> {
        self.held.values().cloned().collect()
    }

    pub(crate) fn lose_all(&mut self) {
        for (_, held) in self.held.drain() {
            held.lose();
        }
        self.newest.clear();
    }
}
