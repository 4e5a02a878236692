//! The SQL of the queue.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use onlyonce_core::attributes::DEAD_LETTER_REASON;
use onlyonce_core::driver::{Disposition, ReceiveLimits};
use onlyonce_core::{Attributes, ErrorKind, Message};
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension, Row, ToSql};

use crate::config::millis;
use crate::error::DbError;
use crate::session::{Promise, Session};

/// The largest message: 64 MiB. A row could be larger, but is written twice and read into memory as a whole.
pub(crate) const MAX_SIZE: usize = 64 << 20;

/// Messages without a group and heads of groups that are neither leased nor delayed, longest waiting first.
const HEADS: &str =
    "SELECT id, grp, free_at, attempts, published_at, queued_at, reason FROM onlyonce_message
     WHERE queue = ?1 AND head = 1 AND free_at <= ?2 ORDER BY free_at, id LIMIT ?3";

/// Those that follow a head in its group.
const FOLLOWERS: &str =
    "SELECT id, grp, free_at, attempts, published_at, queued_at, reason FROM onlyonce_message
     WHERE queue = ?1 AND grp = ?2 AND id > ?3 ORDER BY id LIMIT ?4";

/// When the next lease or delay ends.
const NEXT_FREE: &str = "SELECT free_at FROM onlyonce_message
     WHERE queue = ?1 AND head = 1 ORDER BY free_at LIMIT 1";

/// Makes the first of a group its head.
const SET_HEAD: &str = "UPDATE onlyonce_message SET head = 1 WHERE id =
     (SELECT id FROM onlyonce_message WHERE queue = ?1 AND grp = ?2 ORDER BY id LIMIT 1)";

const PUBLISH: &str = "INSERT INTO onlyonce_message VALUES (?1, ?2, ?3,
     ?3 IS NULL OR NOT EXISTS (SELECT 1 FROM onlyonce_message WHERE queue = ?2 AND grp = ?3),
     0, 0, 0, ?4, ?5, NULL)";

/// A leased message in the file: what its receipt holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SqliteReceipt {
    /// Its row in the table of messages.
    pub id: i64,
    /// The token of its lease: of two leases of one message, the later has the higher token.
    pub token: i64,
}

/// What a queue needs to know in order to receive.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) queue: i64,
    /// Where dead letters go.
    pub(crate) dead: i64,
    pub(crate) lease: Duration,
    pub(crate) max_deliveries: Option<u32>,
    pub(crate) retention: Option<Duration>,
}

/// A message as it was received.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) leased: SqliteReceipt,
    pub(crate) message: Message,
    pub(crate) attempt: u32,
    pub(crate) malformed: Option<String>,
}

/// What one look into a queue gave.
#[derive(Debug)]
pub(crate) enum Look {
    Received(Vec<Received>),
    /// Nothing for now; the earliest lease or delay ends after this long.
    Empty(Option<Duration>),
}

/// The id and the identity of the queue of this name.
pub(crate) fn queue(session: &mut Session, name: &str) -> Result<(i64, String), DbError> {
    let conn = &session.conn;
    conn.execute(
        "INSERT INTO onlyonce_queue (name, identity) VALUES (?1, lower(hex(randomblob(16))))
         ON CONFLICT DO NOTHING",
        [name],
    )?;
    let queue = conn.query_row(
        "SELECT id, identity FROM onlyonce_queue WHERE name = ?1",
        [name],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    Ok(queue)
}

/// Whether there is a queue of this name.
pub(crate) fn exists(session: &Session, name: &str) -> Result<bool, DbError> {
    let mut find = session
        .conn
        .prepare_cached("SELECT 1 FROM onlyonce_queue WHERE name = ?1")?;
    Ok(find.exists([name])?)
}

/// Publishes each message that is not too large, nor stands behind such a one in its group.
pub(crate) fn publish(
    session: &mut Session,
    queue: i64,
    batch: &[Message],
) -> Result<Vec<Result<(), DbError>>, DbError> {
    let times = (session.wall(), session.now());
    let first = session.tokens(batch.len())?;
    let mut stopped = HashSet::new();
    let results = (first..).zip(batch).map(|(id, message)| {
        let group = message.group.as_deref();
        if group.is_some_and(|group| stopped.contains(group)) {
            return Ok(Err(held_up()));
        }
        if message.size() > MAX_SIZE {
            stopped.extend(group);
            return Ok(Err(too_large(message)));
        }
        publish_one(&session.conn, queue, id, times, message).map(Ok)
    });
    results.collect()
}

/// Publishes all messages, or fails.
pub(crate) fn publish_all(
    session: &mut Session,
    queue: i64,
    batch: &[Message],
) -> Result<(), DbError> {
    session.savepoint(|session| publish(session, queue, batch)?.into_iter().collect())
}

fn publish_one(
    conn: &Connection,
    queue: i64,
    id: i64,
    (wall, now): (i64, i64),
    message: &Message,
) -> Result<(), DbError> {
    conn.prepare_cached("INSERT INTO onlyonce_body VALUES (?1, ?2, ?3, ?4)")?
        .execute((
            id,
            &message.dedup_id,
            encode(&message.attributes),
            &message.body[..],
        ))?;
    conn.prepare_cached(PUBLISH)?
        .execute((id, queue, &message.group, wall, now))?;
    Ok(())
}

pub(crate) fn too_large(message: &Message) -> DbError {
    let what = format!(
        "a message of {} bytes is too large: at most {MAX_SIZE} are taken",
        message.size()
    );
    DbError::new(ErrorKind::Message, false, what)
}

fn held_up() -> DbError {
    let what = "not published, because an earlier message of its group could not be published";
    DbError::new(ErrorKind::Other, true, what)
}

pub(crate) fn encode(attributes: &Attributes) -> Option<String> {
    if attributes.is_empty() {
        return None;
    }
    let map: BTreeMap<&str, &str> = attributes.iter().collect();
    serde_json::to_string(&map).ok()
}

/// Text as it stands in the file. SQLite takes any bytes for it; ours is UTF-8, but one row that somebody else wrote must
/// not hold up all the others.
pub(crate) struct Text(Vec<u8>);

impl Text {
    /// What is not UTF-8 is an error, with something readable.
    pub(crate) fn read(self) -> Result<String, String> {
        String::from_utf8(self.0)
            .map_err(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
    }
}

impl FromSql for Text {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        match value {
            ValueRef::Text(bytes) => Ok(Self(bytes.to_vec())),
            _ => Err(FromSqlError::InvalidType),
        }
    }
}

impl ToSql for Text {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(ValueRef::Text(&self.0)))
    }
}

/// A message that may be received.
struct Candidate {
    id: i64,
    group: Option<Text>,
    free_at: i64,
    attempts: u32,
    published_at: i64,
    queued_at: i64,
    reason: Option<Text>,
}

impl Candidate {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            group: row.get(1)?,
            free_at: row.get(2)?,
            // Nobody has to believe a count that is out of bounds.
            attempts: u32::try_from(row.get::<_, i64>(3)?.max(0)).unwrap_or(u32::MAX),
            published_at: row.get(4)?,
            queued_at: row.get(5)?,
            reason: row.get(6)?,
        })
    }
}

/// Leases what is ready, within `limits`.
pub(crate) fn receive(
    session: &mut Session,
    rules: &Rules,
    limits: ReceiveLimits,
) -> Result<Look, DbError> {
    let now = session.now();
    let heads = heads(session, rules, now, limits.messages)?;
    if heads.is_empty() {
        return Ok(Look::Empty(next_free(session, rules, now)?));
    }
    // No group gets more than its share of the messages while others wait.
    let share = (limits.messages / heads.len()).max(1);
    let mut taking = Taking {
        token: session.tokens(1)?,
        session,
        rules,
        limits,
        now,
        taken: Vec::new(),
        bytes: 0,
    };
    for head in heads {
        if !taking.take_run(head, share)? {
            break;
        }
    }
    Ok(match taking.taken {
        // All were dead letters: look again at once.
        taken if taken.is_empty() => Look::Empty(Some(Duration::ZERO)),
        taken => Look::Received(taken),
    })
}

fn heads(
    session: &Session,
    rules: &Rules,
    now: i64,
    most: usize,
) -> Result<Vec<Candidate>, DbError> {
    let mut find = session.conn.prepare_cached(HEADS)?;
    let heads = find.query_map((rules.queue, now, most as i64), Candidate::read)?;
    Ok(heads.collect::<Result<_, _>>()?)
}

fn next_free(session: &Session, rules: &Rules, now: i64) -> Result<Option<Duration>, DbError> {
    let mut find = session.conn.prepare_cached(NEXT_FREE)?;
    let free_at: Option<i64> = find.query_row([rules.queue], |row| row.get(0)).optional()?;
    Ok(free_at.map(|at| Duration::from_millis(at.saturating_sub(now).max(0).unsigned_abs())))
}

/// One receive under way.
struct Taking<'a> {
    session: &'a Session,
    rules: &'a Rules,
    limits: ReceiveLimits,
    now: i64,
    token: i64,
    taken: Vec<Received>,
    bytes: usize,
}

impl Taking<'_> {
    /// Takes a head and, up to its share, those that follow it in its group. `false`: a limit is reached.
    fn take_run(&mut self, head: Candidate, share: usize) -> Result<bool, DbError> {
        let followers = match &head.group {
            Some(group) if share > 1 => self.followers(group, head.id, share - 1)?,
            _ => Vec::new(),
        };
        for candidate in std::iter::once(head).chain(followers) {
            // What is leased or delayed withholds those behind it.
            if candidate.free_at > self.now {
                break;
            }
            if !self.take(candidate)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn followers(&self, group: &Text, head: i64, most: usize) -> Result<Vec<Candidate>, DbError> {
        let mut find = self.session.conn.prepare_cached(FOLLOWERS)?;
        let row = (self.rules.queue, group, head, most as i64);
        let followers = find.query_map(row, Candidate::read)?;
        Ok(followers.collect::<Result<_, _>>()?)
    }

    /// Leases one message, or makes a dead letter of it. `false`: it would exceed the limits.
    fn take(&mut self, candidate: Candidate) -> Result<bool, DbError> {
        if let Some(reason) = self.rules.gives_up(&candidate, self.now) {
            dead_letter(&self.session.conn, self.rules.dead, candidate.id, &reason)?;
            return Ok(true);
        }
        let received = self.read(candidate)?;
        let size = received.message.size();
        let full = self.taken.len() >= self.limits.messages
            || self.bytes.saturating_add(size) > self.limits.bytes;
        if full && !self.taken.is_empty() {
            return Ok(false);
        }
        let until = self.now + millis(self.rules.lease);
        self.session
            .conn
            .prepare_cached(
                "UPDATE onlyonce_message SET free_at = ?2, lease = ?3, attempts = attempts + 1 WHERE id = ?1",
            )?
            .execute((received.leased.id, until, self.token))?;
        self.bytes += size;
        self.taken.push(received);
        Ok(true)
    }

    fn read(&self, candidate: Candidate) -> Result<Received, DbError> {
        let mut find = self
            .session
            .conn
            .prepare_cached("SELECT dedup_id, attributes, body FROM onlyonce_body WHERE id = ?1")?;
        let stored: Option<(Option<Text>, Option<Text>, Vec<u8>)> = find
            .query_row([candidate.id], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })
            .optional()?;
        let mut malformed = stored.is_none().then(|| "its body is missing".to_owned());
        let (dedup_id, attributes, body) = stored.unwrap_or_default();
        let mut message = Message::new(Bytes::from(body));
        match decode(attributes.as_ref()) {
            Ok(attributes) => message.attributes = attributes,
            Err(error) => malformed = Some(format!("its attributes cannot be read: {error}")),
        }
        let mut text = |what: &str, text: Option<Text>| {
            let text = text?.read();
            Some(text.unwrap_or_else(|broken| {
                malformed = Some(format!("its {what} is not UTF-8"));
                broken
            }))
        };
        message.dedup_id = text("dedup id", dedup_id);
        message.group = text("group", candidate.group);
        if let Some(reason) = text("reason", candidate.reason) {
            message.attributes.insert(DEAD_LETTER_REASON, reason);
        }
        message.broker_id = Some(candidate.id.to_string());
        message.published_at = u64::try_from(candidate.published_at)
            .ok()
            .and_then(|millis| UNIX_EPOCH.checked_add(Duration::from_millis(millis)));
        Ok(Received {
            leased: SqliteReceipt {
                id: candidate.id,
                token: self.token,
            },
            message,
            attempt: candidate.attempts.saturating_add(1),
            malformed,
        })
    }
}

impl Rules {
    /// Why a message is not delivered any more, if so.
    fn gives_up(&self, candidate: &Candidate, now: i64) -> Option<String> {
        if let Some(most) = self.max_deliveries
            && candidate.attempts >= most
        {
            return Some(format!("delivered {most} times without being settled"));
        }
        if let Some(retention) = self.retention
            && now.saturating_sub(candidate.queued_at) >= millis(retention)
        {
            return Some(format!("older than the queue's retention of {retention:?}"));
        }
        None
    }
}

pub(crate) fn decode(attributes: Option<&Text>) -> Result<Attributes, serde_json::Error> {
    let Some(Text(attributes)) = attributes else {
        return Ok(Attributes::default());
    };
    let map: BTreeMap<String, String> = serde_json::from_slice(attributes)?;
    Ok(map.into_iter().collect())
}

/// Does to one message what its settlement says. `false`: the lease is not its newest.
pub(crate) fn settle(
    session: &mut Session,
    rules: &Rules,
    leased: SqliteReceipt,
    disposition: &Disposition,
) -> Result<bool, DbError> {
    let now = session.now();
    if let Disposition::Nack { delay } = disposition {
        return give_back(&session.conn, leased, now + millis(*delay));
    }
    if !is_leased(&session.conn, leased)? {
        return Ok(false);
    }
    match disposition {
        Disposition::DeadLetter { reason } => {
            dead_letter(&session.conn, rules.dead, leased.id, reason)?
        }
        _ => delete(&session.conn, leased.id)?,
    }
    Ok(true)
}

fn give_back(conn: &Connection, leased: SqliteReceipt, free_at: i64) -> Result<bool, DbError> {
    let changed = conn
        .prepare_cached(
            "UPDATE onlyonce_message SET lease = 0, free_at = ?3 WHERE id = ?1 AND lease = ?2",
        )?
        .execute((leased.id, leased.token, free_at))?;
    Ok(changed == 1)
}

fn is_leased(conn: &Connection, leased: SqliteReceipt) -> Result<bool, DbError> {
    let mut find =
        conn.prepare_cached("SELECT 1 FROM onlyonce_message WHERE id = ?1 AND lease = ?2")?;
    Ok(find.exists((leased.id, leased.token))?)
}

fn delete(conn: &Connection, id: i64) -> Result<(), DbError> {
    let place = conn
        .prepare_cached("DELETE FROM onlyonce_message WHERE id = ?1 RETURNING queue, grp, head")?
        .query_row([id], Place::read)?;
    conn.prepare_cached("DELETE FROM onlyonce_body WHERE id = ?1")?
        .execute([id])?;
    promote(conn, place)
}

/// Moves a message to the dead-letter queue, where it stands in the order in which it was published.
fn dead_letter(conn: &Connection, dead: i64, id: i64, reason: &str) -> Result<(), DbError> {
    let place = conn
        .prepare_cached("SELECT queue, grp, head FROM onlyonce_message WHERE id = ?1")?
        .query_row([id], Place::read)?;
    // Not a head until the group is looked at as a whole.
    conn.prepare_cached(
        "UPDATE onlyonce_message
         SET queue = ?2, reason = ?3, free_at = 0, lease = 0, attempts = 0, head = grp IS NULL
         WHERE id = ?1",
    )?
    .execute((id, dead, reason))?;
    if let Some(group) = &place.group {
        // The head so far is the first or, if the new one is, the second.
        conn.prepare_cached(
            "UPDATE onlyonce_message SET head = 0 WHERE id IN
             (SELECT id FROM onlyonce_message WHERE queue = ?1 AND grp = ?2 ORDER BY id LIMIT 2)",
        )?
        .execute((dead, group))?;
        set_head(conn, dead, group)?;
    }
    promote(conn, place)
}

/// Where a message stood.
struct Place {
    queue: i64,
    group: Option<Text>,
    head: bool,
}

impl Place {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            queue: row.get(0)?,
            group: row.get(1)?,
            head: row.get(2)?,
        })
    }
}

/// The head of a group has gone: the next one is its head.
fn promote(conn: &Connection, gone: Place) -> Result<(), DbError> {
    match gone.group {
        Some(group) if gone.head => set_head(conn, gone.queue, &group),
        _ => Ok(()),
    }
}

fn set_head(conn: &Connection, queue: i64, group: &Text) -> Result<(), DbError> {
    conn.prepare_cached(SET_HEAD)?.execute((queue, group))?;
    Ok(())
}

/// Promises to extend those leases that are still the newest of their message: see [`Promise`].
pub(crate) fn extend(
    session: &mut Session,
    batch: &[Option<SqliteReceipt>],
    lease: Duration,
) -> Result<Vec<bool>, DbError> {
    let until = session.now() + millis(lease);
    let mut answers = Vec::with_capacity(batch.len());
    for leased in batch {
        let newest = match leased {
            Some(leased) if is_leased(&session.conn, *leased)? => {
                session.promise(Promise::Extend {
                    lease: *leased,
                    until,
                });
                true
            }
            _ => false,
        };
        answers.push(newest);
    }
    Ok(answers)
}

/// Carries out a promised extension. Does nothing where the lease has ended since.
pub(crate) fn extend_now(
    conn: &Connection,
    leased: &SqliteReceipt,
    until: i64,
) -> Result<(), DbError> {
    conn.prepare_cached("UPDATE onlyonce_message SET free_at = ?3 WHERE id = ?1 AND lease = ?2")?
        .execute((leased.id, leased.token, until))?;
    Ok(())
}

/// How SQLite would run it.
#[cfg(test)]
pub(crate) fn plan(conn: &Connection, sql: &str) -> String {
    let mut explain = conn.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
    let steps = explain.raw_query().mapped(|row| row.get::<_, String>(3));
    steps.collect::<Result<Vec<_>, _>>().unwrap().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn receiving_neither_scans_nor_sorts() {
        let conn = Connection::open_in_memory().unwrap();
        conn.execute_batch(include_str!("schema.sql")).unwrap();
        for (sql, index) in [
            (HEADS, "onlyonce_message_ready"),
            (NEXT_FREE, "onlyonce_message_ready"),
            (FOLLOWERS, "onlyonce_message_group"),
            (SET_HEAD, "onlyonce_message_group"),
            (PUBLISH, "onlyonce_message_group"),
        ] {
            let plan = plan(&conn, sql);
            assert!(plan.contains(index), "{sql}: {plan}");
            assert!(
                !plan.contains("SCAN onlyonce") && !plan.contains("TEMP B-TREE"),
                "{sql}: {plan}"
            );
        }
    }
}
