//! What others got wrong, and faults of each kind, one test each; in virtual time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::*;
use bytes::Bytes;
use onlyonce_core::attributes::*;
use onlyonce_core::handler::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::*;
use tokio::time::{Instant, sleep, timeout};

fn sorted(store: &MemoryStore) -> Vec<usize> {
    let text = |b: &Bytes| std::str::from_utf8(b).expect("digits").to_owned();
    let parse = |b: &Bytes| text(b).parse().expect("a number");
    let mut effects: Vec<usize> = store.effects().iter().map(parse).collect();
    effects.sort_unstable();
    effects
}

async fn record(body: Bytes, tx: &mut MemoryTx) {
    tx.push(body);
}

async fn record_faulty(body: Bytes, tx: &mut FaultyTx) {
    tx.tx.push(body);
}

/// Errors of an ack were logged and dropped by others: here the redelivery is settled again, as a duplicate.
#[tokio::test(start_paused = true)]
async fn a_lost_ack_is_settled_again_by_the_redelivery() {
    for (fault, retryable) in [
        (Fault::Refused, true),
        (Fault::Refused, false),
        (Fault::ReplyLost, true),
        (Fault::ReplyLost, false),
    ] {
        let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
        publish(&queue, (0..100).map(numbered)).await;
        let mut source = FaultyQueue::new(&queue);
        source.settle = first(50, fault);
        source.retryable = retryable;
        let report = Pipeline::transactional(source, store.clone())
            .stop_when_idle(Duration::from_secs(60))
            .run(record)
            .await
            .unwrap();
        assert_eq!(sorted(&store), (0..100).collect::<Vec<_>>(), "{fault:?}");
        assert_eq!(queue.depth() + queue.in_flight(), 0, "{fault:?}");
        assert_eq!(report.applied, 100);
        let redelivered = fault == Fault::Refused && !retryable;
        assert_eq!(report.duplicates > 0, redelivered, "{fault:?}: {report:?}");
    }
}

/// Partial failures of a batch were ignored by others.
#[tokio::test(start_paused = true)]
async fn a_failed_entry_of_a_batch_is_settled_again_and_the_others_once() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, (0..300).map(numbered)).await;
    let mut source = FaultyQueue::new(&queue);
    source.settle = Arc::new(|n| match n % 3 {
        0 => Fault::Refused,
        _ => Fault::None,
    });
    let report = Pipeline::transactional(source, store.clone())
        .stop_when_idle(Duration::from_secs(60))
        .run(record)
        .await
        .unwrap();
    assert_eq!(sorted(&store), (0..300).collect::<Vec<_>>());
    assert_eq!(queue.depth() + queue.in_flight(), 0);
    assert_eq!((report.applied, report.settled), (300, 300));
}

/// Errors of "mark done" were logged and dropped by others.
#[tokio::test(start_paused = true)]
async fn a_failed_completion_is_tried_again_before_the_ack() {
    for fault in [Fault::Refused, Fault::ReplyLost] {
        let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
        publish(&queue, (0..10).map(numbered)).await;
        let mut faulty = FaultyStore::new(&store);
        faulty.complete = first(3, fault);
        let runs = Arc::new(AtomicUsize::new(0));
        let seen = runs.clone();
        Pipeline::idempotent(queue.clone(), faulty)
            .stop_when_idle(Duration::from_secs(60))
            .run(move || {
                seen.fetch_add(1, Ordering::SeqCst);
                async {}
            })
            .await
            .unwrap();
        assert_eq!(queue.depth() + queue.in_flight(), 0, "{fault:?}");
        assert_eq!(
            runs.load(Ordering::SeqCst),
            10,
            "{fault:?}: nothing ran twice"
        );
    }
}

/// A commit whose answer is lost may have been made: the message is claimed again, and the store tells.
#[tokio::test(start_paused = true)]
async fn a_failed_commit_or_a_lost_answer_doubles_and_loses_nothing() {
    for fault in [Fault::Refused, Fault::ReplyLost] {
        for group in [None, Some("g")] {
            let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
            let messages = (0..40).map(|n| match group {
                Some(group) => numbered(n).with_group(group),
                None => numbered(n),
            });
            publish(&queue, messages).await;
            let mut faulty = FaultyStore::new(&store);
            faulty.begin = Arc::new(move |n| if n % 2 == 0 { fault } else { Fault::None });
            Pipeline::transactional(queue.clone(), faulty)
                .stop_when_idle(Duration::from_secs(60))
                .run(record_faulty)
                .await
                .unwrap();
            assert_eq!(sorted(&store), (0..40).collect::<Vec<_>>(), "{fault:?}");
            assert_eq!(queue.depth() + queue.in_flight(), 0, "{fault:?}");
            if group.is_some() {
                let order: Vec<_> = (0..40).map(|n: usize| Bytes::from(n.to_string())).collect();
                assert_eq!(store.effects(), order, "{fault:?}: order within the group");
            }
        }
    }
}

/// A commit that the store refuses is not one whose answer was lost: it is a failed attempt of the message that caused it,
/// and of no other that was in the same transaction.
#[tokio::test(start_paused = true)]
async fn a_refused_commit_fails_its_message_and_spares_the_others() {
    for group in [None, Some("g")] {
        let queue = MemoryQueue::new("orders");
        let store = MemoryStore::new().refusing(|effect| effect == b"13" || effect == b"14");
        let messages = (0..40).map(|n| match group {
            Some(group) => numbered(n).with_group(group),
            None => numbered(n),
        });
        publish(&queue, messages).await;
        let runs: Arc<Mutex<Vec<Bytes>>> = Arc::default();
        let seen = runs.clone();
        let report = Pipeline::transactional(queue.clone(), store.clone())
            .state(seen)
            .retry(RetryPolicy::default().max_attempts(3))
            .stop_when_idle(Duration::from_secs(60))
            .run(
                async |body: Bytes,
                       State(runs): State<Arc<Mutex<Vec<Bytes>>>>,
                       tx: &mut MemoryTx| {
                    runs.lock().expect("no panic").push(body.clone());
                    tx.push(body);
                },
            )
            .await
            .unwrap();
        let spared = (0..40).filter(|n| ![13, 14].contains(n));
        assert_eq!(sorted(&store), spared.clone().collect::<Vec<_>>());
        if group.is_some() {
            let order: Vec<_> = spared.map(|n: usize| Bytes::from(n.to_string())).collect();
            assert_eq!(store.effects(), order, "order within the group");
        }
        let dead = queue.dead_letters();
        let reasons: Vec<_> = dead.iter().map(|dead| &dead.reason).collect();
        assert_eq!(dead.len(), 2, "{reasons:?}");
        let reason = "gave up after 3 attempts: the store refuses";
        assert!(reasons[0].starts_with(reason), "{reasons:?}");
        assert_eq!((report.applied, report.failed), (38, 6));
        // The run before the three is not known to be its own failure: it shared a transaction, or may have.
        let runs = runs.lock().expect("no panic");
        let of_13 = runs.iter().filter(|body| **body == "13").count();
        assert_eq!(of_13, 4);
    }
}

/// So too where the record is written after the effect.
#[tokio::test(start_paused = true)]
async fn a_refused_record_fails_its_message_and_spares_the_others() {
    for in_doubt in [InDoubt::RunAgain, InDoubt::Quarantine] {
        let queue = MemoryQueue::new("orders");
        let store = MemoryStore::new().refusing(|outcome| outcome == b"13");
        publish(&queue, (0..40).map(numbered)).await;
        let report = Pipeline::idempotent(queue.clone(), store.clone())
            .on_in_doubt(in_doubt)
            .retry(RetryPolicy::default().max_attempts(3))
            .stop_when_idle(Duration::from_secs(60))
            .run(async |body: Bytes| Outcome::new(body))
            .await
            .unwrap();
        assert_eq!(report.applied, 39);
        let dead = queue.dead_letters();
        assert_eq!(dead.len(), 1);
        let (reason, failed) = match in_doubt {
            InDoubt::Quarantine => ("in doubt:", 1),
            _ => ("gave up after 3 attempts: the store refuses", 3),
        };
        assert!(dead[0].reason.starts_with(reason), "{}", dead[0].reason);
        assert_eq!(report.failed, failed);
    }
}

/// A claim whose answer was lost has been made: it is asked for again, not waited for.
#[tokio::test(start_paused = true)]
async fn a_claim_whose_answer_was_lost_is_claimed_again_at_once() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, (0..10).map(numbered)).await;
    let mut faulty = FaultyStore::new(&store);
    faulty.claim = first(1, Fault::ReplyLost);
    let began = Instant::now();
    let finished = Arc::new(Mutex::new(began));
    let last = finished.clone();
    Pipeline::idempotent(queue.clone(), faulty)
        .stop_when_idle(IDLE)
        .run(move || {
            *last.lock().unwrap() = Instant::now();
            async {}
        })
        .await
        .unwrap();
    let took = *finished.lock().unwrap() - began;
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(queue.depth() + queue.in_flight(), 0);
}

/// Claims without an owner let a stale holder free another's claim in other projects.
#[tokio::test(start_paused = true)]
async fn a_stale_worker_neither_commits_nor_frees_its_successors_claim() {
    let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(2));
    let store = MemoryStore::new();
    publish(&queue, [numbered(1)]).await;
    // The first worker can neither renew its claim nor extend its lease.
    let mut cut_off = FaultyStore::new(&store);
    cut_off.renew = first(usize::MAX, Fault::Refused);
    let mut source = FaultyQueue::new(&queue);
    source.extend = false;
    let stale = Pipeline::transactional(source, cut_off)
        .claim_lease(Duration::from_secs(1))
        .stop_when_idle(Duration::from_secs(3))
        .run(slow_faulty);
    let successor = async {
        sleep(Duration::from_millis(100)).await;
        Pipeline::transactional(queue.clone(), store.clone())
            .claim_lease(Duration::from_secs(1))
            .stop_when_idle(Duration::from_secs(30))
            .run(slow)
            .await
    };
    let (stale, successor) = tokio::join!(stale, successor);
    let (stale, successor) = (stale.unwrap(), successor.unwrap());
    assert_eq!(sorted(&store), [1]);
    assert!(stale.cancelled >= 1 && stale.applied == 0, "{stale:?}");
    assert_eq!(successor.applied, 1, "{successor:?}");
}

async fn slow(body: Bytes, tx: &mut MemoryTx) {
    sleep(Duration::from_secs(5)).await;
    tx.push(body);
}

async fn slow_faulty(body: Bytes, tx: &mut FaultyTx) {
    tx.tx.push(body);
    sleep(Duration::from_secs(5)).await;
}

/// A dead letter deleted the message in other projects when it could not be published.
#[tokio::test(start_paused = true)]
async fn a_dead_letter_is_confirmed_before_the_message_is_acked() {
    for retryable in [true, false] {
        let queue = MemoryQueue::new("orders");
        publish(&queue, [numbered(1)]).await;
        let down = move || Error::new(ErrorKind::Connection, "down").retryable(retryable);
        let sink = FaultySink::new(move |call| (call < 3).then(down));
        let dead = sink.queue.clone();
        let report = Pipeline::idempotent(queue.clone(), MemoryStore::new())
            .dead_letter(sink)
            .stop_when_idle(Duration::from_secs(300))
            .run(async || Err::<(), _>(Failure::dead_letter("no")))
            .await
            .unwrap();
        assert_eq!(
            (dead.depth(), report.dead_lettered),
            (1, 1),
            "retryable {retryable}"
        );
        assert_eq!(queue.depth() + queue.in_flight(), 0);
    }
}

/// A redrive from the dead-letter queue runs the message again: no record of it was kept.
#[tokio::test(start_paused = true)]
async fn a_redriven_dead_letter_is_no_duplicate() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, [numbered(1)]).await;
    Pipeline::idempotent(queue.clone(), store.clone())
        .stop_when_idle(IDLE)
        .run(async || Err::<(), _>(Failure::dead_letter("bug in the handler")))
        .await
        .unwrap();
    let letters = queue.dead_letters();
    publish(
        &queue,
        letters
            .into_iter()
            .map(|dead| Message::clone(&dead.message)),
    )
    .await;
    let report = Pipeline::transactional(queue.clone(), store.clone())
        .stop_when_idle(IDLE)
        .run(record)
        .await
        .unwrap();
    assert_eq!((report.applied, report.duplicates), (1, 0));
}

/// Messages of other groups were dropped until their leases ended, or stood still, in other projects.
#[tokio::test(start_paused = true)]
async fn a_blocked_group_stalls_no_other() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(
        &queue,
        (0..100).map(|n| numbered(n).with_group(format!("g{}", n % 10))),
    )
    .await;
    let began = Instant::now();
    let others = Arc::new(Mutex::new(Vec::new()));
    let seen = others.clone();
    Pipeline::idempotent(queue.clone(), store)
        .concurrency(2)
        .stop_when_idle(Duration::from_secs(90))
        .run(move |body: String, context: Context| {
            let n: usize = body.parse().unwrap();
            let blocked = n == 0 && context.attempt < 8;
            if !n.is_multiple_of(10) {
                seen.lock().unwrap().push(Instant::now());
            }
            async move {
                match blocked {
                    true => Err(Failure::retry("blocked")),
                    false => Ok(()),
                }
            }
        })
        .await
        .unwrap();
    let others = others.lock().unwrap();
    assert_eq!(others.len(), 90);
    let last = *others.iter().max().unwrap() - began;
    assert!(last < Duration::from_millis(100), "{last:?}");
    assert_eq!(queue.depth() + queue.in_flight(), 0);
}

/// Buffered messages were run after their leases had ended in other projects.
#[tokio::test(start_paused = true)]
async fn no_handler_starts_without_lease_and_none_outlives_it() {
    let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(1));
    publish(&queue, (0..50).map(numbered)).await;
    let mut source = FaultyQueue::new(&queue);
    source.extend = false;
    let received = source.received.clone();
    let late = Arc::new(AtomicUsize::new(0));
    let seen = late.clone();
    let report = Pipeline::idempotent(source, MemoryStore::new())
        .concurrency(2)
        .stop_when_idle(IDLE)
        .run(move |body: String| {
            let (received, seen) = (received.clone(), seen.clone());
            let leased = move || {
                let received = received.lock().unwrap();
                let newest = received
                    .iter()
                    .rev()
                    .find(|d| d.message.body == body)
                    .unwrap();
                newest.lease.until.unwrap() > Instant::now()
            };
            async move {
                // Counted at once: a handler that should not have started is soon dropped.
                seen.fetch_add(usize::from(!leased()), Ordering::SeqCst);
                sleep(Duration::from_millis(100)).await;
                seen.fetch_add(usize::from(!leased()), Ordering::SeqCst);
            }
        })
        .await
        .unwrap();
    assert_eq!(late.load(Ordering::SeqCst), 0);
    assert_eq!((report.applied, queue.depth() + queue.in_flight()), (50, 0));
}

/// What is too little lease to start is a share of the lease's own length, not of the claim's.
#[tokio::test(start_paused = true)]
async fn a_long_lease_beside_a_short_claim_starts_handlers() {
    for (lease, claim) in [(3_600, 1), (1, 3_600)] {
        let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(lease));
        publish(&queue, (0..10).map(numbered)).await;
        let report = Pipeline::idempotent(queue, MemoryStore::new())
            .claim_lease(Duration::from_secs(claim))
            .stop_when_idle(IDLE)
            .run(async || ())
            .await
            .unwrap();
        assert_eq!((report.applied, report.received), (10, 10));
    }
}

/// A handler that was cancelled may have produced its effect: in quarantine that doubt is not released with the claim.
#[tokio::test(start_paused = true)]
async fn a_cancelled_handler_leaves_its_doubt_to_the_next_worker() {
    let queue = MemoryQueue::new("orders");
    let store = MemoryStore::new();
    publish(&queue, [numbered(1)]).await;
    let builder = || {
        Pipeline::idempotent(queue.clone(), store.clone())
            .on_in_doubt(InDoubt::Quarantine)
            .claim_lease(Duration::from_secs(2))
    };
    let stopped = builder()
        .shutdown(sleep(Duration::from_secs(1)))
        .drain_timeout(Duration::from_secs(1))
        .run(async || sleep(Duration::from_secs(3_600)).await);
    assert_eq!(stopped.await.unwrap().cancelled, 1);
    let next = builder().stop_when_idle(IDLE).run(async || ());
    let report = next.await.unwrap();
    assert_eq!((report.applied, report.dead_lettered), (0, 1), "{report:?}");
}

/// A completion that was refused settles nothing: the message is its new owner's, or comes again.
#[tokio::test(start_paused = true)]
async fn a_fenced_completion_is_not_settled() {
    let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(3));
    publish(&queue, [numbered(1)]).await;
    let faulty = FaultyStore::new(&MemoryStore::new());
    faulty.takeovers.store(1, Ordering::SeqCst);
    // The owner that took over never finishes, so the redelivery runs once its claim has ended.
    let report = Pipeline::idempotent(queue.clone(), faulty)
        .stop_when_idle(Duration::from_secs(30))
        .run(async || ())
        .await
        .unwrap();
    assert_eq!((report.fenced, report.applied, report.settled), (1, 1, 1));
    assert_eq!(queue.depth() + queue.in_flight(), 0);
}

/// A handler is dropped at the deadline of its lease, not when it comes back.
#[tokio::test(start_paused = true)]
async fn a_handler_is_dropped_when_its_lease_ends() {
    struct Alive(Arc<Mutex<Vec<Duration>>>, Instant);
    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.lock().unwrap().push(self.1.elapsed());
        }
    }
    let lease = Duration::from_secs(2);
    let queue = MemoryQueue::new("orders").with_lease(lease);
    publish(&queue, [numbered(1)]).await;
    let mut source = FaultyQueue::new(&queue);
    source.extend = false;
    let lives = Arc::new(Mutex::new(Vec::new()));
    let seen = lives.clone();
    let run = Pipeline::idempotent(source, MemoryStore::new()).run(move || {
        let alive = Alive(seen.clone(), Instant::now());
        async move {
            sleep(Duration::from_secs(3_600)).await;
            drop(alive);
        }
    });
    let _ = tokio::time::timeout(Duration::from_secs(9), run).await;
    let lives = lives.lock().unwrap();
    assert!(lives.len() >= 3, "{lives:?}");
    let bound = lease + Duration::from_millis(2);
    assert!(lives.iter().all(|life| *life <= bound), "{lives:?}");
}

/// A failure in the middle of a shared transaction rolls back itself and nothing else.
#[tokio::test(start_paused = true)]
async fn a_failure_within_a_shared_transaction_rolls_back_only_itself() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, (0..30).map(|n| numbered(n).with_group("g"))).await;
    let report = Pipeline::transactional(queue.clone(), store.clone())
        .stop_when_idle(IDLE)
        .run(fails_at_first)
        .await
        .unwrap();
    let order: Vec<_> = (0..30).map(|n: usize| Bytes::from(n.to_string())).collect();
    assert_eq!(store.effects(), order);
    assert_eq!((report.applied, report.failed), (30, 6));
    assert_eq!(queue.depth() + queue.in_flight(), 0);
}

async fn fails_at_first(body: String, context: Context, tx: &mut MemoryTx) -> Result<(), Failure> {
    let n: usize = body.parse()?;
    tx.push(body);
    match n % 5 == 3 && context.attempt == 1 {
        true => Err(Failure::retry("at first")),
        false => Ok(()),
    }
}

/// A worker may be started before its broker.
#[tokio::test(start_paused = true)]
async fn a_broker_that_is_not_there_yet_is_waited_for() {
    let queue = MemoryQueue::new("orders");
    publish(&queue, [numbered(1)]).await;
    let source = FaultyQueue::new(&queue);
    source.absent.store(20, Ordering::SeqCst);
    let run = Pipeline::idempotent(source.clone(), MemoryStore::new()).stop_when_idle(IDLE);
    assert_eq!(run.run(async || ()).await.unwrap().applied, 1);
    source.absent.store(usize::MAX, Ordering::SeqCst);
    let run = Pipeline::idempotent(source, MemoryStore::new()).shutdown(sleep(IDLE));
    assert_eq!(run.run(async || ()).await.unwrap(), Report::default());
}

/// The default dedup retention was shorter than a redrive in every other project.
#[tokio::test(start_paused = true)]
async fn the_default_retention_outlasts_the_longest_queue_retention() {
    let with_retention = async |days: u64| {
        let queue = MemoryQueue::new("q").with_retention(Duration::from_secs(days * 86_400));
        Pipeline::idempotent(queue, MemoryStore::new())
            .stop_when_idle(IDLE)
            .run(async || ())
            .await
    };
    assert!(with_retention(14).await.is_ok());
    let refused = with_retention(15).await.unwrap_err();
    assert!(refused.to_string().contains("ShortRetention"), "{refused}");
}

/// A worker that died between effect and record leaves the outcome in doubt: the user chooses.
#[tokio::test(start_paused = true)]
async fn an_outcome_in_doubt_is_run_again_or_quarantined() {
    for (in_doubt, applied, quarantined) in [(InDoubt::RunAgain, 2, 0), (InDoubt::Quarantine, 1, 1)]
    {
        let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(1));
        let store = MemoryStore::new();
        publish(&queue, [numbered(1), numbered(2)]).await;
        let builder = || {
            Pipeline::idempotent(queue.clone(), store.clone())
                .on_in_doubt(in_doubt)
                .concurrency(1)
                .claim_lease(Duration::from_secs(1))
                .stop_when_idle(IDLE)
        };
        // Dies in the middle of the first message; the second was claimed, but not started.
        let dying = builder().run(async || sleep(Duration::from_secs(3_600)).await);
        assert!(timeout(Duration::from_millis(500), dying).await.is_err());
        let report = builder().run(async || ()).await.unwrap();
        assert_eq!(
            (report.applied, report.dead_lettered),
            (applied, quarantined),
            "{in_doubt:?}"
        );
        assert_eq!(report.in_doubt, quarantined);
    }
}

/// A message that is put back from the dead-letter queue as it is runs in spite of the doubt for which it was set aside. If its
/// worker dies again, that is a new doubt.
#[tokio::test(start_paused = true)]
async fn a_redrive_decides_on_one_doubt_and_on_no_later_one() {
    let lease = Duration::from_secs(1);
    let queue = MemoryQueue::new("orders").with_lease(lease);
    let dead = MemoryQueue::new("dead");
    let store = MemoryStore::new();
    publish(&queue, [numbered(1)]).await;
    let builder = || {
        Pipeline::idempotent(queue.clone(), store.clone())
            .on_in_doubt(InDoubt::Quarantine)
            .dead_letter(dead.clone())
            .claim_lease(lease)
            .stop_when_idle(IDLE)
    };
    let dies = async || {
        let dying = builder().run(async || sleep(Duration::from_secs(3_600)).await);
        assert!(timeout(lease / 2, dying).await.is_err(), "it has started");
    };
    for _ in 0..3 {
        dies().await;
        let report = builder().run(async || ()).await.unwrap();
        assert_eq!((report.applied, report.dead_lettered), (0, 1));
        let letters = take_all(&dead).await;
        assert_eq!(letters.len(), 1);
        let reason = letters[0].attributes.get(DEAD_LETTER_REASON).unwrap();
        assert!(reason.starts_with("in doubt: "), "{reason}");
        publish(&queue, letters).await;
    }
    let report = builder().run(async || ()).await.unwrap();
    assert_eq!((report.applied, report.dead_lettered), (1, 0));
}

/// Dropping the pipeline at any moment loses nothing and leaves nothing behind.
#[tokio::test(start_paused = true)]
async fn dropping_the_pipeline_loses_nothing() {
    let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(1));
    let store = MemoryStore::new();
    publish(
        &queue,
        (0..200).map(|n| numbered(n).with_group(format!("g{}", n % 7))),
    )
    .await;
    for millis in [0, 1, 3, 10, 25, 50] {
        let run = Pipeline::transactional(queue.clone(), store.clone())
            .claim_lease(Duration::from_secs(1))
            .run(async_slow);
        let dropped = tokio::time::timeout(Duration::from_millis(millis), run).await;
        assert!(dropped.is_err(), "it was still at work");
    }
    Pipeline::transactional(queue.clone(), store.clone())
        .claim_lease(Duration::from_secs(1))
        .stop_when_idle(IDLE)
        .run(record)
        .await
        .unwrap();
    assert_eq!(sorted(&store), (0..200).collect::<Vec<_>>());
    assert_eq!(queue.depth() + queue.in_flight(), 0);
}

async fn async_slow(body: Bytes, tx: &mut MemoryTx) {
    sleep(Duration::from_millis(1)).await;
    tx.push(body);
}

/// Handlers that ignore the drain are cancelled at its end, and their messages given back.
#[tokio::test(start_paused = true)]
async fn a_drain_has_an_end() {
    let queue = MemoryQueue::new("orders");
    publish(&queue, (0..5).map(numbered)).await;
    let began = Instant::now();
    let report = Pipeline::idempotent(queue.clone(), MemoryStore::new())
        .shutdown(sleep(Duration::from_secs(1)))
        .drain_timeout(Duration::from_secs(2))
        .run(async || sleep(Duration::from_secs(3_600)).await)
        .await
        .unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(6),
        "{:?}",
        began.elapsed()
    );
    assert_eq!((report.cancelled, report.applied), (5, 0));
    assert_eq!(
        (queue.depth(), queue.in_flight()),
        (5, 0),
        "given back at once"
    );
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_takes_too_long_is_cancelled_and_retried() {
    let queue = MemoryQueue::new("orders");
    publish(&queue, [numbered(1)]).await;
    let report = Pipeline::idempotent(queue.clone(), MemoryStore::new())
        .handler_timeout(Duration::from_secs(1))
        .retry(RetryPolicy::default().max_attempts(2))
        .stop_when_idle(IDLE)
        .run(async || sleep(Duration::from_secs(3_600)).await)
        .await
        .unwrap();
    assert_eq!((report.failed, report.dead_lettered), (2, 1));
    assert!(queue.dead_letters()[0].reason.contains("time-out"));
}

#[tokio::test(start_paused = true)]
async fn bytes_held_are_bounded() {
    let queue = MemoryQueue::new("orders");
    publish(
        &queue,
        (0..100).map(|n| Message::new(vec![0; 1_000]).with_dedup_id(n.to_string())),
    )
    .await;
    let (probe, most) = (queue.clone(), Arc::new(AtomicUsize::new(0)));
    let seen = most.clone();
    Pipeline::idempotent(queue, MemoryStore::new())
        .prefetch(1_000, 5_000)
        .stop_when_idle(IDLE)
        .run(move || {
            seen.fetch_max(probe.in_flight(), Ordering::SeqCst);
            async { sleep(Duration::from_millis(10)).await }
        })
        .await
        .unwrap();
    let most = most.load(Ordering::SeqCst);
    assert!(
        (2..=6).contains(&most),
        "{most} messages of 1,000 bytes held"
    );
}

/// A time that cannot be added to the clock ended the stage that tried.
#[tokio::test(start_paused = true)]
async fn no_time_that_somebody_asks_for_is_too_long() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, (0..3).map(numbered)).await;
    let handler = async |body: Bytes, tx: &mut MemoryTx| {
        if body == "1" {
            return Err(Failure::retry_after(Duration::MAX, "much later"));
        }
        tx.push(body);
        Ok(())
    };
    let report = Pipeline::transactional(queue.clone(), store.clone())
        .claim_lease(Duration::MAX)
        .dedup_retention(Duration::MAX)
        .handler_timeout(Duration::MAX)
        .drain_timeout(Duration::MAX)
        .retry(RetryPolicy::default().delays(Duration::MAX, Duration::MAX))
        .stop_when_idle(Duration::from_secs(60))
        .run(handler)
        .await
        .unwrap();
    assert_eq!((report.applied, report.retried), (2, 1));
    assert_eq!(sorted(&store), [0, 2]);
    assert_eq!((queue.depth(), queue.in_flight()), (1, 0));
}
