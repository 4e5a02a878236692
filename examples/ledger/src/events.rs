//! Events: what others are told of each transfer, by way of another queue. An event leaves if and only if its transfer was booked.

use std::time::Duration;

use onlyonce::driver::{Outbox, OutboxTransaction};
use onlyonce::{BoxError, Error, Message, Relay, Report, RunError};
use serde::Serialize;
use tokio::sync::oneshot;
use tokio::time::sleep;

use crate::options::Work;
use crate::worker::Transfer;

/// Where events are to go: a name that the relay maps to a queue.
const DESTINATION: &str = "events";
/// For how long the relay goes on when the pipeline has ended. Whatever is left then waits for the next worker.
const LAST_EVENTS: Duration = Duration::from_secs(1);

#[derive(Debug, Serialize)]
struct Event<'a> {
    #[serde(flatten)]
    transfer: &'a Transfer,
    /// Which of its account's transfers this is. A consumer can see by it that it has missed none.
    number: i64,
}

/// Writes events, if the worker was asked for them.
#[derive(Clone, Copy, Debug)]
pub struct Events {
    wanted: bool,
}

impl Events {
    pub fn new(options: &Work) -> Self {
        let wanted = options.events.is_some();
        Self { wanted }
    }

    /// Writes the event of a transfer into the outbox, in the transaction that books it. Its dedup id comes from the outbox. Its group
    /// is the account, so that nobody sees an account's transfers in another order than that in which they were booked.
    pub async fn write(
        self,
        tx: &mut impl OutboxTransaction,
        transfer: &Transfer,
        number: i64,
    ) -> Result<(), BoxError> {
        if self.wanted {
            let event = serde_json::to_vec(&Event { transfer, number })?;
            let event = Message::new(event).with_group(transfer.from.as_str());
            tx.publish(DESTINATION, event).await?;
        }
        Ok(())
    }
}

/// Runs a pipeline, and beside it a relay that publishes what its handlers have written, and what other workers have left. If either
/// cannot go on, both end.
pub async fn beside(
    pipeline: impl Future<Output = Result<Report, RunError>>,
    outbox: impl Outbox,
    options: &Work,
) -> Result<Report, Error> {
    let Some(url) = &options.events else {
        return Ok(pipeline.await?);
    };
    let (running, ended) = oneshot::channel::<()>();
    let relay = Relay::new(outbox)
        .to(DESTINATION, onlyonce::sink(url).await?)
        .lease(options.claim_lease)
        .shutdown(async {
            // The pipeline has no more to say than that it is gone.
            let _ = ended.await;
            sleep(LAST_EVENTS).await;
        });
    let pipeline = async move {
        let report = pipeline.await;
        drop(running);
        Ok(report?)
    };
    let (report, relayed) = tokio::try_join!(pipeline, relay.run())?;
    tracing::info!(?relayed, "the relay has ended");
    Ok(report)
}
