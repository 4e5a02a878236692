use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;

use crate::driver::Disposition;

use super::engine::{Engine, ToSettle};
use super::in_flight::InFlight;

/// At most this number of batches are given back at once.
const BATCH: usize = 1_000;

impl<Tx: Send + 'static> Engine<Tx> {
    /// Releases claims, then gives the messages back, so that a failure is never taken for work in progress. In a drain the
    /// source may do that better, when it is closed.
    pub(crate) async fn give_back_stage(
        &self,
        mut receiver: UnboundedReceiver<Vec<(Box<InFlight>, Duration)>>,
    ) {
        let mut batches = Vec::new();
        while receiver.recv_many(&mut batches, BATCH).await > 0 {
            let batch: Vec<_> = batches.drain(..).flatten().collect();
            self.release(batch.iter().map(|(in_flight, _)| in_flight))
                .await;
            let source_does = self.capabilities.close_gives_back && self.stop.is_cancelled();
            let nacks: Vec<_> = batch
                .into_iter()
                .filter(|(in_flight, delay)| !(in_flight.acked || source_does && delay.is_zero()))
                .map(|(in_flight, delay)| (in_flight, Disposition::Nack { delay }))
                .collect();
            if !nacks.is_empty() {
                let _ = self.stages.settle.send(ToSettle::Together(nacks));
            }
        }
    }

    /// Gives back what comes too late to be run.
    pub(crate) async fn late_stage(&self, mut receiver: UnboundedReceiver<Box<InFlight>>) {
        while let Some(in_flight) = receiver.recv().await {
            self.give_back(in_flight, Duration::ZERO);
        }
    }
}
