use std::collections::HashSet;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::sleep;

use crate::attributes::{
    DEAD_LETTER_ATTEMPTS, DEAD_LETTER_CONSUMER, DEAD_LETTER_QUEUE, DEAD_LETTER_REASON,
};
use crate::driver::{Disposition, Sink};
use crate::{Error, Message};

use super::backoff::Backoff;
use super::counters::add;
use super::engine::Engine;
use super::in_flight::InFlight;

/// At most this many dead letters in one call to the sink.
const BATCH: usize = 100;

type Dead = Vec<(Box<InFlight>, String)>;

impl<Tx: Send + 'static> Engine<Tx> {
    /// Moves messages to the dead-letter queue: confirmed there before they are acked here. No record is kept of them
    /// in the store, so that a redrive runs them again.
    pub(crate) async fn dead_letter_stage(
        &self,
        mut receiver: UnboundedReceiver<(Box<InFlight>, String)>,
    ) {
        let mut batch = Vec::new();
        while receiver.recv_many(&mut batch, BATCH).await > 0 {
            let batch = self.not_set_aside(std::mem::take(&mut batch)).await;
            match self.sink.clone() {
                Some(sink) => self.publish_dead(&*sink, batch).await,
                None => self.dead_letter_at_source(batch).await,
            }
        }
    }

    /// Acks what has its dead letter already, however it came here: what has no key, for instance, does not come by a worker.
    async fn not_set_aside(&self, batch: Dead) -> Dead {
        let mut rest: Dead = Vec::with_capacity(batch.len());
        let mut ids = HashSet::new();
        for (in_flight, reason) in batch {
            let id = in_flight.broker_id().map(str::to_owned);
            if self.is_set_aside(&in_flight) {
                self.ack_set_aside(in_flight).await;
            } else if id.is_none_or(|id| ids.insert(id)) {
                rest.push((in_flight, reason));
            } else {
                // Two deliveries of one message: this one is seen again when the other has its dead letter.
                let _ = self.stages.dead_letter.send((in_flight, reason));
            }
        }
        rest
    }

    async fn publish_dead(&self, sink: &dyn Sink, mut batch: Dead) {
        let mut backoff = Backoff::new();
        loop {
            self.give_back_lost(&mut batch);
            if batch.is_empty() {
                return;
            }
            let letters: Vec<Message> = batch.iter().map(|dead| self.letter(dead)).collect();
            let results = sink.publish(&letters).await;
            let mut again = Vec::new();
            let mut confirmed = Vec::new();
            for ((in_flight, reason), result) in batch.into_iter().zip(results) {
                match result {
                    Ok(()) => confirmed.push((in_flight, reason)),
                    Err(error) if error.is_retryable() && in_flight.lease.leased() => {
                        tracing::warn!(queue = sink.name(), message_id = %in_flight.label(), %error, "dead letter not confirmed; trying again");
                        again.push((in_flight, reason));
                    }
                    Err(error) => self.not_dead_lettered(in_flight, reason, &error),
                }
            }
            for id in confirmed.iter().filter_map(|(dead, _)| dead.broker_id()) {
                self.set_aside.insert(id, ());
            }
            self.dead_lettered(confirmed, |_| Disposition::Ack).await;
            batch = again;
            if !batch.is_empty() {
                sleep(backoff.next()).await;
            }
        }
    }

    /// Another delivery of what is not leased any more may have left its dead letter.
    fn give_back_lost(&self, batch: &mut Dead) {
        for (in_flight, _) in batch.extract_if(.., |(one, _)| !one.acked && !one.lease.leased()) {
            self.give_back(in_flight, Duration::ZERO);
        }
    }

    async fn dead_letter_at_source(&self, batch: Dead) {
        let can = self.capabilities.dead_letter;
        let (here, nowhere): (Dead, Dead) = batch
            .into_iter()
            .partition(|(in_flight, _)| can && !in_flight.acked);
        for (in_flight, reason) in nowhere {
            let error = Error::config("there is no dead-letter queue");
            self.not_dead_lettered(in_flight, reason, &error);
        }
        self.dead_lettered(here, |reason| Disposition::DeadLetter { reason })
            .await;
    }

    async fn dead_lettered(&self, mut batch: Dead, disposition: impl Fn(String) -> Disposition) {
        add(&self.counters.dead_lettered, batch.len());
        for (in_flight, _) in &mut batch {
            self.drop_doubt(in_flight);
        }
        self.release(batch.iter().map(|(in_flight, _)| in_flight))
            .await;
        for (in_flight, reason) in batch {
            tracing::warn!(queue = &*self.queue, message_id = %in_flight.label(), %reason, "dead-lettered");
            self.settle(in_flight, disposition(reason));
        }
    }

    /// The message stays where it is, kept rather than lost, until the dead-letter queue takes it.
    fn not_dead_lettered(&self, mut in_flight: Box<InFlight>, reason: String, error: &Error) {
        tracing::error!(queue = &*self.queue, message_id = %in_flight.label(), %reason, %error, "cannot be dead-lettered");
        if in_flight.acked {
            add(&self.counters.lost, 1);
        } else {
            // In place, where the reason is known: another worker would run it again.
            in_flight.set_dead_letter(reason);
            self.put_off(in_flight, self.options.retry.max_delay, Duration::MAX);
        }
    }

    fn letter(&self, (in_flight, reason): &(Box<InFlight>, String)) -> Message {
        let mut letter = Message::clone(&in_flight.delivery.message);
        letter
            .attributes
            .insert(DEAD_LETTER_REASON, reason.as_str());
        letter.attributes.insert(DEAD_LETTER_QUEUE, &*self.queue);
        letter
            .attributes
            .insert(DEAD_LETTER_CONSUMER, &*self.consumer);
        let attempts = in_flight.attempt().to_string();
        letter.attributes.insert(DEAD_LETTER_ATTEMPTS, attempts);
        letter
    }
}
