//! A message that comes alone must not wait for company.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::Error;
use crate::measure::Summary;
use crate::peers::{Peer, Setup};
use crate::queue::{Kind, Queue};
use crate::store::{self, EFFECT};
use crate::work::{Effect, Work};

const TRIES: usize = 51;

/// Milliseconds from the publisher's confirm to the handler, or to the commit of its effect, on a peer with nothing else to
/// do. The broker may deliver before it confirms: then it is 0.
pub(crate) async fn measure(
    peer: Peer,
    effect: Effect,
    kind: Kind,
    url: &str,
) -> Result<Summary, Error> {
    let dir = tempfile::tempdir()?;
    let queue = Queue::declare(url, kind, format!("peers-lone-{}", std::process::id())).await?;
    // The first is for the start, and one that is not measured is the last.
    let wanted = TRIES + 2;
    let database = dir.path().join("effects.db");
    let work = Arc::new(Work::new(effect, database, Duration::ZERO, wanted)?);
    let setup = Setup {
        url: url.to_owned(),
        queue: queue.name.clone(),
        kind,
        dead_letters: None,
        alone: true,
        work: work.clone(),
    };
    let consuming = tokio::spawn(async move { peer.consume(&setup).await });
    let mut times = Vec::new();
    for n in 0..=TRIES {
        sleep(Duration::from_millis(20)).await;
        queue.publish(n).await?;
        let confirmed = Instant::now();
        handled(&work, n + 1, &consuming).await?;
        times.push(work.last().saturating_duration_since(confirmed));
    }
    queue.publish(wanted).await?;
    timeout(Duration::from_secs(60), consuming).await???;
    queue.delete().await?;
    Ok(Summary::of(
        times.iter().skip(1).map(|time| time.as_secs_f64() * 1e3),
    ))
}

/// Waits until so many have been handled. It looks rarely: the time itself is noted by the peer.
async fn handled(
    work: &Work,
    count: usize,
    consuming: &JoinHandle<Result<(), Error>>,
) -> Result<(), Error> {
    let waiting = async {
        while work.count() < count && !consuming.is_finished() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(30), waiting).await?;
    match work.count() < count {
        true => Err("the peer ended before its time".into()),
        false => Ok(()),
    }
}

/// What one durable commit costs on this disk, by itself, in milliseconds.
pub(crate) fn one_commit() -> Result<Summary, Error> {
    let dir = tempfile::tempdir()?;
    let db = store::open(&dir.path().join("commit.db"))?;
    let mut times = Vec::new();
    for n in 0..TRIES {
        let began = Instant::now();
        db.execute(EFFECT, [n.to_string()])?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(Summary::of(times))
}
