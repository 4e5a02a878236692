//! What is given back together reaches the source together.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::*;
use onlyonce_core::*;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

const MESSAGES: u64 = 1_500;

/// Delivers one group at once, under a lease that is revoked when told.
#[derive(Clone, Default)]
struct Partition {
    delivered: Arc<Mutex<bool>>,
    revoked: CancellationToken,
    calls: Arc<Mutex<Vec<Vec<Settlement>>>>,
}

#[async_trait]
impl Source for Partition {
    fn name(&self) -> &str {
        "orders"
    }
    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        if std::mem::replace(&mut *self.delivered.lock().unwrap(), true) {
            sleep(limits.wait).await;
            return Ok(Vec::new());
        }
        let deliver = |tag: u64| {
            let message = Message::new(tag.to_string()).with_group("g");
            let lease = Lease::default().revoked_by(self.revoked.clone());
            Delivery::new(message, Receipt::new(tag), lease)
        };
        Ok((0..MESSAGES).map(deliver).collect())
    }
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        self.calls.lock().unwrap().push(batch.to_vec());
        batch.iter().map(|_| SettleResult::Applied).collect()
    }
    async fn extend(&self, batch: &[Receipt], _: Duration) -> Vec<ExtendResult> {
        batch.iter().map(|_| ExtendResult::LeaseLost).collect()
    }
    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let mut info = QueueInfo::default();
        info.capabilities.ordering = Ordering::Delivery;
        info.capabilities.dead_letter = true;
        Ok(info)
    }
    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// A source that can only rewind does so once, and no part of a group comes again before its head.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_head_and_all_behind_it_are_given_back_in_one_call() {
    for _ in 0..20 {
        let source = Partition::default();
        let (revoked, calls) = (source.revoked.clone(), source.calls.clone());
        let pipeline = Pipeline::at_least_once(source)
            .prefetch(2 * MESSAGES as usize, usize::MAX)
            .stop_when_idle(Duration::from_millis(50));
        let report = pipeline
            .run(move || {
                revoked.cancel();
                async {}
            })
            .await
            .unwrap();
        assert_eq!((report.applied, report.given_back), (1, MESSAGES - 1));
        let calls = calls.lock().unwrap();
        let is_nack = |one: &&Settlement| one.disposition != Disposition::Ack;
        let nacks = calls.iter().map(|call| call.iter().filter(is_nack).count());
        let nacks: Vec<_> = nacks.filter(|count| *count > 0).collect();
        assert_eq!(nacks, [MESSAGES as usize - 1]);
    }
}
