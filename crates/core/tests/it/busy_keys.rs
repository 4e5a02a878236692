//! A key that somebody else is busy with, and a second delivery of it behind the first in one group.

use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use onlyonce_core::driver::*;
use onlyonce_core::handler::*;
use onlyonce_core::memory::{MemoryStore, MemoryTx};
use onlyonce_core::*;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{sleep, timeout};

/// Delivers what it is given, in that order, without holding a group back; every settlement works.
struct Scripted {
    next: tokio::sync::Mutex<UnboundedReceiver<Delivery>>,
    settled: Mutex<Vec<Settlement>>,
}

#[async_trait]
impl Source for Scripted {
    fn name(&self) -> &str {
        "orders"
    }
    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        let mut next = self.next.lock().await;
        Ok(match timeout(limits.wait, next.recv()).await {
            Ok(Some(delivery)) => vec![delivery],
            // The script is over.
            Ok(None) => {
                sleep(limits.wait).await;
                Vec::new()
            }
            Err(_) => Vec::new(),
        })
    }
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        self.settled.lock().unwrap().extend_from_slice(batch);
        batch.iter().map(|_| SettleResult::Applied).collect()
    }
    async fn extend(&self, batch: &[Receipt], _: Duration) -> Vec<ExtendResult> {
        batch.iter().map(|_| ExtendResult::LeaseLost).collect()
    }
    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let mut info = QueueInfo::default();
        info.identity = Some("orders".into());
        info.dead_letter = Some("orders.dead".into());
        info.durability = Durability::Process;
        info.capabilities.ordering = Ordering::Delivery;
        info.capabilities.dead_letter = true;
        Ok(info)
    }
    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}

fn deliver(script: &UnboundedSender<Delivery>, tag: u64, id: &str) {
    let message = Message::new(id.to_owned())
        .with_dedup_id(id)
        .with_group("g");
    let receipt = Receipt::new(tag);
    script
        .send(Delivery::new(message, receipt, Lease::default()))
        .unwrap();
}

async fn record_slowly(body: Bytes, tx: &mut MemoryTx) {
    sleep(Duration::from_millis(700)).await;
    tx.push(body);
}

/// The first delivery of `k` finds its key busy. Before it asks again the key becomes free, and a second delivery comes
/// and could claim it, but stands behind the first, which would then wait for it: neither could ever go on.
async fn neither_waits_for_the_other(behind_another: bool) {
    let store = MemoryStore::new();
    let (consumer, queue) = ("default".to_owned(), "orders".to_owned());
    let claim = Claim::new(
        KeyDigest::new(&Scope::new(consumer, queue), &DedupKey::new("k")),
        Fingerprint::of(b"k"),
    );
    let other = Owner::random();
    let ClaimResult::Acquired { token, .. } = store
        .claim(other, &[claim], Duration::from_secs(1))
        .await
        .unwrap()
        .remove(0)
    else {
        panic!("the key is free");
    };
    let (script, next) = unbounded_channel();
    let source = Scripted {
        next: next.into(),
        settled: Mutex::default(),
    };
    let pipeline = Pipeline::transactional(source, store.clone())
        .stop_when_idle(Duration::from_secs(5))
        .run(record_slowly);
    let feed = async {
        if behind_another {
            deliver(&script, 0, "a");
        }
        deliver(&script, 1, "k");
        sleep(Duration::from_millis(500)).await;
        let held = HeldClaim::new(claim.key, token);
        assert_eq!(store.release(&[held]).await.unwrap(), [Ok(())]);
        deliver(&script, 2, "k");
    };
    let (report, ()) = timeout(Duration::from_secs(60), async {
        tokio::join!(pipeline, feed)
    })
    .await
    .expect("the group goes on");
    let report = report.unwrap();
    assert_eq!(report.applied, 1 + u64::from(behind_another));
    assert_eq!(report.duplicates, 1);
    assert_eq!(store.effects().len(), 1 + usize::from(behind_another));
}

#[tokio::test(start_paused = true)]
async fn a_head_and_its_duplicate_do_not_wait_for_each_other() {
    neither_waits_for_the_other(false).await;
}

#[tokio::test(start_paused = true)]
async fn a_message_in_a_lane_and_its_duplicate_do_not_wait_for_each_other() {
    neither_waits_for_the_other(true).await;
}

/// The key becomes free while a delivery of it stands in its lane; one that comes now must not get before it.
#[tokio::test(start_paused = true)]
async fn nobody_overtakes_in_the_queue_for_a_key() {
    let (script, next) = unbounded_channel();
    let source = Scripted {
        next: next.into(),
        settled: Mutex::default(),
    };
    let store = MemoryStore::new();
    let pipeline = Pipeline::idempotent(source, store)
        .stop_when_idle(Duration::from_secs(5))
        .run(|body: String, key: DedupKey, context: Context| async move {
            match (body.as_str(), key.as_str(), context.attempt) {
                ("slow", ..) => sleep(Duration::from_secs(2)).await,
                ("bad", ..) => return Err(Failure::dead_letter("bad")),
                _ => {}
            }
            Ok(())
        });
    let send = |tag: u64, id: &str, body: &str, group: &str| {
        let message = Message::new(body.to_owned())
            .with_dedup_id(id)
            .with_group(group);
        let receipt = Receipt::new(tag);
        script
            .send(Delivery::new(message, receipt, Lease::default()))
            .unwrap();
    };
    let feed = async {
        send(0, "a", "slow", "g");
        send(1, "k", "bad", "h");
        // Behind `a` in its lane, and behind the bad one in the queue for its key.
        send(2, "k", "good", "g");
        sleep(Duration::from_secs(1)).await;
        // The bad one is gone.
        send(3, "k", "good", "g");
    };
    let both = async { tokio::join!(pipeline, feed) };
    let (report, ()) = timeout(Duration::from_secs(60), both)
        .await
        .expect("the group goes on");
    let report = report.unwrap();
    assert_eq!((report.applied, report.duplicates), (2, 1), "{report:?}");
    assert_eq!(report.dead_lettered, 1);
}
