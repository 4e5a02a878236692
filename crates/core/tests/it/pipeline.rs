//! The pipeline on the in-memory queue and store, in virtual time.

use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::*;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use onlyonce_core::attributes::*;
use onlyonce_core::driver::*;
use onlyonce_core::handler::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::*;
use serde::Deserialize;
use tokio::time::{Instant, sleep};

#[derive(Deserialize)]
struct Order {
    id: u64,
}

async fn take_order(
    Json(order): Json<Order>,
    key: DedupKey,
    tx: &mut MemoryTx,
) -> Result<(), Failure> {
    assert_eq!(key.as_str(), order.id.to_string());
    tx.push(order.id.to_string());
    Ok(())
}

async fn record(body: Bytes, tx: &mut MemoryTx) {
    tx.push(body);
}

#[tokio::test(start_paused = true)]
async fn every_message_takes_effect_once_in_transactional_mode() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    for _ in 0..3 {
        publish(
            &queue,
            (0..500)
                .map(|id| Message::new(format!("{{\"id\":{id}}}")).with_dedup_id(id.to_string())),
        )
        .await;
    }
    let report = Pipeline::transactional(queue.clone(), store.clone())
        .stop_when_idle(IDLE)
        .run(take_order)
        .await
        .unwrap();
    let mut effects: Vec<u64> = store
        .effects()
        .iter()
        .map(|b| std::str::from_utf8(b).unwrap().parse().unwrap())
        .collect();
    effects.sort_unstable();
    assert_eq!(effects, (0..500).collect::<Vec<_>>());
    assert_eq!((report.applied, report.duplicates), (500, 1_000));
    assert_eq!(queue.depth(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_group_runs_in_order_and_groups_run_beside_each_other() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    let messages = (0..400).map(|n| {
        Message::new(format!("{}:{}", n % 4, n / 4))
            .with_dedup_id(n.to_string())
            .with_group(format!("g{}", n % 4))
    });
    publish(&queue, messages).await;
    let started = Instant::now();
    Pipeline::transactional(queue.clone(), store.clone())
        .stop_when_idle(IDLE)
        .require_ordering()
        .run(async_slow)
        .await
        .unwrap();
    let mut next = [0; 4];
    for effect in store.effects() {
        let text = String::from_utf8(effect.to_vec()).unwrap();
        let (group, n) = text.split_once(':').unwrap();
        let (group, n): (usize, usize) = (group.parse().unwrap(), n.parse().unwrap());
        assert_eq!(next[group], n, "group {group}");
        next[group] += 1;
    }
    assert_eq!(next, [100; 4]);
    // 400 messages of 10 ms each in 4 lanes take a second, and not four.
    assert!(
        started.elapsed() < Duration::from_secs(3) + IDLE,
        "{:?}",
        started.elapsed()
    );
}

async fn async_slow(body: Bytes, tx: &mut MemoryTx) {
    sleep(Duration::from_millis(10)).await;
    tx.push(body);
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_not_mistaken_for_a_duplicate() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, [numbered(1)]).await;
    let runs = Arc::new(AtomicUsize::new(0));
    let seen = runs.clone();
    let report = Pipeline::idempotent(queue.clone(), store)
        .stop_when_idle(IDLE)
        // Through the broker and back, so that the claim's release is what counts.
        .retry(RetryPolicy::default().in_place(Duration::ZERO))
        .run(move || {
            let run = seen.fetch_add(1, Ordering::SeqCst);
            async move {
                match run {
                    0..3 => Err(Failure::retry("not yet")),
                    _ => Ok(()),
                }
            }
        })
        .await
        .unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 4);
    assert_eq!(
        (report.applied, report.duplicates, report.retried),
        (1, 0, 3)
    );
    assert_eq!(queue.depth(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_retried_message_is_not_overtaken_by_its_group() {
    for in_place in [Duration::ZERO, Duration::from_secs(60)] {
        let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
        publish(
            &queue,
            (0..20).map(|n| numbered(n).with_group(format!("g{}", n % 2))),
        )
        .await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let seen = order.clone();
        Pipeline::idempotent(queue.clone(), store)
            .stop_when_idle(IDLE)
            .retry(RetryPolicy::default().in_place(in_place))
            .run(move |body: String, context: Context| {
                let n: usize = body.parse().unwrap();
                let fails = n.is_multiple_of(5) && context.attempt < 3;
                if !fails {
                    seen.lock().unwrap().push(n);
                }
                async move {
                    match fails {
                        true => Err(Failure::retry("again")),
                        false => Ok(()),
                    }
                }
            })
            .await
            .unwrap();
        let order = order.lock().unwrap();
        for group in 0..2 {
            let of_group: Vec<_> = order.iter().copied().filter(|n| n % 2 == group).collect();
            let sorted: Vec<_> = (0..20).filter(|n| n % 2 == group).collect();
            assert_eq!(of_group, sorted, "in_place {in_place:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn poison_is_dead_lettered_with_its_reason_and_delays_nobody() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    let dead = MemoryQueue::new("orders.dead");
    let poison = [
        Message::new(vec![0xff, 0xfe]).with_dedup_id("utf8"),
        Message::new("{\"id\":\"x\"}").with_dedup_id("json"),
        Message::new("{\"id\":7}"),
        Message::new(vec![b' '; 10 << 20]).with_dedup_id("large"),
    ];
    publish(&queue, poison).await;
    publish(&queue, [Message::new("{\"id\":1}").with_dedup_id("1")]).await;
    let report = Pipeline::transactional(queue.clone(), store.clone())
        .dead_letter(dead.clone())
        .stop_when_idle(IDLE)
        .run(take_order)
        .await
        .unwrap();
    assert_eq!(
        (report.applied, report.dead_lettered, report.failed),
        (1, 4, 3)
    );
    assert_eq!((queue.depth(), dead.depth()), (0, 4));
    let mut reasons = Vec::new();
    for letter in take_all(&dead).await {
        let attributes = &letter.attributes;
        assert_eq!(attributes.get(DEAD_LETTER_QUEUE), Some("orders"));
        reasons.push(attributes.get(DEAD_LETTER_REASON).unwrap().to_owned());
    }
    assert_eq!(
        reasons
            .iter()
            .filter(|r| r.contains("not the JSON asked for"))
            .count(),
        3
    );
    assert_eq!(
        reasons
            .iter()
            .filter(|r| r.contains("no dedup key"))
            .count(),
        1
    );
}

#[tokio::test(start_paused = true)]
async fn a_handler_of_three_leases_finishes_once() {
    let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(3));
    let store = MemoryStore::new();
    publish(&queue, [numbered(1)]).await;
    let report = Pipeline::transactional(queue.clone(), store.clone())
        .claim_lease(Duration::from_secs(2))
        .stop_when_idle(IDLE)
        .run(very_slow)
        .await
        .unwrap();
    assert_eq!(store.effects().len(), 1);
    assert_eq!(
        (report.received, report.applied, report.cancelled),
        (1, 1, 0)
    );
}

async fn very_slow(body: Bytes, tx: &mut MemoryTx) {
    sleep(Duration::from_secs(9)).await;
    tx.push(body);
}

#[tokio::test(start_paused = true)]
async fn the_same_key_with_another_payload_is_a_mismatch_not_a_duplicate() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(
        &queue,
        [
            numbered(1),
            numbered(1),
            Message::new("other").with_dedup_id("m1"),
        ],
    )
    .await;
    let report = Pipeline::transactional(queue.clone(), store)
        .stop_when_idle(IDLE)
        .run(record)
        .await
        .unwrap();
    assert_eq!(
        (report.applied, report.duplicates, report.payload_mismatches),
        (1, 1, 1)
    );
    let dead = queue.dead_letters();
    assert_eq!(dead.len(), 1);
    assert!(
        dead[0].reason.starts_with("payload mismatch"),
        "{}",
        dead[0].reason
    );
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_gets_the_recorded_outcome() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, [numbered(1), numbered(1), numbered(1)]).await;
    let replayed = Arc::new(Mutex::new(Vec::new()));
    let seen = replayed.clone();
    Pipeline::idempotent(queue, store)
        .stop_when_idle(IDLE)
        .on_duplicate(move |context: Context, outcome: Outcome| {
            seen.lock().unwrap().push((context.key, outcome));
            async {}
        })
        .run(async |_: Bytes| Outcome::new("receipt 17"))
        .await
        .unwrap();
    let expected = (Some(DedupKey::new("m1")), Outcome::new("receipt 17"));
    assert_eq!(*replayed.lock().unwrap(), vec![expected.clone(), expected]);
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_a_failure_and_ends_in_the_dead_letter_queue() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, [numbered(1), numbered(2)]).await;
    let report = Pipeline::idempotent(queue.clone(), store)
        .stop_when_idle(IDLE)
        .retry(RetryPolicy::default().max_attempts(3))
        .run(|body: String| async move { assert_ne!(body, "1", "cannot do one") })
        .await
        .unwrap();
    assert_eq!(
        (report.applied, report.failed, report.dead_lettered),
        (1, 3, 1)
    );
    let dead = queue.dead_letters();
    assert!(
        dead[0].reason.contains("gave up after 3 attempts")
            && dead[0].reason.contains("cannot do one")
    );
}

#[tokio::test(start_paused = true)]
async fn a_drain_finishes_what_runs_and_gives_back_the_rest_in_order() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, (0..50).map(|n| numbered(n).with_group("g"))).await;
    let report = Pipeline::transactional(queue.clone(), store.clone())
        .shutdown(sleep(Duration::from_millis(105)))
        .run(async_slow)
        .await
        .unwrap();
    assert!(report.applied > 0 && report.applied < 50, "{report:?}");
    let rest = Pipeline::transactional(queue.clone(), store.clone())
        .stop_when_idle(IDLE)
        .run(async_slow)
        .await
        .unwrap();
    assert_eq!(report.applied + rest.applied, 50);
    let numbers = (0..50).map(|n: usize| Bytes::from(n.to_string()));
    assert_eq!(store.effects(), numbers.collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn unsafe_settings_are_refused_in_one_list() {
    let queue = MemoryQueue::new("orders")
        .with_max_deliveries(3)
        .with_retention(Duration::from_secs(30 * 86_400));
    let error = Pipeline::idempotent(queue, MemoryStore::new())
        .run(async || ())
        .await
        .unwrap_err();
    assert_eq!(error.error.kind(), ErrorKind::Unsafe);
    let text = error.to_string();
    assert!(
        text.contains("ShortRetention") && text.contains("DeliveryLimit"),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_state_that_was_not_given_is_an_error_at_the_start() {
    let error = Pipeline::at_least_once(MemoryQueue::new("orders"))
        .run(async |_: State<String>| ())
        .await
        .unwrap_err();
    assert_eq!(error.error.kind(), ErrorKind::Config);
}

#[tokio::test(start_paused = true)]
async fn at_most_once_acks_first() {
    let queue = MemoryQueue::new("orders");
    publish(&queue, (0..10).map(numbered)).await;
    let probe = queue.clone();
    let report = Pipeline::at_most_once(queue)
        .concurrency(1)
        .stop_when_idle(IDLE)
        .run(move |body: String| {
            let left = probe.depth() + probe.in_flight();
            async move {
                let n: usize = body.parse().unwrap();
                assert!(left < 10 - n, "{left} left while {n} runs");
                if n == 3 {
                    Err(Failure::retry("lost"))
                } else {
                    Ok(())
                }
            }
        })
        .await
        .unwrap();
    assert_eq!((report.applied, report.lost), (9, 1));
}

/// The reasons in a dead-letter queue.
async fn reasons(dead: &MemoryQueue) -> Vec<String> {
    let reason = |letter: &Message| {
        let reason = letter.attributes.get(DEAD_LETTER_REASON);
        reason.unwrap_or_default().to_owned()
    };
    take_all(dead).await.iter().map(reason).collect()
}

#[tokio::test(start_paused = true)]
async fn a_key_policy_that_panics_costs_its_message_and_no_worker() {
    let policy = || {
        KeyPolicy::custom(|message| {
            let id = message.dedup_id.clone();
            assert_ne!(id.as_deref(), Some("m2"), "no such shard");
            id
        })
    };
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    let dead = MemoryQueue::new("dead");
    publish(&queue, (1..=3).map(numbered)).await;
    let report = Pipeline::transactional(queue.clone(), store.clone())
        .dedup_key(policy())
        .dead_letter(dead.clone())
        .stop_when_idle(IDLE)
        .run(record)
        .await
        .unwrap();
    assert_eq!((report.applied, report.dead_lettered), (2, 1));
    assert_eq!(queue.depth() + queue.in_flight(), 0);
    let reasons = reasons(&dead).await;
    assert!(
        reasons[0].contains("the key policy panicked"),
        "{reasons:?}"
    );
    assert!(reasons[0].contains("no such shard"), "{reasons:?}");

    // Without a store there is no key to be chosen for, but a handler may ask for it.
    publish(&queue, [numbered(2)]).await;
    let report = Pipeline::at_least_once(queue.clone())
        .dedup_key(policy())
        .stop_when_idle(IDLE)
        .run(async || {})
        .await
        .unwrap();
    assert_eq!((report.applied, report.dead_lettered), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn json_may_begin_with_a_byte_order_mark_and_what_is_none_is_named() {
    let (queue, dead) = (MemoryQueue::new("orders"), MemoryQueue::new("dead"));
    let bodies = [
        &b"\xef\xbb\xbf{\"id\":1}"[..],
        b"\x1f\x8b\x08\0",
        b"\xff\xfe{\0",
    ];
    let message = |(n, body): (usize, &&'static [u8])| {
        Message::new(Bytes::from_static(body)).with_dedup_id((n + 1).to_string())
    };
    publish(&queue, bodies.iter().enumerate().map(message)).await;
    let report = Pipeline::transactional(queue, MemoryStore::new())
        .dead_letter(dead.clone())
        .concurrency(1)
        .stop_when_idle(IDLE)
        .run(take_order)
        .await
        .unwrap();
    assert_eq!((report.applied, report.dead_lettered), (1, 2));
    let reasons = reasons(&dead).await;
    assert!(
        reasons.iter().any(|why| why.contains("gzip")),
        "{reasons:?}"
    );
    assert!(
        reasons.iter().any(|why| why.contains("UTF-16")),
        "{reasons:?}"
    );
}

/// A dead-letter queue that answers as told.
struct Checked(MemoryQueue, Mutex<Vec<Result<SinkInfo, Error>>>);

#[async_trait::async_trait]
impl Sink for Checked {
    fn name(&self) -> &str {
        "dead"
    }

    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        self.1.lock().unwrap().pop().unwrap()
    }

    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        Sink::publish(&self.0, batch).await
    }

    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// A producer that compresses says so; the handler sees what was meant, and the key is of what was sent.
#[tokio::test(start_paused = true)]
async fn a_payload_is_decoded_as_it_declares() {
    let (queue, dead) = (MemoryQueue::new("orders"), MemoryQueue::new("dead"));
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(b"[1, 2]").unwrap();
    let gzip = gzip.finish().unwrap();
    let sent = |n: usize, encoding: &str| {
        let message = Message::new(gzip.clone()).with_dedup_id(n.to_string());
        message.with_attribute("content-encoding", encoding)
    };
    publish(&queue, [sent(1, "gzip"), sent(2, "br"), sent(3, "zstd")]).await;
    let read = Arc::new(Mutex::new(Vec::new()));
    let seen = read.clone();
    let report = Pipeline::at_least_once(queue)
        .dead_letter(dead.clone())
        .stop_when_idle(IDLE)
        .run(move |Json(numbers): Json<Vec<u32>>| {
            seen.lock().unwrap().push(numbers);
            std::future::ready(())
        })
        .await
        .unwrap();
    assert_eq!((report.applied, report.dead_lettered), (1, 2));
    assert_eq!(*read.lock().unwrap(), [[1, 2]]);
    for letter in take_all(&dead).await {
        let reason = letter.attributes.get(DEAD_LETTER_REASON).unwrap();
        assert!(reason.contains("content-encoding `"), "{reason}");
        assert_eq!(letter.body, gzip, "it is set aside as it came");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_queue_must_be_there_and_another() {
    let (queue, dead) = (MemoryQueue::new("orders"), MemoryQueue::new("dead"));
    publish(&queue, [numbered(1)]).await;
    let run = async |sink: Checked| {
        Pipeline::at_least_once(queue.clone())
            .dead_letter(sink)
            .stop_when_idle(IDLE)
            .run(async || Err::<(), _>(Failure::dead_letter("no")))
            .await
    };
    let gone = Err(Error::new(ErrorKind::NotFound, "there is no such queue"));
    let away = || Err(Error::new(ErrorKind::Connection, "away"));
    let answers = Mutex::new(vec![gone, away(), away()]);
    let error = run(Checked(dead.clone(), answers)).await.unwrap_err();
    assert_eq!(error.error.kind(), ErrorKind::NotFound, "{error}");
    assert_eq!(queue.depth(), 1, "it was not even received");

    let own = Pipeline::at_least_once(queue.clone())
        .dead_letter(queue.clone())
        .stop_when_idle(IDLE)
        .run(async || Err::<(), _>(Failure::dead_letter("no")))
        .await
        .unwrap_err();
    assert_eq!(own.error.kind(), ErrorKind::Unsafe, "{own}");
    assert_eq!(queue.depth(), 1, "it was not even received");

    let answers = Mutex::new(vec![Ok(SinkInfo::default()), away()]);
    let report = run(Checked(dead.clone(), answers)).await.unwrap();
    assert_eq!((report.dead_lettered, dead.depth()), (1, 1));
}
