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
}

impl DeadLetters {
    pub(super) fn new(name: &str, faults: &Faults) -> Self {
        Self {
            queue: MemoryQueue::new(format!("{name}.dead")),
            faults: faults.clone(),
        }
    }

    /// A worker's way to it.
    pub fn connect(&self, worker: u64) -> Sender {
        Sender {
            queue: self.queue.clone(),
            faults: self.faults.clone(),
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
    worker: u64,
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
        let queue = self.queue.clone();
        let sent = send(&disturbance, async move { queue.publish(&kept).await }).await;
        match sent {
            Ok(_) => fails
                .iter()
                .map(|fails| if *fails { Err(lost()) } else { Ok(()) })
                .collect(),
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
