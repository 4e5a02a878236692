//! Public conformance suites for any onlyonce source and store.
//!
//! An adapter promises what the traits of [`onlyonce_core`] say. These suites check that promise against the real thing:
//! you supply a *harness*, which opens your source, sink or store, and one macro makes every check a test of its own.
//!
//! | you wrote a | implement | register |
//! |---|---|---|
//! | [`Source`](onlyonce_core::driver::Source) and [`Sink`](onlyonce_core::driver::Sink) | [`SourceHarness`](source::SourceHarness) | [`source_suite!`] |
//! | [`Store`](onlyonce_core::driver::Store) | [`StoreHarness`](store::StoreHarness) | [`store_suite!`] |
//! | [`TransactionalStore`](onlyonce_core::driver::TransactionalStore) | also [`TransactionalStoreHarness`](transactional_store::TransactionalStoreHarness) | also [`transactional_store_suite!`] |
//! | [`Outbox`](onlyonce_core::driver::Outbox) of such a store | also [`OutboxHarness`](outbox::OutboxHarness) | also [`outbox_suite!`] |
//!
//! In a test file of your crate:
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//!
//! use onlyonce_core::driver::{Receipt, Sink, Source};
//! use onlyonce_core::memory::{MemoryQueue, MemoryReceipt};
//! use onlyonce_testkit::source::{DeadLettered, SourceHarness};
//!
//! struct Orders(MemoryQueue);
//!
//! impl Orders {
//!     async fn start() -> Self {
//!         // For a broker: make a queue with a fresh name.
//!         Self(MemoryQueue::new("orders").with_lease(Duration::from_secs(1)))
//!     }
//! }
//!
//! #[async_trait::async_trait]
//! impl SourceHarness for Orders {
//!     async fn source(&self) -> Arc<dyn Source> {
//!         Arc::new(self.0.clone())
//!     }
//!     async fn sink(&self) -> Arc<dyn Sink> {
//!         Arc::new(self.0.clone())
//!     }
//!     async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>) {
//!         let other = MemoryQueue::new("orders");
//!         (Arc::new(other.clone()), Arc::new(other))
//!     }
//!     fn made_up(&self, receipt: &Receipt) -> Vec<Receipt> {
//!         let real = receipt.get::<MemoryReceipt>().expect("it is of a queue in memory");
//!         vec![Receipt::new(MemoryReceipt { tag: real.tag + 1_000_000, ..*real })]
//!     }
//!     fn lease(&self) -> Duration {
//!         Duration::from_secs(1)
//!     }
//!     async fn dead_letters(&self) -> Vec<DeadLettered> {
//!         let dead = self.0.dead_letters().into_iter();
//!         dead.map(|dead| DeadLettered { body: dead.message.body.clone(), reason: dead.reason })
//!             .collect()
//!     }
//! }
//!
//! onlyonce_testkit::source_suite!(Orders::start().await);
//! # fn main() {}
//! ```
//!
//! `cargo test` then shows `source::ack_removes`, `source::nack_redelivers` and so on.
//!
//! - **Every check gets a harness of its own.** Give it a queue or a store that nobody else uses: checks run in parallel.
//! - **Capabilities choose the checks.** What [`Capabilities`](onlyonce_core::driver::Capabilities) claim is proven, and what they
//!   do not claim is asserted to be missing: a source without delays must *refuse* a delay.
//! - **Nothing is skipped in silence.** A test that needs a broker is registered with `ignore = "why"`, so that the
//!   report counts it. A check that your service or its emulator cannot pass is declared as a [`Gap`] and must then
//!   fail: once it passes, you are told to remove the gap.
//! - **Time is tokio's**, so a harness without a real clock runs at once under `#[tokio::test(start_paused = true)]`; a
//!   store with a clock of its own turns it in [`StoreHarness::expire`](store::StoreHarness::expire).
//! - **Random histories** of calls are compared with a reference model, for sources, stores and outboxes. A failure prints a seed;
//!   `ONLYONCE_SEED=<seed> cargo test random` plays that history again.
//!
//! For what goes wrong on the way to a broker there is a [`proxy`] that cuts, delays, swallows and truncates.

mod gap;
mod macros;
pub mod outbox;
pub mod proxy;
mod random;
pub mod simulated;
pub mod source;
pub mod store;
pub mod transactional_store;

pub use gap::Gap;
