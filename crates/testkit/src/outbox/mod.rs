//! The checks of an [`Outbox`]: see [`outbox_suite!`](crate::outbox_suite).
//!
//! They come on top of [`store`](crate::store)'s and [`transactional_store`](crate::transactional_store)'s, which its store must
//! pass as well.

mod commits;
mod fetching;
mod leases;
mod settling;
mod tools;

pub use commits::*;
pub use fetching::*;
pub use leases::*;
pub use settling::*;

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use onlyonce_core::Message;
use onlyonce_core::driver::{Outbox, OutboxTransaction, OutgoingId, TransactionalStore};

use crate::Gap;
use crate::transactional_store::TransactionalStoreHarness;

/// What the checks need of a store that has an outbox.
#[async_trait]
pub trait OutboxHarness:
    TransactionalStoreHarness<Store: TransactionalStore<Tx: OutboxTransaction>>
{
    /// A new handle on the store's outbox, as another process would open it.
    async fn outbox(&self) -> Arc<dyn Outbox>;

    /// Publishes in a transaction of its own, as code outside of any pipeline does.
    async fn publish(&self, destination: &str, message: Message) -> OutgoingId;

    /// A size that the outbox takes, in bytes.
    fn large_body(&self) -> usize {
        1 << 20
    }

    /// The checks of this suite that are known to fail.
    fn outbox_gaps(&self) -> &'static [Gap] {
        &[]
    }
}

/// The names of all checks.
pub const CHECKS: &[&str] = crate::__outbox_checks! { names };

/// Runs one check, or asserts that it fails where a [`Gap`] says so.
pub async fn run(harness: &impl OutboxHarness, name: &str, check: impl Future<Output = ()>) {
    crate::gap::run(CHECKS, name, harness.outbox_gaps(), check).await;
}
