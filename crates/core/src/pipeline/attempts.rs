use super::recent::Recent;

/// What makes attempts of a broker's count of deliveries: a delivery with `k` runs counts as `k`, not as one, so that what
/// was given back without having run has lost nothing, and retries in place are not forgotten.
#[derive(Default)]
pub(crate) struct Attempts(Recent<Known>);

#[derive(Clone, Copy)]
enum Known {
    /// The delivery of the highest count so far.
    Delivery {
        seq: u64,
        count: u32,
        runs: u32,
        /// What is to be added to its count, for the deliveries before it.
        more: i64,
        /// The runs of the deliveries before it.
        before: u32,
    },
    /// Two messages have this id: the runs of one must not be taken off the other, which might then never be given up.
    Ambiguous,
}

/// A delivery: its place in the order of arrival, and the broker's count of it, if it counts.
type Counted = (u64, Option<u32>);

/// What is known of the deliveries before one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Before {
    /// What is to be added to the broker's count, or to 1 where it does not count.
    pub(crate) more: i64,
    /// Their runs.
    pub(crate) runs: u32,
}

impl Known {
    /// What is known before this delivery. A broker's count grows with each delivery of a message; one that does not is
    /// another message's. Where the broker does not count, each delivery counts as the first.
    fn before(self, (delivery, delivered): Counted) -> Option<Before> {
        let Self::Delivery {
            seq,
            count,
            runs,
            more,
            before,
        } = self
        else {
            return None;
        };
        if seq == delivery {
            return Some(Before { more, runs: before });
        }
        let added = match delivered {
            None => i64::from(runs),
            Some(delivered) if count < delivered => i64::from(runs) - 1,
            Some(_) => return None,
        };
        Some(Before {
            more: more.saturating_add(added),
            runs: before.saturating_add(runs),
        })
    }
}

impl Attempts {
    /// Remembers that this delivery of the message `id` has had this many runs.
    pub(crate) fn record(&self, id: &str, delivery: Counted, runs: u32) {
        let (seq, count) = delivery;
        self.0.update(id, |known| {
            let before = known.map_or(Some(Before::default()), |known| known.before(delivery));
            Some(before.map_or(Known::Ambiguous, |before| Known::Delivery {
                seq,
                count: count.unwrap_or(1),
                runs,
                more: before.more,
                before: before.runs,
            }))
        });
    }

    /// What is known of the deliveries of the message `id` before this one.
    pub(crate) fn before(&self, id: &str, delivery: Counted) -> Before {
        // Nothing is known at a first delivery, and most are.
        if delivery.1.is_some_and(|count| count <= 1) {
            return Before::default();
        }
        let Some(known) = self.0.get(id) else {
            return Before::default();
        };
        known.before(delivery).unwrap_or_else(|| {
            self.0.update(id, |known| known.map(|_| Known::Ambiguous));
            Before::default()
        })
    }

    /// The message `id` does not come again. An ambiguous id stays so: it is also another message's.
    pub(crate) fn forget(&self, id: &str) {
        self.0.update(id, |known| {
            known.filter(|known| matches!(known, Known::Ambiguous))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delivery_counts_as_its_runs() {
        let attempts = Attempts::default();
        assert_eq!(
            attempts.before("a", (1, Some(2))).more,
            0,
            "nothing is known"
        );
        for runs in 1..=5 {
            attempts.record("a", (0, Some(1)), runs);
            assert_eq!(attempts.before("a", (1, Some(2))).more, i64::from(runs) - 1);
        }
        attempts.record("a", (1, Some(2)), 0);
        assert_eq!(
            attempts.before("a", (1, Some(2))).more,
            4,
            "its own are not added"
        );
        assert_eq!(attempts.before("a", (2, Some(3))).more, 3);
        // The third was some other worker's.
        attempts.record("a", (3, Some(4)), 1);
        assert_eq!(attempts.before("a", (4, Some(5))).more, 3);
        assert_eq!(
            attempts.before("b", (5, Some(5))).more,
            0,
            "another message"
        );
    }

    #[test]
    fn what_never_ran_has_no_attempts() {
        let attempts = Attempts::default();
        for count in 1..100 {
            let delivery = (u64::from(count), Some(count));
            assert_eq!(attempts.before("a", delivery).more, 1 - i64::from(count));
            attempts.record("a", delivery, 0);
        }
    }

    #[test]
    fn two_messages_with_one_id_adjust_nothing_for_good() {
        let recorded = Attempts::default();
        recorded.record("a", (0, Some(3)), 0);
        recorded.record("a", (1, Some(3)), 0);
        let looked_up = Attempts::default();
        looked_up.record("a", (0, Some(3)), 0);
        assert_eq!(looked_up.before("a", (1, Some(2))).more, 0);
        for attempts in [recorded, looked_up] {
            attempts.record("a", (2, Some(8)), 9);
            attempts.forget("a");
            attempts.record("a", (3, Some(9)), 9);
            assert_eq!(attempts.before("a", (4, Some(10))).more, 0);
        }
    }

    #[test]
    fn what_is_settled_is_forgotten() {
        let attempts = Attempts::default();
        attempts.record("a", (0, Some(1)), 5);
        attempts.forget("a");
        assert_eq!(attempts.before("a", (1, Some(2))).more, 0);
        assert_eq!(attempts.0.len(), 0);
    }

    #[test]
    fn no_count_is_too_high() {
        let attempts = Attempts::default();
        attempts.record("a", (0, Some(u32::MAX - 1)), u32::MAX);
        assert_eq!(
            attempts.before("a", (1, Some(u32::MAX))).more,
            i64::from(u32::MAX) - 1
        );
    }

    #[test]
    fn runs_add_up_where_the_broker_does_not_count() {
        let attempts = Attempts::default();
        assert_eq!(attempts.before("a", (0, None)).more, 0);
        attempts.record("a", (0, None), 1);
        attempts.record("a", (0, None), 2);
        assert_eq!(attempts.before("a", (1, None)).more, 2);
        attempts.record("a", (1, None), 3);
        assert_eq!(
            attempts.before("a", (1, None)).more,
            2,
            "its own are not added"
        );
        assert_eq!(attempts.before("a", (2, None)).more, 5);
        assert_eq!(attempts.before("a", (2, None)).runs, 5);
        assert_eq!(attempts.before("b", (3, None)).more, 0, "another message");
    }
}
