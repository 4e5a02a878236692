//! Which attempt a run is, however the message came back; in virtual time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::*;
use async_trait::async_trait;
use onlyonce_core::driver::*;
use onlyonce_core::handler::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::*;
use tokio::time::sleep;

/// The attempts that the runs of each message were told.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<BTreeMap<String, Vec<u32>>>>);

impl Seen {
    /// Notes a run and returns how many there were before.
    fn run(&self, body: &str, context: &Context) -> usize {
        let mut seen = self.0.lock().expect("no panic under it");
        let attempts = seen.entry(body.to_owned()).or_default();
        attempts.push(context.attempt);
        attempts.len() - 1
    }

    fn of(&self, body: &str) -> Vec<u32> {
        let seen = self.0.lock().expect("no panic under it");
        seen.get(body).cloned().unwrap_or_default()
    }
}

/// What is left when all is settled, and why it was set aside.
fn assert_given_up(queue: &MemoryQueue, bodies: &[&str]) {
    assert_eq!((queue.depth(), queue.in_flight()), (0, 0));
    let dead = queue.dead_letters();
    let given_up: Vec<_> = dead.iter().map(|dead| &dead.message.body[..]).collect();
    let expected: Vec<_> = bodies.iter().map(|body| body.as_bytes()).collect();
    assert_eq!(given_up, expected);
    for letter in dead {
        let reason = &letter.reason;
        assert!(reason.starts_with("gave up after 10 attempts"), "{reason}");
    }
}

const LONG: Duration = Duration::from_secs(300);

async fn always_fails(source: impl Source, seen: &Seen) -> Report {
    let note = seen.clone();
    Pipeline::at_least_once(source)
        .stop_when_idle(LONG)
        .run(move |body: String, context: Context| {
            note.run(&body, &context);
            async { Err::<(), _>(Failure::retry("always")) }
        })
        .await
        .expect("the pipeline ends well")
}

#[tokio::test(start_paused = true)]
async fn what_always_fails_runs_as_often_as_the_policy_says() {
    let (queue, seen) = (MemoryQueue::new("orders"), Seen::default());
    publish(&queue, [numbered(0)]).await;
    let report = always_fails(queue.clone(), &seen).await;
    assert_eq!(seen.of("0"), Vec::from_iter(1..=10));
    assert!((3..10).contains(&report.received), "{report:?}");
    assert_given_up(&queue, &["0"]);
}

/// They went back with it again and again, and were given up at their first failure.
#[tokio::test(start_paused = true)]
async fn followers_of_a_head_that_fails_keep_their_attempts() {
    let queue = MemoryQueue::new("orders");
    let (store, seen) = (MemoryStore::new(), Seen::default());
    publish(&queue, (0..4).map(|n| numbered(n).with_group("g"))).await;
    let report = Pipeline::transactional(queue.clone(), store.clone())
        .state(seen.clone())
        .stop_when_idle(LONG)
        .run(fails_but_for_the_last)
        .await
        .unwrap();
    for body in ["0", "1"] {
        assert_eq!(seen.of(body), Vec::from_iter(1..=10), "{body}");
    }
    assert_eq!((seen.of("2"), seen.of("3")), (vec![1, 2], vec![1]));
    assert!(report.given_back > 10, "{report:?}");
    assert_given_up(&queue, &["0", "1"]);
    assert_eq!(store.effects(), ["2", "3"]);
}

async fn fails_but_for_the_last(
    body: String,
    context: Context,
    State(seen): State<Seen>,
    tx: &mut MemoryTx,
) -> Result<(), Failure> {
    let before = seen.run(&body, &context);
    match body.as_str() {
        "0" | "1" => Err(Failure::retry("always")),
        "2" if before == 0 => Err(Failure::retry("at first")),
        _ => {
            tx.push(body);
            Ok(())
        }
    }
}

/// A replay of what was done before is not run again without end either.
#[tokio::test(start_paused = true)]
async fn a_replay_that_always_fails_is_given_up() {
    let (queue, seen) = (MemoryQueue::new("orders"), Seen::default());
    publish(&queue, [numbered(0), numbered(0)]).await;
    let note = seen.clone();
    Pipeline::idempotent(queue.clone(), MemoryStore::new())
        .stop_when_idle(LONG)
        .on_duplicate(move |context: Context, _: Outcome| {
            note.run("0", &context);
            async { Err::<(), _>(Failure::retry("always")) }
        })
        .run(async || ())
        .await
        .unwrap();
    assert_eq!(seen.of("0"), Vec::from_iter(1..=10));
    assert_given_up(&queue, &["0"]);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_was_cut_off_is_an_attempt() {
    let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(4));
    let (seen, mut source) = (Seen::default(), FaultyQueue::new(&queue));
    source.extend = false;
    publish(&queue, [numbered(0)]).await;
    let note = seen.clone();
    let report = Pipeline::at_least_once(source)
        .allow(ConfigRisk::ShortLease)
        .stop_when_idle(LONG)
        .run(move |body: String, context: Context| {
            let hangs = note.run(&body, &context) % 3 == 2;
            async move {
                if hangs {
                    sleep(LONG).await;
                }
                Err::<(), _>(Failure::retry("always"))
            }
        })
        .await
        .unwrap();
    assert_eq!(seen.of("0"), Vec::from_iter(1..=10));
    assert_eq!((report.cancelled > 0, report.failed), (true, 7));
    assert_given_up(&queue, &["0"]);
}

#[tokio::test(start_paused = true)]
async fn a_lost_ack_loses_no_attempts() {
    let (queue, seen) = (MemoryQueue::new("orders"), Seen::default());
    let mut source = FaultyQueue::new(&queue);
    source.settle = first(1, Fault::Refused);
    source.retryable = false;
    publish(&queue, [numbered(0)]).await;
    let note = seen.clone();
    let report = Pipeline::at_least_once(source)
        .stop_when_idle(LONG)
        .run(move |body: String, context: Context| {
            let fails = note.run(&body, &context) < 2;
            async move {
                match fails {
                    true => Err(Failure::retry("twice")),
                    false => Ok(()),
                }
            }
        })
        .await
        .unwrap();
    assert_eq!(seen.of("0"), [1, 2, 3, 4]);
    assert_eq!((report.received, report.applied), (2, 2));
}

/// A queue whose messages all have one id.
struct OneId {
    queue: MemoryQueue,
    /// It is the producer's.
    producer: bool,
}

#[async_trait]
impl Source for OneId {
    fn name(&self) -> &str {
        self.queue.name()
    }
    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        let mut deliveries = self.queue.receive(limits).await?;
        for delivery in &mut deliveries {
            let mut message = Message::clone(&delivery.message);
            let same = Some("same".to_owned());
            (message.broker_id, message.dedup_id) = match self.producer {
                true => (None, same),
                false => (same, None),
            };
            delivery.message = Arc::new(message);
        }
        Ok(deliveries)
    }
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        self.queue.settle(batch).await
    }
    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        self.queue.extend(batch, lease).await
    }
    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        self.queue.queue_info().await
    }
    async fn close(&self) -> Result<(), Error> {
        Source::close(&self.queue).await
    }
}

/// The followers, which never run, would take off what each failure of the head adds.
#[tokio::test(start_paused = true)]
async fn messages_that_share_an_id_are_given_up_all_the_same() {
    for producer in [false, true] {
        let (queue, seen) = (MemoryQueue::new("orders"), Seen::default());
        publish(&queue, (0..3).map(|n| numbered(n).with_group("g"))).await;
        let source = OneId {
            queue: queue.clone(),
            producer,
        };
        let note = seen.clone();
        Pipeline::at_least_once(source)
            .retry(RetryPolicy::default().in_place(Duration::ZERO))
            .stop_when_idle(LONG)
            .shutdown(sleep(Duration::from_secs(3_600)))
            .run(move |body: String, context: Context| {
                note.run(&body, &context);
                async move {
                    match body == "0" {
                        true => Err(Failure::retry("always")),
                        false => Ok(()),
                    }
                }
            })
            .await
            .unwrap();
        assert_eq!(seen.of("0").len(), 10);
        assert_eq!((seen.of("1").len(), seen.of("2").len()), (1, 1));
        assert_given_up(&queue, &["0"]);
    }
}

/// Where there is no id of the broker's, the producer's does.
#[tokio::test(start_paused = true)]
async fn a_message_is_known_again_by_its_producers_id() {
    let (queue, seen) = (MemoryQueue::new("orders"), Seen::default());
    publish(&queue, [numbered(0)]).await;
    let source = OneId {
        queue: queue.clone(),
        producer: true,
    };
    always_fails(source, &seen).await;
    assert_eq!(seen.of("0"), Vec::from_iter(1..=10));
    assert_given_up(&queue, &["0"]);
}
