use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// What a pipeline has done so far; shared and live. See [`Builder::counters`](crate::Builder::counters).
        #[derive(Debug, Default)]
        pub struct Counters {
            $(pub(crate) $name: AtomicU64,)+
        }

        /// The counts of a pipeline at one moment, or of several together.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[non_exhaustive]
        pub struct Report {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl AddAssign for Report {
            fn add_assign(&mut self, other: Self) {
                $(self.$name += other.$name;)+
            }
        }

        impl Counters {
            /// The counts as they are now.
            pub fn report(&self) -> Report {
                Report { $($name: self.$name.load(Ordering::Relaxed),)+ }
            }
        }
    };
}

counters! {
    /// Deliveries received.
    received,
    /// Messages that took effect: handled, and recorded where the mode records.
    applied,
    /// Deliveries of messages that had taken effect before.
    duplicates,
    /// Handler runs that failed.
    failed,
    /// Retries, in place or by way of the broker.
    retried,
    /// Messages that were confirmed in the dead-letter queue.
    dead_lettered,
    /// Deliveries whose key had been used for another payload.
    payload_mismatches,
    /// Claims taken over from an owner that may have produced the effect.
    in_doubt,
    /// Handlers cancelled because the lease or the claim ended.
    cancelled,
    /// Effects refused because somebody else had taken the key over.
    fenced,
    /// Runs that were rolled back because another transaction was in the way, and done again.
    conflicts,
    /// Deliveries given back unhandled.
    given_back,
    /// Settlements that the broker confirmed, or, where it confirms none, that were written in full.
    settled,
    /// Settlements that came too late.
    lease_lost,
    /// Settlements whose result is not known; the redelivery is settled again.
    unknown,
    /// Messages that may be lost: only in `at_most_once`, when the handler failed after the ack.
    lost,
}

/// Adds `n`.
pub(crate) fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}
