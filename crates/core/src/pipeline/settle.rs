use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::Error;
use crate::driver::{Disposition, HeldClaim, SettleResult, Settlement};

use super::backoff::Backoff;
use super::counters::add;
use super::engine::{Confirm, Engine};
use super::in_flight::InFlight;

/// At most so many settlements are taken up at once.
const BATCH: usize = 1_000;
/// Settlements that do not fill a request wait for more, but no longer than this: little beside the request's own time.
const FILL_WAIT: Duration = Duration::from_millis(5);

type Settling = Vec<(Box<InFlight>, Disposition)>;

impl<Tx: Send + 'static> Engine<Tx> {
    /// The last stage: settles whatever waits, in batches. What is worth another try holds up nothing else.
    pub(crate) async fn settle_stage(
        &self,
        mut receiver: UnboundedReceiver<(Box<InFlight>, Disposition)>,
    ) {
        let mut backoff = Backoff::new();
        let (mut waiting, mut again) = (Vec::new(), Vec::new());
        let mut due = Instant::now();
        loop {
            tokio::select! {
                biased;
                () = sleep_until(due), if !again.is_empty() => {
                    waiting.splice(..0, again.drain(..));
                }
                more = self.gather(&mut receiver, &mut waiting) => if !more {
                    return;
                },
            }
            let batch = self.requests(&mut waiting);
            let failed = self.settle_batch(batch).await;
            if failed.is_empty() && again.is_empty() {
                backoff.reset();
            } else if again.is_empty() {
                due = Instant::now() + backoff.next();
            }
            again.extend(failed);
        }
    }

    /// Waits until something is to be settled, and where that fills no request and more may follow, a moment longer.
    /// `false` when nothing will come any more.
    async fn gather(
        &self,
        receiver: &mut UnboundedReceiver<(Box<InFlight>, Disposition)>,
        waiting: &mut Settling,
    ) -> bool {
        if waiting.is_empty() && receiver.recv_many(waiting, BATCH).await == 0 {
            return false;
        }
        let filled = async {
            while waiting.len() < self.request()
                && waiting.len() < self.budget.held()
                && receiver.recv_many(waiting, BATCH).await > 0
            {}
        };
        let _ = timeout(FILL_WAIT, filled).await;
        true
    }

    /// How many settlements fill a request.
    fn request(&self) -> usize {
        self.capabilities.settle_batch.unwrap_or(1).max(1)
    }

    /// Takes out what fills whole requests, from the front; all, if that does not fill one.
    fn requests(&self, waiting: &mut Settling) -> Settling {
        let tail = match waiting.len() {
            few if few < self.request() => 0,
            many => many % self.request(),
        };
        let tail = waiting.split_off(waiting.len() - tail);
        std::mem::replace(waiting, tail)
    }

    /// Settles once and returns what is worth another try.
    async fn settle_batch(&self, mut batch: Settling) -> Settling {
        // The broker may have given a delivery whose lease has ended to someone else; some brokers would let us settle it
        // all the same.
        let lost = batch.extract_if(.., |(in_flight, _)| !in_flight.lease.leased());
        for (in_flight, disposition) in lost {
            add(&self.counters.lease_lost, 1);
            self.not_settled(in_flight, &disposition);
        }
        if batch.is_empty() {
            return batch;
        }
        let (messages, settlements): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .map(|(in_flight, disposition)| {
                let receipt = in_flight.delivery.receipt.clone();
                (
                    in_flight,
                    Settlement {
                        receipt,
                        disposition,
                    },
                )
            })
            .unzip();
        let answers = self.source.settle(&settlements).await;
        let mut again = Vec::new();
        let mut applied = 0;
        for ((mut in_flight, settlement), answer) in
            messages.into_iter().zip(settlements).zip(answers)
        {
            if answer.is_applied() {
                self.settled(&in_flight, &settlement.disposition);
            }
            match answer {
                SettleResult::Applied => applied += 1,
                SettleResult::LeaseLost => {
                    add(&self.counters.lease_lost, 1);
                    self.not_settled(in_flight, &settlement.disposition);
                }
                SettleResult::Unknown(error) if in_flight.may_settle_again(&error) => {
                    again.push((in_flight, settlement.disposition));
                }
                SettleResult::Unknown(error) => {
                    self.unknown(&in_flight, &error);
                    self.not_settled(in_flight, &settlement.disposition);
                }
            }
        }
        add(&self.counters.settled, applied);
        again
    }

    /// It may come again. If it holds its lane it is a dead letter, which has no record and would run: what waits behind it
    /// goes back too.
    fn not_settled(&self, in_flight: Box<InFlight>, disposition: &Disposition) {
        if in_flight.lane.is_some() && !matches!(disposition, Disposition::Nack { .. }) {
            self.give_back(in_flight, Duration::ZERO);
        }
    }

    fn unknown(&self, in_flight: &InFlight, error: &Error) {
        add(&self.counters.unknown, 1);
        tracing::warn!(queue = &*self.queue, message_id = %in_flight.label(), %error, "settlement not confirmed; the redelivery will be settled again");
    }

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
            for (in_flight, delay) in batch {
                if !(source_does && delay.is_zero()) {
                    self.settle(in_flight, Disposition::Nack { delay });
                }
            }
        }
    }

    /// Gives claims up. A claim that cannot be released ends by itself, and one in doubt is left to: releasing it would
    /// release the doubt.
    pub(crate) async fn release(&self, messages: impl Iterator<Item = &Box<InFlight>>) {
        let held: Vec<HeldClaim> = messages
            .filter_map(|in_flight| {
                let held = in_flight.lease.unclaim().or(in_flight.marked);
                held.filter(|_| !self.keeps_doubt(in_flight))
            })
            .collect();
        if let Some(store) = self.store.as_ref().filter(|_| !held.is_empty())
            && let Err(error) = self.within(store.release(&held)).await
        {
            tracing::warn!(queue = &*self.queue, %error, "claims not released; they end by themselves");
        }
    }

    /// The first stage of `at_most_once`: the broker confirms the ack before the handler may start.
    pub(crate) async fn confirm_stage(&self, mut receiver: UnboundedReceiver<Confirm>) {
        let mut backoff = Backoff::new();
        let mut batch = Vec::new();
        while !batch.is_empty() || receiver.recv_many(&mut batch, BATCH).await > 0 {
            batch = self.confirm_batch(batch).await;
            if batch.is_empty() {
                backoff.reset();
            } else {
                sleep(backoff.next()).await;
            }
        }
    }

    /// Acks once, lets run what the broker confirmed, and returns what is worth another try.
    async fn confirm_batch(&self, batch: Vec<Confirm>) -> Vec<Confirm> {
        let (batch, ended): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .partition(|(in_flight, _)| in_flight.lease.leased());
        for (in_flight, _) in ended {
            self.cancelled(in_flight);
        }
        let acks: Vec<Settlement> = batch
            .iter()
            .map(|(in_flight, _)| Settlement {
                receipt: in_flight.delivery.receipt.clone(),
                disposition: Disposition::Ack,
            })
            .collect();
        let answers = match acks.is_empty() {
            true => Vec::new(),
            false => self.source.settle(&acks).await,
        };
        let mut again = Vec::new();
        for ((mut in_flight, waiter), answer) in batch.into_iter().zip(answers) {
            match answer {
                SettleResult::Applied => {
                    add(&self.counters.settled, 1);
                    in_flight.acked = true;
                    let _ = waiter.send(in_flight);
                }
                SettleResult::LeaseLost => add(&self.counters.lease_lost, 1),
                SettleResult::Unknown(error) if in_flight.may_settle_again(&error) => {
                    again.push((in_flight, waiter));
                }
                // The broker may have forgotten the message, so it must not run: this mode's loss.
                SettleResult::Unknown(error) => self.unknown(&in_flight, &error),
            }
        }
        again
    }
}
