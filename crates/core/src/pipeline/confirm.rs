use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::sleep;

use crate::driver::{Disposition, SettleResult, Settlement};

use super::backoff::Backoff;
use super::counters::add;
use super::engine::{Confirm, Engine};

/// At most this number of messages are acked at once.
const BATCH: usize = 1_000;

impl<Tx: Send + 'static> Engine<Tx> {
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
            .map(|(in_flight, _)| {
                Settlement::new(in_flight.delivery.receipt.clone(), Disposition::Ack)
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
                SettleResult::Unknown(error) => self.not_confirmed(&in_flight, &error),
            }
        }
        again
    }
}
