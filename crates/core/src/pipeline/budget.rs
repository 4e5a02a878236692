use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// How many messages and bytes the pipeline may hold. Every delivery carries a [`Permit`] until it is settled, so the
/// channels between the stages are bounded by this too.
pub(crate) struct Budget {
    limit: Amount,
    used: Mutex<Amount>,
    stalled: AtomicUsize,
    changed: Notify,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    pub(crate) messages: usize,
    pub(crate) bytes: usize,
}

/// A delivery's share of the budget; freed on drop.
pub(crate) struct Permit {
    budget: Arc<Budget>,
    bytes: usize,
    stalled: bool,
}

impl Budget {
    pub(crate) fn new(messages: usize, bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            limit: Amount { messages, bytes },
            used: Mutex::default(),
            stalled: AtomicUsize::new(0),
            changed: Notify::new(),
        })
    }

    fn used(&self) -> MutexGuard<'_, Amount> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn held(&self) -> usize {
        self.used().messages
    }

    /// How many of the messages that are held keep a worker busy, or will as soon as one is free.
    pub(crate) fn active(&self) -> usize {
        let stalled = self.stalled.load(Ordering::Relaxed);
        self.held().saturating_sub(stalled)
    }

    /// Takes a share, even beyond the limit: a single message may be larger than all of it.
    pub(crate) fn take(self: &Arc<Self>, bytes: usize) -> Permit {
        let mut used = self.used();
        used.messages += 1;
        used.bytes += bytes;
        drop(used);
        Permit {
            budget: self.clone(),
            bytes,
            stalled: false,
        }
    }

    pub(crate) fn room(&self) -> Amount {
        let used = self.used();
        Amount {
            messages: self.limit.messages.saturating_sub(used.messages),
            bytes: self.limit.bytes.saturating_sub(used.bytes),
        }
    }

    /// Waits until `test` holds of the budget.
    pub(crate) async fn until(&self, test: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            if test(self) {
                return;
            }
            changed.await;
        }
    }
}

impl Permit {
    /// What has this share waits for something else than a worker.
    pub(crate) fn stall(&mut self) {
        if !std::mem::replace(&mut self.stalled, true) {
            self.budget.stalled.fetch_add(1, Ordering::Relaxed);
            self.budget.changed.notify_waiters();
        }
    }

    /// It goes on.
    pub(crate) fn resume(&mut self) {
        if std::mem::take(&mut self.stalled) {
            self.budget.stalled.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.resume();
        let mut used = self.budget.used();
        used.messages -= 1;
        used.bytes -= self.bytes;
        drop(used);
        self.budget.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_come_back_on_drop_and_one_may_exceed_the_limit() {
        let budget = Budget::new(2, 100);
        let large = budget.take(1_000);
        assert_eq!(
            budget.room(),
            Amount {
                messages: 1,
                bytes: 0
            }
        );
        drop(large);
        assert_eq!(
            budget.room(),
            Amount {
                messages: 2,
                bytes: 100
            }
        );
    }

    #[test]
    fn what_stalls_is_held_but_needs_no_worker() {
        let budget = Budget::new(10, 100);
        let (mut first, mut second) = (budget.take(1), budget.take(1));
        first.stall();
        first.stall();
        second.stall();
        assert_eq!((budget.held(), budget.active()), (2, 0));
        first.resume();
        assert_eq!((budget.held(), budget.active()), (2, 1));
        drop(second);
        assert_eq!((budget.held(), budget.active()), (1, 1));
    }
}
