use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{RwLock, oneshot};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::driver::{
    Capabilities, Claim, Completion, Delivery, Disposition, Fingerprint, KeyDigest,
    Ordering as GroupOrder, Owner, Printable, Scope, Sink, Source, Store, TransactionalStore,
};
use crate::handler::Parts;
use crate::handler::{Callable, OnFailure, States};
use crate::{Context, DedupKey, Error, ErrorKind, Failure, Outcome};

use super::Mode;
use super::attempts::{Attempts, Before};
use super::budget::Budget;
use super::builder::OnDuplicate;
use super::counters::{Counters, add};
use super::in_flight::{InFlight, LeaseState};
use super::keys::Keys;
use super::lanes::{LaneLock, Lanes};
use super::lease_renewer::LeaseRenewer;
use super::options::{InDoubt, Options};
use super::retry::LONGEST_DELAY;
use super::set_aside::SetAside;

/// So many messages that cannot be told apart or read, and none that can, are no exceptions.
pub(crate) const FEW: usize = 10;

/// The ways out of a stage and into the next. The channels have no bound of their own: each item carries its share of
/// the [`Budget`].
pub(crate) struct Stages {
    /// A batch that has just come.
    pub(crate) arrived: UnboundedSender<Vec<Box<InFlight>>>,
    /// Ack now, and hand back what the broker confirmed.
    pub(crate) confirm: UnboundedSender<Confirm>,
    pub(crate) complete: UnboundedSender<(Box<InFlight>, Outcome)>,
    pub(crate) settle: UnboundedSender<(Box<InFlight>, Disposition)>,
    /// Release the claim, then nack with this delay; in the order given.
    pub(crate) give_back: UnboundedSender<Vec<(Box<InFlight>, Duration)>>,
    pub(crate) dead_letter: UnboundedSender<(Box<InFlight>, String)>,
}

/// A message in flight to be acked before it runs, and who waits for it.
pub(crate) type Confirm = (Box<InFlight>, oneshot::Sender<Box<InFlight>>);

/// What all stages share.
pub(crate) struct Engine<Tx> {
    pub(crate) mode: Mode,
    pub(crate) options: Options,
    pub(crate) source: Arc<dyn Source>,
    pub(crate) capabilities: Capabilities,
    /// The source's lease, where it has one that ends by the clock.
    pub(crate) lease: Option<Duration>,
    pub(crate) store: Option<Arc<dyn Store>>,
    pub(crate) transactions: Option<Arc<dyn TransactionalStore<Tx = Tx>>>,
    pub(crate) sink: Option<Arc<dyn Sink>>,
    pub(crate) handler: Callable<Tx>,
    /// For people.
    pub(crate) handler_name: &'static str,
    pub(crate) on_duplicate: Option<OnDuplicate>,
    pub(crate) states: States,
    pub(crate) owner: Owner,
    pub(crate) scope: Scope,
    pub(crate) queue: Arc<str>,
    pub(crate) consumer: Arc<str>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) keys: Arc<Keys>,
    pub(crate) renewer: Arc<LeaseRenewer>,
    pub(crate) attempts: Attempts,
    pub(crate) set_aside: SetAside,
    /// Held by all that run: by one alone, or by any number.
    pub(crate) running: RwLock<()>,
    pub(crate) lanes: Arc<Lanes>,
    pub(crate) stages: Stages,
    /// Stop receiving.
    pub(crate) stop: CancellationToken,
    /// Stop handlers too.
    pub(crate) cancel: CancellationToken,
    /// What made the pipeline stop, if something did.
    pub(crate) fatal: Mutex<Option<Error>>,
    pub(crate) arrivals: AtomicU64,
    /// Messages that the handler could not read.
    pub(crate) rejected: AtomicUsize,
    /// Whether it could read one.
    pub(crate) readable: AtomicBool,
    /// Mean duration of a handler, in nanoseconds; zero until one has ended.
    pub(crate) handler_nanos: AtomicU64,
}

impl<Tx: Send + 'static> Engine<Tx> {
    /// Takes a delivery in and gives it its place in the budget.
    pub(crate) fn admit(&self, delivery: Delivery, key: Option<DedupKey>) -> Box<InFlight> {
        let message = &delivery.message;
        let claim = match (&key, &self.store) {
            (Some(key), Some(_)) => Some(Claim {
                key: KeyDigest::new(&self.scope, key),
                fingerprint: Fingerprint::of(&message.body),
            }),
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
            retries: 0,
            begun: false,
            before: Before::default(),
            recorded: None,
            unsettled: 0,
            acked: false,
            takeovers: 0,
            alone: false,
            in_doubt: None,
            marked_in_vain: Vec::new(),
            marked: None,
            replay: None,
            doomed: None,
            lane: None,
            key_place: None,
            _renewal: kept,
            lease,
            permit: self.budget.take(message.size()),
            delivery,
        })
    }

    /// Settles which attempt the next run is. Only when it is about to begin: an earlier delivery may have ended after this
    /// one came.
    pub(crate) fn number(&self, in_flight: &mut InFlight) {
        let delivery = (in_flight.seq, in_flight.delivery.attempt);
        let before = in_flight.id().map(|id| self.attempts.before(id, delivery));
        in_flight.before = before.unwrap_or_default();
    }

    /// A run begins.
    pub(crate) fn begin(&self, in_flight: &mut InFlight) {
        self.number(in_flight);
        in_flight.begun = true;
        // The first run counts as its delivery, whatever becomes of it.
        if in_flight.retries > 0 {
            self.record(in_flight);
        }
    }

    /// Records the runs for a later delivery. A lease can end, and the message be delivered again, long before this
    /// delivery is at its end here; so they are recorded as they are made, and not again when another has followed.
    fn record(&self, in_flight: &mut InFlight) {
        let runs = in_flight.runs();
        if let Some(id) = in_flight.id()
            && in_flight.recorded != Some(runs)
        {
            let delivery = (in_flight.seq, in_flight.delivery.attempt);
            self.attempts.record(id, delivery, runs);
            in_flight.recorded = Some(runs);
        }
    }

    pub(crate) fn parts(&self, in_flight: &InFlight) -> Parts {
        Parts {
            message: in_flight.delivery.message.clone(),
            context: Context {
                queue: self.queue.clone(),
                consumer: self.consumer.clone(),
                key: in_flight.key.clone(),
                attempt: in_flight.attempt(),
            },
            native: Some(in_flight.delivery.receipt.clone()),
            states: self.states.clone(),
        }
    }

    pub(crate) fn completion(&self, in_flight: &InFlight, outcome: Outcome) -> Option<Completion> {
        Some(Completion {
            held: in_flight.lease.held()?,
            fingerprint: in_flight.claim?.fingerprint,
            outcome: outcome.0,
            retention: self.options.dedup_retention,
        })
    }

    /// A call to the store, with an end: half a claim's lease.
    pub(crate) async fn within<T>(
        &self,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let limit = self.options.claim_lease / 2;
        timeout(limit, call).await.unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Timeout,
                format!("the store did not answer within {limit:?}"),
            ))
        })
    }

    /// Ends the pipeline with `error`, after a drain. The first error counts.
    pub(crate) fn fail(&self, error: Error) {
        tracing::error!(queue = &*self.queue, %error, "stopping");
        let mut fatal = self.fatal.lock().unwrap_or_else(PoisonError::into_inner);
        fatal.get_or_insert(error);
        drop(fatal);
        self.stop.cancel();
    }

    /// Tells the broker; where it was acked before it ran there is nothing left to do.
    pub(crate) fn settle(&self, in_flight: Box<InFlight>, disposition: Disposition) {
        if !in_flight.acked {
            let _ = self.stages.settle.send((in_flight, disposition));
        }
    }

    /// The broker has done with it what it was told.
    pub(crate) fn settled(&self, in_flight: &InFlight, disposition: &Disposition) {
        let returns = matches!(disposition, Disposition::Nack { .. });
        let known =
            in_flight.recorded.is_some() || in_flight.before.runs > 0 || in_flight.count() > 1;
        if let Some(id) = in_flight.id()
            && known
            && !returns
        {
            self.attempts.forget(id);
        }
        if let Some(id) = in_flight.broker_id()
            && self.capabilities.confirms_settle
            && !returns
        {
            self.set_aside.forget(id);
        }
    }

    /// The message took effect: its lane goes on, the broker is told.
    pub(crate) fn applied(&self, mut in_flight: Box<InFlight>) {
        add(&self.counters.applied, 1);
        in_flight.lease.unclaim();
        in_flight.key_place = None;
        in_flight.lane = None;
        self.settle(in_flight, Disposition::Ack);
    }

    /// The message took effect before.
    pub(crate) fn duplicate(&self, mut in_flight: Box<InFlight>) {
        add(&self.counters.duplicates, 1);
        in_flight.key_place = None;
        in_flight.lane = None;
        self.settle(in_flight, Disposition::Ack);
    }

    /// Its lane waits until it is out of the queue: should it have to come back, nothing has overtaken it.
    pub(crate) fn dead_letter(&self, mut in_flight: Box<InFlight>, reason: impl Into<String>) {
        in_flight.key_place = None;
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
        let delay = delay.min(LONGEST_DELAY);
        let grouped = in_flight.lane.is_some();
        let broker_can = self.capabilities.delayed_nack
            && (!grouped || self.capabilities.ordering == GroupOrder::Group);
        let lease_can = self.capabilities.extend || in_flight.lease.lease_lasts(delay * 2);
        // Where neither can wait for so long, it waits for as long as the lease lets it: a broker that is given a message back
        // at once delivers it at once, again and again, until it gives up on it.
        let spare = in_flight.lease.spare();
        if broker_can && (delay > in_place || !lease_can) {
            self.give_back(in_flight, delay);
        } else if lease_can {
            self.lanes.wait(in_flight, Instant::now() + delay);
        } else if spare.is_zero() {
            self.give_back(in_flight, Duration::ZERO);
        } else {
            self.lanes.wait(in_flight, Instant::now() + spare);
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

    /// Whether a handler that may have produced its effect keeps its message from being run again.
    pub(crate) fn quarantines(&self) -> bool {
        self.mode == Mode::Idempotent && self.options.on_in_doubt == InDoubt::Quarantine
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

    /// The store does not know whether the effect was recorded: claim the message again and see.
    pub(crate) fn in_doubt(&self, mut in_flight: Box<InFlight>, error: &Error) {
        tracing::warn!(queue = &*self.queue, message_id = %in_flight.label(), %error, "effect not confirmed by the store");
        // This worker has not died of it.
        if !(in_flight.begun && self.quarantines())
            && let Some(held) = in_flight.lease.held()
        {
            in_flight.marked_in_vain.push(held.token);
        }
        self.claim_again(in_flight, 1);
    }

    fn claim_again(&self, mut in_flight: Box<InFlight>, attempt: u32) {
        let held = in_flight.lease.unclaim();
        let suspect = self.is_suspect(&in_flight) && !self.quarantines();
        in_flight.marked = held.filter(|_| suspect && in_flight.in_doubt.is_none());
        let delay = self.options.retry.delay(attempt);
        self.postpone(in_flight, delay);
    }
}
