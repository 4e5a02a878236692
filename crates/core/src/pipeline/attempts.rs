use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// No more messages are remembered; whose last record is oldest is forgotten first.
const MOST: usize = 10_000;

/// What makes attempts of a broker's count of deliveries: a delivery with `k` runs counts as `k`, not as one, so that what
/// was given back without having run has lost nothing, and retries in place are not forgotten.
#[derive(Default)]
pub(crate) struct Attempts(Mutex<Memory>);

/// Two generations, so that forgetting the oldest needs no list of their ages.
#[derive(Default)]
struct Memory {
    recent: HashMap<String, Known>,
    /// What was recent until that was full, and has not been recorded again.
    older: HashMap<String, Known>,
}

#[derive(Clone, Copy)]
enum Known {
    /// The delivery of the highest count so far.
    Delivery {
        seq: u64,
        count: u32,
        runs: u32,
        /// What is to be added to its count, for the deliveries before it.
        more: i64,
    },
    /// Two messages have this id: the runs of one must not be taken off the other, which might then never be given up.
    Ambiguous,
}

impl Known {
    /// What is to be added to the count of this delivery. A broker's count grows with each delivery of a message; one that
    /// does not is another message's.
    fn more(self, delivery: u64, delivered: u32) -> Option<i64> {
        match self {
            Self::Delivery { seq, more, .. } if seq == delivery => Some(more),
            Self::Delivery {
                count, runs, more, ..
            } if count < delivered => Some(more.saturating_add(i64::from(runs) - 1)),
            _ => None,
        }
    }
}

impl Attempts {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers that the delivery `seq` of the message `id`, of which the broker has counted `count`, has had so many
    /// runs.
    pub(crate) fn record(&self, id: &str, (seq, count): (u64, u32), runs: u32) {
        let mut memory = self.memory();
        let more = match memory.remove(id) {
            Some(known) => known.more(seq, count),
            None => Some(0),
        };
        let known = more.map_or(Known::Ambiguous, |more| Known::Delivery {
            seq,
            count,
            runs,
            more,
        });
        memory.insert(id, known);
    }

    /// What is to be added to the broker's `count` of the delivery `seq` of the message `id`.
    pub(crate) fn more(&self, id: &str, (seq, count): (u64, u32)) -> i64 {
        // Nothing is known at a first delivery, and most are: they need not wait for the lock.
        if count <= 1 {
            return 0;
        }
        let mut memory = self.memory();
        let Some(known) = memory.get_mut(id) else {
            return 0;
        };
        known.more(seq, count).unwrap_or_else(|| {
            *known = Known::Ambiguous;
            0
        })
    }

    /// The message `id` does not come again. An ambiguous id stays so: it is also another message's.
    pub(crate) fn forget(&self, id: &str) {
        let mut memory = self.memory();
        if let Some(ambiguous @ Known::Ambiguous) = memory.remove(id) {
            memory.insert(id, ambiguous);
        }
    }
}

impl Memory {
    fn get_mut(&mut self, id: &str) -> Option<&mut Known> {
        let older = &mut self.older;
        self.recent.get_mut(id).or_else(|| older.get_mut(id))
    }

    fn remove(&mut self, id: &str) -> Option<Known> {
        self.recent.remove(id).or_else(|| self.older.remove(id))
    }

    fn insert(&mut self, id: &str, known: Known) {
        if self.recent.len() >= MOST / 2 {
            self.older = std::mem::take(&mut self.recent);
        }
        self.recent.insert(id.to_owned(), known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delivery_counts_as_its_runs() {
        let attempts = Attempts::default();
        assert_eq!(attempts.more("a", (1, 2)), 0, "nothing is known");
        for runs in 1..=5 {
            attempts.record("a", (0, 1), runs);
            assert_eq!(attempts.more("a", (1, 2)), i64::from(runs) - 1);
        }
        attempts.record("a", (1, 2), 0);
        assert_eq!(attempts.more("a", (1, 2)), 4, "its own are not added");
        assert_eq!(attempts.more("a", (2, 3)), 3);
        // The third was some other worker's.
        attempts.record("a", (3, 4), 1);
        assert_eq!(attempts.more("a", (4, 5)), 3);
        assert_eq!(attempts.more("b", (5, 5)), 0, "another message");
    }

    #[test]
    fn what_never_ran_has_no_attempts() {
        let attempts = Attempts::default();
        for count in 1..100 {
            let delivery = (u64::from(count), count);
            assert_eq!(attempts.more("a", delivery), 1 - i64::from(count));
            attempts.record("a", delivery, 0);
        }
    }

    #[test]
    fn two_messages_with_one_id_adjust_nothing_for_good() {
        let recorded = Attempts::default();
        recorded.record("a", (0, 3), 0);
        recorded.record("a", (1, 3), 0);
        let looked_up = Attempts::default();
        looked_up.record("a", (0, 3), 0);
        assert_eq!(looked_up.more("a", (1, 2)), 0);
        for attempts in [recorded, looked_up] {
            attempts.record("a", (2, 8), 9);
            attempts.forget("a");
            attempts.record("a", (3, 9), 9);
            assert_eq!(attempts.more("a", (4, 10)), 0);
        }
    }

    #[test]
    fn what_is_settled_is_forgotten() {
        let attempts = Attempts::default();
        attempts.record("a", (0, 1), 5);
        attempts.forget("a");
        assert_eq!(attempts.more("a", (1, 2)), 0);
        assert!(attempts.memory().recent.is_empty());
    }

    #[test]
    fn so_many_are_remembered_and_no_more() {
        let attempts = Attempts::default();
        attempts.record("often", (0, 1), 2);
        let most = u32::try_from(MOST).unwrap();
        for n in 1..=3 * most {
            attempts.record(&n.to_string(), (u64::from(n), 1), 3);
            if n % 1_000 == 0 {
                attempts.record("often", (u64::from(n), n), 1);
            }
            let memory = attempts.memory();
            assert!(memory.recent.len() + memory.older.len() <= MOST);
        }
        let more = |id: &str| attempts.more(id, (u64::MAX, u32::MAX));
        assert_eq!(more("1"), 0, "the oldest is forgotten");
        assert_eq!(more(&(3 * most).to_string()), 2);
        assert_eq!(more("often"), 1, "it was recorded again");
    }

    #[test]
    fn no_count_is_too_high() {
        let attempts = Attempts::default();
        attempts.record("a", (0, u32::MAX - 1), u32::MAX);
        assert_eq!(attempts.more("a", (1, u32::MAX)), i64::from(u32::MAX) - 1);
    }
}
