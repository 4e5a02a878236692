use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep};

use crate::driver::{Claim, ClaimResult, HeldClaim, LookUp, Store, Transaction};
use crate::{Error, Outcome};

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
/// A look-up counts for as long as records are kept, and for no longer than this.
const LONGEST_LOOK_UP: Duration = Duration::from_secs(86_400);
const PAYLOAD_MISMATCH: &str =
    "payload mismatch: the dedup key was used before, for another payload";

type Arrived = UnboundedReceiver<Vec<Box<InFlight>>>;
type Heads = UnboundedReceiver<Box<InFlight>>;

/// What is asked of the store for one message.
enum Question {
    Claim(Claim),
    LookUp(Claim),
    None,
}

impl Question {
    fn claim(&self) -> Option<Claim> {
        match self {
            Self::Claim(claim) => Some(*claim),
            _ => None,
        }
    }

    fn look_up(&self) -> Option<Claim> {
        match self {
            Self::LookUp(claim) => Some(*claim),
            _ => None,
        }
    }
}

/// What it says, in the order of the questions.
struct Answers {
    claimed: Vec<ClaimResult>,
    looked_up: Vec<LookUp>,
}

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

impl<Tx: Transaction> Engine<Tx> {
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

    /// Claims or looks up the messages that are first in the queues for their keys; the others come along, to keep their
    /// places.
    async fn claim_batch(&self, store: &dyn Store, batch: Vec<Box<InFlight>>) {
        let mut backoff = Backoff::new();
        loop {
            let questions: Vec<_> = batch.iter().map(|one| self.question(one)).collect();
            let sent = Instant::now();
            let error = match self.ask(store, &questions).await {
                Ok(answers) => return self.answered_all(batch, &questions, answers, sent),
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

    /// What to ask for this message: nothing if another is before it in the queue for its key, or if its lease has ended. It
    /// goes to its lane then, to be given back with those behind it.
    fn question(&self, in_flight: &InFlight) -> Question {
        match in_flight.claim {
            Some(claim) if is_first(in_flight) && in_flight.lease.leased() => {
                match self.looks_up(in_flight) {
                    true => Question::LookUp(claim),
                    false => Question::Claim(claim),
                }
            }
            _ => Question::None,
        }
    }

    /// In a transaction the record alone keeps an effect from happening twice, so that a claim would be one more write. It is
    /// needed for what may have killed its workers: by claims that expire the store counts them, where the broker does not.
    fn looks_up(&self, in_flight: &InFlight) -> bool {
        let delivery = &in_flight.delivery;
        let counted = delivery.attempt.is_some() || delivery.is_first;
        let suspect = in_flight.must_claim || self.is_suspect(in_flight);
        self.transactions.is_some() && counted && !suspect
    }

    async fn ask(&self, store: &dyn Store, questions: &[Question]) -> Result<Answers, Error> {
        let claims: Vec<_> = questions.iter().filter_map(Question::claim).collect();
        let keys: Vec<_> = questions.iter().filter_map(Question::look_up).collect();
        let (mut claimed, mut looked_up) = (Vec::new(), Vec::new());
        if let Some(store) = self.transactions.as_ref().filter(|_| !keys.is_empty()) {
            looked_up = self.within(store.look_up(&keys)).await?;
        }
        if !claims.is_empty() {
            let lease = self.options.claim_lease;
            claimed = self.within(store.claim(self.owner, &claims, lease)).await?;
        }
        Ok(Answers { claimed, looked_up })
    }

    fn answered_all(
        &self,
        batch: Vec<Box<InFlight>>,
        questions: &[Question],
        answers: Answers,
        sent: Instant,
    ) {
        let mut claimed = answers.claimed.into_iter();
        let mut looked_up = answers.looked_up.into_iter();
        let mut go_on = Vec::with_capacity(batch.len());
        for (in_flight, question) in batch.into_iter().zip(questions) {
            let claimed = question
                .claim()
                .and_then(|claim| Some((claim, claimed.next()?)));
            let looked_up = question.look_up().and_then(|_| looked_up.next());
            go_on.extend(match (claimed, looked_up) {
                (Some((claim, answer)), _) => self.claimed(in_flight, claim, answer, sent),
                (_, Some(answer)) => self.looked_up(in_flight, answer, sent),
                (None, None) => self.wait_for_key(in_flight),
            });
        }
        self.lanes.push(go_on);
    }

    /// What the answer to a look-up means; returns the message if it goes on to its lane.
    fn looked_up(
        &self,
        mut in_flight: Box<InFlight>,
        answer: LookUp,
        sent: Instant,
    ) -> Option<Box<InFlight>> {
        match answer {
            LookUp::New(looked_up) => {
                let until = sent + self.options.dedup_retention.min(LONGEST_LOOK_UP);
                in_flight.lease.may_run(looked_up, until);
                Some(in_flight)
            }
            LookUp::Completed { outcome } => self.took_effect(in_flight, outcome),
            // On its way to its lane it asks again.
            LookUp::Claimed => {
                in_flight.must_claim = true;
                Some(in_flight)
            }
            LookUp::PayloadMismatch => self.mismatch(in_flight),
        }
    }

    /// What the answer to a claim means; returns the message if it goes on to its lane.
    fn claimed(
        &self,
        mut in_flight: Box<InFlight>,
        claim: Claim,
        answer: ClaimResult,
        sent: Instant,
    ) -> Option<Box<InFlight>> {
        match answer {
            ClaimResult::Acquired {
                token,
                in_doubt,
                takeovers,
            } => {
                let key = claim.key;
                let until = sent + self.options.claim_lease;
                in_flight.lease.may_run(HeldClaim::new(key, token), until);
                let message = &in_flight.delivery.message;
                let decided = in_doubt.is_some_and(|starts| is_decided(message, starts));
                in_flight.takeovers = takeovers;
                let vain = &mut in_flight.marked_in_vain;
                // What is not the last by now is never told again.
                vain.retain(|token| in_doubt.is_some_and(|starts| starts.last == *token));
                let in_doubt = in_doubt.filter(|_| !decided && vain.is_empty());
                in_flight.next = Next::Run { in_doubt };
                Some(in_flight)
            }
            ClaimResult::Completed { outcome } => self.took_effect(in_flight, outcome),
            // It asks again when it is first in its lane. In both cases it keeps its place in the queue for the key.
            ClaimResult::InProgress { .. } if in_flight.in_lane() => Some(in_flight),
            ClaimResult::InProgress { retry_in } => {
                self.postpone(in_flight, retry_in.max(BUSY_AT_LEAST));
                None
            }
            ClaimResult::PayloadMismatch => self.mismatch(in_flight),
        }
    }

    fn took_effect(
        &self,
        mut in_flight: Box<InFlight>,
        outcome: Option<Bytes>,
    ) -> Option<Box<InFlight>> {
        if self.on_duplicate.is_some() {
            in_flight.next = Next::Replay(Outcome(outcome));
            return Some(in_flight);
        }
        self.duplicate(in_flight);
        None
    }

    fn mismatch(&self, mut in_flight: Box<InFlight>) -> Option<Box<InFlight>> {
        add(&self.counters.payload_mismatches, 1);
        in_flight.set_dead_letter(PAYLOAD_MISMATCH);
        Some(in_flight)
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
