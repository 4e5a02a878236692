//! How a pipeline ends.

use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::timeout;

use crate::{Error, ErrorKind};

use super::engine::Engine;

/// What is left of the work after handlers were cancelled gets this time, and so do stages that are told to end.
pub(crate) const GRACE: Duration = Duration::from_secs(2);
/// Closing the source and the dead-letter queue may take this time: more than any broker's longest poll.
const CLOSE: Duration = Duration::from_secs(30);

impl<Tx: Send + 'static> Engine<Tx> {
    /// Lets running handlers finish and gives the rest back, last first.
    pub(crate) async fn drain(&self) {
        let waiting = self.lanes.close();
        let parked = self.keys.drain();
        let mut rest: Vec<_> = waiting.into_iter().chain(parked).collect();
        rest.sort_by_key(|in_flight| in_flight.seq);
        for in_flight in rest.into_iter().rev() {
            self.give_back(in_flight, Duration::ZERO);
        }
        let empty = || self.budget.until(|budget| budget.held() == 0);
        if timeout(self.options.drain_timeout, empty()).await.is_err() {
            tracing::warn!(
                queue = &*self.queue,
                held = self.budget.held(),
                "drain timed out; cancelling handlers"
            );
            self.cancel.cancel();
            let _ = timeout(GRACE, empty()).await;
        }
    }

    pub(crate) async fn close(&self) -> Result<(), Error> {
        let closed = closed_in_time(self.source.name(), self.source.close()).await;
        if let Some(sink) = &self.sink {
            let _ = closed_in_time(sink.name(), sink.close()).await.inspect_err(
                |error| tracing::warn!(queue = sink.name(), %error, "dead-letter queue not closed"),
            );
        }
        let fatal = self
            .fatal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        fatal.map_or(closed, Err)
    }
}

/// Whatever does not answer must not keep the pipeline from ending.
pub(crate) async fn closed_in_time(
    queue: &str,
    close: impl Future<Output = Result<(), Error>>,
) -> Result<(), Error> {
    timeout(CLOSE, close).await.unwrap_or_else(|_| {
        Err(Error::new(
            ErrorKind::Timeout,
            format!(
                "it was not closed within {CLOSE:?}; what it held comes again when its leases end"
            ),
        )
        .on_queue(queue))
    })
}
