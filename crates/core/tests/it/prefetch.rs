//! How many messages a worker holds: no more than it can start in time, and enough for all its handlers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::*;
use onlyonce_core::handler::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore};
use onlyonce_core::*;
use tokio::time::{Instant, sleep};

const LEASE: Duration = Duration::from_secs(30);

fn orders() -> MemoryQueue {
    MemoryQueue::new("orders").with_lease(LEASE)
}

/// To hold more costs requests, and attempts if this worker dies, and keeps them from other workers.
#[tokio::test(start_paused = true)]
async fn no_more_is_held_than_can_start_before_its_lease_must_be_extended() {
    for (millis, in_time, extend) in [
        (100, 100, true),
        (100, 100, false),
        (900, 11, true),
        (900, 11, false),
        (2_100, 4, true),
        (2_100, 4, false),
        (15_000, 1, true),
        (15_000, 1, false),
    ] {
        let queue = orders();
        publish(&queue, (0..200).map(numbered)).await;
        let mut source = FaultyQueue::new(&queue);
        source.extend = extend;
        let most = Arc::new(AtomicUsize::new(0));
        let seen = most.clone();
        let began = Instant::now();
        let report = Pipeline::idempotent(source.clone(), MemoryStore::new())
            .concurrency(4)
            .prefetch(80, usize::MAX)
            .stop_when_idle(IDLE)
            .run(move || {
                seen.fetch_max(queue.in_flight(), Ordering::SeqCst);
                sleep(Duration::from_millis(millis))
            })
            .await
            .unwrap();
        let case = format!("{millis} ms, extended: {extend}");
        assert_eq!((report.settled, report.cancelled), (200, 0), "{case}");
        assert_eq!(most.load(Ordering::SeqCst), 80.min(4 * in_time), "{case}");
        // No handler waited for its messages.
        let busy = Duration::from_millis(millis) * 200 / 4;
        assert!(began.elapsed() < busy + busy / 20 + IDLE, "{case}");
        // What runs for longer than that is extended, and nothing else.
        let extended = source.extensions.load(Ordering::SeqCst);
        assert_eq!(extended > 0, millis > 10_000 && extend, "{case}");
        // One of a group at a time until it is known what they take.
        let limits = source.limits.lock().unwrap();
        let per_group: Vec<_> = limits.iter().map(|limit| limit.per_group).collect();
        assert_eq!(per_group.first(), Some(&1), "{case}");
        assert_eq!(per_group.last(), Some(&in_time), "{case}");
        assert!(limits.iter().all(|limit| limit.messages > 0), "{case}");
    }
}

/// A lease that has no end by the clock need not be extended.
#[tokio::test(start_paused = true)]
async fn leases_without_end_bound_nothing() {
    let queue = orders();
    publish(&queue, (0..200).map(numbered)).await;
    let mut source = FaultyQueue::new(&queue);
    (source.timed, source.extend) = (false, false);
    let report = Pipeline::idempotent(source.clone(), MemoryStore::new())
        .concurrency(4)
        .prefetch(80, usize::MAX)
        .stop_when_idle(IDLE)
        .run(|| sleep(Duration::from_millis(500)))
        .await
        .unwrap();
    assert_eq!(report.settled, 200);
    let limits = source.limits.lock().unwrap();
    assert_eq!(limits[0].messages, 80);
    assert!(limits.iter().all(|limit| limit.per_group == usize::MAX));
}

/// When handlers become faster or slower, the bound follows.
#[tokio::test(start_paused = true)]
async fn the_bound_follows_the_handlers() {
    let queue = orders();
    publish(&queue, (0..600).map(numbered)).await;
    let source = FaultyQueue::new(&queue);
    let held = Arc::new(Mutex::new(Vec::new()));
    let seen = held.clone();
    Pipeline::idempotent(source, MemoryStore::new())
        .concurrency(4)
        .prefetch(100, usize::MAX)
        .stop_when_idle(IDLE)
        .run(move |body: String| {
            seen.lock().unwrap().push(queue.in_flight());
            let slow = (200..400).contains(&body.parse::<usize>().unwrap());
            sleep(Duration::from_millis(if slow { 4_000 } else { 10 }))
        })
        .await
        .unwrap();
    let held = held.lock().unwrap();
    let most = |range: std::ops::Range<usize>| held[range].iter().max().copied();
    assert_eq!(most(100..200), Some(100));
    assert_eq!(most(340..400), Some(8));
    assert_eq!(most(440..500), Some(100));
}

/// Those who wait behind others of their group are held too: beyond the bound there is one more for each idle worker.
#[tokio::test(start_paused = true)]
async fn groups_are_bounded_too() {
    let queue = orders();
    let grouped = |n| numbered(n).with_group((n % 6).to_string());
    publish(&queue, (0..200).map(grouped)).await;
    let most = Arc::new(AtomicUsize::new(0));
    let (seen, probe) = (most.clone(), queue.clone());
    let began = Instant::now();
    let report = Pipeline::idempotent(queue, MemoryStore::new())
        .concurrency(4)
        .stop_when_idle(IDLE)
        .run(move || {
            seen.fetch_max(probe.in_flight(), Ordering::SeqCst);
            sleep(Duration::from_millis(2_100))
        })
        .await
        .unwrap();
    assert_eq!(report.settled, 200);
    assert!((12..20).contains(&most.load(Ordering::SeqCst)), "{most:?}");
    let busy = Duration::from_millis(2_100) * 200 / 4;
    let took = began.elapsed() - IDLE;
    assert!(took < busy + busy / 10, "{took:?}");
}

/// Handlers that take two seconds, one at a time: five messages can start in time. Of the first ten, all but one stall,
/// since each of them that runs waits in place for its second attempt. Ten more come later, and none of these may wait.
async fn nobody_waits_behind(message: impl Fn(usize) -> Message) {
    const LATER: Duration = Duration::from_secs(60);
    let queue = orders();
    let producer = async {
        publish(&queue, (0..10).map(&message)).await;
        sleep(LATER).await;
        publish(&queue, (10..20).map(&message)).await;
    };
    let ended = Arc::new(Mutex::new(Vec::new()));
    let seen = ended.clone();
    let began = Instant::now();
    let consumer = Pipeline::idempotent(queue.clone(), MemoryStore::new())
        .concurrency(1)
        .retry(RetryPolicy::default().in_place(Duration::MAX))
        .stop_when_idle(IDLE)
        .run(move |body: String, context: Context| {
            let seen = seen.clone();
            async move {
                sleep(Duration::from_secs(2)).await;
                let n = body.parse::<usize>()?;
                if (1..10).contains(&n) && context.attempt == 1 {
                    let delay = Duration::from_secs(600);
                    return Err(Failure::retry_after(delay, "blocked"));
                }
                let mut seen = seen.lock().expect("no panic under it");
                seen.push((n, began.elapsed()));
                Ok(())
            }
        });
    let (report, ()) = tokio::join!(consumer, producer);
    assert_eq!(report.expect("nothing fails").settled, 20);
    let ended = ended.lock().expect("no panic under it");
    let later = ended.iter().filter(|(n, _)| *n >= 10);
    let last = later.map(|(_, at)| *at).max();
    assert!(
        last.is_some_and(|last| last < LATER + Duration::from_secs(10 * 2 + 2)),
        "{last:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_blocked_group_stalls_no_other_however_much_of_it_is_held() {
    let group = |n| {
        if (1..10).contains(&n) {
            "blocked"
        } else {
            "other"
        }
    };
    nobody_waits_behind(|n| numbered(n).with_group(group(n))).await;
}

#[tokio::test(start_paused = true)]
async fn messages_that_wait_for_their_retries_stall_no_other() {
    nobody_waits_behind(numbered).await;
}

#[tokio::test(start_paused = true)]
async fn copies_that_wait_for_the_first_stall_no_other() {
    nobody_waits_behind(|n| numbered(if n < 10 { n.min(1) } else { n })).await;
}

#[tokio::test(start_paused = true)]
async fn poison_that_cannot_be_set_aside_stalls_nobody() {
    let queue = orders();
    publish(&queue, (0..20).map(numbered)).await;
    let began = Instant::now();
    let away = || Error::new(ErrorKind::Connection, "away").retryable(true);
    let sink = FaultySink::new(move |_| (began.elapsed() < Duration::from_secs(600)).then(away));
    let dead = sink.queue.clone();
    let ended = Arc::new(Mutex::new(Vec::new()));
    let seen = ended.clone();
    let report = Pipeline::idempotent(queue.clone(), MemoryStore::new())
        .dead_letter(sink)
        .concurrency(2)
        .stop_when_idle(IDLE)
        .run(move |body: String| {
            let seen = seen.clone();
            async move {
                sleep(Duration::from_secs(6)).await;
                match body.parse::<usize>()? {
                    0..10 => Err(Failure::dead_letter("poison")),
                    n => {
                        seen.lock().unwrap().push((n, began.elapsed()));
                        Ok(())
                    }
                }
            }
        })
        .await
        .unwrap();
    assert_eq!((report.applied, dead.depth()), (10, 10));
    let last = ended.lock().unwrap().last().copied();
    assert!(
        last.is_some_and(|(_, at)| at < Duration::from_secs(62)),
        "{last:?}"
    );
}

/// The time for which a slow handler kept the pipeline from receiving is no idleness.
#[tokio::test(start_paused = true)]
async fn a_pipeline_that_waits_for_room_is_not_idle() {
    let queue = orders();
    publish(&queue, [numbered(0)]).await;
    let producer = async {
        // The first has just ended.
        sleep(Duration::from_secs(20) + IDLE / 2).await;
        publish(&queue, [numbered(1)]).await;
    };
    let consumer = Pipeline::idempotent(queue.clone(), MemoryStore::new())
        .concurrency(1)
        .stop_when_idle(IDLE)
        .run(|| sleep(Duration::from_secs(20)));
    let (report, ()) = tokio::join!(consumer, producer);
    assert_eq!(report.unwrap().applied, 2);
}
