use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc::UnboundedSender;

use crate::driver::KeyDigest;

/// The keys this pipeline is busy with. Deliveries of one key queue up here, in the order of their arrival, instead of
/// asking the store again and again about a claim that is our own.
///
/// Nobody overtakes: a delivery waits only for earlier ones, in its lane as for its key, so no two can wait for each other.
pub(crate) struct Keys<M> {
    state: Mutex<State<M>>,
    again: UnboundedSender<M>,
}

struct State<M> {
    tickets: u64,
    keys: HashMap<KeyDigest, Queue<M>>,
}

struct Queue<M> {
    /// The first may claim the key.
    tickets: BTreeSet<u64>,
    /// Those who have nothing left to wait for but the key.
    waiting: Vec<M>,
}

/// A delivery's place in the queue for its key; given up on drop, and the next may go on.
pub(crate) struct KeyPlace<M> {
    keys: Arc<Keys<M>>,
    key: KeyDigest,
    ticket: u64,
}

impl<M> Keys<M> {
    /// `again` takes those who may go on.
    pub(crate) fn new(again: UnboundedSender<M>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                tickets: 0,
                keys: HashMap::new(),
            }),
            again,
        })
    }

    fn state(&self) -> MutexGuard<'_, State<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last place in the queue for `key`.
    pub(crate) fn queue(self: &Arc<Self>, key: KeyDigest) -> KeyPlace<M> {
        let mut state = self.state();
        state.tickets += 1;
        let ticket = state.tickets;
        let queue = state.keys.entry(key).or_insert_with(|| Queue {
            tickets: BTreeSet::new(),
            waiting: Vec::new(),
        });
        queue.tickets.insert(ticket);
        KeyPlace {
            keys: self.clone(),
            key,
            ticket,
        }
    }

    /// Lets what has this ticket wait for its key; gives it back if it is the first by now.
    pub(crate) fn wait(&self, (key, ticket): (KeyDigest, u64), message: M) -> Option<M> {
        let mut state = self.state();
        match state.keys.get_mut(&key) {
            Some(queue) if queue.tickets.first() != Some(&ticket) => {
                queue.waiting.push(message);
                None
            }
            _ => Some(message),
        }
    }

    /// Takes out everything that waits.
    pub(crate) fn drain(&self) -> Vec<M> {
        let mut state = self.state();
        let queues = state.keys.values_mut();
        queues
            .flat_map(|q| std::mem::take(&mut q.waiting))
            .collect()
    }
}

impl<M> KeyPlace<M> {
    pub(crate) fn ticket(&self) -> (KeyDigest, u64) {
        (self.key, self.ticket)
    }

    /// Whether it is this delivery's turn to claim the key.
    pub(crate) fn is_first(&self) -> bool {
        let state = self.keys.state();
        let queue = state.keys.get(&self.key);
        queue.is_some_and(|queue| queue.tickets.first() == Some(&self.ticket))
    }
}

impl<M> Drop for KeyPlace<M> {
    fn drop(&mut self) {
        let mut state = self.keys.state();
        let Some(queue) = state.keys.get_mut(&self.key) else {
            return;
        };
        queue.tickets.remove(&self.ticket);
        let waiting = std::mem::take(&mut queue.waiting);
        if queue.tickets.is_empty() {
            state.keys.remove(&self.key);
        }
        drop(state);
        for in_flight in waiting {
            // Nobody listens once the pipeline has stopped; the lease then ends by itself.
            let _ = self.keys.again.send(in_flight);
        }
    }
}
