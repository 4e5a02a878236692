use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc::UnboundedSender;

use crate::KeyDigest;

use super::in_flight::Flight;

/// The keys this pipeline is busy with. A second delivery of one of them waits here, instead of asking the store again
/// and again about a claim that is our own, and is claimed again when the first is done.
pub(crate) struct Keys {
    waiting: Mutex<HashMap<KeyDigest, Vec<Flight>>>,
    again: UnboundedSender<Flight>,
}

/// The right to be busy with one key; what waits for it goes on when this is dropped.
pub(crate) struct KeyGuard {
    keys: Arc<Keys>,
    key: KeyDigest,
}

impl Keys {
    /// `again` takes what waited.
    pub(crate) fn new(again: UnboundedSender<Flight>) -> Arc<Self> {
        Arc::new(Self {
            waiting: Mutex::default(),
            again,
        })
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<KeyDigest, Vec<Flight>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters `key` unless somebody is busy with it.
    pub(crate) fn enter(self: &Arc<Self>, key: KeyDigest) -> Option<KeyGuard> {
        let mut waiting = self.waiting();
        if waiting.contains_key(&key) {
            return None;
        }
        waiting.insert(key, Vec::new());
        Some(KeyGuard {
            keys: self.clone(),
            key,
        })
    }

    /// Lets `flight` wait for `key`; gives it back if nobody is busy with the key any more.
    pub(crate) fn wait(&self, key: KeyDigest, flight: Flight) -> Option<Flight> {
        match self.waiting().get_mut(&key) {
            Some(queue) => {
                queue.push(flight);
                None
            }
            None => Some(flight),
        }
    }

    /// Takes out everything that waits.
    pub(crate) fn drain(&self) -> Vec<Flight> {
        self.waiting()
            .values_mut()
            .flat_map(std::mem::take)
            .collect()
    }
}

impl Drop for KeyGuard {
    fn drop(&mut self) {
        let waited = self.keys.waiting().remove(&self.key);
        for flight in waited.into_iter().flatten() {
            // Nobody listens once the pipeline has stopped; the lease then ends by itself.
            let _ = self.keys.again.send(flight);
        }
    }
}
