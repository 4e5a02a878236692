//! What stands between an ordered subscription of the emulator and a test of something else.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{
    Delivery, Disposition, ExtendResult, QueueInfo, Receipt, ReceiveLimits, SettleResult,
    Settlement, Sink, SinkInfo, Source,
};
use onlyonce_core::{Error, Message};
use onlyonce_pubsub::PubSubSource;

/// Gives back in a second what is to be given back at once: the emulator would put it behind what it has not delivered yet of
/// the key, Pub/Sub in its place. And gives messages without a key one of their own: the emulator takes their acks only in the
/// order in which they were published, Pub/Sub in any.
pub(crate) struct OnTheEmulator<T>(pub(crate) T);

#[async_trait]
impl Source for OnTheEmulator<PubSubSource> {
    fn name(&self) -> &str {
        self.0.name()
    }

    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        self.0.receive(limits).await
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let mut batch = batch.to_vec();
        for settlement in &mut batch {
            if let Disposition::Nack { delay } = &mut settlement.disposition {
                *delay = (*delay).max(Duration::from_secs(1));
            }
        }
        self.0.settle(&batch).await
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        self.0.extend(batch, lease).await
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        self.0.queue_info().await
    }

    async fn close(&self) -> Result<(), Error> {
        self.0.close().await
    }
}

#[async_trait]
impl Sink for OnTheEmulator<Arc<dyn Sink>> {
    fn name(&self) -> &str {
        self.0.name()
    }

    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        self.0.sink_info().await
    }

    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        static KEYS: AtomicU64 = AtomicU64::new(0);
        let mut batch = batch.to_vec();
        for message in &mut batch {
            let own = || format!("alone-{}", KEYS.fetch_add(1, Ordering::Relaxed));
            message.group.get_or_insert_with(own);
        }
        self.0.publish(&batch).await
    }

    async fn close(&self) -> Result<(), Error> {
        self.0.close().await
    }
}
