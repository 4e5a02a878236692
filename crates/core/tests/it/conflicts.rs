//! Transactions that are in each other's way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use onlyonce_core::memory::{MemoryQueue, MemoryStore};
use onlyonce_core::{Failure, Pipeline, Report, RetryPolicy, State};

use crate::support::*;

async fn write(body: Bytes, tx: &mut FaultyTx) {
    tx.tx.push(body);
}

/// Every message has one attempt.
async fn run(queue: &MemoryQueue, store: FaultyStore) -> Report {
    let pipeline = Pipeline::transactional(queue.clone(), store)
        .retry(RetryPolicy::default().max_attempts(1))
        .stop_when_idle(Duration::from_secs(60));
    pipeline.run(write).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_conflicts_is_done_again_and_is_no_attempt() {
    for group in [None, Some("g")] {
        let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
        let messages = (0..40).map(|n| match group {
            Some(group) => numbered(n).with_group(group),
            None => numbered(n),
        });
        publish(&queue, messages).await;
        let mut faulty = FaultyStore::new(&store);
        faulty.begin = Arc::new(|n| {
            if n % 3 < 2 {
                Fault::Conflict
            } else {
                Fault::None
            }
        });
        let report = run(&queue, faulty).await;
        assert_eq!(
            (report.applied, report.failed, report.dead_lettered),
            (40, 0, 0)
        );
        assert!(report.conflicts > 0);
        if group.is_some() {
            let order: Vec<_> = (0..40).map(|n: usize| Bytes::from(n.to_string())).collect();
            assert_eq!(store.effects(), order, "order within the group");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_meets_a_conflict_runs_again_and_that_is_no_attempt() {
    async fn collide(
        State(runs): State<Arc<AtomicUsize>>,
        body: Bytes,
        tx: &mut FaultyTx,
    ) -> Result<(), Failure> {
        tx.tx.push(body);
        match runs.fetch_add(1, SeqCst) {
            // As a cause, too.
            0 => Err(Failure::retry(Collision)),
            1 => Err(Failure::retry(
                onlyonce_core::Error::config("wrapped").caused_by(Collision),
            )),
            _ => Ok(()),
        }
    }
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, [numbered(1)]).await;
    let report = Pipeline::transactional(queue.clone(), FaultyStore::new(&store))
        .retry(RetryPolicy::default().max_attempts(1))
        .state(Arc::new(AtomicUsize::new(0)))
        .stop_when_idle(Duration::from_secs(60))
        .run(collide)
        .await
        .unwrap();
    assert_eq!((report.applied, report.failed, report.conflicts), (1, 0, 2));
    assert_eq!(store.effects().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn conflicts_without_end_are_a_failure() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, [numbered(1)]).await;
    let mut faulty = FaultyStore::new(&store);
    faulty.begin = Arc::new(|_| Fault::Conflict);
    let report = run(&queue, faulty).await;
    assert_eq!(
        (report.conflicts, report.failed, report.dead_lettered),
        (50, 1, 1)
    );
    assert!(queue.dead_letters()[0].reason.contains("deadlock"));
}
