use std::sync::Arc;
use std::time::Duration;

use tokio::time::{interval, sleep};

use crate::driver::Store;

/// At most this number of expired records are removed in one call, at these times; at once again while there are more.
const PRUNE: usize = 500;
const PRUNE_EVERY: Duration = Duration::from_secs(10);
const PRUNE_PAUSE: Duration = Duration::from_millis(50);

/// Removes expired records in the background, in small steps.
pub(crate) async fn prune(store: Arc<dyn Store>) {
    let mut ticks = interval(PRUNE_EVERY);
    loop {
        ticks.tick().await;
        loop {
            match store.prune(PRUNE).await {
                Ok(removed) if removed >= PRUNE => sleep(PRUNE_PAUSE).await,
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, "expired records not removed; trying again later");
                    break;
                }
            }
        }
    }
}
