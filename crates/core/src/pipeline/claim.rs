use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep};

use crate::{Claim, Claimed, Held, Outcome, Store};

use super::backoff::Backoff;
use super::counters::add;
use super::doubt::is_decided;
use super::engine::Engine;
use super::in_flight::Flight;
use super::keys::KeyPlace;

/// At most so many claims in one call to the store.
const BATCH: usize = 1_000;
/// A store whose answer says "busy for no time" is asked again after this.
const BUSY_AT_LEAST: Duration = Duration::from_millis(10);
const CONFLICT: &str = "conflict: the dedup key was used before, for another payload";

type Arrived = UnboundedReceiver<Vec<Flight>>;
type Heads = UnboundedReceiver<Flight>;

/// Takes whatever waits: batches that have just come, then heads of lanes that have no claim yet.
async fn next_batch(arrived: &mut Arrived, heads: &mut Heads) -> Option<Vec<Flight>> {
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
            for flight in &mut batch {
                if let Some(claim) = flight.claim {
                    let place = &mut flight.key_place;
                    place.get_or_insert_with(|| self.keys.queue(claim.key));
                }
            }
            self.claim_batch(store, batch).await;
        }
    }

    /// Claims the messages that are first in the queues for their keys; the others come along, to keep their places.
    async fn claim_batch(&self, store: &dyn Store, batch: Vec<Flight>) {
        let mut backoff = Backoff::new();
        loop {
            // One whose lease has ended goes to its lane without a claim, to be given back with those behind it.
            let may_claim = |flight: &Flight| is_first(flight) && flight.lease.leased();
            let first: Vec<bool> = batch.iter().map(may_claim).collect();
            let wanted = batch.iter().zip(&first).filter(|(_, first)| **first);
            let claims: Vec<Claim> = wanted.filter_map(|(flight, _)| flight.claim).collect();
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
                    return last_first.for_each(|flight| self.give_back(flight, Duration::ZERO));
                }
                () = sleep(backoff.next()) => {}
            }
        }
    }

    fn claimed(&self, batch: Vec<Flight>, first: &[bool], answers: Vec<Claimed>, until: Instant) {
        let mut answers = answers.into_iter();
        let mut go_on = Vec::with_capacity(batch.len());
        for (flight, first) in batch.into_iter().zip(first) {
            let answer = match flight.claim {
                Some(claim) if *first => answers.next().map(|answer| (claim, answer)),
                _ => None,
            };
            go_on.extend(match answer {
                Some((claim, answer)) => self.answered(flight, claim, answer, until),
                None => self.wait_for_key(flight),
            });
        }
        self.lanes.push(go_on);
    }

    /// What the store's answer means; returns the flight if it goes on to its lane.
    fn answered(
        &self,
        mut flight: Flight,
        claim: Claim,
        answer: Claimed,
        until: Instant,
    ) -> Option<Flight> {
        match answer {
            Claimed::New {
                token,
                uncertain,
                takeovers,
            } => {
                let key = claim.key;
                flight.lease.claimed(Held { key, token }, until);
                let message = &flight.delivery.message;
                let decided = uncertain.is_some_and(|starts| is_decided(message, starts));
                flight.takeovers = takeovers;
                let vain = &mut flight.marked_in_vain;
                // What is not the last by now is never told again.
                vain.retain(|token| uncertain.is_some_and(|starts| starts.last == *token));
                flight.uncertain = uncertain.filter(|_| !decided && vain.is_empty());
                return Some(flight);
            }
            Claimed::Done { outcome } if self.on_duplicate.is_some() => {
                flight.replay = Some(Outcome(outcome));
                return Some(flight);
            }
            Claimed::Done { .. } => self.duplicate(flight),
            // It asks again when its turn comes. In both cases it keeps its place in the queue for the key.
            Claimed::Busy { .. } if flight.in_lane() => return Some(flight),
            Claimed::Busy { retry_in } => self.postpone(flight, retry_in.max(BUSY_AT_LEAST)),
            Claimed::Conflict => {
                add(&self.counters.conflicts, 1);
                flight.doomed = Some(CONFLICT.into());
                return Some(flight);
            }
        }
        None
    }

    /// Another delivery is before it in the queue for its key: a message of a group waits in its lane, one whose turn it
    /// is for the key.
    fn wait_for_key(&self, flight: Flight) -> Option<Flight> {
        match flight.in_lane() {
            true => Some(flight),
            false => self.keys.wait(flight),
        }
    }
}

fn is_first(flight: &Flight) -> bool {
    flight.key_place.as_ref().is_some_and(KeyPlace::is_first)
}
