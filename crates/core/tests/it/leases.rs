//! Leases that are not as long as was asked for, that several messages share, and that are taken away with notice.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::*;
use onlyonce_core::handler::Native;
use onlyonce_core::memory::{MemoryQueue, MemoryReceipt, MemoryStore, MemoryTx};
use onlyonce_core::*;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::support::{IDLE, numbered, publish};

const LEASE: Duration = Duration::from_secs(30);

/// A queue whose leases are as a service's that decides about them itself.
#[derive(Clone)]
struct Service {
    queue: MemoryQueue,
    /// It grants no more than this.
    grants: Duration,
    /// All messages have one lease.
    shared: bool,
    /// It can neither extend a lease nor delay what is given back.
    plain: bool,
    notice: CancellationToken,
    /// After this number of extensions it answers no more of them.
    answers: usize,
    /// How many receipts each call to extend had, and when it came.
    extensions: Arc<Mutex<Vec<(usize, Instant)>>>,
}

impl Service {
    fn new(grants: Duration) -> Self {
        Self {
            queue: MemoryQueue::new("orders").with_lease(LEASE),
            grants,
            shared: false,
            plain: false,
            notice: CancellationToken::new(),
            answers: usize::MAX,
            extensions: Arc::default(),
        }
    }
}

#[async_trait]
impl Source for Service {
    fn name(&self) -> &str {
        self.queue.name()
    }
    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        if self.notice.is_cancelled() {
            sleep(limits.wait).await;
            return Ok(Vec::new());
        }
        let mut deliveries = self.queue.receive(limits).await?;
        for delivery in &mut deliveries {
            delivery.lease.revoked = Some(self.notice.clone());
            delivery.lease.shared = self.shared.then_some(1);
        }
        Ok(deliveries)
    }
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        self.queue.settle(batch).await
    }
    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        if self.extensions.lock().unwrap().len() >= self.answers {
            std::future::pending::<()>().await;
        }
        let extension = (batch.len(), Instant::now());
        self.extensions.lock().unwrap().push(extension);
        self.queue.extend(batch, lease.min(self.grants)).await
    }
    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let mut info = self.queue.queue_info().await?;
        info.capabilities.extend &= !self.plain;
        info.capabilities.delayed_nack &= !self.plain;
        Ok(info)
    }
    async fn close(&self) -> Result<(), Error> {
        Source::close(&self.queue).await
    }
}

/// A handler of four leases finishes once, although each extension brings a third of what was asked for.
#[tokio::test(start_paused = true)]
async fn a_service_that_grants_less_than_asked_is_asked_in_time() {
    for grants in [LEASE / 3, LEASE / 30] {
        let (service, store) = (Service::new(grants), MemoryStore::new());
        publish(&service.queue, [numbered(1)]).await;
        let report = Pipeline::transactional(service.clone(), store)
            .stop_when_idle(IDLE)
            .run(async |_: &mut MemoryTx| sleep(LEASE * 4).await)
            .await
            .unwrap();
        assert_eq!(
            (report.applied, report.received),
            (1, 1),
            "{grants:?}: {report:?}"
        );
    }
}

/// What a service does not grant is not believed to be there: the handler is cut off before another worker gets the message.
#[tokio::test(start_paused = true)]
async fn a_handler_is_cut_off_where_the_grant_ends() {
    let mut service = Service::new(LEASE / 30);
    service.answers = 1;
    publish(&service.queue, [numbered(1)]).await;
    let began = Instant::now();
    let cut_off = Arc::new(Mutex::new(None));
    let guard = cut_off.clone();
    let pipeline = Pipeline::at_least_once(service.clone())
        .drain_timeout(Duration::ZERO)
        .run(move || {
            let guard = Cut(guard.clone());
            async move {
                let _guard = guard;
                std::future::pending::<()>().await
            }
        });
    let _ = timeout(LEASE * 2, pipeline).await;
    let (_, asked) = service.extensions.lock().unwrap()[0];
    let cut_off = cut_off.lock().unwrap().expect("it was cut off");
    assert!(cut_off <= asked + service.grants, "{:?}", cut_off - began);
}

/// Notes when it is dropped for the first time.
struct Cut(Arc<Mutex<Option<Instant>>>);

impl Drop for Cut {
    fn drop(&mut self) {
        self.0.lock().unwrap().get_or_insert_with(Instant::now);
    }
}

#[tokio::test(start_paused = true)]
async fn a_shared_lease_is_extended_once_for_all_its_messages() {
    for (shared, receipts) in [(false, 3), (true, 1)] {
        let mut service = Service::new(LEASE);
        service.shared = shared;
        publish(&service.queue, (0..3).map(numbered)).await;
        let report = Pipeline::at_least_once(service.clone())
            .stop_when_idle(IDLE)
            .run(async || sleep(LEASE / 2).await)
            .await
            .unwrap();
        let extensions = service.extensions.lock().unwrap();
        let counts: Vec<_> = extensions.iter().map(|(count, _)| *count).collect();
        assert_eq!(counts, [receipts], "shared: {shared}");
        assert_eq!(report.applied, 3);
    }
}

/// Another message came later, and its part of the lease was shorter when it came.
#[tokio::test(start_paused = true)]
async fn all_messages_of_a_shared_lease_learn_that_it_was_extended() {
    let mut service = Service::new(LEASE);
    service.shared = true;
    publish(&service.queue, [numbered(0)]).await;
    let queue = service.queue.clone();
    let later = async {
        sleep(LEASE / 5).await;
        publish(&queue, [numbered(1)]).await;
    };
    let pipeline = Pipeline::at_least_once(service.clone())
        .stop_when_idle(IDLE)
        .run(async || sleep(LEASE * 2 / 5).await);
    let (report, ()) = tokio::join!(pipeline, later);
    assert_eq!(report.unwrap().applied, 2);
    let extensions = service.extensions.lock().unwrap();
    assert_eq!(extensions.len(), 1, "{extensions:?}");
}

/// What runs ends and is settled; what has not begun goes back in order, and is not run here.
#[tokio::test(start_paused = true)]
async fn a_lease_that_is_revoked_lets_finish_what_runs_and_starts_nothing() {
    let (service, store) = (Service::new(LEASE), MemoryStore::new());
    let messages = (0..5).map(|n| numbered(n).with_group("g"));
    publish(&service.queue, messages).await;
    let revoked = service.clone();
    let stop = CancellationToken::new();
    let pipeline = Pipeline::transactional(service.clone(), store.clone())
        .shutdown(stop.clone().cancelled_owned())
        .run(async |body: String, tx: &mut MemoryTx| {
            sleep(Duration::from_secs(2)).await;
            tx.push(body);
        });
    let watch = async move {
        sleep(Duration::from_secs(3)).await;
        revoked.notice.cancel();
        // The second has begun by now; nobody takes the others again meanwhile.
        sleep(Duration::from_secs(2)).await;
        stop.cancel();
    };
    let (report, ()) = tokio::join!(pipeline, watch);
    let report = report.unwrap();
    assert_eq!((report.applied, report.failed), (2, 0), "{report:?}");
    assert_eq!(store.effects(), ["0", "1"]);
    assert_eq!(service.queue.depth(), 3);
}

/// A broker delivers what it gets back at once, and counts. So a message that another worker has claimed is kept for as long as
/// its lease lets it, where nothing better can be done: the broker would soon give up on it.
#[tokio::test(start_paused = true)]
async fn a_message_that_another_worker_has_claimed_is_not_taken_again_and_again() {
    let mut service = Service::new(LEASE);
    service.plain = true;
    let store = MemoryStore::new();
    let twice = [numbered(1), numbered(1)];
    publish(&service.queue, twice).await;
    let worker = || {
        Pipeline::transactional(service.clone(), store.clone())
            .prefetch(1, 1 << 20)
            .stop_when_idle(IDLE)
            .run(async |_: &mut MemoryTx| sleep(LEASE * 2 / 3).await)
    };
    let (one, other) = tokio::join!(worker(), worker());
    let mut all = one.unwrap();
    all += other.unwrap();
    assert_eq!((all.applied, all.duplicates), (1, 1), "{all:?}");
    assert!(all.received <= 4, "{all:?}");
}

#[tokio::test(start_paused = true)]
async fn a_handler_sees_what_only_its_broker_knows() {
    let queue = MemoryQueue::new("orders");
    publish(&queue, (0..2).map(numbered)).await;
    let seen = Arc::new(Mutex::new(Vec::<u64>::new()));
    let report = Pipeline::at_least_once(queue.clone())
        .state(seen.clone())
        .stop_when_idle(IDLE)
        .run(
            async |delivery: Native<MemoryReceipt>, State(seen): State<Arc<Mutex<Vec<u64>>>>| {
                seen.lock().unwrap().push(delivery.tag);
            },
        )
        .await
        .unwrap();
    assert_eq!(report.applied, 2);
    let tags = std::mem::take(&mut *seen.lock().unwrap());
    assert!(tags[0] < tags[1], "{tags:?}");

    publish(&queue, [numbered(3)]).await;
    let report = Pipeline::at_least_once(queue.clone())
        .stop_when_idle(IDLE)
        .run(async |_: Native<String>| ())
        .await
        .unwrap();
    assert_eq!(report.dead_lettered, 1);
    let reason = &queue.dead_letters()[0].reason;
    assert!(reason.contains("String"), "{reason}");
}
