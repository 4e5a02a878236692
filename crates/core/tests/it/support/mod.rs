//! Wrappers that make a source, a store or a sink misbehave in one way.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::*;

pub const IDLE: Duration = Duration::from_secs(5);

pub async fn publish(queue: &MemoryQueue, messages: impl IntoIterator<Item = Message>) {
    let messages: Vec<_> = messages.into_iter().collect();
    for result in Sink::publish(queue, &messages).await {
        result.expect("the memory queue takes everything");
    }
}

/// Takes out of a queue whatever is there.
pub async fn take_all(queue: &MemoryQueue) -> Vec<Message> {
    let everything = ReceiveLimits::new(usize::MAX, Duration::ZERO);
    let deliveries = queue.receive(everything).await.unwrap();
    let acks: Vec<_> = deliveries
        .iter()
        .map(|delivery| Settlement::new(delivery.receipt.clone(), Disposition::Ack))
        .collect();
    assert!(
        queue
            .settle(&acks)
            .await
            .iter()
            .all(SettleResult::is_applied)
    );
    deliveries
        .iter()
        .map(|delivery| Message::clone(&delivery.message))
        .collect()
}

pub fn numbered(n: usize) -> Message {
    Message::new(n.to_string()).with_dedup_id(format!("m{n}"))
}

/// What a wrapper does with one call or entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Not done; the answer says that it is not known.
    Refused,
    /// Done; the answer says that it is not known.
    ReplyLost,
    /// Not done, since another transaction was in the way.
    Conflict,
}

impl Fault {
    pub fn conflict() -> Error {
        Error::new(ErrorKind::Conflict, "a deadlock")
    }
}

pub type Plan = Arc<dyn Fn(usize) -> Fault + Send + Sync>;

pub fn never() -> Plan {
    Arc::new(|_| Fault::None)
}

pub fn first(calls: usize, fault: Fault) -> Plan {
    Arc::new(move |n| if n < calls { fault } else { Fault::None })
}

fn lost(retryable: bool) -> Error {
    Error::new(ErrorKind::Connection, "injected").retryable(retryable)
}

/// A queue whose settlements fail as planned, entry by entry.
#[derive(Clone)]
pub struct FaultyQueue {
    pub queue: MemoryQueue,
    pub settle: Plan,
    pub retryable: bool,
    pub extend: bool,
    pub timed: bool,
    /// Whether deliveries are counted.
    pub counts: bool,
    /// How often `queue_info` finds nobody there.
    pub absent: Arc<AtomicUsize>,
    pub count: Arc<AtomicUsize>,
    pub received: Arc<Mutex<Vec<Delivery>>>,
    /// What the receives asked for.
    pub limits: Arc<Mutex<Vec<ReceiveLimits>>>,
    /// How many leases were to be extended.
    pub extensions: Arc<AtomicUsize>,
}

impl FaultyQueue {
    pub fn new(queue: &MemoryQueue) -> Self {
        Self {
            queue: queue.clone(),
            settle: never(),
            retryable: true,
            extend: true,
            timed: true,
            counts: true,
            absent: Arc::default(),
            count: Arc::default(),
            received: Arc::default(),
            limits: Arc::default(),
            extensions: Arc::default(),
        }
    }
}

#[async_trait]
impl Source for FaultyQueue {
    fn name(&self) -> &str {
        self.queue.name()
    }
    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        self.limits.lock().expect("no panic under it").push(limits);
        let mut deliveries = self.queue.receive(limits).await?;
        for delivery in &mut deliveries {
            delivery.attempt = delivery.attempt.filter(|_| self.counts);
        }
        self.received
            .lock()
            .expect("no panic under it")
            .extend(deliveries.iter().cloned());
        Ok(deliveries)
    }
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let mut answers = Vec::new();
        for settlement in batch {
            let fault = (self.settle)(self.count.fetch_add(1, Ordering::SeqCst));
            let mut answer = SettleResult::Unknown(lost(self.retryable));
            if fault != Fault::Refused {
                let real = self.queue.settle(std::slice::from_ref(settlement)).await;
                if fault == Fault::None {
                    answer = real.into_iter().next().expect("one answer each");
                }
            }
            answers.push(answer);
        }
        answers
    }
    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        self.extensions.fetch_add(batch.len(), Ordering::SeqCst);
        match self.extend {
            true => self.queue.extend(batch, lease).await,
            false => batch
                .iter()
                .map(|_| ExtendResult::Unknown(lost(false)))
                .collect(),
        }
    }
    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let absent = &self.absent;
        if (absent.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))).is_ok() {
            return Err(lost(true));
        }
        let mut info = self.queue.queue_info().await?;
        info.capabilities.extend &= self.extend;
        info.capabilities.timed_lease &= self.timed;
        info.capabilities.counts_attempts &= self.counts;
        Ok(info)
    }
    async fn close(&self) -> Result<(), Error> {
        Source::close(&self.queue).await
    }
}

/// A store whose calls fail as planned.
#[derive(Clone)]
pub struct FaultyStore {
    pub store: MemoryStore,
    pub claim: Plan,
    pub renew: Plan,
    pub complete: Plan,
    pub begin: Plan,
    /// Another owner takes everything over before this many completions.
    pub takeovers: Arc<AtomicUsize>,
    counts: Arc<[AtomicUsize; 4]>,
}

impl FaultyStore {
    pub fn new(store: &MemoryStore) -> Self {
        Self {
            store: store.clone(),
            claim: never(),
            renew: never(),
            complete: never(),
            begin: never(),
            takeovers: Arc::default(),
            counts: Arc::default(),
        }
    }

    async fn call<T>(
        &self,
        which: usize,
        plan: &Plan,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        match plan(self.counts[which].fetch_add(1, Ordering::SeqCst)) {
            Fault::None => call.await,
            Fault::Refused => Err(lost(true)),
            Fault::ReplyLost => call.await.and_then(|_| Err(lost(true))),
            Fault::Conflict => Err(Fault::conflict()),
        }
    }
}

fn claim_of(completion: &Completion) -> Claim {
    Claim::new(completion.precondition.key(), completion.fingerprint)
}

#[async_trait]
impl Store for FaultyStore {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        self.store.store_info().await
    }
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        self.call(0, &self.claim, self.store.claim(owner, batch, lease))
            .await
    }
    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        self.call(1, &self.renew, self.store.renew(batch, lease))
            .await
    }
    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        self.store.start(batch).await
    }
    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        let take = |n: usize| n.checked_sub(1);
        let update = (self.takeovers).fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
        if update.is_ok() {
            self.store.forget_claims();
            let claims: Vec<_> = batch.iter().map(claim_of).collect();
            let lease = Duration::from_secs(1);
            self.store.claim(Owner(7), &claims, lease).await?;
        }
        self.call(2, &self.complete, self.store.complete(batch))
            .await
    }
    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        self.store.release(batch).await
    }
    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        self.store.prune(limit).await
    }
}

#[async_trait]
impl TransactionalStore for FaultyStore {
    type Tx = FaultyTx;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        self.call(0, &self.claim, self.store.look_up(batch)).await
    }
    async fn begin(&self) -> Result<FaultyTx, Error> {
        let fault = (self.begin)(self.counts[3].fetch_add(1, Ordering::SeqCst));
        Ok(FaultyTx {
            tx: self.store.begin().await?,
            fault,
        })
    }
    async fn begin_alone(&self) -> Result<FaultyTx, Error> {
        self.begin().await
    }
}

/// The error of a statement that another transaction was in the way of.
#[derive(Debug)]
pub struct Collision;

impl std::fmt::Display for Collision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a deadlock")
    }
}

impl std::error::Error for Collision {}

/// A transaction whose commit fails as planned.
pub struct FaultyTx {
    pub tx: MemoryTx,
    fault: Fault,
}

#[async_trait]
impl Transaction for FaultyTx {
    async fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        self.tx.complete(completions).await
    }
    async fn rollback(&mut self) -> Result<(), Error> {
        self.tx.rollback().await
    }
    fn is_conflict(&self, error: &(dyn std::error::Error + 'static)) -> bool {
        error.is::<Collision>()
    }
    async fn commit(self) -> Result<(), Error> {
        match self.fault {
            Fault::None => self.tx.commit().await,
            Fault::Refused => Err(lost(true)),
            Fault::ReplyLost => self.tx.commit().await.and(Err(lost(true))),
            Fault::Conflict => Err(Fault::conflict()),
        }
    }
}

/// A dead-letter queue of which some calls are refused.
#[derive(Clone)]
pub struct FaultySink {
    pub queue: MemoryQueue,
    calls: Arc<AtomicUsize>,
    /// Why this call is refused, if it is; by its number.
    refuse: Arc<dyn Fn(usize) -> Option<Error> + Send + Sync>,
}

impl FaultySink {
    pub fn new(refuse: impl Fn(usize) -> Option<Error> + Send + Sync + 'static) -> Self {
        Self {
            queue: MemoryQueue::new("dead"),
            calls: Arc::default(),
            refuse: Arc::new(refuse),
        }
    }
}

#[async_trait]
impl Sink for FaultySink {
    fn name(&self) -> &str {
        "dead"
    }
    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        Ok(SinkInfo::default())
    }
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        match (self.refuse)(self.calls.fetch_add(1, Ordering::SeqCst)) {
            Some(error) => {
                let refused = batch
                    .iter()
                    .map(|message| Err(error.clone().on_message(message)));
                refused.collect()
            }
            None => Sink::publish(&self.queue, batch).await,
        }
    }
    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}
