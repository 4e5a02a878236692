//! The checks of a [`Store`]: see [`store_suite!`](crate::store_suite).

mod batches;
mod claims;
mod durability;
mod model;
pub(crate) mod tools;

pub use batches::*;
pub use claims::*;
pub use durability::*;
pub use model::*;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::Store;

use crate::Gap;

/// What the checks need of a store. Each check gets a harness of its own, with a store that nobody else uses.
#[async_trait]
pub trait StoreHarness: Send + Sync {
    /// A new handle on the store, as another process would open it.
    async fn store(&self) -> Arc<dyn Store>;

    /// A short time to claim for: checks wait for its end, but it must be long enough for a few calls.
    fn lease(&self) -> Duration {
        Duration::from_secs(1)
    }

    /// Lets `time` pass on the store's clock. A store with a clock of the test's own just turns it on.
    async fn expire(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// Ends the store's process without warning and starts it anew; the checks have dropped their handles. Claims may
    /// be lost, records may not. Without a process of its own, dropping and reopening is enough.
    async fn crash(&self) {}

    /// Whether the store drops expired records without being told to, so that [`Store::prune`] may find none.
    fn prunes_by_itself(&self) -> bool {
        false
    }

    /// The checks that are known to fail.
    fn gaps(&self) -> &'static [Gap] {
        &[]
    }
}

/// The names of all checks.
pub const CHECKS: &[&str] = crate::__store_checks! { names };

/// Runs one check, or asserts that it fails where a [`Gap`] says so.
pub async fn run(harness: &dyn StoreHarness, name: &str, check: impl Future<Output = ()>) {
    crate::gap::run(CHECKS, name, harness.gaps(), check).await;
}
