//! Runs that end without an answer: their worker dies, their lease ends, their thread is blocked.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::*;
use onlyonce_core::driver::*;
use onlyonce_core::handler::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore};
use onlyonce_core::*;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

const LEASE: Duration = Duration::from_secs(5);
const ATTEMPTS: u32 = 3;
/// How many runs alone follow, where their workers died.
const ALONE: u32 = 3;

fn orders() -> MemoryQueue {
    MemoryQueue::new("orders").with_lease(LEASE)
}

fn policy() -> RetryPolicy {
    RetryPolicy::default().max_attempts(ATTEMPTS)
}

fn reasons(queue: &MemoryQueue) -> Vec<(String, String)> {
    let dead = queue.dead_letters().into_iter();
    let body = |body: &[u8]| String::from_utf8_lossy(body).into_owned();
    dead.map(|dead| (body(&dead.message.body), dead.reason))
        .collect()
}

/// Lets `workers` workers receive a message and die without having run it.
async fn hold(queue: &MemoryQueue, workers: u32) {
    for _ in 0..workers {
        let held = queue.clone();
        let limit = ReceiveLimits::new(1, LEASE * 2)
            .with_bytes(1)
            .with_per_group(1);
        assert_eq!(held.receive(limit).await.unwrap().len(), 1);
    }
}

/// One life of a worker that message 0 kills; the bodies that took effect are noted.
async fn life(
    source: FaultyQueue,
    store: MemoryStore,
    (applied, runs): (&Arc<Mutex<Vec<String>>>, &Arc<AtomicUsize>),
) {
    let death = Arc::new(Notify::new());
    let (kill, noted, ran) = (death.clone(), applied.clone(), runs.clone());
    let handler = move |body: String| {
        let (kill, noted, ran) = (kill.clone(), noted.clone(), ran.clone());
        async move {
            if body == "0" {
                ran.fetch_add(1, Ordering::SeqCst);
                kill.notify_one();
                std::future::pending::<()>().await;
            }
            sleep(Duration::from_millis(50)).await;
            noted.lock().unwrap().push(body);
        }
    };
    let run = Pipeline::idempotent(source, store)
        .retry(policy())
        .claim_lease(LEASE)
        .concurrency(4)
        .stop_when_idle(IDLE)
        .run(handler);
    tokio::select! {
        biased;
        // The pipeline is dropped, as a process that dies drops it.
        () = death.notified() => {}
        ended = run => drop(ended.unwrap()),
    }
}

/// Message 0 kills every worker that runs it, with its neighbours in flight and held. Returns how often it ran, and what was
/// given up.
async fn until_all_is_settled(store: MemoryStore, counts: bool) -> (usize, Vec<String>) {
    let queue = orders();
    publish(&queue, (0..12).map(numbered)).await;
    let (applied, runs) = (Arc::default(), Arc::default());
    for _ in 0..40 {
        if queue.depth() + queue.in_flight() == 0 {
            break;
        }
        // A consumer of its own: what a dead one held comes again when its leases end.
        let mut source = FaultyQueue::new(&queue);
        source.counts = counts;
        life(source, store.clone(), (&applied, &runs)).await;
    }
    assert_eq!((queue.depth(), queue.in_flight()), (0, 0));
    let dead = reasons(&queue);
    for (_, reason) in &dead {
        assert!(reason.starts_with("gave up before attempt"), "{reason}");
    }
    let dead: Vec<_> = dead.into_iter().map(|(body, _)| body).collect();
    let applied = applied.lock().unwrap().clone();
    for body in (0..12).map(|n: usize| n.to_string()) {
        assert!(applied.contains(&body) != dead.contains(&body), "{body}");
    }
    (runs.load(Ordering::SeqCst), dead)
}

#[tokio::test(start_paused = true)]
async fn a_message_that_kills_its_worker_is_given_up_and_its_neighbours_are_not() {
    let (runs, dead) = until_all_is_settled(MemoryStore::new(), true).await;
    assert_eq!(dead, ["0"]);
    assert!(runs <= (ATTEMPTS + ALONE) as usize, "{runs} runs");
}

/// A classic queue of RabbitMQ, say: the store knows from how many workers it was taken over.
#[tokio::test(start_paused = true)]
async fn so_it_is_where_the_broker_does_not_count() {
    let (runs, dead) = until_all_is_settled(MemoryStore::new(), false).await;
    assert_eq!(dead, ["0"]);
    assert!(runs <= (ATTEMPTS + ALONE) as usize, "{runs} runs");
}

/// A deployment that ends a worker twice, while it runs a message alone, is not the message's doing.
#[tokio::test(start_paused = true)]
async fn a_message_whose_run_alone_was_ended_from_outside_runs_again() {
    let (queue, store) = (orders(), MemoryStore::new());
    publish(&queue, [numbered(0)]).await;
    hold(&queue, ATTEMPTS).await;
    let started = Arc::new(Notify::new());
    let life = || {
        let starts = started.clone();
        Pipeline::idempotent(queue.clone(), store.clone())
            .retry(policy())
            .claim_lease(LEASE)
            .stop_when_idle(LEASE * 3)
            .run(move || {
                starts.notify_one();
                sleep(LEASE / 2)
            })
    };
    for _ in 1..ALONE {
        tokio::select! {
            biased;
            () = started.notified() => {}
            ended = life() => panic!("it has not started: {ended:?}"),
        }
    }
    let report = life().await.unwrap();
    assert_eq!((report.applied, report.dead_lettered), (1, 0));
}

/// Nobody remembers then whether it ran or was only held, so it is not given up, and comes again.
#[tokio::test(start_paused = true)]
async fn without_a_store_a_message_that_was_only_held_is_not_given_up() {
    let queue = orders();
    publish(&queue, [numbered(0)]).await;
    hold(&queue, 3 * ATTEMPTS).await;
    let report = Pipeline::at_least_once(queue.clone())
        .retry(policy())
        .stop_when_idle(LEASE * 2)
        .run(|| async {})
        .await
        .unwrap();
    assert_eq!((report.applied, report.dead_lettered), (1, 0));
}

fn with_records(source: FaultyQueue) -> Builder<NoTx> {
    Pipeline::idempotent(source, MemoryStore::new())
}

/// Runs `handler` on one message whose lease cannot be extended; returns how often it ran, and why it was given up.
async fn given_up<F, Fut>(
    pipeline: fn(FaultyQueue) -> Builder<NoTx>,
    lease: Duration,
    handler: F,
) -> (usize, String)
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let queue = MemoryQueue::new("orders").with_lease(lease);
    publish(&queue, [numbered(0)]).await;
    let mut source = FaultyQueue::new(&queue);
    source.extend = false;
    let runs = Arc::new(AtomicUsize::new(0));
    let ran = runs.clone();
    let run = pipeline(source)
        .retry(policy().delays(Duration::from_millis(10), Duration::from_millis(50)))
        .stop_when_idle(lease * 4)
        .run(move || {
            ran.fetch_add(1, Ordering::SeqCst);
            handler()
        });
    let report = timeout(Duration::from_secs(600), run);
    let report = report.await.expect("it comes to an end").unwrap();
    assert_eq!((report.applied, report.dead_lettered), (0, 1), "{report:?}");
    assert_eq!((queue.depth(), queue.in_flight()), (0, 0));
    (runs.load(Ordering::SeqCst), reasons(&queue).remove(0).1)
}

#[tokio::test(start_paused = true)]
async fn a_handler_longer_than_its_lease_is_given_up() {
    let (runs, reason) = given_up(with_records, LEASE, || sleep(LEASE * 2)).await;
    assert!(runs <= ATTEMPTS as usize + 1, "{runs} runs");
    assert!(reason.contains("longer than its lease"), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn without_a_store_the_runs_of_one_worker_count() {
    let long = || sleep(LEASE * 2);
    let (runs, _) = given_up(Pipeline::at_least_once, LEASE, long).await;
    assert!(runs <= ATTEMPTS as usize + 1, "{runs} runs");
}

#[tokio::test]
async fn a_handler_that_blocks_its_thread_past_its_lease_is_given_up() {
    let lease = Duration::from_millis(200);
    let (runs, reason) = given_up(with_records, lease, move || async move {
        std::thread::sleep(lease * 2);
    })
    .await;
    assert!(runs <= ATTEMPTS as usize + 1, "{runs} runs");
    assert!(reason.contains("block its thread"), "{reason}");
}

/// It heeds the handler's time-out and counts its attempts.
#[tokio::test(start_paused = true)]
async fn an_on_duplicate_that_hangs_is_given_up() {
    let (queue, store) = (orders(), MemoryStore::new());
    publish(&queue, [numbered(0), numbered(0)]).await;
    let report = Pipeline::idempotent(queue.clone(), store)
        .retry(policy())
        .handler_timeout(Duration::from_secs(1))
        .on_duplicate(|_, _| std::future::pending::<()>())
        .stop_when_idle(IDLE)
        .run(|| async {});
    let report = timeout(Duration::from_secs(600), report);
    let report = report.await.expect("it comes to an end").unwrap();
    assert_eq!((report.applied, report.failed), (1, ATTEMPTS.into()));
    assert_eq!(report.dead_lettered, 1);
}

/// Who only waited, while its worker died again and again, has lost nothing: it runs as if it had just come.
#[tokio::test(start_paused = true)]
async fn a_message_that_was_only_held_runs_whatever_its_count() {
    let (queue, store) = (orders(), MemoryStore::new());
    publish(&queue, [numbered(0)]).await;
    hold(&queue, ATTEMPTS + 1).await;
    let report = Pipeline::idempotent(queue.clone(), store)
        .retry(policy())
        .stop_when_idle(LEASE * 2)
        .run(|context: Context| async move {
            assert!(context.attempt > ATTEMPTS);
        })
        .await
        .unwrap();
    assert_eq!((report.applied, report.dead_lettered), (1, 0));
}
