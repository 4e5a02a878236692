use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::driver::{Claim, Delivery, Fingerprint, KeyDigest, ReceiveLimits};
use crate::{DedupKey, Error};

use super::attempts::Before;
use super::backoff::Backoff;
use super::budget::Amount;
use super::counters::add;
use super::engine::{Engine, FEW};
use super::in_flight::{InFlight, Next};
use super::invoke::panic_text;
use super::lease_renewer::extended_after;
use super::lease_state::LeaseState;

/// How long one receive may wait: the longest poll that any broker allows.
const LONG_POLL: Duration = Duration::from_secs(20);
/// Where all is held that may be, receives wait for room for this many messages, but no longer than this time.
const CHUNK: usize = 16;
const CHUNK_WAIT: Duration = Duration::from_millis(5);

impl<Tx: Send + 'static> Engine<Tx> {
    /// Receives until told to stop.
    pub(crate) async fn intake(&self) {
        let mut backoff = Backoff::new();
        let mut active = Instant::now();
        let mut keyless = Some(0);
        while !self.stop.is_cancelled() {
            let holding = self.budget.held() > 0;
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                () = self.until_room() => {}
            }
            if holding {
                active = Instant::now();
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
                    self.take_in(deliveries, &mut keyless);
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
    async fn until_room(&self) {
        let room_for = |messages| {
            let room = self.room();
            room.messages >= messages && room.bytes > 0
        };
        let most = self.options.prefetch_messages.min(self.startable());
        let chunk = CHUNK.min(most.div_ceil(4));
        let enough = self.budget.until(|_| room_for(chunk));
        if timeout(CHUNK_WAIT, enough).await.is_err() {
            self.budget.until(|_| room_for(1)).await;
        }
    }

    fn limit(&self) -> ReceiveLimits {
        let room = self.room();
        let idle = self
            .options
            .stop_when_idle
            .map_or(LONG_POLL, |idle| idle / 4);
        ReceiveLimits::new(
            room.messages.max(1),
            idle.clamp(Duration::from_millis(1), LONG_POLL),
        )
        .with_bytes(room.bytes)
        .with_per_group(self.startable_by_one())
    }

    /// How much more may be held: what can start in time, and in any case something for each idle worker, so that
    /// messages that stall hold up no others.
    fn room(&self) -> Amount {
        let room = self.budget.room();
        let startable = self.startable().saturating_sub(self.budget.held());
        let idle = (self.options.concurrency).saturating_sub(self.budget.active());
        Amount {
            messages: room.messages.min(startable.max(idle)),
            ..room
        }
    }

    /// How many messages can start before their leases would have to be extended. Holding more would cost requests, and
    /// attempts if this worker died, and keep them from other workers.
    fn startable(&self) -> usize {
        let workers = self.options.concurrency;
        self.startable_by_one().saturating_mul(workers)
    }

    /// How many one worker can start, one after another, by the recent mean duration of a handler; one as long as there is none.
    fn startable_by_one(&self) -> usize {
        let Some(lease) = self.lease else {
            return usize::MAX;
        };
        let many = match self.handler_nanos.load(Ordering::Relaxed) {
            0 => 1,
            mean => extended_after(lease).as_nanos() / u128::from(mean),
        };
        usize::try_from(many).unwrap_or(usize::MAX).max(1)
    }

    fn take_in(&self, deliveries: Vec<Delivery>, keyless_so_far: &mut Option<usize>) {
        if deliveries.is_empty() {
            return;
        }
        add(&self.counters.received, deliveries.len());
        let mut batch = Vec::with_capacity(deliveries.len());
        let mut keyless = Vec::new();
        for delivery in deliveries {
            match self.identify(&delivery) {
                Ok(None) if self.store.is_some() => keyless.push(self.admit(delivery, None)),
                Ok(key) => batch.push(self.admit(delivery, key)),
                Err(reason) => self.dead_letter(self.admit(delivery, None), reason),
            }
        }
        if !batch.is_empty() {
            *keyless_so_far = None;
        }
        if !keyless.is_empty() {
            self.without_a_key(keyless, keyless_so_far);
        }
        if self.store.is_some() {
            let _ = self.stages.arrived.send(batch);
        } else {
            self.lanes.push(batch);
        }
    }

    /// Takes a delivery in and gives it its place in the budget.
    fn admit(&self, delivery: Delivery, key: Option<DedupKey>) -> Box<InFlight> {
        let message = &delivery.message;
        let claim = match (&key, &self.store) {
            (Some(key), Some(_)) => Some(Claim::new(
                KeyDigest::new(&self.scope, key),
                Fingerprint::of(&message.body),
            )),
            _ => None,
        };
        let seq = self.arrivals.fetch_add(1, Ordering::Relaxed);
        let lease = LeaseState::of(&delivery);
        let renewable = self.capabilities.extend && delivery.lease.until.is_some();
        let kept = (renewable || claim.is_some()).then(|| self.renewer.keep(seq, lease.clone()));
        Box::new(InFlight {
            seq,
            key,
            claim,
            must_claim: false,
            retries: 0,
            begun: false,
            before: Before::default(),
            recorded: None,
            unsettled: 0,
            acked: false,
            takeovers: 0,
            alone: false,
            conflicts: 0,
            marked_in_vain: Vec::new(),
            marked: None,
            next: Next::Run { in_doubt: None },
            lane: None,
            key_place: None,
            _renewal: kept,
            lease,
            permit: self.budget.take(message.size()),
            delivery,
        })
    }

    /// The key of a message, if it has one, or why it cannot be handled.
    fn identify(&self, delivery: &Delivery) -> Result<Option<DedupKey>, String> {
        if let Some(reason) = &delivery.malformed {
            return Err(reason.clone());
        }
        let choose = || self.options.dedup_key.choose(&delivery.message);
        catch_unwind(AssertUnwindSafe(choose))
            .map_err(|panic| format!("the key policy panicked: {}", panic_text(&*panic)))
    }

    /// One message without a key is its producer's mistake. If the first ones all have none, the key policy does not fit the
    /// queue, and it is better to stop than to dead-letter them all. `so_far`: how many there were; `None` once one had a
    /// key.
    fn without_a_key(&self, messages: Vec<Box<InFlight>>, so_far: &mut Option<usize>) {
        let reason = format!(
            "no dedup key: the message has none of {:?}, which the key policy asks for; see Builder::dedup_key, and KeyPolicy::or_content where equal payloads mean the same thing",
            self.options.dedup_key
        );
        if let Some(so_far) = so_far {
            *so_far += messages.len();
            if *so_far >= FEW {
                let all = format!("the first {so_far} messages cannot be told apart: {reason}");
                self.fail(Error::config(all).on_queue(&*self.queue));
                let last_first = messages.into_iter().rev();
                return last_first.for_each(|in_flight| self.give_back(in_flight, Duration::ZERO));
            }
        }
        for in_flight in messages {
            self.dead_letter(in_flight, reason.clone());
        }
    }
}
