//! What becomes of a message in flight. Every stage calls these, and no stage calls another.
//!
//! | what happened | method | the message | its lane | its claim |
//! |---|---|---|---|---|
//! | its effect is recorded | `applied` | is acked | goes on | is a record |
//! | it took effect before | `duplicate` | is acked | goes on | none |
//! | its handler failed | `failed` | waits for its next attempt, or `dead_letter` | waits | is kept, or released |
//! | the handler cannot read it | `rejected` | `dead_letter`, or the pipeline ends | waits | is released |
//! | its run was cut off | `cancelled` | is claimed again, or `give_back` | waits | is forgotten |
//! | nobody knows whether its effect is recorded | `in_doubt` | is claimed again | waits | is forgotten |
//! | another transaction was in its way | `conflicted` | waits a moment and runs again | waits | is kept |
//! | its claim is not the newest | `fenced` | as `in_doubt` | waits | is another's |
//! | it has to wait | `postpone` | waits in place, or `give_back` | waits | is kept, or released |
//! | it goes back | `give_back` | is nacked, after all that waits behind it | ends | is released |
//! | it cannot be processed | `dead_letter` | is acked once its dead letter is confirmed | waits until then | is released |
//! | its dead letter was confirmed before | `ack_set_aside` | is acked | waits until then | is released |

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use crate::driver::{Disposition, Fenced, Ordering as GroupOrder, Printable};
use crate::handler::OnFailure;
use crate::{Error, ErrorKind, Failure};

use super::Mode;
use super::counters::add;
use super::engine::{Engine, FEW, ToSettle};
use super::in_flight::InFlight;
use super::lanes::LaneLock;
use super::retry::LONGEST_DELAY;

/// As many conflicts in a row are one failure.
const CONFLICTS: u32 = 50;
/// After the more of them it waits for longer, up to this power of two, in milliseconds.
const LONGEST_CONFLICT: u32 = 7;

/// Where a message waits, and for how long.
enum Wait {
    AtBroker(Duration),
    InPlace(Duration),
}

impl<Tx: Send + 'static> Engine<Tx> {
    /// The message took effect: its lane goes on, the broker is told.
    pub(crate) fn applied(&self, mut in_flight: Box<InFlight>) {
        add(&self.counters.applied, 1);
        in_flight.lease.forget_claim();
        in_flight.leave_key();
        in_flight.leave_lane();
        self.settle(in_flight, Disposition::Ack);
    }

    /// The message took effect before.
    pub(crate) fn duplicate(&self, mut in_flight: Box<InFlight>) {
        add(&self.counters.duplicates, 1);
        in_flight.leave_key();
        in_flight.leave_lane();
        self.settle(in_flight, Disposition::Ack);
    }

    /// Its lane waits until it is out of the queue: should it have to come back, nothing has overtaken it.
    pub(crate) fn dead_letter(&self, mut in_flight: Box<InFlight>, reason: impl Into<String>) {
        in_flight.leave_key();
        in_flight.permit.stall();
        let reason = self.with_doubt(&in_flight, Printable(reason.into()).to_string());
        let _ = self.stages.dead_letter.send((in_flight, reason));
    }

    /// Gives a message back, and with it, in order, all that waits behind it: they must not overtake it.
    pub(crate) fn give_back(&self, in_flight: Box<InFlight>, delay: Duration) {
        let mut rest = in_flight
            .lane
            .as_ref()
            .map(LaneLock::rest)
            .unwrap_or_default();
        if let Some(lane) = &in_flight.lane
            && in_flight.lease.connection_is_lost()
        {
            // The broker has taken back all of that connection; what the next one brought is in order.
            let (next, lost) = rest.into_iter().partition(|later| later.lease.leased());
            lane.put_back(next);
            rest = lost;
        }
        let later = rest.into_iter().rev().map(|later| (later, Duration::ZERO));
        let mut batch: Vec<_> = later.chain([(in_flight, delay)]).collect();
        for (in_flight, _) in &mut batch {
            self.record(in_flight);
        }
        add(&self.counters.given_back, batch.len());
        let _ = self.stages.give_back.send(batch);
    }

    /// Tries again later: in place where the delay is short or the broker could not keep the order, else by way of the
    /// broker.
    pub(crate) fn postpone(&self, in_flight: Box<InFlight>, delay: Duration) {
        self.put_off(in_flight, delay, self.options.retry.in_place);
    }

    /// As [`postpone`](Self::postpone); in place up to a delay of `in_place`.
    pub(crate) fn put_off(&self, in_flight: Box<InFlight>, delay: Duration, in_place: Duration) {
        match self.place_to_wait(&in_flight, delay.min(LONGEST_DELAY), in_place) {
            Wait::AtBroker(delay) => self.give_back(in_flight, delay),
            Wait::InPlace(delay) => self.lanes.wait(in_flight, Instant::now() + delay),
        }
    }

    fn place_to_wait(&self, in_flight: &InFlight, delay: Duration, in_place: Duration) -> Wait {
        let grouped = in_flight.lane.is_some();
        let broker_can = self.capabilities.delayed_nack
            && (!grouped || self.capabilities.ordering == GroupOrder::Group);
        let lease_can = self.capabilities.extend || in_flight.lease.lease_lasts(delay * 2);
        if broker_can && (delay > in_place || !lease_can) {
            return Wait::AtBroker(delay);
        }
        if lease_can {
            return Wait::InPlace(delay);
        }
        // A broker that is given a message back at once delivers it at once, again and again, until it gives up on it. So it
        // waits until half of its lease is left.
        match in_flight.lease.spare() {
            Duration::ZERO => Wait::AtBroker(Duration::ZERO),
            spare => Wait::InPlace(spare),
        }
    }

    /// What becomes of a message whose handler failed.
    pub(crate) fn failed(&self, mut in_flight: Box<InFlight>, failure: &Failure) {
        add(&self.counters.failed, 1);
        tracing::debug!(queue = &*self.queue, message_id = %in_flight.label(), error = %Printable(failure), "handler failed");
        let attempt = in_flight.attempt();
        let max = self.options.retry.max_attempts;
        if failure.then == OnFailure::Reject {
            return self.rejected(in_flight, failure);
        }
        self.readable.store(true, Ordering::Relaxed);
        let delay = match failure.then {
            OnFailure::DeadLetter | OnFailure::Reject => {
                return self.dead_letter(in_flight, failure.to_string());
            }
            _ if self.mode == Mode::AtMostOnce => {
                return self.dead_letter(in_flight, failure.to_string());
            }
            _ if attempt >= max => {
                let reason = format!("gave up after {attempt} attempts: {failure}");
                return self.dead_letter(in_flight, reason);
            }
            OnFailure::Retry => self.options.retry.delay(attempt),
            OnFailure::RetryAfter(delay) => delay,
        };
        add(&self.counters.retried, 1);
        self.record(&mut in_flight);
        in_flight.begun = false;
        in_flight.retries += 1;
        self.postpone(in_flight, delay);
    }

    /// One message that cannot be read is its producer's mistake. If the first ones all cannot be, the handler does not fit the
    /// queue, and it is better to stop than to dead-letter them all.
    fn rejected(&self, in_flight: Box<InFlight>, failure: &Failure) {
        let so_far = self.rejected.fetch_add(1, Ordering::Relaxed) + 1;
        if self.readable.load(Ordering::Relaxed) || so_far < FEW {
            return self.dead_letter(in_flight, failure.to_string());
        }
        let all = format!("the first {so_far} messages cannot be read by the handler: {failure}");
        self.fail(Error::config(all).on_queue(&*self.queue));
        self.give_back(in_flight, Duration::ZERO);
    }

    /// The handler was cut off, or must not start: lease or claim is at its end. A run that was cut off is an attempt.
    pub(crate) fn cancelled(&self, mut in_flight: Box<InFlight>) {
        add(&self.counters.cancelled, 1);
        let attempt = in_flight.attempt();
        if in_flight.begun {
            // A pipeline that stops is not the message's doing.
            if self.is_suspect(&in_flight) && !self.cancel.is_cancelled() {
                in_flight.doubt();
            }
            in_flight.marked_in_vain.clear();
            self.record(&mut in_flight);
            in_flight.begun = false;
            in_flight.retries += 1;
        }
        if in_flight.lease.can_start_again() {
            // It stays where it is: a broker may put what is given back behind what follows it.
            self.claim_again(in_flight, attempt);
        } else {
            self.give_back(in_flight, Duration::ZERO);
        }
    }

    /// Another transaction was in its way, and nothing of it happened. It runs again alone, and that is no attempt of it, unless it
    /// goes on like this.
    pub(crate) fn conflicted(&self, mut in_flight: Box<InFlight>, error: &Error) {
        add(&self.counters.conflicts, 1);
        in_flight.alone = true;
        in_flight.conflicts += 1;
        if in_flight.conflicts.is_multiple_of(CONFLICTS) {
            return self.failed(in_flight, &Failure::retry(error.clone()));
        }
        tracing::debug!(queue = &*self.queue, message_id = %in_flight.label(), %error, "a conflict; running it again");
        in_flight.begun = false;
        let longest = 1 << in_flight.conflicts.min(LONGEST_CONFLICT);
        let delay = Duration::from_millis(fastrand::u64(1..=longest));
        self.lanes.wait(in_flight, Instant::now() + delay);
    }

    /// The store does not know whether the effect was recorded: claim the message again and see.
    pub(crate) fn in_doubt(&self, in_flight: Box<InFlight>, error: &Error) {
        tracing::warn!(queue = &*self.queue, message_id = %in_flight.label(), %error, "effect not confirmed by the store");
        self.ask_whose(in_flight);
    }

    /// The store is asked whose the message is.
    fn ask_whose(&self, mut in_flight: Box<InFlight>) {
        // This worker has not died of it.
        if !(in_flight.begun && self.quarantines())
            && let Some(held) = in_flight.lease.held()
        {
            in_flight.marked_in_vain.push(held.token);
        }
        self.claim_again(in_flight, 1);
    }

    fn claim_again(&self, mut in_flight: Box<InFlight>, attempt: u32) {
        let held = in_flight.lease.forget_claim();
        let suspect = self.is_suspect(&in_flight) && !self.quarantines();
        in_flight.marked = held.filter(|_| suspect && in_flight.in_doubt().is_none());
        let delay = self.options.retry.delay(attempt);
        self.postpone(in_flight, delay);
    }

    pub(crate) fn completed(&self, in_flight: Box<InFlight>, verdict: Result<(), Fenced>) {
        match verdict {
            Ok(()) => self.applied(in_flight),
            Err(Fenced) => self.fenced(in_flight),
        }
    }

    /// Somebody else has taken the key over, or an earlier call had recorded it although its answer was lost: the store is
    /// asked again whose it is. Nothing is settled on the strength of this run.
    pub(crate) fn fenced(&self, in_flight: Box<InFlight>) {
        add(&self.counters.fenced, 1);
        // Two workers had one message, which is what the store is there for.
        tracing::debug!(queue = &*self.queue, message_id = %in_flight.label(), "fenced: somebody else has the message, or has done it");
        self.ask_whose(in_flight);
    }

    /// Tells the broker; where it was acked before it ran there is nothing left to do.
    pub(crate) fn settle(&self, in_flight: Box<InFlight>, disposition: Disposition) {
        if !in_flight.acked {
            let one = ToSettle::One(in_flight, disposition);
            let _ = self.stages.settle.send(one);
        }
    }

    /// The broker did not say whether it was settled: the message may come again.
    pub(crate) fn not_confirmed(&self, in_flight: &InFlight, error: &Error) {
        add(&self.counters.unknown, 1);
        tracing::warn!(queue = &*self.queue, message_id = %in_flight.label(), %error, "settlement not confirmed; the redelivery will be settled again");
    }

    /// Whether a dead letter of it is confirmed, and only its ack was lost.
    pub(crate) fn is_set_aside(&self, in_flight: &InFlight) -> bool {
        in_flight
            .broker_id()
            .is_some_and(|id| self.set_aside.get(id).is_some())
    }

    /// Acks what is set aside already.
    pub(crate) async fn ack_set_aside(&self, mut in_flight: Box<InFlight>) {
        in_flight.leave_key();
        self.drop_doubt(&mut in_flight);
        self.release(std::iter::once(&in_flight)).await;
        self.settle(in_flight, Disposition::Ack);
    }
}

pub(crate) fn fenced() -> Error {
    Error::new(
        ErrorKind::Store,
        "fenced: the claim is no longer the newest",
    )
    .retryable(true)
}
