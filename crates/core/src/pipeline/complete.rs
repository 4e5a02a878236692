use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep};

use crate::driver::{Completion, Store, Verdicts};
use crate::{Error, ErrorKind, Failure, Outcome};

use super::backoff::Backoff;
use super::engine::Engine;
use super::in_flight::InFlight;

/// At most this many records in one call to the store.
const BATCH: usize = 1_000;

impl<Tx: Send + 'static> Engine<Tx> {
    /// Records whatever waits, in one durable write, and only then lets it be acked.
    pub(crate) async fn complete_stage(
        &self,
        store: &dyn Store,
        mut receiver: UnboundedReceiver<(Box<InFlight>, Outcome)>,
    ) {
        let mut batch = Vec::new();
        while receiver.recv_many(&mut batch, BATCH).await > 0 {
            let batch = batch.drain(..).filter_map(|(in_flight, outcome)| {
                let completion = self.completion(&in_flight, outcome)?;
                Some((in_flight, completion))
            });
            let refused = self.record_batch(store, batch.collect()).await;
            // Whose doing it is shows only one by one.
            for one in refused {
                self.record_batch(store, vec![one]).await;
            }
        }
    }

    /// Records once, and returns what was refused without its being known whose doing that is.
    async fn record_batch(
        &self,
        store: &dyn Store,
        batch: Vec<(Box<InFlight>, Completion)>,
    ) -> Vec<(Box<InFlight>, Completion)> {
        let (messages, completions): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        match self.complete_batch(store, &completions).await {
            Ok(verdicts) => messages
                .into_iter()
                .zip(verdicts)
                .for_each(|(in_flight, verdict)| self.completed(in_flight, verdict)),
            Err(error) if error.kind() == ErrorKind::Refused && messages.len() > 1 => {
                return messages.into_iter().zip(completions).collect();
            }
            Err(error) => messages
                .into_iter()
                .for_each(|in_flight| self.not_recorded(in_flight, &error)),
        }
        Vec::new()
    }

    fn not_recorded(&self, mut in_flight: Box<InFlight>, error: &Error) {
        if error.kind() != ErrorKind::Refused {
            return self.in_doubt(in_flight, error);
        }
        // Its handler has run, so it may have had its effect.
        in_flight.doubt();
        self.failed(in_flight, &Failure::retry(error.clone()));
    }

    /// Tries until the store answers, for as long as a claim lasts that is not renewed.
    async fn complete_batch(
        &self,
        store: &dyn Store,
        completions: &[Completion],
    ) -> Result<Verdicts, Error> {
        let mut backoff = Backoff::new();
        let give_up = Instant::now() + self.options.claim_lease;
        loop {
            match self.within(store.complete(completions)).await {
                Err(error) if error.is_retryable() && Instant::now() < give_up => {
                    tracing::warn!(queue = &*self.queue, %error, "completion failed; trying again");
                    sleep(backoff.next()).await;
                }
                other => return other,
            }
        }
    }
}
