//! A queue that tells when a message is settled.

use std::time::Duration;

use onlyonce::driver::{
    Delivery, ExtendResult, QueueInfo, Receipt, ReceiveLimits, SettleResult, Settlement, Source,
};
use onlyonce::memory::MemoryQueue;
use tokio::sync::mpsc::UnboundedSender;

pub(crate) struct Told {
    pub(crate) queue: MemoryQueue,
    pub(crate) sender: UnboundedSender<()>,
}

#[async_trait::async_trait]
impl Source for Told {
    fn name(&self) -> &str {
        Source::name(&self.queue)
    }

    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, onlyonce::Error> {
        self.queue.receive(limits).await
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let results = self.queue.settle(batch).await;
        for _ in batch {
            let _ = self.sender.send(());
        }
        results
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        self.queue.extend(batch, lease).await
    }

    async fn queue_info(&self) -> Result<QueueInfo, onlyonce::Error> {
        self.queue.queue_info().await
    }

    async fn close(&self) -> Result<(), onlyonce::Error> {
        Source::close(&self.queue).await
    }
}
