//! What one source has leased.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use onlyonce_core::driver::{Delivery, Lease, Receipt, SettleResult, Settlement};
use tokio::time::Instant;

use crate::messages::{Received, SqliteReceipt};

/// The leases of one source that are not settled yet, so that closing it can give them back.
#[derive(Debug, Default)]
pub(crate) struct OpenLeases(Mutex<Holding>);

#[derive(Debug, Default)]
struct Holding {
    /// Until when each lasts.
    leases: BTreeMap<SqliteReceipt, Instant>,
    /// Received for a caller who went away: the next one gets them.
    unclaimed: Vec<Delivery>,
}

impl OpenLeases {
    fn lock(&self) -> MutexGuard<'_, Holding> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Some of what was received for a caller who went away, as far as its lease still lasts.
    pub(crate) fn take_unclaimed(&self, most: usize) -> Vec<Delivery> {
        let now = Instant::now();
        let mut holding = self.lock();
        let live = |delivery: &Delivery| delivery.lease.until.is_some_and(|until| until > now);
        holding.unclaimed.retain(live);
        let most = most.min(holding.unclaimed.len());
        holding.unclaimed.drain(..most).collect()
    }

    /// Everything, in the order of publication.
    pub(crate) fn take_all(&self) -> Vec<SqliteReceipt> {
        let mut holding = self.lock();
        holding.unclaimed.clear();
        std::mem::take(&mut holding.leases).into_keys().collect()
    }

    /// Drops what is settled or lost.
    pub(crate) fn forget(&self, batch: &[Settlement], answers: &[SettleResult]) {
        let mut holding = self.lock();
        for (settlement, answer) in batch.iter().zip(answers) {
            if !matches!(answer, SettleResult::Unknown(_))
                && let Some(leased) = leased(&settlement.receipt)
            {
                holding.leases.remove(&leased);
            }
        }
    }

    pub(crate) fn extend(
        &self,
        batch: &[Option<SqliteReceipt>],
        answers: &[SettleResult],
        until: Instant,
    ) {
        let mut holding = self.lock();
        for (leased, answer) in batch.iter().zip(answers) {
            if answer.is_applied()
                && let Some(held) = leased.and_then(|leased| holding.leases.get_mut(&leased))
            {
                *held = until;
            }
        }
    }
}

/// Deliveries on their way to the caller. If they do not arrive, the next caller gets them.
pub(crate) struct Arriving {
    deliveries: Vec<Delivery>,
    held: Arc<OpenLeases>,
}

impl Arriving {
    pub(crate) fn new(received: Vec<Received>, until: Instant, held: Arc<OpenLeases>) -> Self {
        let mut holding = held.lock();
        // Whoever lets leases run out does not settle them either; they need not be given back.
        let now = Instant::now();
        holding.leases.retain(|_, until| *until > now);
        holding
            .leases
            .extend(received.iter().map(|received| (received.leased, until)));
        drop(holding);
        Self {
            deliveries: received
                .into_iter()
                .map(|received| delivery(received, until))
                .collect(),
            held,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.deliveries.is_empty()
    }

    pub(crate) fn arrive(mut self) -> Vec<Delivery> {
        std::mem::take(&mut self.deliveries)
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if !self.deliveries.is_empty() {
            self.held.lock().unclaimed.append(&mut self.deliveries);
        }
    }
}

/// The lease that a receipt stands for, if it is one of ours.
pub(crate) fn leased(receipt: &Receipt) -> Option<SqliteReceipt> {
    receipt.get().copied()
}

fn delivery(received: Received, until: Instant) -> Delivery {
    let receipt = Receipt::new(received.leased);
    let delivery = Delivery::new(received.message, receipt, Lease::until(until))
        .with_attempt(received.attempt);
    match received.malformed {
        Some(reason) => delivery.with_malformed(reason),
        None => delivery,
    }
}
