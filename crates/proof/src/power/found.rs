//! What is in the file, and whether that is what was promised.

use std::collections::{BTreeMap, BTreeSet};

use onlyonce_sqlite::rusqlite::{self, Connection};

use super::broken::Broken;
use super::pipeline::{self, Mode, OUTBOX, QUEUE};
use super::promised::Promised;
use super::scenes::Scene;

/// What the file says.
#[derive(Debug, Default)]
pub struct Found {
    pub effects: BTreeMap<u32, u32>,
    records: BTreeSet<[u8; 16]>,
    /// Messages by their queue's own ids, and by what their publisher calls them.
    pub queued: BTreeSet<i64>,
    queued_names: BTreeSet<String>,
    pub dead_names: BTreeSet<String>,
    /// What handlers have published.
    outbox: Vec<String>,
    /// What waits for a relay.
    waiting: BTreeSet<String>,
    /// Of sealed records.
    pub segments: u32,
}

impl Found {
    pub fn read(db: &Connection) -> rusqlite::Result<Self> {
        let mut found = Self::default();
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
        let waiting = "SELECT dedup_id FROM onlyonce_outbox";
        found.waiting = all(db, waiting, |row| row.get(0))?;
        let segments = "SELECT count(*) FROM onlyonce_segment";
        found.segments = db.query_row(segments, [], |row| row.get(0))?;
        Ok(found)
    }

    /// What does not hold of what was promised.
    pub fn broken(&self, scene: &Scene, promised: &Promised) -> Vec<Broken> {
        let effects: BTreeSet<_> = self.effects.keys().map(|id| pipeline::key(*id).0).collect();
        let is_there = |id: &u32| {
            let name = pipeline::dedup_id(*id);
            self.effects.contains_key(id)
                || self.queued_names.contains(&name)
                || self.dead_names.contains(&name)
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
                promised.recorded.is_subset(&self.records),
            ),
            (
                Broken::EffectTwice,
                self.effects.values().all(|times| *times == 1),
            ),
            (
                Broken::EffectWithoutRecord,
                !transactional || effects.is_subset(&self.records),
            ),
            (
                Broken::RecordWithoutEffect,
                self.records.is_subset(&effects),
            ),
            (Broken::FollowerAlone, !transactional || self.followed()),
            (
                Broken::AckLost,
                !scene.durable_acks || promised.acked.is_disjoint(&self.queued),
            ),
            (Broken::RunsAgain, promised.ran.is_disjoint(&self.queued)),
        ];
        let broken = holds.iter().filter(|(_, holds)| !holds);
        broken.map(|(what, _)| *what).collect()
    }

    /// Whether handlers have published with their effects, and only with them: what goes through the outbox at least once.
    pub fn followed(&self) -> bool {
        let effects = self.effects.keys().copied();
        let effects = effects.filter(|id| pipeline::has_follower(*id));
        let (relayed, at_once): (Vec<_>, Vec<_>) =
            effects.partition(|id| pipeline::is_relayed(*id));
        let relayed: BTreeSet<_> = relayed.into_iter().map(pipeline::dedup_id).collect();
        let mut expected: Vec<_> = at_once.into_iter().map(pipeline::dedup_id).collect();
        let of_relay = |name: &String| relayed.contains(name);
        let (repeated, mut once): (Vec<_>, Vec<_>) =
            self.outbox.iter().cloned().partition(of_relay);
        expected.sort_unstable();
        once.sort_unstable();
        let there: BTreeSet<_> = repeated.into_iter().chain(self.waiting.clone()).collect();
        once == expected && there == relayed
    }

    /// Whether nothing waits for a relay.
    pub fn is_relayed(&self) -> bool {
        self.waiting.is_empty()
    }
}

fn all<T, C: FromIterator<T>>(
    db: &Connection,
    sql: &str,
    read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<C> {
    db.prepare(sql)?.query_map([], read)?.collect()
}
