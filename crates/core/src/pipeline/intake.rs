use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::{Delivery, Error, Limit};

use super::backoff::Backoff;
use super::counters::add;
use super::engine::Engine;

/// How long one receive may wait: the longest poll that any broker allows.
const LONG_POLL: Duration = Duration::from_secs(20);
/// With the budget used up, receives wait for room for so many messages, but no longer than this.
const CHUNK: usize = 16;
const CHUNK_WAIT: Duration = Duration::from_millis(5);

const NO_KEY: &str =
    "no dedup key: the producer set none of those that the consumer's key policy asks for";

impl<Tx: Send + 'static> Engine<Tx> {
    /// Receives until told to stop.
    pub(crate) async fn intake(&self) {
        let mut backoff = Backoff::new();
        let mut active = Instant::now();
        while !self.stop.is_cancelled() {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                () = self.room() => {}
            }
            let received = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                received = self.source.receive(self.limit()) => received,
            };
            match received {
                Ok(deliveries) => {
                    backoff.reset();
                    let idle = deliveries.is_empty() && self.budget.held() == 0;
                    self.take_in(deliveries);
                    if !idle {
                        // Only now: taking in large messages takes a while, which is not idle either.
                        active = Instant::now();
                    }
                    if self
                        .options
                        .stop_when_idle
                        .is_some_and(|idle| active.elapsed() >= idle)
                    {
                        return;
                    }
                }
                Err(error) => self.receive_failed(error, &mut backoff).await,
            }
        }
    }

    async fn receive_failed(&self, error: Error, backoff: &mut Backoff) {
        if !error.is_retryable() {
            return self.fail(error);
        }
        let delay = backoff.next();
        tracing::warn!(queue = &*self.queue, %error, ?delay, "receive failed; trying again");
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {}
            () = sleep(delay) => {}
        }
    }

    /// Waits until it is worth asking for more.
    async fn room(&self) {
        let limit = self.limit();
        if limit.messages >= CHUNK && limit.bytes > 0 {
            return;
        }
        let chunk = CHUNK.min(self.options.prefetch_messages.div_ceil(4));
        let enough = self.budget.until(|budget| {
            let room = budget.room();
            room.messages >= chunk && room.bytes > 0
        });
        if timeout(CHUNK_WAIT, enough).await.is_err() {
            self.budget
                .until(|budget| budget.room().messages > 0 && budget.room().bytes > 0)
                .await;
        }
    }

    fn limit(&self) -> Limit {
        let room = self.budget.room();
        let startable = self.startable().saturating_sub(self.budget.held());
        let idle = self
            .options
            .stop_when_idle
            .map_or(LONG_POLL, |idle| idle / 4);
        Limit {
            messages: room.messages.min(startable).max(1),
            per_group: usize::MAX,
            bytes: room.bytes,
            wait: idle.clamp(Duration::from_millis(1), LONG_POLL),
        }
    }

    /// How many messages can start before their leases end, at the rate of late. Leases that are extended do not end.
    fn startable(&self) -> usize {
        let Some(lease) = self.lease.filter(|_| !self.capabilities.extend) else {
            return usize::MAX;
        };
        let mean = self.handler_nanos.load(Ordering::Relaxed).max(1);
        let each = usize::try_from(lease.as_nanos() / 2 / u128::from(mean)).unwrap_or(usize::MAX);
        each.saturating_mul(self.options.concurrency)
            .max(self.options.concurrency)
    }

    fn take_in(&self, deliveries: Vec<Delivery>) {
        if deliveries.is_empty() {
            return;
        }
        add(&self.counters.received, deliveries.len());
        let mut batch = Vec::with_capacity(deliveries.len());
        for delivery in deliveries {
            let malformed = delivery.malformed.clone();
            let flight = self.admit(delivery);
            if let Some(reason) = malformed {
                self.dead_letter(flight, reason);
            } else if self.store.is_some() && flight.claim.is_none() {
                self.dead_letter(flight, NO_KEY);
            } else {
                batch.push(flight);
            }
        }
        if self.store.is_some() {
            let _ = self.stages.arrived.send(batch);
        } else {
            self.lanes.push(batch);
        }
    }
}
