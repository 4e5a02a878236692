//! Whatever hangs, the pipeline comes to an end when it is told to stop.

use std::time::Duration;

use crate::support::*;
use async_trait::async_trait;
use onlyonce_core::driver::*;
use onlyonce_core::handler::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::*;
use tokio::time::{sleep, timeout};

/// Which call never returns.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Hang {
    QueueInfo,
    Receive,
    Settle,
    Extend,
    CloseSource,
    Publish,
    CloseSink,
    StoreInfo,
    Claim,
    Renew,
    Release,
    Begin,
    Complete,
    Commit,
    Handler,
    Replay,
}

const ALL: [Hang; 16] = [
    Hang::QueueInfo,
    Hang::Receive,
    Hang::Settle,
    Hang::Extend,
    Hang::CloseSource,
    Hang::Publish,
    Hang::CloseSink,
    Hang::StoreInfo,
    Hang::Claim,
    Hang::Renew,
    Hang::Release,
    Hang::Begin,
    Hang::Complete,
    Hang::Commit,
    Hang::Handler,
    Hang::Replay,
];

/// A source, a sink and a store in one, of which one call hangs.
#[derive(Clone)]
struct Hanging {
    hang: Hang,
    queue: MemoryQueue,
    dead: MemoryQueue,
    store: MemoryStore,
}

impl Hanging {
    async fn at(&self, hang: Hang) {
        if self.hang == hang {
            std::future::pending().await
        }
    }
}

#[async_trait]
impl Source for Hanging {
    fn name(&self) -> &str {
        self.queue.name()
    }
    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        self.at(Hang::Receive).await;
        self.queue.receive(limits).await
    }
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        self.at(Hang::Settle).await;
        self.queue.settle(batch).await
    }
    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        self.at(Hang::Extend).await;
        self.queue.extend(batch, lease).await
    }
    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        self.at(Hang::QueueInfo).await;
        self.queue.queue_info().await
    }
    async fn close(&self) -> Result<(), Error> {
        self.at(Hang::CloseSource).await;
        Source::close(&self.queue).await
    }
}

#[async_trait]
impl Sink for Hanging {
    fn name(&self) -> &str {
        self.dead.name()
    }
    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        Ok(SinkInfo::default())
    }
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        self.at(Hang::Publish).await;
        Sink::publish(&self.dead, batch).await
    }
    async fn close(&self) -> Result<(), Error> {
        self.at(Hang::CloseSink).await;
        Ok(())
    }
}

#[async_trait]
impl Store for Hanging {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        self.at(Hang::StoreInfo).await;
        self.store.store_info().await
    }
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        self.at(Hang::Claim).await;
        self.store.claim(owner, batch, lease).await
    }
    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        self.at(Hang::Renew).await;
        self.store.renew(batch, lease).await
    }
    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        self.store.start(batch).await
    }
    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        self.store.complete(batch).await
    }
    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        self.at(Hang::Release).await;
        self.store.release(batch).await
    }
    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        self.store.prune(limit).await
    }
}

#[async_trait]
impl TransactionalStore for Hanging {
    type Tx = HangingTx;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        self.at(Hang::Claim).await;
        self.store.look_up(batch).await
    }

    async fn begin(&self) -> Result<HangingTx, Error> {
        self.at(Hang::Begin).await;
        let (tx, hang) = (self.store.begin().await?, self.hang);
        Ok(HangingTx { tx, hang })
    }

    async fn begin_alone(&self) -> Result<HangingTx, Error> {
        self.begin().await
    }
}

struct HangingTx {
    tx: MemoryTx,
    hang: Hang,
}

#[async_trait]
impl Transaction for HangingTx {
    async fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        if self.hang == Hang::Complete {
            std::future::pending::<()>().await;
        }
        self.tx.complete(completions).await
    }
    async fn rollback(&mut self) -> Result<(), Error> {
        self.tx.rollback().await
    }
    fn is_conflict(&self, error: &(dyn std::error::Error + 'static)) -> bool {
        self.tx.is_conflict(error)
    }
    async fn commit(self) -> Result<(), Error> {
        if self.hang == Hang::Commit {
            std::future::pending::<()>().await;
        }
        self.tx.commit().await
    }
}

/// One good message, one that took effect before, one that belongs into the dead-letter queue, and a group.
async fn run_until_stopped(hang: Hang) -> Result<Report, RunError> {
    let all = Hanging {
        hang,
        queue: MemoryQueue::new("orders"),
        dead: MemoryQueue::new("dead"),
        store: MemoryStore::new(),
    };
    publish(&all.queue, [0, 0, 1].map(numbered)).await;
    publish(&all.queue, (2..5).map(|n| numbered(n).with_group("g"))).await;
    let handler = move |body: String, _: &mut HangingTx| {
        let hangs = hang == Hang::Handler && body == "0";
        async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            match body.as_str() {
                "1" => Err(Failure::dead_letter("one")),
                _ => Ok(()),
            }
        }
    };
    Pipeline::transactional(all.clone(), all.clone())
        .dead_letter(all)
        .on_duplicate(move |_, _| async move {
            if hang == Hang::Replay {
                std::future::pending::<()>().await;
            }
        })
        .drain_timeout(Duration::from_secs(10))
        .shutdown(sleep(Duration::from_secs(60)))
        .run(handler)
        .await
}

#[tokio::test(start_paused = true)]
async fn a_pipeline_that_is_told_to_stop_ends_whatever_hangs() {
    for hang in ALL {
        // Drain, grace for what was cancelled and for the stages, source and sink closed.
        let bound = Duration::from_secs(60 + 10 + 2 * 2 + 2 * 30);
        let ended = timeout(bound, run_until_stopped(hang)).await;
        assert!(ended.is_ok(), "{hang:?} keeps it from ending");
    }
}

/// A thread cannot be taken from a handler that blocks it, but the pipeline ends without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_blocks_its_thread_for_good_does_not_keep_the_pipeline() {
    let (blocked, release) = std::sync::mpsc::channel::<()>();
    let release = std::sync::Mutex::new(release);
    let queue = MemoryQueue::new("orders");
    publish(&queue, [numbered(0)]).await;
    let run = Pipeline::at_least_once(queue)
        .drain_timeout(Duration::from_millis(100))
        .shutdown(sleep(Duration::from_millis(300)))
        .run(move || {
            let _ = release.lock().unwrap().recv();
            async {}
        });
    let ended = timeout(Duration::from_secs(20), run).await;
    drop(blocked);
    assert!(ended.is_ok());
}
