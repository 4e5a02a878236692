use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep};

use crate::Outcome;
use crate::driver::{Claim, ClaimResult, HeldClaim, Store};

use super::backoff::Backoff;
use super::counters::add;
use super::doubt::is_decided;
use super::engine::Engine;
use super::in_flight::{InFlight, Next};
use super::keys::KeyPlace;

/// At most this many claims in one call to the store.
const BATCH: usize = 1_000;
/// A store whose answer says "busy for no time" is asked again after this.
const BUSY_AT_LEAST: Duration = Duration::from_millis(10);
const PAYLOAD_MISMATCH: &str =
    "payload mismatch: the dedup key was used before, for another payload";

type Arrived = UnboundedReceiver<Vec<Box<InFlight>>>;
type Heads = UnboundedReceiver<Box<InFlight>>;

/// Takes whatever waits: batches that have just come, then heads of lanes that have no claim yet.
async fn next_batch(arrived: &mut Arrived, heads: &mut Heads) -> Option<Vec<Box<InFlight>>> {
    let mut batch = tokio::select! {
        biased;
        Some(batch) = arrived.recv() => batch,
        Some(head) = heads.recv() => vec![head],
        else => return None,
    };
    while batch.len() < BATCH {
        if let Ok(head) = heads.try_recv() {
            batch.push(head);
        } else if let Ok(more) = arrived.try_recv() {
            batch.extend(more);
        } else {
            break;
        }
    }
    Some(batch)
}

impl<Tx: Send + 'static> Engine<Tx> {
    /// The claim stage: asks the store whose each message is.
    pub(crate) async fn claim_stage(
        &self,
        store: &dyn Store,
        mut arrived: Arrived,
        mut heads: Heads,
    ) {
        while let Some(mut batch) = next_batch(&mut arrived, &mut heads).await {
            for in_flight in &mut batch {
                if let Some(claim) = in_flight.claim {
                    let place = &mut in_flight.key_place;
                    place.get_or_insert_with(|| self.keys.queue(claim.key));
                }
            }
            self.claim_batch(store, batch).await;
        }
    }

    /// Claims the messages that are first in the queues for their keys; the others come along, to keep their places.
    async fn claim_batch(&self, store: &dyn Store, batch: Vec<Box<InFlight>>) {
        let mut backoff = Backoff::new();
        loop {
            // One whose lease has ended goes to its lane without a claim, to be given back with those behind it.
            let may_claim = |in_flight: &InFlight| is_first(in_flight) && in_flight.lease.leased();
            let first: Vec<bool> = batch.iter().map(|one| may_claim(one)).collect();
            let wanted = batch.iter().zip(&first).filter(|(_, first)| **first);
            let claims: Vec<Claim> = wanted
                .filter_map(|(in_flight, _)| in_flight.claim)
                .collect();
            let sent = Instant::now();
            if claims.is_empty() {
                return self.claimed(batch, &first, Vec::new(), sent);
            }
            let lease = self.options.claim_lease;
            let error = match self.within(store.claim(self.owner, &claims, lease)).await {
                Ok(answers) => return self.claimed(batch, &first, answers, sent + lease),
                Err(error) => error,
            };
            tracing::warn!(queue = &*self.queue, %error, "claims failed");
            if !error.is_retryable() {
                self.fail(error);
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled() => {
                    let last_first = batch.into_iter().rev();
                    return last_first.for_each(|in_flight| self.give_back(in_flight, Duration::ZERO));
                }
                () = sleep(backoff.next()) => {}
            }
        }
    }

    fn claimed(
        &self,
        batch: Vec<Box<InFlight>>,
        first: &[bool],
        answers: Vec<ClaimResult>,
        until: Instant,
    ) {
        let mut answers = answers.into_iter();
        let mut go_on = Vec::with_capacity(batch.len());
        for (in_flight, first) in batch.into_iter().zip(first) {
            let answer = match in_flight.claim {
                Some(claim) if *first => answers.next().map(|answer| (claim, answer)),
                _ => None,
            };
            go_on.extend(match answer {
                Some((claim, answer)) => self.answered(in_flight, claim, answer, until),
                None => self.wait_for_key(in_flight),
            });
        }
        self.lanes.push(go_on);
    }

    /// What the store's answer means; returns the message if it goes on to its lane.
    fn answered(
        &self,
        mut in_flight: Box<InFlight>,
        claim: Claim,
        answer: ClaimResult,
        until: Instant,
    ) -> Option<Box<InFlight>> {
        match answer {
            ClaimResult::Acquired {
                token,
                in_doubt,
                takeovers,
            } => {
                let key = claim.key;
                in_flight.lease.claimed(HeldClaim::new(key, token), until);
                let message = &in_flight.delivery.message;
                let decided = in_doubt.is_some_and(|starts| is_decided(message, starts));
                in_flight.takeovers = takeovers;
                let vain = &mut in_flight.marked_in_vain;
                // What is not the last by now is never told again.
                vain.retain(|token| in_doubt.is_some_and(|starts| starts.last == *token));
                let in_doubt = in_doubt.filter(|_| !decided && vain.is_empty());
                in_flight.next = Next::Run { in_doubt };
                return Some(in_flight);
            }
            ClaimResult::Completed { outcome } if self.on_duplicate.is_some() => {
                in_flight.next = Next::Replay(Outcome(outcome));
                return Some(in_flight);
            }
            ClaimResult::Completed { .. } => self.duplicate(in_flight),
            // It asks again when it is first in its lane. In both cases it keeps its place in the queue for the key.
            ClaimResult::InProgress { .. } if in_flight.in_lane() => return Some(in_flight),
            ClaimResult::InProgress { retry_in } => {
                self.postpone(in_flight, retry_in.max(BUSY_AT_LEAST))
            }
            ClaimResult::PayloadMismatch => {
                add(&self.counters.payload_mismatches, 1);
                in_flight.set_dead_letter(PAYLOAD_MISMATCH);
                return Some(in_flight);
            }
        }
        None
    }

    /// Another delivery is before it in the queue for its key: a message of a group waits in its lane, one that is first in its
    /// lane for the key.
    fn wait_for_key(&self, mut in_flight: Box<InFlight>) -> Option<Box<InFlight>> {
        let Some(place) = in_flight
            .key_place
            .as_ref()
            .filter(|_| !in_flight.in_lane())
        else {
            return Some(in_flight);
        };
        let ticket = place.ticket();
        in_flight.permit.stall();
        let mut first = self.keys.wait(ticket, in_flight)?;
        first.permit.resume();
        Some(first)
    }
}

fn is_first(in_flight: &InFlight) -> bool {
    in_flight.key_place.as_ref().is_some_and(KeyPlace::is_first)
}
