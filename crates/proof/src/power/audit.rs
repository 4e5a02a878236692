//! Opens what a power failure has left, and asks for what was promised before it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use onlyonce_core::{BoxError, Claim, Claimed, Error, Fingerprint, KeyDigest, Owner, Store as _};
use onlyonce_sqlite::rusqlite::{self, Connection};
use onlyonce_sqlite::{Config, SqliteQueue, SqliteStore};

use super::disk;
use super::machine::Case;
use super::notes::Notebook;
use super::pipeline::{self, LEASE, Mode, OUTBOX, QUEUE};
use super::promised::Promised;
use super::recording::Scene;
use super::worker::FILE;

/// Longer than any delay of a retry.
const IDLE: Duration = Duration::from_millis(60);

/// What does not hold after a power failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Broken {
    Unopened,
    Corrupt,
    MessageLost,
    RecordLost,
    EffectTwice,
    EffectWithoutRecord,
    RecordWithoutEffect,
    FollowerAlone,
    AckLost,
    RunsAgain,
    TokenFell,
    NotEnded,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unopened => "the file opens",
            Self::Corrupt => "the file is intact",
            Self::MessageLost => "published: queued, done or dead",
            Self::RecordLost => "what was recorded stays so",
            Self::EffectTwice => "no effect is there twice",
            Self::EffectWithoutRecord => "no effect without its record",
            Self::RecordWithoutEffect => "no record without its effect",
            Self::FollowerAlone => "published in a transaction, or not",
            Self::AckLost => "what was acked durably stays so",
            Self::RunsAgain => "at most once: nothing runs again",
            Self::TokenFell => "tokens go up",
            Self::NotEnded => "in the end, each effect once",
        })
    }
}

/// Whatever can be broken.
pub const PROMISES: [Broken; 12] = [
    Broken::Unopened,
    Broken::Corrupt,
    Broken::MessageLost,
    Broken::RecordLost,
    Broken::EffectTwice,
    Broken::EffectWithoutRecord,
    Broken::RecordWithoutEffect,
    Broken::FollowerAlone,
    Broken::AckLost,
    Broken::RunsAgain,
    Broken::TokenFell,
    Broken::NotEnded,
];

/// What came of one power failure.
#[derive(Debug, Default)]
pub struct Audit {
    pub broken: BTreeSet<Broken>,
    /// An acknowledgement is lost, which is allowed.
    pub taken_back: bool,
    /// The log of records has been sealed.
    pub sealed: bool,
}

/// What the file says.
#[derive(Debug, Default)]
struct Found {
    effects: BTreeMap<u32, u32>,
    records: BTreeSet<[u8; 16]>,
    /// Messages by their queue's own ids, and by what their publisher calls them.
    queued: BTreeSet<i64>,
    queued_names: BTreeSet<String>,
    dead_names: BTreeSet<String>,
    /// What handlers have published.
    outbox: Vec<String>,
    segments: u32,
}

/// The machine's clock, which can be set forward.
#[derive(Clone)]
struct Clock {
    began: Instant,
    ahead: Arc<AtomicU64>,
}

impl Clock {
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
        clock.forward();
        let ended = finish(scene.mode, case, &config, folder).await;
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
    let _queue = SqliteQueue::open(config).await?;
    let store = SqliteStore::open(config).await?;
    let db = Connection::open(&config.path)?;
    let intact: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
    if intact != "ok" {
        audit.broken.insert(Broken::Corrupt);
    }
    let found = found(&db)?;
    audit.broken.extend(compare(scene, &case.promised, &found));
    audit.sealed = found.segments > 0;
    audit.taken_back = !scene.durable_acks && !case.promised.acked.is_disjoint(&found.queued);
    if token(&store).await? <= case.promised.token {
        audit.broken.insert(Broken::TokenFell);
    }
    Ok(())
}

/// The token of a claim that nobody had before.
async fn token(store: &SqliteStore) -> Result<u64, Error> {
    let claim = Claim {
        key: KeyDigest([0; 16]),
        fingerprint: Fingerprint([0; 16]),
    };
    let claimed = store.claim(Owner::random(), &[claim], LEASE).await?;
    Ok(match claimed.first() {
        Some(Claimed::New { token, .. }) => token.0,
        _ => 0,
    })
}

fn found(db: &Connection) -> rusqlite::Result<Found> {
    let mut found = Found::default();
    let has_effects = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'effects')";
    if db.query_row(has_effects, [], |row| row.get(0))? {
        let effects = "SELECT message, count(*) FROM effects GROUP BY message";
        found.effects = all(db, effects, |row| Ok((row.get(0)?, row.get(1)?)))?;
    }
    let records = "SELECT key FROM onlyonce_recent UNION ALL SELECT key FROM onlyonce_done";
    found.records = all(db, records, |row| row.get(0))?;
    found.records.retain(|key| !pipeline::is_ballast(key));
    let queued = "SELECT m.id, b.dedup_id, q.name FROM onlyonce_message m
        JOIN onlyonce_queue q ON q.id = m.queue LEFT JOIN onlyonce_body b ON b.id = m.id";
    let queued: Vec<(i64, Option<String>, String)> = all(db, queued, |row| {
        Ok((row.get(0)?, row.get(1)?, row.get(2)?))
    })?;
    for (id, name, queue) in queued {
        match queue.as_str() {
            QUEUE => {
                found.queued.insert(id);
                found.queued_names.extend(name);
            }
            OUTBOX => found.outbox.extend(name),
            _ => found.dead_names.extend(name),
        }
    }
    let segments = "SELECT count(*) FROM onlyonce_segment";
    found.segments = db.query_row(segments, [], |row| row.get(0))?;
    Ok(found)
}

fn all<T, C: FromIterator<T>>(
    db: &Connection,
    sql: &str,
    read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<C> {
    db.prepare(sql)?.query_map([], read)?.collect()
}

fn compare(scene: &Scene, promised: &Promised, found: &Found) -> Vec<Broken> {
    let effects: BTreeSet<_> = found
        .effects
        .keys()
        .map(|id| pipeline::key(*id).0)
        .collect();
    let is_there = |id: &u32| {
        let name = pipeline::dedup_id(*id);
        found.effects.contains_key(id)
            || found.queued_names.contains(&name)
            || found.dead_names.contains(&name)
    };
    let at_most_once = scene.mode == Mode::AtMostOnce;
    let transactional = scene.mode == Mode::Transactional;
    let holds = [
        (
            Broken::MessageLost,
            at_most_once || promised.published.iter().all(is_there),
        ),
        (
            Broken::RecordLost,
            promised.recorded.is_subset(&found.records),
        ),
        (
            Broken::EffectTwice,
            found.effects.values().all(|times| *times == 1),
        ),
        (
            Broken::EffectWithoutRecord,
            !transactional || effects.is_subset(&found.records),
        ),
        (
            Broken::RecordWithoutEffect,
            found.records.is_subset(&effects),
        ),
        (Broken::FollowerAlone, !transactional || followed(found)),
        (
            Broken::AckLost,
            !scene.durable_acks || promised.acked.is_disjoint(&found.queued),
        ),
        (Broken::RunsAgain, promised.ran.is_disjoint(&found.queued)),
    ];
    let broken = holds.iter().filter(|(_, holds)| !holds);
    broken.map(|(what, _)| *what).collect()
}

/// Whether handlers have published with their effects, and only with them.
fn followed(found: &Found) -> bool {
    let effects = found.effects.keys().copied();
    let effects = effects.filter(|id| pipeline::has_follower(*id));
    let mut expected: Vec<_> = effects.map(pipeline::dedup_id).collect();
    let mut outbox = found.outbox.clone();
    expected.sort_unstable();
    outbox.sort_unstable();
    outbox == expected
}

/// Works off what is left; whether each message has had its effect once then, or is dead if it is poison.
async fn finish(mode: Mode, case: &Case, config: &Config, folder: &Path) -> Result<bool, BoxError> {
    let queue = SqliteQueue::open(config).await?;
    pipeline::prepare(queue.database()).await?;
    pipeline::run(mode, config, IDLE, &Notebook::open(folder)?).await?;
    let found = found(&Connection::open(&config.path)?)?;
    let done = |id: &u32| match pipeline::is_poison(*id) {
        true => found.dead_names.contains(&pipeline::dedup_id(*id)),
        false => found.effects.contains_key(id),
    };
    let once = found.effects.values().all(|times| *times == 1);
    let no_poison = !found.effects.keys().any(|id| pipeline::is_poison(*id));
    let all = case.promised.published.iter().all(done);
    let followed = mode != Mode::Transactional || followed(&found);
    Ok(followed && once && no_poison && all && found.queued.is_empty())
}
