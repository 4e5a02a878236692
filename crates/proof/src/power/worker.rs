//! The process that the recorder watches: it publishes, and works until nothing is left.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use fastrand::Rng;
use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, Fingerprint, HeldClaim, KeyDigest, Owner, Sink, Store,
};
use onlyonce_core::{Error, Message};
use onlyonce_sqlite::rusqlite::{self, Connection};
use onlyonce_sqlite::{SqliteQueue, SqliteStore};
use serde::{Deserialize, Serialize};

use super::notes::{Notebook, Watched};
use super::pipeline::{self, LEASE, Mode};
use super::trace::Note;
use crate::error::failed;

/// The database in the folder that is watched.
pub const FILE: &str = "app.db";
const IDLE: Duration = Duration::from_millis(150);
/// The log is copied into the file at this interval, and not only after the 16 MiB that the store waits for.
const CHECKPOINTS: Duration = Duration::from_millis(25);
/// Published when nobody takes them any more: the next worker finds them when it has just opened the file.
const LEFT: u32 = 16;
/// Of ballast: small, so that the log of the database grows with it.
const BATCH: usize = 100;
const KEPT: Duration = Duration::from_secs(3_600);
/// Records that each worker makes in the end, for the next one's pipelines to prune.
const EXPIRED: u32 = 200;
const FINGERPRINT: Fingerprint = Fingerprint([0; 16]);

/// What a worker is told by its parent.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Work {
    pub folder: PathBuf,
    pub mode: Mode,
    pub durable_acks: bool,
    /// What it publishes.
    pub messages: Range<u32>,
    /// How many records that nobody asks for it makes first, to be kept.
    pub ballast: u32,
    /// Whether another connection makes checkpoints.
    pub checkpoints: bool,
    pub seed: u64,
}

pub async fn run(work: &Work) -> Result<(), Error> {
    let file = work.folder.join(FILE);
    let notebook = Notebook::open(&work.folder);
    let notebook = notebook.map_err(|error| failed("no notes", error))?;
    let config = pipeline::config(&file, work.durable_acks);
    notebook.note(&Note::Opening);
    let queue = SqliteQueue::open(config.clone()).await?;
    notebook.note(&Note::Opened);
    pipeline::prepare(queue.database()).await?;
    let store = Watched::new(SqliteStore::open(config.clone()).await?, &notebook);
    take_token(&store).await?;
    load(&store.inner, 0..work.ballast, KEPT).await?;

    let (stop, stopped) = channel();
    let checkpoints = work.checkpoints;
    let checkpoints = std::thread::spawn(move || match checkpoints {
        true => checkpoint(&file, &stopped),
        false => Ok(()),
    });
    let half = work.messages.start.midpoint(work.messages.end);
    let left = work.messages.end.saturating_sub(LEFT).max(half);
    let publish = |ids| publish(&queue, ids, work.seed, &notebook);
    let pipeline = || pipeline::run(work.mode, &config, IDLE, &notebook);
    tokio::try_join!(
        publish(work.messages.start..half),
        publish(half..left),
        pipeline(),
        pipeline(),
    )?;
    drop(stop);
    if let Ok(Err(error)) = checkpoints.join() {
        return Err(failed("a checkpoint", error));
    }
    let first = 1_000 * work.messages.end;
    load(&store.inner, first..first + EXPIRED, Duration::ZERO).await?;
    publish(left..work.messages.end).await?;
    take_token(&store).await?;
    // The file is not closed: closing would leave everything in good order.
    std::mem::forget(queue);
    Ok(())
}

/// Makes records that nobody asks for.
async fn load(store: &SqliteStore, ballast: Range<u32>, retention: Duration) -> Result<(), Error> {
    let keys: Vec<_> = ballast.map(pipeline::ballast).collect();
    for keys in keys.chunks(BATCH) {
        let claims: Vec<_> = keys.iter().copied().map(claim).collect();
        let claimed = store.claim(Owner(1), &claims, LEASE).await?;
        let completions = keys.iter().zip(claimed).filter_map(|(key, claimed)| {
            let ClaimResult::Acquired { token, .. } = claimed else {
                return None;
            };
            Some(Completion::new(
                HeldClaim::new(*key, token),
                FINGERPRINT,
                None,
                retention,
            ))
        });
        store.complete(&completions.collect::<Vec<_>>()).await?;
    }
    Ok(())
}

/// A claim that nothing comes of. When a worker has just opened the file, and when it ends, nothing that is synced follows it.
async fn take_token(store: &impl Store) -> Result<(), Error> {
    let key = pipeline::ballast(u32::MAX);
    store.claim(Owner(1), &[claim(key)], LEASE).await?;
    Ok(())
}

fn claim(key: KeyDigest) -> Claim {
    Claim::new(key, FINGERPRINT)
}

/// Publishes these messages in small batches, and now and then one again.
async fn publish(
    queue: &SqliteQueue,
    mut ids: Range<u32>,
    seed: u64,
    notebook: &Notebook,
) -> Result<(), Error> {
    let mut rng = Rng::with_seed(seed ^ u64::from(ids.start));
    let first = ids.start;
    while !ids.is_empty() {
        let many = rng.usize(1..8);
        let mut batch: Vec<_> = ids.by_ref().take(many).collect();
        if rng.u8(0..8) == 0 {
            batch.push(rng.u32(first..ids.start));
        }
        let messages: Vec<_> = batch.iter().copied().map(pipeline::message).collect();
        while let Err(error) = publish_once(queue, &messages).await {
            if !error.is_retryable() {
                return Err(error);
            }
        }
        notebook.note(&Note::Published(batch));
        tokio::time::sleep(Duration::from_millis(rng.u64(0..4))).await;
    }
    Ok(())
}

async fn publish_once(queue: &SqliteQueue, messages: &[Message]) -> Result<(), Error> {
    queue.publish(messages).await.into_iter().collect()
}

/// What any other program may do that has the file open.
fn checkpoint(file: &Path, stopped: &Receiver<()>) -> rusqlite::Result<()> {
    let db = Connection::open(file)?;
    let kinds = [
        "PASSIVE", "PASSIVE", "PASSIVE", "RESTART", "PASSIVE", "TRUNCATE",
    ];
    for kind in kinds.iter().cycle() {
        if stopped.recv_timeout(CHECKPOINTS) != Err(RecvTimeoutError::Timeout) {
            break;
        }
        let sql = format!("PRAGMA wal_checkpoint({kind})");
        db.query_row(&sql, [], |_| Ok(()))?;
    }
    Ok(())
}
