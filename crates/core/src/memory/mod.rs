//! A queue, a store and its outbox in memory, for tests, simulation and demos.
//!
//! They keep the same promises as the real ones, except that nothing outlives the process. Time is tokio's clock alone,
//! so all run under a paused one. There are no background tasks: what has expired is looked up on each call.

mod outbox;
mod queue;
mod state;
mod store;
mod tx;

pub use outbox::MemoryOutbox;
pub use queue::MemoryQueue;
pub use state::{DeadLetter, MemoryReceipt};
pub use store::MemoryStore;
pub use tx::MemoryTx;

use std::time::Duration;

use tokio::time::Instant;

/// `now + after`, or a century from now where that overflows.
fn later(now: Instant, after: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    now.checked_add(after.min(CENTURY)).unwrap_or(now)
}

#[cfg(test)]
mod tests;
