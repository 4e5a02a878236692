//! The SQL of the outbox.

use std::time::Duration;

use bytes::Bytes;
use onlyonce_core::driver::{
    Fenced, Fetch, FetchResult, OutboxDisposition, OutboxSettlement, Outgoing, OutgoingId, Owner,
    SetAside, Verdicts,
};
use onlyonce_core::{Message, attributes};
use rusqlite::{Connection, OptionalExtension, Row};

use crate::config::millis;
use crate::error::DbError;
use crate::messages::{Text, decode, encode};
use crate::session::Session;

const WRITE: &str = "INSERT INTO onlyonce_outbox (id, aggregatetype, aggregateid, type, payload, dedup_id, attributes)
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";

/// What may be published now, in order. `?3`: whether what was set aside blocks its group.
const READY: &str = "SELECT seq, id, aggregateid, payload, dedup_id, attributes, attempts FROM onlyonce_outbox AS row
     WHERE aggregatetype = ?1 AND set_aside = 0 AND ready_at <= ?2
       AND (aggregateid IS NULL OR NOT EXISTS (
         SELECT 1 FROM onlyonce_outbox AS before
         WHERE before.aggregatetype = ?1 AND before.aggregateid = row.aggregateid AND before.seq < row.seq
           AND before.ready_at > 0
           AND CASE before.set_aside WHEN 0 THEN before.ready_at > ?2 ELSE ?3 END))
     ORDER BY seq LIMIT ?4";

/// When the first of those that are delayed is ready.
const NEXT_READY: &str = "SELECT ready_at FROM onlyonce_outbox
     WHERE aggregatetype = ?1 AND set_aside = 0 AND ready_at > 0 AND ready_at > ?2 ORDER BY ready_at LIMIT 1";

const SET_ASIDE: &str =
    "SELECT seq, id, aggregateid, payload, dedup_id, attributes, attempts, reason FROM onlyonce_outbox
     WHERE aggregatetype = ?1 AND set_aside = 1 AND ready_at > 0 ORDER BY seq LIMIT ?2";

const LEASE: &str = "INSERT INTO onlyonce_relay VALUES (?1, ?2, ?3)
     ON CONFLICT DO UPDATE SET owner = excluded.owner, until = excluded.until";

/// Writes one message, in whatever transaction `conn` is in.
pub(crate) fn write(
    conn: &Connection,
    destination: &str,
    message: &Message,
) -> rusqlite::Result<OutgoingId> {
    let id = OutgoingId::random();
    let kind = message.attributes.get(attributes::TYPE);
    conn.prepare_cached(WRITE)?.execute((
        id.to_string(),
        destination,
        &message.group,
        kind.unwrap_or_default(),
        &message.body[..],
        &message.dedup_id,
        encode(&message.attributes),
    ))?;
    Ok(id)
}

/// Leases a destination and reads what may be published.
pub(crate) fn fetch(
    session: &mut Session,
    destination: &str,
    fetch: Fetch,
    mark: u64,
) -> Result<FetchResult, DbError> {
    let now = session.now();
    let held: Option<(i64, i64)> = session
        .conn
        .prepare_cached("SELECT owner, until FROM onlyonce_relay WHERE destination = ?1")?
        .query_row([destination], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    if let Some((owner, until)) = held
        && owner != number(fetch.relay)
        && until > now
    {
        let retry_in = Duration::from_millis((until - now).unsigned_abs());
        return Ok(FetchResult::Busy { retry_in });
    }
    let until = now + millis(fetch.lease);
    session
        .conn
        .prepare_cached(LEASE)?
        .execute((destination, number(fetch.relay), until))?;
    let messages = ready(&session.conn, destination, fetch, now)?;
    let ready_at: Option<i64> = session
        .conn
        .prepare_cached(NEXT_READY)?
        .query_row((destination, now), |row| row.get(0))
        .optional()?;
    Ok(FetchResult::Fetched {
        messages,
        ready_in: ready_at.map(|at| Duration::from_millis((at - now).unsigned_abs())),
        mark,
    })
}

fn ready(
    conn: &Connection,
    destination: &str,
    fetch: Fetch,
    now: i64,
) -> Result<Vec<Outgoing>, DbError> {
    let mut find = conn.prepare_cached(READY)?;
    let limit = fetch.messages.max(1) as i64;
    let mut rows = find.query((destination, now, fetch.waits_for_set_aside, limit))?;
    let (mut messages, mut bytes) = (Vec::new(), 0);
    let mut unreadable = Vec::new();
    while fetch.allows_more(messages.len(), bytes)
        && let Some(row) = rows.next()?
    {
        match outgoing(row)? {
            Ok(outgoing) => {
                bytes += outgoing.message.size();
                messages.push(outgoing);
            }
            Err(why) => unreadable.push((row.get::<_, i64>(0)?, why)),
        }
    }
    for (seq, why) in unreadable {
        conn.prepare_cached(
            "UPDATE onlyonce_outbox SET set_aside = 1, ready_at = max(1, ?2), reason = ?3 WHERE seq = ?1",
        )?
        .execute((seq, now, why))?;
    }
    Ok(messages)
}

/// A row as a message, or why it is none: somebody else may have written it, and it must not hold up all the others.
fn outgoing(row: &Row<'_>) -> Result<Result<Outgoing, String>, DbError> {
    let id: Text = row.get(1)?;
    let group: Option<Text> = row.get(2)?;
    let body: Vec<u8> = row.get(3)?;
    let dedup_id: Option<Text> = row.get(4)?;
    let attributes: Option<Text> = row.get(5)?;
    let attempts: i64 = row.get(6)?;
    let read = || {
        let id = id.read().ok().and_then(|id| id.parse().ok());
        let id: OutgoingId = id.ok_or("its id is not a UUID")?;
        let text = |text: Option<Text>, what| text.map(Text::read).transpose().map_err(|_| what);
        let mut message = Message::new(Bytes::from(body));
        message.group = text(group, "its group is not UTF-8")?;
        message.dedup_id = text(dedup_id, "its dedup id is not UTF-8")?;
        message.attributes =
            decode(attributes.as_ref()).map_err(|_| "its attributes are not an object of texts")?;
        let attempts = u32::try_from(attempts.max(0)).unwrap_or(u32::MAX);
        Ok::<_, &str>(Outgoing::new(id, message, attempts))
    };
    Ok(read().map_err(|why| format!("it cannot be read: {why}")))
}

/// Says what became of messages.
pub(crate) fn settle(
    session: &mut Session,
    relay: Owner,
    destination: &str,
    batch: &[OutboxSettlement],
) -> Result<Verdicts, DbError> {
    let now = session.now();
    let conn = &session.conn;
    let held = conn
        .prepare_cached("SELECT 1 FROM onlyonce_relay WHERE destination = ?1 AND owner = ?2")?
        .exists((destination, number(relay)))?;
    let one = |settlement: &OutboxSettlement| {
        let id = settlement.id.to_string();
        match &settlement.disposition {
            OutboxDisposition::Sent => {
                conn.prepare_cached("DELETE FROM onlyonce_outbox WHERE id = ?1")?
                    .execute([id])?;
            }
            // What has gone is settled.
            _ if !held => {
                let mut find =
                    conn.prepare_cached("SELECT 1 FROM onlyonce_outbox WHERE id = ?1")?;
                return Ok(if find.exists([id])? {
                    Err(Fenced)
                } else {
                    Ok(())
                });
            }
            OutboxDisposition::Failed { reason, retry_in } => {
                let ready_at = now + millis(*retry_in);
                hold(conn, &id, false, ready_at, reason)?;
            }
            OutboxDisposition::SetAside { reason } => hold(conn, &id, true, now, reason)?,
        }
        Ok(Ok(()))
    };
    batch.iter().map(one).collect()
}

/// Counts a failure.
fn hold(
    conn: &Connection,
    id: &str,
    set_aside: bool,
    ready_at: i64,
    reason: &str,
) -> rusqlite::Result<()> {
    conn.prepare_cached(
        "UPDATE onlyonce_outbox
         SET attempts = attempts + 1, set_aside = ?2, ready_at = max(1, ?3), reason = ?4 WHERE id = ?1",
    )?
    .execute((id, set_aside, ready_at, reason))?;
    Ok(())
}

pub(crate) fn release(
    session: &mut Session,
    relay: Owner,
    destination: &str,
) -> Result<(), DbError> {
    session
        .conn
        .prepare_cached("DELETE FROM onlyonce_relay WHERE destination = ?1 AND owner = ?2")?
        .execute((destination, number(relay)))?;
    Ok(())
}

pub(crate) fn set_aside(
    session: &Session,
    destination: &str,
    limit: usize,
) -> Result<Vec<SetAside>, DbError> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut find = session.conn.prepare_cached(SET_ASIDE)?;
    let mut rows = find.query((destination, limit))?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        // What cannot be read has no name by which it could be requeued; it can be seen in the table.
        if let Ok(outgoing) = outgoing(row)? {
            let reason: Option<Text> = row.get(7)?;
            let reason = reason.map(|reason| reason.read().unwrap_or_else(|broken| broken));
            found.push(SetAside::new(outgoing, reason.unwrap_or_default()));
        }
    }
    Ok(found)
}

pub(crate) fn requeue(
    session: &mut Session,
    destination: &str,
    ids: &[OutgoingId],
) -> Result<usize, DbError> {
    let mut requeued = 0;
    for id in ids {
        requeued += session
            .conn
            .prepare_cached(
                "UPDATE onlyonce_outbox SET set_aside = 0, attempts = 0, ready_at = 0, reason = NULL
                 WHERE id = ?1 AND aggregatetype = ?2 AND set_aside = 1",
            )?
            .execute((id.to_string(), destination))?;
    }
    Ok(requeued)
}

/// SQLite's numbers have a sign.
fn number(relay: Owner) -> i64 {
    relay.0.cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::plan;

    #[test]
    fn fetching_neither_scans_nor_sorts() {
        let conn = Connection::open_in_memory().unwrap();
        conn.execute_batch(include_str!("schema.sql")).unwrap();
        for (sql, indexes) in [
            (READY, &["onlyonce_outbox_next", "onlyonce_outbox_held"][..]),
            (NEXT_READY, &["onlyonce_outbox_delayed"]),
        ] {
            let plan = plan(&conn, sql);
            for index in indexes {
                assert!(plan.contains(index), "{sql}: {plan}");
            }
            assert!(
                !plan.contains("SCAN") && !plan.contains("TEMP B-TREE"),
                "{sql}: {plan}"
            );
        }
        let plan = plan(&conn, SET_ASIDE);
        assert!(plan.contains("onlyonce_outbox_delayed"), "{plan}");
    }
}
