use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep_until, timeout};

use crate::driver::{Disposition, SettleResult, Settlement};

use super::backoff::Backoff;
use super::counters::add;
use super::engine::{Engine, ToSettle};
use super::in_flight::InFlight;

/// At most this many settlements are taken up at once.
const BATCH: usize = 1_000;
/// Settlements that do not fill a request wait for more, but no longer than this: little beside the request's own time.
const FILL_WAIT: Duration = Duration::from_millis(5);

type Settling = Vec<(Box<InFlight>, Disposition)>;

/// Waits for something to settle and takes up what is there; `false` when nothing will come any more.
async fn take_up(receiver: &mut UnboundedReceiver<ToSettle>, waiting: &mut Settling) -> bool {
    let mut more = Vec::new();
    let came = receiver.recv_many(&mut more, BATCH).await > 0;
    for one in more {
        match one {
            ToSettle::One(in_flight, disposition) => waiting.push((in_flight, disposition)),
            ToSettle::Together(all) => waiting.extend(all),
        }
    }
    came
}

impl<Tx: Send + 'static> Engine<Tx> {
    /// The last stage: settles whatever waits, in batches. What is worth another try holds up nothing else.
    pub(crate) async fn settle_stage(&self, mut receiver: UnboundedReceiver<ToSettle>) {
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
        receiver: &mut UnboundedReceiver<ToSettle>,
        waiting: &mut Settling,
    ) -> bool {
        if waiting.is_empty() && !take_up(receiver, waiting).await {
            return false;
        }
        let filled = async {
            while waiting.len() < self.request()
                && waiting.len() < self.budget.held()
                && take_up(receiver, waiting).await
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
                (in_flight, Settlement::new(receipt, disposition))
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
                    self.not_confirmed(&in_flight, &error);
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

    /// The broker has done with it what it was told.
    fn settled(&self, in_flight: &InFlight, disposition: &Disposition) {
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
            && self.capabilities.acks.confirms()
            && !returns
        {
            self.set_aside.remove(id);
        }
    }
}
