//! The checks of a [`Source`] and its [`Sink`]: see [`source_suite!`](crate::source_suite).

mod identity;
mod leases;
mod lifecycle;
mod messages;
mod model;
mod order;
mod settling;
mod tools;

pub use identity::*;
pub use leases::*;
pub use lifecycle::*;
pub use messages::*;
pub use model::*;
pub use order::*;
pub use settling::*;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use onlyonce_core::Message;
use onlyonce_core::driver::{Receipt, Sink, Source};

use crate::Gap;

/// What the checks need of a broker. Each check gets a harness of its own, with a queue that nobody else uses.
#[async_trait]
pub trait SourceHarness: Send + Sync {
    /// A new consumer of the queue, as another process would open it.
    async fn source(&self) -> Arc<dyn Source>;

    /// A new publisher to the queue.
    async fn sink(&self) -> Arc<dyn Sink>;

    /// A consumer of another queue that has the same name, in another place (another virtual host, region or file), and a
    /// publisher to it.
    async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>);

    /// For how long the queue leases a delivery: short, since checks wait for its end, but long enough for a few calls.
    /// Without timed leases: the time scale of the checks, a second say.
    fn lease(&self) -> Duration;

    /// How long a check waits for what must come. It returns at once when it does.
    fn patience(&self) -> Duration {
        self.lease() * 4 + Duration::from_secs(10)
    }

    /// How long a check waits to see that nothing comes. It must be well below the lease.
    fn quiet(&self) -> Duration {
        self.lease() / 4
    }

    /// The largest body that the queue takes beside a few short attributes; 1 MiB is enough.
    fn large_body(&self) -> usize {
        1 << 20
    }

    /// Receipts that look like this one of the source's and belong to no delivery.
    fn made_up(&self, receipt: &Receipt) -> Vec<Receipt>;

    /// A message that the sink must refuse: too large, say.
    fn refused_message(&self) -> Option<Message> {
        None
    }

    /// Breaks the connection of every source so far, as a network would; `false` if there is none to break.
    async fn break_connection(&self) -> bool {
        false
    }

    /// What is in the queue's dead-letter queue now; needed if the source can dead-letter.
    async fn dead_letters(&self) -> Vec<DeadLettered> {
        Vec::new()
    }

    /// The checks that are known to fail.
    fn gaps(&self) -> &'static [Gap] {
        &[]
    }
}

/// A message in a dead-letter queue, as the harness found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLettered {
    /// Its payload.
    pub body: Bytes,
    /// Why it is there.
    pub reason: String,
}

/// The names of all checks.
pub const CHECKS: &[&str] = crate::__source_checks! { names };

/// Runs one check, or asserts that it fails where a [`Gap`] says so.
pub async fn run(harness: &dyn SourceHarness, name: &str, check: impl Future<Output = ()>) {
    crate::gap::run(CHECKS, name, harness.gaps(), check).await;
}
