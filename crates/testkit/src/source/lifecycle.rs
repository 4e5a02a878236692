//! Closing, cancelling, sharing, and connections that break.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onlyonce_core::ErrorKind;
use onlyonce_core::driver::{Disposition, Ordering, SettleResult, Source};
use tokio::time::{Instant, sleep, timeout};

use super::SourceHarness;
use super::tools::*;

/// Closing gives back what is unsettled, in order, and ends every lease; other consumers go on.
pub async fn close_gives_back(harness: &dyn SourceHarness) {
    let both = [&harness.source().await, &harness.source().await];
    let sent = grouped("a", 4);
    publish(harness, &sent).await;
    let (first, second, held) = whoever_receives(harness, both, 4).await;
    first.close().await.expect("it closes");
    first.close().await.expect("closing twice is harmless");

    let error = first.receive(limit(1, Duration::ZERO)).await;
    let error = error.expect_err("a closed source receives nothing");
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    for answer in settle(&**first, &held, &Disposition::Ack).await {
        assert!(matches!(answer, SettleResult::LeaseLost), "{answer:?}");
    }
    let back = drain(harness, &**second, 4).await;
    let until = held[0].lease.until;
    let waited = until.is_some_and(|until| Instant::now() >= until);
    assert!(!waited, "they came back only as their leases ended");
    if able(&**second).await.ordering != Ordering::None {
        assert_eq!(back, bodies(&sent));
    } else {
        assert_eq!(sorted(back), bodies(&sent));
    }
    nothing(harness, &**second).await;
}

/// A receive that is dropped, at whatever moment, loses no message: each comes to a later call.
pub async fn dropped_receive_loses_nothing(harness: &dyn SourceHarness) {
    const MESSAGES: usize = 60;
    let (source, sink) = (harness.source().await, harness.sink().await);
    let mut missing: BTreeSet<String> = bodies(&numbered("m", MESSAGES)).into_iter().collect();
    let publishing = async {
        for message in numbered("m", MESSAGES) {
            let results = sink.publish(&[message]).await;
            assert!(results[0].is_ok(), "{results:?}");
            sleep(Duration::from_millis(2)).await;
        }
    };
    let receiving = async {
        let deadline = Instant::now() + harness.patience();
        // Polled once, then a little longer every time: the drop falls into every stage of a call.
        for round in 0_u64.. {
            assert!(Instant::now() < deadline, "lost: {missing:?}");
            let short = Duration::from_micros(200 * (round % 32));
            let receive = receive(&*source, limit(5, harness.patience()));
            let Ok(got) = timeout(short, receive).await else {
                continue;
            };
            applied(&*source, &got, &Disposition::Ack).await;
            for body in bodies_of(&got) {
                missing.remove(&body);
            }
            if missing.is_empty() {
                break;
            }
        }
    };
    futures_util::future::join(publishing, receiving).await;
}

/// Receives and acks until `seen` has `count` bodies.
async fn share(
    source: Arc<dyn Source>,
    seen: Arc<Mutex<Vec<String>>>,
    count: usize,
    deadline: Instant,
) {
    let read = |seen: &Mutex<Vec<String>>| seen.lock().expect("no panic").len();
    while read(&seen) < count && Instant::now() < deadline {
        let got = receive(&*source, limit(3, Duration::from_millis(100))).await;
        seen.lock().expect("no panic").extend(bodies_of(&got));
        applied(&*source, &got, &Disposition::Ack).await;
    }
}

/// Consumers side by side get each message once between them, as long as leases last.
pub async fn concurrent_receivers_share(harness: &dyn SourceHarness) {
    const MESSAGES: usize = 100;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let deadline = Instant::now() + harness.patience();
    let mut consumers = Vec::new();
    let mut sources = Vec::new();
    for _ in 0..4 {
        let source = harness.source().await;
        sources.push(source.clone());
        // Two calls at once on one source, too.
        for _ in 0..2 {
            let share = share(source.clone(), seen.clone(), MESSAGES, deadline);
            consumers.push(tokio::spawn(share));
        }
    }
    publish(harness, &numbered("m", MESSAGES)).await;
    for consumer in consumers {
        consumer.await.expect("no panic");
    }
    let seen = std::mem::take(&mut *seen.lock().expect("no panic"));
    let sent = bodies(&numbered("m", MESSAGES));
    assert_eq!(sorted(seen), sorted(sent), "each message exactly once");
}

/// After a break the same source goes on: what was unsettled comes back, and no old receipt settles what came since.
pub async fn broken_connection_gives_back(harness: &dyn SourceHarness) {
    publish(harness, &numbered("m", 3)).await;
    let source = harness.source().await;
    let old = collect(harness, &*source, 3).await;
    if !harness.break_connection().await {
        return;
    }
    if able(&*source).await.timed_lease {
        // The leases may have survived, so whatever is not acked must come back.
        let answers = settle(&*source, &old, &Disposition::Ack).await;
        let rest = answers.iter().filter(|answer| !answer.is_applied()).count();
        drain(harness, &*source, rest).await;
    } else {
        let new = collect(harness, &*source, 3).await;
        assert_eq!(sorted(bodies_of(&new)), ["m1", "m2", "m3"]);
        for answer in settle(&*source, &old, &Disposition::Ack).await {
            assert!(matches!(answer, SettleResult::LeaseLost), "{answer:?}");
        }
        for delivery in &old {
            let lost = delivery.lease.lost.as_ref();
            assert!(lost.is_some_and(|lost| lost.is_cancelled()), "leases died");
        }
        // Had an old receipt acked one of the new deliveries, it would not come back.
        applied(&*source, &new, &NACK).await;
        drain(harness, &*source, 3).await;
    }
    nothing(harness, &*source).await;
    publish(harness, &numbered("later", 1)).await;
    assert_eq!(drain(harness, &*source, 1).await, ["later1"]);
}
