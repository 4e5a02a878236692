use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// No more messages are remembered; whose dead letter is oldest is forgotten first.
const MOST: usize = 10_000;

/// The messages of which a dead letter is confirmed and whose ack may have been lost, by the broker's own ids. Should one come
/// again, it is acked and not run: it would only leave another dead letter, without end where the ack is lost each time.
///
/// A message that somebody puts back has another id.
#[derive(Default)]
pub(crate) struct SetAside(Mutex<Memory>);

/// Two generations, so that forgetting the oldest needs no list of their ages.
#[derive(Default)]
struct Memory {
    recent: HashSet<String>,
    older: HashSet<String>,
}

impl SetAside {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn remember(&self, id: &str) {
        let mut memory = self.memory();
        if memory.recent.len() >= MOST / 2 {
            memory.older = std::mem::take(&mut memory.recent);
        }
        memory.recent.insert(id.to_owned());
    }

    pub(crate) fn knows(&self, id: &str) -> bool {
        let memory = self.memory();
        memory.recent.contains(id) || memory.older.contains(id)
    }

    /// The broker has confirmed the ack: it does not come again.
    pub(crate) fn forget(&self, id: &str) {
        let mut memory = self.memory();
        memory.recent.remove(id);
        memory.older.remove(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_confirmed_is_forgotten_and_the_rest_is_bounded() {
        let set_aside = SetAside::default();
        set_aside.remember("a");
        set_aside.remember("b");
        set_aside.forget("a");
        assert_eq!((set_aside.knows("a"), set_aside.knows("b")), (false, true));
        for n in 0..MOST {
            set_aside.remember(&n.to_string());
            let memory = set_aside.memory();
            assert!(memory.recent.len() + memory.older.len() <= MOST);
        }
        assert!(!set_aside.knows("b"), "the oldest is forgotten");
        assert!(set_aside.knows(&(MOST - 1).to_string()));
    }
}
