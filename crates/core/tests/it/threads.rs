//! Several pipelines on real threads, in real time: what the simulation, on one thread, cannot see.
//!
//! Leases are long enough that nothing comes again by itself: a message whose wake-up is lost stays where it is, and the run does
//! not end.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::*;
use async_trait::async_trait;
use onlyonce_core::driver::*;
use onlyonce_core::handler::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::*;
use tokio::task::{JoinHandle, yield_now};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const MESSAGES: usize = 1_200;
const GROUPS: usize = 40;
const PIPELINES: usize = 3;
const LEASE: Duration = Duration::from_secs(600);
/// How long a duplicate waits at most for another worker's claim on its key.
const CLAIM: Duration = Duration::from_secs(1);
/// Far longer than it takes, and far shorter than a lease.
const PATIENCE: Duration = Duration::from_secs(120);

/// Gives the processor away, or waits for a timer, now and then: in the store's calls and in the handler.
async fn pause() {
    match fastrand::u8(..8) {
        0 => sleep(Duration::from_micros(fastrand::u64(..1_500))).await,
        1..4 => yield_now().await,
        _ => {}
    }
}

/// A store whose calls are left and come back to.
#[derive(Clone)]
struct Distant(MemoryStore);

#[async_trait]
impl Store for Distant {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        self.0.store_info().await
    }
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        pause().await;
        self.0.claim(owner, batch, lease).await
    }
    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        self.0.renew(batch, lease).await
    }
    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        pause().await;
        self.0.start(batch).await
    }
    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        pause().await;
        self.0.complete(batch).await
    }
    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        pause().await;
        self.0.release(batch).await
    }
    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        self.0.prune(limit).await
    }
}

#[async_trait]
impl TransactionalStore for Distant {
    type Tx = MemoryTx;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        pause().await;
        self.0.look_up(batch).await
    }
    async fn begin(&self) -> Result<MemoryTx, Error> {
        pause().await;
        self.0.begin().await
    }
    async fn begin_alone(&self) -> Result<MemoryTx, Error> {
        self.begin().await
    }
}

/// What the handlers have done: for each message how often it ran to its end, and for each group its last message.
#[derive(Default)]
struct Seen {
    done: HashMap<usize, usize>,
    last: HashMap<usize, usize>,
    breaches: Vec<String>,
}

#[derive(Clone, Default)]
struct Book(Arc<Mutex<Seen>>, Arc<AtomicUsize>);

impl Book {
    async fn run(&self, body: &str) -> Result<(), Failure> {
        pause().await;
        if fastrand::u8(..10) == 0 {
            return Err(Failure::retry_after(Duration::from_millis(1), "not yet"));
        }
        let n: usize = body.parse().unwrap();
        let mut seen = self.0.lock().unwrap();
        *seen.done.entry(n).or_default() += 1;
        if let Some(group) = group(n) {
            let before = seen.last.insert(group, n);
            if before.is_some_and(|before| before > n) {
                seen.breaches.push(format!("{n} ran behind {before:?}"));
            }
        }
        Ok(())
    }
}

/// A third has no group.
fn group(n: usize) -> Option<usize> {
    (!n.is_multiple_of(3)).then_some(n % GROUPS)
}

async fn transactional(
    body: String,
    State(book): State<Book>,
    tx: &mut MemoryTx,
) -> Result<(), Failure> {
    tx.push(body.clone());
    book.run(&body).await
}

async fn plain(body: String, State(book): State<Book>) -> Result<(), Failure> {
    book.run(&body).await
}

fn message(n: usize) -> Message {
    match group(n) {
        Some(group) => numbered(n).with_group(format!("g{group}")),
        None => numbered(n),
    }
}

fn is_sent_twice(n: usize) -> bool {
    n.is_multiple_of(10) && group(n).is_none()
}

/// Publishes all, and some a second time, while they are consumed.
async fn produce(queue: MemoryQueue) {
    for n in 0..MESSAGES {
        publish(&queue, [message(n)]).await;
        if is_sent_twice(n) {
            publish(&queue, [message(n)]).await;
        }
        if n.is_multiple_of(50) {
            pause().await;
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    Transactional,
    /// Starts are marked, and duplicates replayed.
    Quarantine,
    AtLeastOnce,
}

/// Everything that the pipelines of one run share.
#[derive(Clone)]
struct Shared {
    queue: MemoryQueue,
    store: MemoryStore,
    book: Book,
    stop: CancellationToken,
}

impl Shared {
    fn new() -> Self {
        Self {
            queue: MemoryQueue::new("orders").with_lease(LEASE),
            store: MemoryStore::new(),
            book: Book::default(),
            stop: CancellationToken::new(),
        }
    }

    fn settings<Tx: Transaction>(&self, builder: Builder<Tx>, concurrency: usize) -> Builder<Tx> {
        builder
            .concurrency(concurrency)
            .claim_lease(CLAIM)
            .retry(RetryPolicy::default().max_attempts(1_000))
            .state(self.book.clone())
            .shutdown(self.stop.clone().cancelled_owned())
    }

    fn start(&self, mode: Mode, concurrency: usize) -> JoinHandle<Result<Report, RunError>> {
        let (source, store) = (self.queue.clone(), Distant(self.store.clone()));
        match mode {
            Mode::Transactional => {
                let builder = Pipeline::transactional(source, store);
                tokio::spawn(self.settings(builder, concurrency).run(transactional))
            }
            Mode::Quarantine => {
                let replayed = self.book.1.clone();
                let builder = Pipeline::idempotent(source, store)
                    .on_in_doubt(InDoubt::Quarantine)
                    .on_duplicate(move |_, _| {
                        replayed.fetch_add(1, Ordering::Relaxed);
                        pause()
                    });
                tokio::spawn(self.settings(builder, concurrency).run(plain))
            }
            Mode::AtLeastOnce => {
                let builder = Pipeline::at_least_once(source);
                tokio::spawn(self.settings(builder, concurrency).run(plain))
            }
        }
    }

    async fn settled(&self) {
        produce(self.queue.clone()).await;
        while self.queue.depth() + self.queue.in_flight() > 0 {
            sleep(Duration::from_millis(1)).await;
        }
    }

    fn check(&self, mode: Mode) {
        let seen = self.book.0.lock().unwrap();
        assert_eq!(seen.breaches, [""; 0], "{mode:?}");
        for n in 0..MESSAGES {
            let runs = seen.done.get(&n).copied().unwrap_or_default();
            let expected = match (mode, is_sent_twice(n)) {
                (Mode::AtLeastOnce, true) => 2..=2,
                // Two pipelines may run it at the same time.
                (Mode::Transactional, true) => 1..=2,
                _ => 1..=1,
            };
            assert!(
                expected.contains(&runs),
                "{mode:?}: message {n} ran {runs} times"
            );
        }
        match mode {
            Mode::Transactional => {
                let effects = self.store.effects();
                let once: HashSet<_> = effects.iter().collect();
                assert_eq!((effects.len(), once.len()), (MESSAGES, MESSAGES));
            }
            Mode::Quarantine => assert!(self.book.1.load(Ordering::Relaxed) > 0, "replays"),
            Mode::AtLeastOnce => {}
        }
    }
}

async fn consume(mode: Mode, concurrency: usize) {
    let shared = Shared::new();
    let running: Vec<_> = (0..PIPELINES)
        .map(|_| shared.start(mode, concurrency))
        .collect();
    let in_time = timeout(PATIENCE, shared.settled()).await;
    let (left, held) = (shared.queue.depth(), shared.queue.in_flight());
    assert!(in_time.is_ok(), "{mode:?}: {left} wait, {held} are held");
    shared.stop.cancel();
    for pipeline in running {
        pipeline.await.unwrap().unwrap();
    }
    shared.check(mode);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_wake_up_is_lost_and_no_group_overtaken_on_real_threads() {
    for mode in [Mode::Transactional, Mode::Quarantine, Mode::AtLeastOnce] {
        for concurrency in [1, 2, 16] {
            consume(mode, concurrency).await;
        }
    }
}
