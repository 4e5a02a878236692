use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use onlyonce_core::driver::{Disposition, ReceiveLimits, Settlement, Sink, SinkInfo, Source as _};
use onlyonce_core::memory::MemoryQueue;
use onlyonce_core::{Error, Message};
use tokio::time::Duration;

use super::faults::{Call, Faults};
use super::network::{lost, send};

/// A queue for dead letters, reached over a bad network.
#[derive(Clone, Debug)]
pub struct DeadLetters {
    queue: MemoryQueue,
    faults: Faults,
    confirmed: Confirmed,
}

type Confirmed = Arc<Mutex<Letters>>;

/// A worker, and a message's id at its broker.
type Of = (u64, String);

#[derive(Debug, Default)]
struct Letters {
    /// Confirmed to a worker, while the message is still in its queue.
    set_aside: BTreeSet<Of>,
    /// Left by that worker once more.
    repeated: Vec<Of>,
}

impl DeadLetters {
    pub(super) fn new(name: &str, faults: &Faults) -> Self {
        Self {
            queue: MemoryQueue::new(format!("{name}.dead")),
            faults: faults.clone(),
            confirmed: Confirmed::default(),
        }
    }

    /// Of which messages a worker has left another dead letter, although one was confirmed to it and only the ack was lost: the
    /// worker, and the message's id at its broker.
    #[must_use]
    pub fn repeated(&self) -> Vec<(u64, String)> {
        lock(&self.confirmed).repeated.clone()
    }

    /// The message is out of its queue.
    pub(super) fn acked(&self, broker_id: Option<&str>) {
        let other = |(_, id): &Of| Some(id.as_str()) != broker_id;
        lock(&self.confirmed).set_aside.retain(other);
    }

    /// A worker's way to it.
    pub fn connect(&self, worker: u64) -> Sender {
        Sender {
            queue: self.queue.clone(),
            faults: self.faults.clone(),
            confirmed: self.confirmed.clone(),
            worker,
        }
    }

    /// How many there are.
    pub fn depth(&self) -> usize {
        self.queue.depth()
    }

    /// Adds messages.
    pub async fn put_back(&self, messages: Vec<Message>) {
        self.queue.publish(&messages).await;
    }

    /// Takes everything out.
    ///
    /// # Errors
    /// What the queue in memory says, if it was closed.
    pub async fn take_all(&self) -> Result<Vec<Message>, Error> {
        let all = ReceiveLimits::new(usize::MAX, Duration::ZERO);
        let deliveries = self.queue.receive(all).await?;
        let acks: Vec<Settlement> = deliveries
            .iter()
            .map(|delivery| Settlement::new(delivery.receipt.clone(), Disposition::Ack))
            .collect();
        self.queue.settle(&acks).await;
        Ok(deliveries
            .iter()
            .map(|d| Message::clone(&d.message))
            .collect())
    }
}

/// One worker's connection to the [`DeadLetters`].
#[derive(Debug)]
pub struct Sender {
    queue: MemoryQueue,
    faults: Faults,
    confirmed: Confirmed,
    worker: u64,
}

impl Sender {
    fn confirm(&self, letters: &[Message]) {
        let mut confirmed = lock(&self.confirmed);
        for id in letters.iter().filter_map(|letter| letter.broker_id.clone()) {
            let of = (self.worker, id);
            if !confirmed.set_aside.insert(of.clone()) {
                confirmed.repeated.push(of);
            }
        }
    }
}

fn lock(confirmed: &Confirmed) -> MutexGuard<'_, Letters> {
    confirmed.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Sink for Sender {
    fn name(&self) -> &str {
        self.queue.name()
    }

    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        self.queue.sink_info().await
    }

    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        let mut disturbance = self.faults.on(self.worker, Call::Publish);
        let mut partial = disturbance.partial.take();
        let fails: Vec<bool> = batch
            .iter()
            .map(|_| partial.as_mut().is_some_and(fastrand::Rng::bool))
            .collect();
        let kept: Vec<Message> = batch
            .iter()
            .zip(&fails)
            .filter(|(_, fails)| !**fails)
            .map(|(m, _)| m.clone())
            .collect();
        let (queue, letters) = (self.queue.clone(), kept.clone());
        let sent = send(&disturbance, async move { queue.publish(&kept).await }).await;
        match sent {
            Ok(_) => {
                self.confirm(&letters);
                fails
                    .iter()
                    .map(|fails| if *fails { Err(lost()) } else { Ok(()) })
                    .collect()
            }
            Err(error) => batch.iter().map(|_| Err(repeat(&error))).collect(),
        }
    }

    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// The same error once more.
pub(super) fn repeat(error: &Error) -> Error {
    Error::new(error.kind(), "simulated").retryable(error.is_retryable())
}
