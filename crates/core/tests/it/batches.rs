//! Handlers that take many messages in one call.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::*;
use tokio::time::sleep;

use crate::support::{IDLE, numbered, publish, take_all};

/// The calls that a handler got, by the payloads of each.
#[derive(Clone, Default)]
struct Calls(Arc<Mutex<Vec<Vec<String>>>>);

impl Calls {
    fn add(&self, batch: &Batch<String>) -> Vec<String> {
        let bodies: Vec<_> = batch.iter().map(|body| body.to_string()).collect();
        self.0.lock().unwrap().push(bodies.clone());
        bodies
    }

    fn sizes(&self) -> Vec<usize> {
        self.0.lock().unwrap().iter().map(Vec::len).collect()
    }

    fn of(&self, body: &str) -> usize {
        let calls = self.0.lock().unwrap();
        calls.iter().flatten().filter(|one| *one == body).count()
    }
}

fn of_group(group: &str, n: usize) -> Message {
    numbered(n).with_group(group)
}

/// Writes everything, then fails if 13 is among it.
async fn not_with_13(
    batch: Batch<String>,
    calls: State<Calls>,
    tx: &mut MemoryTx,
) -> Result<(), Failure> {
    let bodies = calls.add(&batch);
    bodies.iter().for_each(|body| tx.push(body.clone()));
    match bodies.iter().any(|body| body == "13") {
        true => Err(Failure::dead_letter("13")),
        false => Ok(()),
    }
}

async fn write_all(batch: Batch<String>, calls: State<Calls>, tx: &mut MemoryTx) {
    calls.add(&batch).into_iter().for_each(|body| tx.push(body));
}

/// Fails 13 alone, and writes the others.
async fn all_but_13(batch: Batch<String>, calls: State<Calls>, tx: &mut MemoryTx) {
    calls.add(&batch);
    for body in &batch {
        match &**body == "13" {
            true => body.fail(Failure::dead_letter("13")),
            false => tx.push(body.to_string()),
        }
    }
}

fn effects(store: &MemoryStore) -> Vec<String> {
    let text = |effect: &bytes::Bytes| String::from_utf8(effect.to_vec()).unwrap();
    store.effects().iter().map(text).collect()
}

fn sorted(store: &MemoryStore) -> Vec<usize> {
    let mut all: Vec<usize> = effects(store)
        .iter()
        .map(|one| one.parse().unwrap())
        .collect();
    all.sort_unstable();
    all
}

#[tokio::test(start_paused = true)]
async fn many_messages_are_handled_in_one_call() {
    let (queue, store, calls) = (
        MemoryQueue::new("orders"),
        MemoryStore::new(),
        Calls::default(),
    );
    publish(&queue, (0..100).map(numbered)).await;
    let report = Pipeline::transactional(queue, store.clone())
        .batch(40, 1 << 20, Duration::from_millis(50))
        .state(calls.clone())
        .stop_when_idle(IDLE)
        .run(write_all)
        .await
        .unwrap();
    assert_eq!(report.applied, 100);
    assert_eq!(calls.sizes().iter().sum::<usize>(), 100);
    assert!(calls.sizes().len() <= 6, "{:?}", calls.sizes());
    assert!(calls.sizes().iter().all(|size| *size <= 40));
    assert_eq!(sorted(&store), (0..100).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn a_batch_has_no_more_bytes_than_it_may() {
    let (queue, store, calls) = (
        MemoryQueue::new("orders"),
        MemoryStore::new(),
        Calls::default(),
    );
    let large = |n: usize| Message::new("x".repeat(1_000)).with_dedup_id(format!("m{n}"));
    publish(&queue, (0..40).map(large)).await;
    let report = Pipeline::transactional(queue, store)
        .batch(100, 4_500, Duration::from_millis(50))
        .state(calls.clone())
        .stop_when_idle(IDLE)
        .run(write_all)
        .await
        .unwrap();
    assert_eq!(report.applied, 40);
    assert!(
        calls.sizes().iter().all(|size| *size <= 5),
        "{:?}",
        calls.sizes()
    );
}

/// A batch that waits for others is run at once when the worker is told to stop.
#[tokio::test(start_paused = true)]
async fn a_stop_ends_the_wait_for_others() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, (0..3).map(numbered)).await;
    let started = tokio::time::Instant::now();
    let report = Pipeline::transactional(queue, store.clone())
        .batch(10, 1 << 20, Duration::from_secs(3600))
        .state(Calls::default())
        .shutdown(sleep(Duration::from_secs(1)))
        .run(write_all)
        .await
        .unwrap();
    assert_eq!(report.applied, 3);
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
}

/// The one that is guilty is dead-lettered; the others take effect once, whatever was rolled back.
#[tokio::test(start_paused = true)]
async fn a_batch_that_fails_is_halved_until_the_guilty_message_is_alone() {
    let (queue, dead) = (MemoryQueue::new("orders"), MemoryQueue::new("dead"));
    let (store, calls) = (MemoryStore::new(), Calls::default());
    publish(&queue, (0..64).map(numbered)).await;
    let report = Pipeline::transactional(queue, store.clone())
        .dead_letter(dead.clone())
        .batch(64, 1 << 20, Duration::from_millis(50))
        .state(calls.clone())
        .stop_when_idle(IDLE)
        .run(not_with_13)
        .await
        .unwrap();
    assert_eq!(
        (report.applied, report.failed, report.dead_lettered),
        (63, 1, 1)
    );
    let expected: Vec<_> = (0..64).filter(|n| *n != 13).collect();
    assert_eq!(sorted(&store), expected);
    assert_eq!(take_all(&dead).await.len(), 1);
    assert!(calls.sizes().len() <= 2 + 2 * 6, "{:?}", calls.sizes());
}

/// What is behind it in its group waits for it, and what is before it has gone.
#[tokio::test(start_paused = true)]
async fn nothing_of_its_group_overtakes_the_guilty_message() {
    for handler_says_which in [false, true] {
        let (queue, dead) = (MemoryQueue::new("orders"), MemoryQueue::new("dead"));
        let (store, calls) = (MemoryStore::new(), Calls::default());
        publish(&queue, (0..32).map(|n| of_group(["a", "b"][n % 2], n))).await;
        let pipeline = Pipeline::transactional(queue, store.clone())
            .dead_letter(dead.clone())
            .batch(32, 1 << 20, Duration::from_millis(50))
            .state(calls.clone())
            .stop_when_idle(IDLE);
        let report = match handler_says_which {
            true => pipeline.run(all_but_13).await,
            false => pipeline.run(not_with_13).await,
        };
        let report = report.unwrap();
        assert_eq!((report.applied, report.dead_lettered), (31, 1));
        let effects = effects(&store);
        for group in 0..2 {
            let numbers = effects.iter().map(|one| one.parse::<usize>().unwrap());
            let of_group: Vec<_> = numbers.filter(|n| n % 2 == group).collect();
            assert!(of_group.is_sorted(), "{of_group:?}");
        }
        assert_eq!(effects.len(), 31);
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_that_the_handler_fails_is_tried_again_alone() {
    async fn not_at_first(batch: Batch<String>, calls: State<Calls>, tx: &mut MemoryTx) {
        calls.add(&batch);
        for body in &batch {
            match &**body == "13" && calls.of("13") == 1 {
                true => body.fail("not yet"),
                false => tx.push(body.to_string()),
            }
        }
    }
    let (queue, store, calls) = (
        MemoryQueue::new("orders"),
        MemoryStore::new(),
        Calls::default(),
    );
    publish(&queue, (0..20).map(numbered)).await;
    let report = Pipeline::transactional(queue, store.clone())
        .batch(20, 1 << 20, Duration::from_millis(50))
        .state(calls.clone())
        .stop_when_idle(IDLE)
        .run(not_at_first)
        .await
        .unwrap();
    assert_eq!((report.applied, report.failed), (20, 1));
    assert_eq!(calls.sizes(), [20, 1]);
    assert_eq!(sorted(&store), (0..20).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_is_not_in_the_batch() {
    async fn sum(batch: Batch<(Json<u32>, DedupKey)>, tx: &mut MemoryTx) {
        for number in &batch {
            let (Json(number), key) = &**number;
            tx.push(format!("{key} {number}"));
        }
    }
    let (queue, dead, store) = (
        MemoryQueue::new("orders"),
        MemoryQueue::new("dead"),
        MemoryStore::new(),
    );
    let broken = Message::new("no number").with_dedup_id("broken");
    publish(
        &queue,
        (0..5)
            .map(numbered)
            .chain([broken])
            .chain((6..9).map(numbered)),
    )
    .await;
    let report = Pipeline::transactional(queue, store.clone())
        .dead_letter(dead.clone())
        .stop_when_idle(IDLE)
        .run(sum)
        .await
        .unwrap();
    assert_eq!((report.applied, report.dead_lettered), (8, 1));
    let dead = take_all(&dead).await;
    assert_eq!(dead[0].dedup_id.as_deref(), Some("broken"));
    assert_eq!(effects(&store).len(), 8);
}

/// What a call did before it failed stays, so those that it had are run again; and a group is never in a batch twice.
#[tokio::test(start_paused = true)]
async fn batches_without_a_transaction_keep_records_and_order() {
    async fn collect(
        batch: Batch<(String, DedupKey)>,
        done: State<Arc<Mutex<Vec<String>>>>,
    ) -> Result<(), Failure> {
        let mut done = done.0.lock().unwrap();
        let mut groups = Vec::new();
        for item in &batch {
            let number: usize = item.0.parse().unwrap();
            groups.push(number % 4);
            done.push(item.0.clone());
        }
        groups.sort_unstable();
        groups.dedup();
        assert_eq!(groups.len(), batch.len(), "one of each group");
        match batch.iter().any(|item| item.0 == "13") {
            true => Err(Failure::dead_letter("13")),
            false => Ok(()),
        }
    }
    let (queue, dead, store) = (
        MemoryQueue::new("orders"),
        MemoryQueue::new("dead"),
        MemoryStore::new(),
    );
    let messages = (0..40).map(|n| of_group(["a", "b", "c", "d"][n % 4], n));
    publish(&queue, messages).await;
    let done: Arc<Mutex<Vec<String>>> = Arc::default();
    let report = Pipeline::idempotent(queue, store)
        .dead_letter(dead.clone())
        .state(done.clone())
        .stop_when_idle(IDLE)
        .run(collect)
        .await
        .unwrap();
    assert_eq!((report.applied, report.dead_lettered), (39, 1));
    let mut first_runs: Vec<usize> = Vec::new();
    for number in done
        .lock()
        .unwrap()
        .iter()
        .map(|n| n.parse::<usize>().unwrap())
    {
        if !first_runs.contains(&number) {
            first_runs.push(number);
        }
    }
    for group in 0..4 {
        assert!(first_runs.iter().filter(|n| *n % 4 == group).is_sorted());
    }
    assert_eq!(first_runs.len(), 40);
}

/// The lease of one of them ends: nothing of the call counts, and everything is done once in the end.
#[tokio::test(start_paused = true)]
async fn a_call_ends_with_the_first_of_its_leases() {
    async fn slow_at_first(batch: Batch<String>, calls: State<Calls>, tx: &mut MemoryTx) {
        let bodies = calls.add(&batch);
        bodies.into_iter().for_each(|body| tx.push(body));
        if calls.sizes().len() == 1 {
            sleep(Duration::from_secs(3600)).await;
        }
    }
    let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(30));
    let (store, calls) = (MemoryStore::new(), Calls::default());
    publish(&queue, (0..10).map(numbered)).await;
    let mut source = crate::support::FaultyQueue::new(&queue);
    source.extend = false;
    let report = Pipeline::transactional(source, store.clone())
        .batch(10, 1 << 20, Duration::from_millis(50))
        .state(calls.clone())
        .stop_when_idle(Duration::from_secs(120))
        .run(slow_at_first)
        .await
        .unwrap();
    assert_eq!(report.applied, 10);
    assert_eq!(sorted(&store), (0..10).collect::<Vec<_>>());
}

/// A message of which somebody else has made the record meanwhile keeps the others from nothing.
#[tokio::test(start_paused = true)]
async fn a_fenced_message_spares_the_others_of_its_batch() {
    async fn slowly(batch: Batch<String>, calls: State<Calls>, tx: &mut MemoryTx) {
        let bodies = calls.add(&batch);
        bodies.into_iter().for_each(|body| tx.push(body));
        sleep(Duration::from_secs(1)).await;
    }
    let (one, other) = (MemoryQueue::new("orders"), MemoryQueue::new("orders"));
    let (store, calls) = (MemoryStore::new(), Calls::default());
    publish(&one, (0..10).map(numbered)).await;
    publish(&other, (9..12).map(numbered)).await;
    let work = async |queue: MemoryQueue| {
        Pipeline::transactional(queue, store.clone())
            .identity("orders")
            .batch(10, 1 << 20, Duration::from_millis(50))
            .state(calls.clone())
            .stop_when_idle(IDLE)
            .run(slowly)
            .await
            .unwrap()
    };
    let (a, b) = tokio::join!(work(one), work(other));
    assert_eq!(a.applied + b.applied, 12);
    assert_eq!(a.duplicates + b.duplicates, 1);
    assert_eq!(sorted(&store), (0..12).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn a_batch_handler_has_no_parameter_of_one_message() {
    async fn mixed(_all: Batch<String>, _one: Context) {}
    let error = Pipeline::at_least_once(MemoryQueue::new("orders"))
        .run(mixed)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("Batch<(A, B)>"), "{error}");
}

/// Only the one that failed is tried again, and only its tries count.
#[tokio::test(start_paused = true)]
async fn only_the_guilty_message_uses_up_its_attempts() {
    async fn fail_with_3(
        batch: Batch<(String, Context)>,
        runs: State<Arc<AtomicUsize>>,
    ) -> Result<(), &'static str> {
        for item in &batch {
            if item.0 == "3" {
                assert!(
                    batch.len() > 1 || item.1.attempt as usize == runs.fetch_add(1, SeqCst) + 1
                );
                return Err("3");
            }
            assert_eq!(item.1.attempt, 1);
        }
        Ok(())
    }
    let (queue, dead) = (MemoryQueue::new("orders"), MemoryQueue::new("dead"));
    publish(&queue, (0..8).map(numbered)).await;
    let runs = Arc::new(AtomicUsize::new(0));
    let report = Pipeline::at_least_once(queue)
        .dead_letter(dead.clone())
        .retry(RetryPolicy::default().max_attempts(4))
        .state(runs.clone())
        .stop_when_idle(IDLE)
        .run(fail_with_3)
        .await
        .unwrap();
    assert_eq!((report.applied, report.dead_lettered), (7, 1));
    assert_eq!(runs.load(SeqCst), 4);
}
