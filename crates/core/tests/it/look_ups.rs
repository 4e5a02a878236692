//! Transactional mode looks a key up and runs without a claim: two may run one message, and one commits.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use onlyonce_core::driver::*;
use onlyonce_core::handler::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::*;
use tokio::sync::Barrier;
use tokio::time::{Instant, sleep, timeout};

use crate::support::{FaultyQueue, IDLE, numbered, publish};

/// A store that counts how many keys it is asked for.
#[derive(Clone, Default)]
struct Counting {
    store: MemoryStore,
    claimed: Arc<AtomicUsize>,
    looked_up: Arc<AtomicUsize>,
}

impl Counting {
    fn counts(&self) -> (usize, usize) {
        (self.claimed.load(SeqCst), self.looked_up.load(SeqCst))
    }
}

#[async_trait]
impl Store for Counting {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        self.store.store_info().await
    }
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        self.claimed.fetch_add(batch.len(), SeqCst);
        self.store.claim(owner, batch, lease).await
    }
    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        self.store.renew(batch, lease).await
    }
    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        self.store.start(batch).await
    }
    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        self.store.complete(batch).await
    }
    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        self.store.release(batch).await
    }
    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        self.store.prune(limit).await
    }
}

#[async_trait]
impl TransactionalStore for Counting {
    type Tx = MemoryTx;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        self.looked_up.fetch_add(batch.len(), SeqCst);
        self.store.look_up(batch).await
    }
    async fn begin(&self) -> Result<MemoryTx, Error> {
        self.store.begin().await
    }
    async fn begin_alone(&self) -> Result<MemoryTx, Error> {
        self.store.begin_alone().await
    }
}

async fn record(body: Bytes, tx: &mut MemoryTx) {
    tx.push(body);
}

async fn record_together(both: State<Arc<Barrier>>, body: Bytes, tx: &mut MemoryTx) {
    // Whoever comes again runs alone.
    timeout(Duration::from_secs(1), both.0.wait()).await.ok();
    tx.push(body);
}

async fn record_slowly_at_first(runs: State<Arc<AtomicUsize>>, body: Bytes, tx: &mut MemoryTx) {
    tx.push(body);
    if runs.0.fetch_add(1, SeqCst) == 0 {
        sleep(Duration::from_secs(3600)).await;
    }
}

async fn never_end(_tx: &mut MemoryTx) {
    std::future::pending().await
}

#[tokio::test(start_paused = true)]
async fn nothing_is_claimed_before_a_first_run() {
    let (queue, store) = (MemoryQueue::new("orders"), Counting::default());
    publish(&queue, (0..100).map(numbered)).await;
    let report = Pipeline::transactional(queue, store.clone())
        .stop_when_idle(IDLE)
        .run(record)
        .await
        .unwrap();
    assert_eq!(report.applied, 100);
    assert_eq!(store.counts(), (0, 100));
    assert_eq!(store.store.effects().len(), 100);
}

/// Its producer has sent it twice, and two workers have it.
#[tokio::test(start_paused = true)]
async fn of_two_that_run_a_message_at_once_one_commits() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, [numbered(1), numbered(1)]).await;
    let both = Arc::new(Barrier::new(2));
    let work = async || {
        let pipeline = Pipeline::transactional(queue.clone(), store.clone());
        let pipeline = pipeline.prefetch(1, 1 << 20).state(both.clone());
        let report = pipeline.stop_when_idle(IDLE).run(record_together).await;
        report.unwrap()
    };
    let (one, other) = tokio::join!(work(), work());
    assert_eq!(one.applied + other.applied, 1);
    assert_eq!(one.duplicates + other.duplicates, 1);
    assert_eq!(store.effects().len(), 1);
}

/// The broker counts, so the message is known to be a second delivery, and still nobody waits for a claim of the dead.
#[tokio::test(start_paused = true)]
async fn after_a_crash_nothing_waits_for_the_dead_worker() {
    let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(2));
    let store = MemoryStore::new();
    publish(&queue, [numbered(1)]).await;
    let dead = Pipeline::transactional(queue.clone(), store.clone()).run(never_end);
    assert!(timeout(Duration::from_secs(1), dead).await.is_err());

    let began = Instant::now();
    let report = Pipeline::transactional(queue, store.clone())
        .claim_lease(Duration::from_secs(600))
        .stop_when_idle(IDLE)
        .run(record)
        .await
        .unwrap();
    assert_eq!(report.applied, 1);
    let took = began.elapsed() - IDLE;
    assert!(took < Duration::from_secs(5), "it took {took:?}");
}

/// Where the broker does not count, claims that expire tell how many workers a message may have killed.
#[tokio::test(start_paused = true)]
async fn what_is_delivered_again_without_a_count_is_claimed() {
    let (queue, store) = (MemoryQueue::new("orders"), Counting::default());
    publish(&queue, [numbered(1)]).await;
    let mut source = FaultyQueue::new(&queue);
    source.counts = false;
    let dead = Pipeline::transactional(source.clone(), store.clone()).run(never_end);
    assert!(timeout(Duration::from_secs(1), dead).await.is_err());
    assert_eq!(store.counts(), (0, 1), "the first delivery");
    let report = Pipeline::transactional(source, store.clone())
        .stop_when_idle(Duration::from_secs(60))
        .run(record)
        .await
        .unwrap();
    assert_eq!(report.applied, 1);
    assert_eq!(store.counts(), (1, 1), "the second");
}

/// The record of another worker may have been made and pruned meanwhile.
#[tokio::test(start_paused = true)]
async fn a_handler_that_outlives_the_records_does_not_commit() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, [numbered(1)]).await;
    let runs = Arc::new(AtomicUsize::new(0));
    let report = Pipeline::transactional(queue, store.clone())
        .claim_lease(Duration::from_secs(1))
        .dedup_retention(Duration::from_secs(60))
        .state(runs.clone())
        .stop_when_idle(IDLE)
        .run(record_slowly_at_first)
        .await
        .unwrap();
    assert_eq!((report.cancelled, report.applied), (1, 1));
    assert_eq!(runs.load(SeqCst), 2);
    assert_eq!(store.effects().len(), 1);
}
