//! The relay between an outbox in memory and scripted queues.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{
    Fetch, FetchResult, Outbox, OutboxSettlement, OutgoingId, Owner, SetAside, Sink, SinkInfo,
    Transaction, TransactionalStore, Verdicts,
};
use onlyonce_core::memory::{MemoryOutbox, MemoryQueue, MemoryStore};
use onlyonce_core::{Error, ErrorKind, Message, Relay, RelayReport, RetryPolicy};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

type Answer = dyn Fn(&Message, usize) -> Result<(), Error> + Send + Sync;

/// A queue that answers as it is told, and remembers what it took.
#[derive(Clone)]
struct Scripted {
    /// What it says to a message, and how often the message had come before.
    answer: Arc<Answer>,
    seen: Arc<Mutex<Seen>>,
    calls: Arc<AtomicUsize>,
    /// How long a call takes.
    takes: Arc<dyn Fn() -> Duration + Send + Sync>,
    stops_groups: bool,
}

#[derive(Default)]
struct Seen {
    taken: Vec<Message>,
    came: HashMap<String, usize>,
}

impl Scripted {
    fn new(answer: impl Fn(&Message, usize) -> Result<(), Error> + Send + Sync + 'static) -> Self {
        Self {
            answer: Arc::new(answer),
            seen: Arc::default(),
            calls: Arc::default(),
            takes: Arc::new(|| Duration::from_millis(1)),
            stops_groups: false,
        }
    }

    fn willing() -> Self {
        Self::new(|_, _| Ok(()))
    }

    fn taken(&self) -> Vec<Message> {
        self.seen.lock().unwrap().taken.clone()
    }

    fn bodies(&self) -> Vec<String> {
        self.taken().iter().map(body).collect()
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn take(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        let mut seen = self.seen.lock().unwrap();
        let mut stopped: Vec<&str> = Vec::new();
        let mut answers = Vec::new();
        for message in batch {
            let group = message.group.as_deref();
            if self.stops_groups && group.is_some_and(|group| stopped.contains(&group)) {
                answers.push(Err(away()));
                continue;
            }
            let came = seen.came.entry(body(message)).or_default();
            let answer = (self.answer)(message, *came);
            *came += 1;
            match &answer {
                Ok(()) => seen.taken.push(message.clone()),
                Err(_) => stopped.extend(group),
            }
            answers.push(answer);
        }
        answers
    }

    async fn until_taken(&self, messages: usize) {
        while self.taken().len() < messages {
            sleep(Duration::from_millis(1)).await;
        }
    }
}

#[async_trait]
impl Sink for Scripted {
    fn name(&self) -> &str {
        "scripted"
    }
    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        let mut info = SinkInfo::default();
        info.stops_groups = self.stops_groups;
        Ok(info)
    }
    /// What was sent arrives, even if nobody waits for it any more.
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let (queue, batch, takes) = (self.clone(), batch.to_vec(), (self.takes)());
        let arrives = async move {
            sleep(takes).await;
            queue.take(&batch)
        };
        tokio::spawn(arrives).await.unwrap()
    }
    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// An outbox whose calls are counted, and whose settlements can be swallowed.
#[derive(Clone)]
struct Watched {
    outbox: MemoryOutbox,
    fetches: Arc<AtomicUsize>,
    settles: Arc<AtomicUsize>,
    /// Settlements are not answered, and nothing comes of them.
    hangs: bool,
    hanging: Arc<Notify>,
}

impl Watched {
    fn new(outbox: &MemoryOutbox) -> Self {
        Self {
            outbox: outbox.clone(),
            fetches: Arc::default(),
            settles: Arc::default(),
            hangs: false,
            hanging: Arc::default(),
        }
    }
}

#[async_trait]
impl Outbox for Watched {
    fn name(&self) -> &str {
        "watched"
    }
    async fn fetch(&self, destination: &str, fetch: Fetch) -> Result<FetchResult, Error> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        self.outbox.fetch(destination, fetch).await
    }
    async fn settle(
        &self,
        relay: Owner,
        destination: &str,
        batch: &[OutboxSettlement],
    ) -> Result<Verdicts, Error> {
        self.settles.fetch_add(1, Ordering::SeqCst);
        if self.hangs {
            self.hanging.notify_one();
            std::future::pending().await
        }
        self.outbox.settle(relay, destination, batch).await
    }
    async fn wait(&self, destination: &str, mark: u64, longest: Duration) -> Result<(), Error> {
        self.outbox.wait(destination, mark, longest).await
    }
    async fn release(&self, relay: Owner, destination: &str) -> Result<(), Error> {
        self.outbox.release(relay, destination).await
    }
    async fn set_aside(&self, destination: &str, limit: usize) -> Result<Vec<SetAside>, Error> {
        self.outbox.set_aside(destination, limit).await
    }
    async fn requeue(&self, destination: &str, ids: &[OutgoingId]) -> Result<usize, Error> {
        self.outbox.requeue(destination, ids).await
    }
}

fn body(message: &Message) -> String {
    String::from_utf8_lossy(&message.body).into_owned()
}

fn away() -> Error {
    Error::new(ErrorKind::Connection, "the broker is away")
}

fn refused() -> Error {
    Error::new(ErrorKind::Message, "it is too large")
}

fn grouped(group: &str, body: impl Into<String>) -> Message {
    Message::new(body.into()).with_group(group)
}

fn write(outbox: &MemoryOutbox, messages: impl IntoIterator<Item = Message>) {
    for message in messages {
        outbox.publish("out", message);
    }
}

/// Waits until nothing is left but what was set aside, and a little longer.
async fn until_left(outbox: &MemoryOutbox, left: usize) {
    while outbox.depth("out") > left {
        sleep(Duration::from_millis(1)).await;
    }
}

/// Runs a relay until `left` messages are left.
async fn run_until_left(relay: Relay, outbox: &MemoryOutbox, left: usize) -> RelayReport {
    let outbox = outbox.clone();
    let done = async move { until_left(&outbox, left).await };
    let run = relay.shutdown(done).run();
    timeout(Duration::from_secs(3600), run)
        .await
        .expect("it ends")
        .unwrap()
}

fn retry(attempts: u32) -> RetryPolicy {
    let (first, longest) = (Duration::from_millis(100), Duration::from_secs(1));
    RetryPolicy::default()
        .max_attempts(attempts)
        .delays(first, longest)
}

#[tokio::test(start_paused = true)]
async fn what_was_committed_is_published_and_what_was_rolled_back_is_not() {
    let store = MemoryStore::new();
    let mut tx = store.begin().await.unwrap();
    tx.publish("out", Message::new("rolled back"))
        .await
        .unwrap();
    tx.rollback().await.unwrap();
    tx.publish("out", Message::new("kept").with_attribute("a", "1"))
        .await
        .unwrap();
    tx.complete(&[]).await.unwrap().unwrap();
    tx.publish("out", Message::new("not completed"))
        .await
        .unwrap();
    tx.commit().await.unwrap();
    let sink = Scripted::willing();
    let relay = Relay::new(store.outbox()).to("out", sink.clone());
    let report = run_until_left(relay, &store.outbox(), 0).await;
    assert_eq!((report.sent, report.failed, report.set_aside), (1, 0, 0));
    assert_eq!(sink.bodies(), ["kept"]);
    assert_eq!(sink.taken()[0].attributes.get("a"), Some("1"));
}

#[tokio::test(start_paused = true)]
async fn a_message_has_its_own_dedup_id_or_the_outbox_gives_it_one() {
    let outbox = MemoryStore::new().outbox();
    let id = outbox.publish("out", Message::new("unnamed"));
    outbox.publish("out", Message::new("named").with_dedup_id("order-1"));
    let sink = Scripted::willing();
    let relay = Relay::new(outbox.clone()).to("out", sink.clone());
    run_until_left(relay, &outbox, 0).await;
    let taken = sink.taken();
    assert_eq!(taken[0].dedup_id, Some(id.to_string()));
    assert_eq!(taken[1].dedup_id.as_deref(), Some("order-1"));
}

/// A queue that is away for a minute fails no message: all are published soon after it is back, and hardly anybody asks meanwhile.
#[tokio::test(start_paused = true)]
async fn a_queue_that_is_away_sets_nothing_aside_and_is_not_stormed() {
    for kind in [
        ErrorKind::Connection,
        ErrorKind::NotFound,
        ErrorKind::Permission,
    ] {
        let outbox = MemoryStore::new().outbox();
        write(&outbox, (0..50).map(|n| grouped("g", n.to_string())));
        write(&outbox, (50..100).map(|n| Message::new(n.to_string())));
        let back = Instant::now() + Duration::from_secs(60);
        let sink = Scripted::new(move |_, _| match Instant::now() < back {
            true => Err(Error::new(kind, "away")),
            false => Ok(()),
        });
        let watched = Watched::new(&outbox);
        let relay = Relay::new(watched.clone())
            .to("out", sink.clone())
            .retry(retry(2));
        let report = run_until_left(relay, &outbox, 0).await;
        assert_eq!((report.sent, report.failed, report.set_aside), (100, 0, 0));
        let late = Instant::now() - back;
        assert!(late < Duration::from_secs(11), "{late:?}");
        // 50 of one group, one after another, and a few while it was away.
        assert!(sink.calls() < 50 + 25, "{} calls", sink.calls());
        let settles = watched.settles.load(Ordering::SeqCst);
        assert_eq!(settles, 1, "nothing is written while it is away");
        assert_eq!(in_groups(&sink.taken())["g"].len(), 50);
    }
}

#[tokio::test(start_paused = true)]
async fn poison_is_set_aside_with_its_reason_and_delays_nobody() {
    let outbox = MemoryStore::new().outbox();
    write(&outbox, [grouped("g", "poison"), grouped("g", "behind")]);
    write(&outbox, (0..20).map(|n| grouped("other", n.to_string())));
    let sink = Scripted::new(|message, _| match body(message).as_str() {
        "poison" => Err(refused()),
        _ => Ok(()),
    });
    let began = Instant::now();
    let relay = Relay::new(outbox.clone())
        .to("out", sink.clone())
        .retry(retry(5));
    let others = sink.clone();
    let (report, ()) = tokio::join!(run_until_left(relay, &outbox, 1), async {
        others.until_taken(20).await;
        assert!(began.elapsed() < Duration::from_millis(100));
        assert!(!others.bodies().contains(&"behind".to_owned()), "it waits");
    });
    assert_eq!((report.sent, report.failed, report.set_aside), (21, 4, 1));
    assert_eq!(sink.bodies().last().unwrap(), "behind", "the group goes on");
    let set_aside = outbox.set_aside("out", 10).await.unwrap();
    assert_eq!(set_aside.len(), 1);
    assert_eq!(set_aside[0].reason, "it is too large");
    assert_eq!(set_aside[0].outgoing.attempts, 5);
    assert_eq!(body(&set_aside[0].outgoing.message), "poison");
}

#[tokio::test(start_paused = true)]
async fn behind_what_was_set_aside_its_group_waits_if_it_is_told_to() {
    let outbox = MemoryStore::new().outbox();
    write(&outbox, [grouped("g", "poison"), grouped("g", "behind")]);
    write(&outbox, [grouped("other", "other")]);
    let cured = Arc::new(AtomicUsize::new(0));
    let is_cured = cured.clone();
    let sink = Scripted::new(move |message, _| {
        let poison = body(message) == "poison" && is_cured.load(Ordering::SeqCst) == 0;
        if poison { Err(refused()) } else { Ok(()) }
    });
    let relay = Relay::new(outbox.clone())
        .to("out", sink.clone())
        .retry(retry(2))
        .wait_behind_set_aside(true);
    let (report, ()) = tokio::join!(run_until_left(relay, &outbox, 0), async {
        sleep(Duration::from_secs(600)).await;
        assert_eq!(sink.bodies(), ["other"]);
        let set_aside = outbox.set_aside("out", 10).await.unwrap();
        cured.store(1, Ordering::SeqCst);
        let id = set_aside[0].outgoing.id;
        assert_eq!(outbox.requeue("out", &[id]).await.unwrap(), 1);
    });
    assert_eq!((report.sent, report.set_aside), (3, 1));
    assert_eq!(sink.bodies(), ["other", "poison", "behind"]);
}

/// What the queue might take later is tried for as long as it takes, even if the queue takes others.
#[tokio::test(start_paused = true)]
async fn what_may_be_taken_later_is_never_set_aside() {
    let outbox = MemoryStore::new().outbox();
    write(&outbox, [grouped("g", "throttled"), grouped("g", "behind")]);
    let sink = Scripted::new(|message, came| match body(message).as_str() {
        "throttled" if came < 30 => Err(Error::new(ErrorKind::Throttled, "slow down")),
        _ => Ok(()),
    });
    let relay = Relay::new(outbox.clone())
        .to("out", sink.clone())
        .retry(retry(3));
    let stream = async {
        for n in 0..100 {
            write(&outbox, [Message::new(n.to_string())]);
            sleep(Duration::from_millis(500)).await;
        }
    };
    let (report, ()) = tokio::join!(
        async {
            sleep(Duration::from_secs(1)).await;
            run_until_left(relay, &outbox, 0).await
        },
        stream
    );
    assert_eq!(report.set_aside, 0);
    let bodies = sink.bodies();
    let place = |body: &str| bodies.iter().position(|one| one == body).unwrap();
    assert!(place("throttled") < place("behind"));
}

/// The one that dies between publishing and settling leaves its lease and what it published.
#[tokio::test(start_paused = true)]
async fn what_was_published_and_not_settled_is_repeated_under_its_dedup_id() {
    let outbox = MemoryStore::new().outbox();
    write(&outbox, (0..3).map(|n| grouped("g", n.to_string())));
    let sink = Scripted::willing();
    let mut watched = Watched::new(&outbox);
    watched.hangs = true;
    let lease = Duration::from_secs(20);
    let first = Relay::new(watched.clone())
        .to("out", sink.clone())
        .lease(lease);
    let began = Instant::now();
    tokio::select! {
        _ = first.run() => unreachable!("it hangs"),
        () = watched.hanging.notified() => {}
    }
    assert_eq!(sink.bodies(), ["0", "1", "2"]);
    let second = Relay::new(outbox.clone()).to("out", sink.clone());
    let report = run_until_left(second, &outbox, 0).await;
    assert!(began.elapsed() >= lease, "one relay at a time");
    assert!(began.elapsed() < lease + Duration::from_secs(1));
    assert_eq!(report.sent, 3);
    assert_eq!(sink.bodies(), ["0", "1", "2", "0", "1", "2"]);
    let ids: Vec<_> = sink.taken().into_iter().map(|m| m.dedup_id).collect();
    assert_eq!(ids[..3], ids[3..]);
    assert!(ids[0].is_some() && ids[0] != ids[1]);
}

/// One that stops gives its lease to the next, which need not wait for its end.
#[tokio::test(start_paused = true)]
async fn a_relay_that_stops_gives_up_its_leases() {
    let outbox = MemoryStore::new().outbox();
    let sink = Scripted::willing();
    let relay = |sink: &Scripted| {
        let relay = Relay::new(outbox.clone()).to("out", sink.clone());
        relay.lease(Duration::from_secs(3600))
    };
    let first = relay(&sink).shutdown(sleep(Duration::from_secs(10)));
    let second = async {
        sleep(Duration::from_secs(5)).await;
        write(&outbox, [Message::new("by the first")]);
        run_until_left(relay(&sink), &outbox, 0).await;
    };
    let (first, ()) = tokio::join!(first.run(), second);
    assert_eq!(first.unwrap().sent, 1);
    write(&outbox, [Message::new("by another")]);
    let began = Instant::now();
    run_until_left(relay(&sink), &outbox, 0).await;
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_relay_publishes_at_once_and_asks_little_while_it_is_idle() {
    let outbox = MemoryStore::new().outbox();
    let sink = Scripted::willing();
    let watched = Watched::new(&outbox);
    let relay = Relay::new(watched.clone())
        .to("out", sink.clone())
        .shutdown(sleep(Duration::from_secs(3601)));
    let late = async {
        sleep(Duration::from_secs(3600)).await;
        let fetches = watched.fetches.load(Ordering::SeqCst);
        assert!((600..=721).contains(&fetches), "{fetches} in an hour");
        assert_eq!(sink.calls(), 0);
        write(&outbox, [Message::new("at last")]);
        sink.until_taken(1).await;
    };
    let late = async {
        late.await;
        Instant::now()
    };
    let began = Instant::now();
    let (report, taken) = tokio::join!(relay.run(), late);
    assert!(taken - began < Duration::from_millis(3_600_010));
    assert_eq!(report.unwrap().sent, 1);
}

/// Which message stands where in its group, without repetitions.
fn in_groups(taken: &[Message]) -> BTreeMap<&str, Vec<u32>> {
    let mut groups: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    for message in taken.iter().filter(|message| message.group.is_some()) {
        let group = groups.entry(message.group.as_deref().unwrap()).or_default();
        let number = body(message).rsplit('-').next().unwrap().parse().unwrap();
        if !group.contains(&number) {
            group.push(number);
        }
    }
    groups
}

/// Failures by the seed: of single messages for good or for a while, of whole calls, lost answers, calls that outlast the lease.
fn unreliable(seed: u64, stops_groups: bool) -> Scripted {
    let rng = Mutex::new(fastrand::Rng::with_seed(seed));
    let mut sink = Scripted::new(move |_, _| match rng.lock().unwrap().u32(..10) {
        0 => Err(away()),
        1 => Err(Error::new(ErrorKind::Message, "not now")),
        2 => Err(Error::new(ErrorKind::Throttled, "slow down")),
        _ => Ok(()),
    });
    let rng = Mutex::new(fastrand::Rng::with_seed(seed + 1));
    sink.takes = Arc::new(move || {
        let mut rng = rng.lock().unwrap();
        let most = if rng.u32(..20) == 0 { 1000 } else { 50 };
        Duration::from_millis(rng.u64(..most))
    });
    sink.stops_groups = stops_groups;
    sink
}

/// Two relays, of which the first is dropped again and again.
async fn relays(outbox: MemoryOutbox, sink: Scripted, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let lease = Duration::from_millis(200);
    let relay = |batch: usize| {
        let relay = Relay::new(outbox.clone())
            .to("out", sink.clone())
            .lease(lease);
        relay.retry(retry(u32::MAX)).batch(batch, 1 << 20)
    };
    let crashing = async {
        loop {
            let life = Duration::from_millis(rng.u64(1..300));
            let _ = timeout(life, relay(rng.usize(1..30)).run()).await;
        }
    };
    tokio::select! {
        () = crashing => {}
        _ = relay(7).run() => {}
        () = until_left(&outbox, 0) => {}
    }
}

#[tokio::test(start_paused = true)]
async fn groups_keep_their_order_whatever_fails_and_nothing_is_lost() {
    let mut repeated = 0;
    for seed in 0..20 {
        let outbox = MemoryStore::new().outbox();
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut next: BTreeMap<String, u32> = BTreeMap::new();
        for _ in 0..200 {
            let group = format!("g{}", rng.u32(..5));
            let number = next.entry(group.clone()).or_default();
            write(&outbox, [grouped(&group, format!("{group}-{number}"))]);
            *number += 1;
        }
        let sink = unreliable(seed, seed % 2 == 0);
        let run = relays(outbox.clone(), sink.clone(), seed);
        let done = timeout(Duration::from_secs(36_000), run).await;
        assert!(done.is_ok(), "seed {seed}: {} left", outbox.depth("out"));
        let taken = sink.taken();
        let groups = in_groups(&taken);
        repeated += taken.len() - 200;
        for (group, number) in next {
            let whole: Vec<u32> = (0..number).collect();
            assert_eq!(groups[group.as_str()], whole, "seed {seed}: {group}");
        }
    }
    assert!(repeated > 200, "relays died in the midst: {repeated}");
}

/// Where the sink stops a group by itself, a group takes few calls.
#[tokio::test(start_paused = true)]
async fn a_group_is_published_in_whole_batches_where_the_sink_stops_it() {
    for (stops_groups, calls) in [(true, 4), (false, 1000)] {
        let outbox = MemoryStore::new().outbox();
        write(&outbox, (0..1000).map(|n| grouped("g", n.to_string())));
        let mut sink = Scripted::willing();
        sink.stops_groups = stops_groups;
        let relay = Relay::new(outbox.clone()).to("out", sink.clone());
        let watched = run_until_left(relay, &outbox, 0).await;
        assert_eq!((watched.sent, sink.calls()), (1000, calls));
        let numbers: Vec<u32> = (0..1000).collect();
        assert_eq!(in_groups(&sink.taken())["g"], numbers);
    }
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_is_away_delays_no_other_destination() {
    let outbox = MemoryStore::new().outbox();
    outbox.publish("away", Message::new("waits"));
    let queue = MemoryQueue::new("orders");
    let relay = Relay::new(outbox.clone())
        .to("away", Scripted::new(|_, _| Err(away())))
        .to("orders", queue.clone())
        .shutdown(sleep(Duration::from_secs(60)));
    let orders = async {
        for n in 1..=50 {
            outbox.publish("orders", Message::new("x"));
            sleep(Duration::from_millis(10)).await;
            assert_eq!(queue.depth(), n);
        }
    };
    let (report, ()) = tokio::join!(relay.run(), orders);
    assert_eq!(report.unwrap().sent, 50);
    assert_eq!(outbox.depth("away"), 1);
}

/// It ends although the queue never answers, and loses nothing.
#[tokio::test(start_paused = true)]
async fn a_relay_that_is_told_to_stop_ends_whatever_hangs() {
    let outbox = MemoryStore::new().outbox();
    write(&outbox, [Message::new("x")]);
    let mut hanging = Scripted::willing();
    hanging.takes = Arc::new(|| Duration::from_secs(1_000_000));
    let began = Instant::now();
    let relay = Relay::new(outbox.clone())
        .to("out", hanging)
        .lease(Duration::from_secs(3600))
        .shutdown(sleep(Duration::from_secs(1)));
    let report = relay.run().await.unwrap();
    assert_eq!((report.sent, outbox.depth("out")), (0, 1));
    assert!(began.elapsed() < Duration::from_secs(62));
}

#[tokio::test(start_paused = true)]
async fn what_is_under_way_is_settled_before_a_relay_ends() {
    let outbox = MemoryStore::new().outbox();
    write(&outbox, [Message::new("x")]);
    let mut slow = Scripted::willing();
    slow.takes = Arc::new(|| Duration::from_secs(10));
    let relay = Relay::new(outbox.clone())
        .to("out", slow.clone())
        .shutdown(sleep(Duration::from_secs(1)));
    assert_eq!(relay.run().await.unwrap().sent, 1);
    assert_eq!((slow.bodies().len(), outbox.depth("out")), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn destinations_that_cannot_work_are_found_at_the_start() {
    let outbox = MemoryStore::new().outbox();
    let none = Relay::new(outbox.clone()).run().await.unwrap_err();
    assert_eq!(none.kind(), ErrorKind::Config);
    let twice = Relay::new(outbox.clone())
        .to("out", Scripted::willing())
        .to("out", Scripted::willing());
    assert!(twice.run().await.unwrap_err().to_string().contains("out"));
    let closed = MemoryQueue::new("closed");
    Sink::close(&closed).await.unwrap();
    let closed = Relay::new(outbox).to("out", closed).run().await;
    assert_eq!(closed.unwrap_err().kind(), ErrorKind::Closed);
}
