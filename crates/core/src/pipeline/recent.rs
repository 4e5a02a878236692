use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// No more messages are remembered; whose entry is oldest is forgotten first.
pub(crate) const MOST: usize = 10_000;

/// What a worker remembers of single messages, by id.
pub(crate) struct Recent<V> {
    memory: Mutex<Memory<V>>,
    /// Whether nothing is remembered. Mostly so: then nobody needs to wait for the lock.
    is_empty: AtomicBool,
}

/// Two generations, so that forgetting the oldest needs no list of their ages.
struct Memory<V> {
    recent: HashMap<String, V>,
    /// What was recent until that was full, and has not been written again.
    older: HashMap<String, V>,
}

impl<V> Default for Recent<V> {
    fn default() -> Self {
        Self {
            memory: Mutex::new(Memory {
                recent: HashMap::new(),
                older: HashMap::new(),
            }),
            is_empty: AtomicBool::new(true),
        }
    }
}

impl<V: Copy> Recent<V> {
    pub(crate) fn get(&self, id: &str) -> Option<V> {
        if self.is_empty.load(Relaxed) {
            return None;
        }
        self.with(|memory| {
            memory
                .recent
                .get(id)
                .or_else(|| memory.older.get(id))
                .copied()
        })
    }

    pub(crate) fn insert(&self, id: &str, value: V) {
        self.update(id, |_| Some(value));
    }

    pub(crate) fn remove(&self, id: &str) {
        if !self.is_empty.load(Relaxed) {
            self.update(id, |_| None);
        }
    }

    /// Puts what this makes of the value in its place.
    pub(crate) fn update(&self, id: &str, change: impl FnOnce(Option<V>) -> Option<V>) {
        self.with(|memory| {
            let value = memory.recent.remove(id).or_else(|| memory.older.remove(id));
            if let Some(value) = change(value) {
                if memory.recent.len() >= MOST / 2 {
                    memory.older = std::mem::take(&mut memory.recent);
                }
                memory.recent.insert(id.to_owned(), value);
            }
        });
    }

    fn with<R>(&self, act: impl FnOnce(&mut Memory<V>) -> R) -> R {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = act(&mut memory);
        self.is_empty
            .store(memory.recent.is_empty() && memory.older.is_empty(), Relaxed);
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl<V: Copy> Recent<V> {
        pub(crate) fn len(&self) -> usize {
            self.with(|memory| memory.recent.len() + memory.older.len())
        }
    }

    #[test]
    fn what_is_removed_is_forgotten() {
        let recent = Recent::default();
        assert_eq!(recent.get("a"), None);
        recent.insert("a", 1);
        recent.insert("b", 2);
        recent.remove("a");
        assert_eq!((recent.get("a"), recent.get("b")), (None, Some(2)));
        recent.update("b", |value| value.map(|value| value + 1));
        assert_eq!(recent.get("b"), Some(3));
        recent.remove("b");
        assert_eq!((recent.get("b"), recent.len()), (None, 0));
    }

    #[test]
    fn the_oldest_is_forgotten_first() {
        let recent = Recent::default();
        recent.insert("often", 0);
        for n in 1..=3 * MOST {
            recent.insert(&n.to_string(), n);
            if n % 1_000 == 0 {
                recent.insert("often", n);
            }
            assert!(recent.len() <= MOST);
        }
        assert_eq!(recent.get("1"), None);
        assert_eq!(recent.get(&(3 * MOST).to_string()), Some(3 * MOST));
        assert_eq!(recent.get("often"), Some(3 * MOST), "it was written again");
    }
}
