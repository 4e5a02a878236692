//! `tower` layers around a handler.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::*;
use bytes::Bytes;
use onlyonce_core::handler::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::*;
use tokio::time::sleep;
use tower::ServiceBuilder;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::timeout::TimeoutLayer;

async fn slow_for_one(body: Bytes, tx: &mut MemoryTx) -> Result<(), Failure> {
    tx.push(body.clone());
    if body == "1" {
        sleep(Duration::from_secs(60)).await;
    }
    if body == "2" {
        return Err(Failure::dead_letter("two is never right"));
    }
    Ok(())
}

/// A layer's own error is retried; what the handler decided survives the layers; an effect within a transaction is
/// rolled back when a layer drops the handler.
#[tokio::test(start_paused = true)]
async fn layers_fit_around_a_transactional_handler() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, (0..4).map(numbered)).await;
    let calls = Arc::new(AtomicUsize::new(0));
    let seen = calls.clone();
    let count = ServiceBuilder::new()
        .map_request(move |request: Request<MemoryTx>| {
            seen.fetch_add(1, Ordering::SeqCst);
            request
        })
        .into_inner();
    let report = Pipeline::transactional(queue.clone(), store.clone())
        .retry(RetryPolicy::default().max_attempts(2))
        .layer(TimeoutLayer::new(Duration::from_secs(1)))
        .layer(count)
        .stop_when_idle(IDLE)
        .run(slow_for_one)
        .await
        .unwrap();
    let mut effects = store.effects();
    effects.sort();
    assert_eq!(effects, ["0", "3"]);
    assert_eq!((report.applied, report.dead_lettered), (2, 2));
    assert_eq!(
        calls.load(Ordering::SeqCst),
        5,
        "one of four was tried twice"
    );
    let reasons: Vec<_> = queue.dead_letters().into_iter().map(|d| d.reason).collect();
    assert!(
        reasons.iter().any(|r| r == "two is never right"),
        "{reasons:?}"
    );
    assert!(
        reasons.iter().any(|r| r.contains("timed out")),
        "{reasons:?}"
    );
}

/// The time for which a layer makes messages wait is not the handler's.
#[tokio::test(start_paused = true)]
async fn a_layer_that_waits_uses_up_no_handler_timeout() {
    let queue = MemoryQueue::new("orders");
    publish(&queue, (0..30).map(numbered)).await;
    let report = Pipeline::idempotent(queue.clone(), MemoryStore::new())
        .handler_timeout(Duration::from_secs(2))
        .layer(GlobalConcurrencyLimitLayer::new(1))
        .stop_when_idle(IDLE)
        .run(|| sleep(Duration::from_secs(1)))
        .await
        .unwrap();
    assert_eq!((report.applied, report.failed), (30, 0));
}
