//! Opens what a power failure has left, and asks for what was promised before it.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use onlyonce_core::driver::{Claim, ClaimResult, Fingerprint, KeyDigest, Owner, Store as _};
use onlyonce_core::{BoxError, Error};
use onlyonce_sqlite::rusqlite::Connection;
use onlyonce_sqlite::{Config, SqliteQueue, SqliteStore};

use super::broken::Broken;
use super::disk;
use super::found::Found;
use super::machine::Case;
use super::notes::Notebook;
use super::pipeline::{self, LEASE, Mode};
use super::scenes::Scene;
use super::worker::FILE;

/// Longer than any delay of a retry.
const IDLE: Duration = Duration::from_millis(60);
/// A machine that is busy with other things may be idle for longer while a message waits: then the work goes on.
const SHIFTS: u32 = 5;

/// What came of one power failure.
#[derive(Debug, Default)]
pub struct Audit {
    pub broken: BTreeSet<Broken>,
    /// An acknowledgement is lost, which is allowed.
    pub taken_back: bool,
    /// The log of records has been sealed.
    pub sealed: bool,
}

/// The machine's clock, which can be set forward.
#[derive(Clone)]
struct Clock {
    began: Instant,
    ahead: Arc<AtomicU64>,
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "nothing is decided by it")]
    fn config(&self, file: &Path, scene: &Scene) -> Config {
        let clock = self.clone();
        let uptime =
            move || clock.began.elapsed() + Duration::from_millis(clock.ahead.load(Relaxed));
        pipeline::config(file, scene.durable_acks).clock(SystemTime::now, uptime)
    }

    /// Every lease and claim of those who are gone has ended.
    fn forward(&self) {
        let leases = 2 * LEASE.as_millis() as u64;
        self.ahead.fetch_add(leases, Relaxed);
    }
}

/// `to_the_end`: all that is left is worked off, too, which takes longer.
pub async fn of(
    scene: &Scene,
    case: &Case,
    to_the_end: bool,
    folder: &Path,
) -> Result<Audit, BoxError> {
    disk::write_all(&case.image, folder)?;
    let file = folder.join(FILE);
    let clock = Clock {
        began: Instant::now(),
        ahead: Arc::default(),
    };
    let config = clock.config(&file, scene);
    let mut audit = Audit::default();
    if let Err(error) = look(scene, case, &config, &mut audit).await {
        audit.broken.insert(damage(&error));
    }
    if to_the_end && audit.broken.is_empty() {
        let ended = finish(scene, case, &clock, folder).await;
        if !ended.unwrap_or(false) {
            audit.broken.insert(Broken::NotEnded);
        }
    }
    Ok(audit)
}

/// The library could not open the file, or SQLite could not read what is in it.
fn damage(error: &BoxError) -> Broken {
    match error.is::<Error>() {
        true => Broken::Unopened,
        false => Broken::Corrupt,
    }
}

async fn look(
    scene: &Scene,
    case: &Case,
    config: &Config,
    audit: &mut Audit,
) -> Result<(), BoxError> {
    let _queue = SqliteQueue::open(config.clone()).await?;
    let store = SqliteStore::open(config.clone()).await?;
    let db = Connection::open(&config.path)?;
    let intact: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
    if intact != "ok" {
        audit.broken.insert(Broken::Corrupt);
    }
    let found = Found::read(&db)?;
    audit.broken.extend(found.broken(scene, &case.promised));
    audit.sealed = found.segments > 0;
    audit.taken_back = !scene.durable_acks && !case.promised.acked.is_disjoint(&found.queued);
    if token(&store).await? <= case.promised.token {
        audit.broken.insert(Broken::TokenFell);
    }
    Ok(())
}

/// The token of a claim that nobody had before.
async fn token(store: &SqliteStore) -> Result<u64, Error> {
    let claim = Claim::new(KeyDigest([0; 16]), Fingerprint([0; 16]));
    let claimed = store.claim(Owner::random(), &[claim], LEASE).await?;
    Ok(match claimed.first() {
        Some(ClaimResult::Acquired { token, .. }) => token.0,
        _ => 0,
    })
}

/// Works off what is left; whether each message has had its effect once then, or is dead if it is poison.
async fn finish(
    scene: &Scene,
    case: &Case,
    clock: &Clock,
    folder: &Path,
) -> Result<bool, BoxError> {
    let config = clock.config(&folder.join(FILE), scene);
    let queue = SqliteQueue::open(config.clone()).await?;
    pipeline::prepare(queue.database()).await?;
    let notebook = Notebook::open(folder)?;
    let mut found = Found::default();
    for _ in 0..SHIFTS {
        clock.forward();
        pipeline::run(scene.mode, &config, IDLE, &notebook).await?;
        found = Found::read(&Connection::open(&config.path)?)?;
        if found.queued.is_empty() {
            break;
        }
    }
    let done = |id: &u32| match pipeline::is_poison(*id) {
        true => found.dead_names.contains(&pipeline::dedup_id(*id)),
        false => found.effects.contains_key(id),
    };
    let once = found.effects.values().all(|times| *times == 1);
    let no_poison = !found.effects.keys().any(|id| pipeline::is_poison(*id));
    let all = case.promised.published.iter().all(done);
    let followed = scene.mode != Mode::Transactional || found.followed();
    let nothing_left = found.queued.is_empty() && found.is_relayed();
    Ok(followed && once && no_poison && all && nothing_left)
}
