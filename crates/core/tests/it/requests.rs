//! What the pipeline asks of a broker that carries ten settlements a request.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::*;
use async_trait::async_trait;
use onlyonce_core::driver::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore};
use onlyonce_core::*;
use tokio::time::{Instant, sleep};

/// What one request carries.
const REQUEST: usize = 10;
/// How long one takes.
const ROUND_TRIP: Duration = Duration::from_millis(20);

/// A queue behind a network that carries [`REQUEST`] settlements at once, and what was asked of it.
#[derive(Clone)]
struct Billed {
    queue: MemoryQueue,
    received: Arc<Mutex<Vec<Receipt>>>,
    settled: Arc<Mutex<Vec<Settled>>>,
    /// How many settlements, the first ones, are not known to have been made.
    refused: Arc<AtomicUsize>,
}

/// One call to the source: when it began and what was to be settled.
#[derive(Clone)]
struct Settled {
    at: Instant,
    batch: Vec<Settlement>,
}

impl Billed {
    fn new(queue: &MemoryQueue) -> Self {
        Self {
            queue: queue.clone(),
            received: Arc::default(),
            settled: Arc::default(),
            refused: Arc::default(),
        }
    }

    fn calls(&self) -> Vec<Settled> {
        self.settled.lock().expect("no panic under it").clone()
    }

    /// The sizes of the requests that the calls were made in.
    fn requests(&self) -> Vec<usize> {
        let calls = self.calls();
        let requests = calls.iter().flat_map(|call| call.batch.chunks(REQUEST));
        requests.map(<[_]>::len).collect()
    }
}

#[async_trait]
impl Source for Billed {
    fn name(&self) -> &str {
        self.queue.name()
    }
    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        let deliveries = self.queue.receive(limits).await?;
        let receipts = deliveries.iter().map(|one| one.receipt.clone());
        self.received
            .lock()
            .expect("no panic under it")
            .extend(receipts);
        Ok(deliveries)
    }
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let call = Settled {
            at: Instant::now(),
            batch: batch.to_vec(),
        };
        self.settled.lock().expect("no panic under it").push(call);
        sleep(ROUND_TRIP).await;
        let take = |n: usize| n.checked_sub(1);
        let mut answers = Vec::new();
        for settlement in batch {
            let refused = (self.refused).fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
            answers.extend(match refused {
                Ok(_) => vec![SettleResult::Unknown(
                    Error::new(ErrorKind::Timeout, "injected").retryable(true),
                )],
                Err(_) => self.queue.settle(std::slice::from_ref(settlement)).await,
            });
        }
        answers
    }
    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        self.queue.extend(batch, lease).await
    }
    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let mut info = self.queue.queue_info().await?;
        info.capabilities.settle_batch = Some(REQUEST);
        Ok(info)
    }
    async fn close(&self) -> Result<(), Error> {
        Source::close(&self.queue).await
    }
}

#[tokio::test(start_paused = true)]
async fn settlements_share_full_requests_and_none_is_left() {
    const MESSAGES: usize = 2_003;
    let queue = MemoryQueue::new("orders");
    publish(&queue, (0..MESSAGES).map(numbered)).await;
    let source = Billed::new(&queue);
    let report = Pipeline::idempotent(source.clone(), MemoryStore::new())
        .stop_when_idle(IDLE)
        // One after another, as the handlers end, and never ten at once.
        .run(async |body: String| {
            let n: u64 = body.parse().unwrap();
            sleep(Duration::from_millis(20 + n % 17)).await;
        })
        .await
        .unwrap();
    assert_eq!((report.settled, report.received), (2_003, 2_003));
    assert_eq!(queue.depth() + queue.in_flight(), 0);
    let requests = source.requests();
    let partial: Vec<_> = requests.iter().filter(|size| **size < REQUEST).collect();
    assert!(partial.len() <= 3, "{partial:?} of {}", requests.len());
}

#[tokio::test(start_paused = true)]
async fn a_lone_settlement_waits_for_nobody() {
    let queue = MemoryQueue::new("orders");
    let source = Billed::new(&queue);
    let handled = Arc::new(Mutex::new(Vec::new()));
    let seen = handled.clone();
    let producer = async {
        for n in 0..3 {
            publish(&queue, [numbered(n)]).await;
            sleep(Duration::from_secs(1)).await;
        }
    };
    let consumer = Pipeline::idempotent(source.clone(), MemoryStore::new())
        .stop_when_idle(IDLE)
        .run(move || {
            seen.lock().unwrap().push(Instant::now());
            async {}
        });
    let (report, ()) = tokio::join!(consumer, producer);
    assert_eq!(report.unwrap().settled, 3);
    let settled: Vec<_> = source.calls().iter().map(|call| call.at).collect();
    assert_eq!(settled, *handled.lock().unwrap());
}

/// What the others of a request wait for is a moment, and not the slowest handler.
#[tokio::test(start_paused = true)]
async fn nobody_waits_long_for_a_full_request() {
    let queue = MemoryQueue::new("orders");
    publish(&queue, (0..13).map(numbered)).await;
    let source = Billed::new(&queue);
    let began = Instant::now();
    Pipeline::idempotent(source.clone(), MemoryStore::new())
        .stop_when_idle(IDLE)
        .run(async |body: String| {
            if body == "12" {
                sleep(Duration::from_secs(20)).await;
            }
        })
        .await
        .unwrap();
    assert_eq!(source.requests(), [10, 2, 1]);
    let calls = source.calls();
    let at: Vec<_> = calls.iter().map(|call| call.at - began).collect();
    let moment = Duration::from_millis(10);
    assert!(
        at[0] < moment && at[1] < at[0] + ROUND_TRIP + moment,
        "{at:?}"
    );
    assert!(at[2] < Duration::from_secs(20) + moment, "{at:?}");
}

#[tokio::test(start_paused = true)]
async fn a_group_is_given_back_last_first_across_requests() {
    let queue = MemoryQueue::new("orders");
    publish(&queue, (0..37).map(|n| numbered(n).with_group("g"))).await;
    let source = Billed::new(&queue);
    let report = Pipeline::idempotent(source.clone(), MemoryStore::new())
        .shutdown(sleep(Duration::from_millis(105)))
        .run(async || sleep(Duration::from_millis(10)).await)
        .await
        .unwrap();
    assert!(report.given_back > 2 * 10, "{report:?}");
    let received = source.received.lock().unwrap();
    let place = |receipt| received.iter().position(|one| one == receipt).unwrap();
    let calls = source.calls();
    let settlements = calls.iter().flat_map(|call| &call.batch);
    let given_back = settlements.filter(|one| one.disposition != Disposition::Ack);
    let places: Vec<_> = given_back.map(|one| place(&one.receipt)).collect();
    let last_first: Vec<_> = (report.applied as usize..37).rev().collect();
    assert_eq!(places, last_first);
}

/// What is tried again has its turn among messages that never stop coming.
#[tokio::test(start_paused = true)]
async fn a_settlement_that_failed_does_not_wait_for_a_lull() {
    let queue = MemoryQueue::new("orders");
    let source = Billed::new(&queue);
    source.refused.store(1, Ordering::SeqCst);
    let producer = async {
        for n in 0..3_000 {
            publish(&queue, [numbered(n)]).await;
            sleep(Duration::from_millis(1)).await;
        }
    };
    let consumer = Pipeline::idempotent(source.clone(), MemoryStore::new())
        .shutdown(sleep(Duration::from_secs(2)))
        .run(async || ());
    tokio::select! {
        report = consumer => drop(report.unwrap()),
        () = producer => panic!("it was to be stopped before"),
    }
    let calls = source.calls();
    let first = &calls[0].batch[0];
    let tries = calls.iter().filter(|call| call.batch.contains(first));
    let tries: Vec<_> = tries.map(|call| call.at).collect();
    assert_eq!(tries.len(), 2);
    let again = tries[1] - tries[0];
    assert!(again < Duration::from_millis(200), "{again:?}");
}

/// Nor does a drain: it ends with the last handler.
#[tokio::test(start_paused = true)]
async fn a_drain_does_not_wait_for_full_requests() {
    let queue = MemoryQueue::new("orders");
    publish(&queue, (0..64).map(numbered)).await;
    let source = Billed::new(&queue);
    let began = Instant::now();
    let report = Pipeline::idempotent(source.clone(), MemoryStore::new())
        .shutdown(sleep(Duration::from_millis(10)))
        .run(async |body: String| {
            sleep(Duration::from_millis(100 * body.parse::<u64>().unwrap())).await;
        })
        .await
        .unwrap();
    assert_eq!((report.settled, queue.in_flight()), (64, 0));
    let slowest = Duration::from_millis(6_300);
    let end = began.elapsed();
    assert!(
        (slowest..slowest + 2 * ROUND_TRIP).contains(&end),
        "{end:?}"
    );
}
