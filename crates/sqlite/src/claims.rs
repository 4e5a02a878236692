use std::time::Duration;

use bytes::Bytes;
use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, Fenced, HeldClaim, LookUp, LookedUp, Owner, Precondition,
    Starts, Token, Verdicts,
};
use rusqlite::{Connection, OptionalExtension as _};

use crate::config::millis;
use crate::error::DbError;
use crate::records::Record;
use crate::session::{Promise, Session};

/// Key and token of a claim, as the database holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Row {
    key: [u8; 16],
    token: i64,
}

impl From<HeldClaim> for Row {
    fn from(held: HeldClaim) -> Self {
        Self {
            key: held.key.0,
            // Tokens come from an `i64`; a larger one was never given, and fits none.
            token: i64::try_from(held.token.0).unwrap_or(-1),
        }
    }
}

/// Who wants to claim, until when.
struct Claimer {
    owner: i64,
    now: i64,
    until: i64,
    /// The tokens of this batch begin here.
    first: i64,
}

/// A claim that is there already.
struct Existing {
    fingerprint: [u8; 16],
    owner: i64,
    token: i64,
    until: i64,
    starts: Option<Starts>,
    takeovers: u32,
}

pub(crate) fn claim(
    session: &mut Session,
    owner: Owner,
    batch: &[Claim],
    lease: Duration,
) -> Result<Vec<ClaimResult>, DbError> {
    let now = session.now();
    let claimer = Claimer {
        owner: owner.0 as i64,
        now,
        until: now + millis(lease),
        first: session.tokens(batch.len())?,
    };
    let candidates = session.records.candidates(batch.iter().map(|c| &c.key.0));
    let claims = (claimer.first..).zip(batch).zip(candidates);
    claims
        .map(|((token, claim), candidates)| {
            let record = session
                .records
                .find_among(&session.conn, &claim.key.0, candidates)?;
            match record {
                Some(record) => Ok(completed(claim, record)),
                None => claim_one(session, &claimer, token, claim),
            }
        })
        .collect()
}

fn completed(claim: &Claim, record: Record) -> ClaimResult {
    if record.fingerprint == claim.fingerprint.0 {
        ClaimResult::Completed {
            outcome: record.outcome.map(Bytes::from),
        }
    } else {
        ClaimResult::PayloadMismatch
    }
}

/// Claims a key that has no record.
fn claim_one(
    session: &Session,
    claimer: &Claimer,
    token: i64,
    claim: &Claim,
) -> Result<ClaimResult, DbError> {
    if insert(session, claimer, token, claim)? {
        return Ok(new(token, None, 0));
    }
    let existing = find(&session.conn, claim)?;
    let live = existing.until > claimer.now;
    // What expired without having been started has had no effect, so its payload does not bind the key.
    if existing.fingerprint != claim.fingerprint.0 && (live || existing.starts.is_some()) {
        return Ok(ClaimResult::PayloadMismatch);
    }
    // The owner's own claim is taken over, unless it was made by this very batch.
    let others = existing.owner != claimer.owner || existing.token >= claimer.first;
    if others && live {
        let left = existing.until - claimer.now;
        return Ok(ClaimResult::InProgress {
            retry_in: Duration::from_millis(left.unsigned_abs()),
        });
    }
    let takeovers = existing.takeovers.saturating_add(u32::from(!live));
    // The marks of starts stay: the key is in doubt until someone completes or releases it.
    session
        .conn
        .prepare_cached(
            "UPDATE onlyonce_claim SET fingerprint = ?2, owner = ?3, token = ?4, until = ?5, takeovers = ?6
             WHERE key = ?1",
        )?
        .execute((
            claim.key.0,
            claim.fingerprint.0,
            claimer.owner,
            token,
            claimer.until,
            takeovers,
        ))?;
    Ok(new(token, existing.starts, takeovers))
}

fn new(token: i64, in_doubt: Option<Starts>, takeovers: u32) -> ClaimResult {
    ClaimResult::Acquired {
        token: Token(token.unsigned_abs()),
        in_doubt,
        takeovers,
    }
}

/// Makes a claim, unless there is one.
fn insert(
    session: &Session,
    claimer: &Claimer,
    token: i64,
    claim: &Claim,
) -> Result<bool, DbError> {
    let inserted = session
        .conn
        .prepare_cached(
            "INSERT INTO onlyonce_claim VALUES (?1, ?2, ?3, ?4, ?5, 0, 0, 0) ON CONFLICT DO NOTHING",
        )?
        .execute((
            claim.key.0,
            claim.fingerprint.0,
            claimer.owner,
            token,
            claimer.until,
        ))?;
    Ok(inserted == 1)
}

fn find(conn: &Connection, claim: &Claim) -> Result<Existing, DbError> {
    let mut find = conn.prepare_cached(
        "SELECT fingerprint, owner, token, until, started, starts, takeovers FROM onlyonce_claim WHERE key = ?1",
    )?;
    let existing = find.query_row([claim.key.0], |row| {
        Ok(Existing {
            fingerprint: row.get(0)?,
            owner: row.get(1)?,
            token: row.get(2)?,
            until: row.get(3)?,
            starts: starts(row.get(4)?, row.get(5)?),
            takeovers: row.get(6)?,
        })
    });
    Ok(existing?)
}

/// As the row has them: no start has the token 0.
fn starts(last: i64, count: u32) -> Option<Starts> {
    let last = Token(last.unsigned_abs());
    (last != Token(0)).then_some(Starts::new(last, count))
}

/// Promises to renew the claims that are still held: see [`Promise`].
pub(crate) fn renew(
    session: &mut Session,
    batch: &[HeldClaim],
    lease: Duration,
) -> Result<Verdicts, DbError> {
    let until = session.now() + millis(lease);
    let mut verdicts = Vec::with_capacity(batch.len());
    for held in batch {
        let claim = Row::from(*held);
        let is_held = is_held(session, &claim)?;
        if is_held {
            session.promise(Promise::Renew { claim, until });
        }
        verdicts.push(verdict(is_held));
    }
    Ok(verdicts)
}

fn is_held(session: &Session, claim: &Row) -> Result<bool, DbError> {
    // A completion that is not committed yet may still be rolled back, and its claim has to last until then.
    if session.completing.contains(claim) {
        return Ok(true);
    }
    let mut find = session
        .conn
        .prepare_cached("SELECT 1 FROM onlyonce_claim WHERE key = ?1 AND token = ?2")?;
    Ok(find.exists((claim.key, claim.token))?)
}

/// Carries out a promised renewal. Does nothing where the claim has ended since.
pub(crate) fn renew_now(conn: &Connection, claim: &Row, until: i64) -> Result<(), DbError> {
    conn.prepare_cached("UPDATE onlyonce_claim SET until = ?3 WHERE key = ?1 AND token = ?2")?
        .execute((claim.key, claim.token, until))?;
    Ok(())
}

/// Marks claims as started. It is committed before it is answered, turns or no turns: a process that dies in between
/// must not have run a handler which nobody will call in doubt.
pub(crate) fn start(session: &mut Session, batch: &[HeldClaim]) -> Result<Verdicts, DbError> {
    each(
        session,
        "UPDATE onlyonce_claim SET started = token, starts = starts + (started <> token) WHERE key = ?1 AND token = ?2",
        batch,
    )
}

pub(crate) fn release(session: &mut Session, batch: &[HeldClaim]) -> Result<Verdicts, DbError> {
    each(session, DELETE, batch)
}

const DELETE: &str = "DELETE FROM onlyonce_claim WHERE key = ?1 AND token = ?2";

fn each(session: &Session, sql: &str, batch: &[HeldClaim]) -> Result<Verdicts, DbError> {
    let mut statement = session.conn.prepare_cached(sql)?;
    let mut verdicts = Vec::with_capacity(batch.len());
    for held in batch {
        let claim = Row::from(*held);
        verdicts.push(verdict(statement.execute((claim.key, claim.token))? == 1));
    }
    Ok(verdicts)
}

/// Records each for which the precondition holds.
pub(crate) fn complete_all(
    session: &mut Session,
    batch: &[Completion],
) -> Result<Verdicts, DbError> {
    batch
        .iter()
        .map(|completion| complete(session, completion))
        .collect()
}

/// Records them up to the first that is fenced; the caller rolls back then.
pub(crate) fn complete_or_none(
    session: &mut Session,
    completions: &[Completion],
) -> Result<Result<(), Fenced>, DbError> {
    for completion in completions {
        if let Err(Fenced) = complete(session, completion)? {
            return Ok(Err(Fenced));
        }
    }
    Ok(Ok(()))
}

fn complete(session: &mut Session, completion: &Completion) -> Result<Result<(), Fenced>, DbError> {
    let holds = match completion.precondition {
        Precondition::Claim(held) => end_claim(session, held)?,
        Precondition::NoRecord(looked_up) => {
            let is_new = is_still_new(session, looked_up, completion.retention)?;
            if is_new {
                end_claims_of_others(session, looked_up.key.0)?;
            }
            is_new
        }
    };
    if !holds {
        return Ok(Err(Fenced));
    }
    let record = Record {
        key: completion.precondition.key().0,
        fingerprint: completion.fingerprint.0,
        outcome: completion.outcome.as_ref().map(|o| o.to_vec()),
        expires: session.now() + millis(completion.retention),
    };
    session.records.insert(&session.conn, &record)?;
    Ok(Ok(()))
}

/// Removes a claim, if its token is still the newest.
fn end_claim(session: &mut Session, held: HeldClaim) -> Result<bool, DbError> {
    let claim = Row::from(held);
    let deleted = session
        .conn
        .prepare_cached(DELETE)?
        .execute((claim.key, claim.token))?;
    if deleted == 1 {
        session.completing.insert(claim);
    }
    Ok(deleted == 1)
}

/// Whether there is no record, and none can have been pruned since the look-up.
fn is_still_new(
    session: &Session,
    looked_up: LookedUp,
    retention: Duration,
) -> Result<bool, DbError> {
    let at = i64::try_from(looked_up.at).unwrap_or(i64::MAX);
    let lasts = session.now() < at.saturating_add(millis(retention));
    Ok(lasts
        && session
            .records
            .find(&session.conn, &looked_up.key.0)?
            .is_none())
}

/// Whoever has claimed the key meanwhile finds it recorded. There is seldom anybody, and looking costs far less than a `DELETE`
/// that returns what it has deleted, for which SQLite makes a table each time.
fn end_claims_of_others(session: &mut Session, key: [u8; 16]) -> Result<(), DbError> {
    let mut find = session
        .conn
        .prepare_cached("SELECT token FROM onlyonce_claim WHERE key = ?1")?;
    let token = find.query_row([key], |row| row.get(0)).optional()?;
    if let Some(token) = token {
        let claim = Row { key, token };
        session
            .conn
            .prepare_cached(DELETE)?
            .execute((claim.key, claim.token))?;
        session.completing.insert(claim);
    }
    Ok(())
}

/// Looks keys up, and writes nothing.
pub(crate) fn look_up(session: &Session, batch: &[Claim]) -> Result<Vec<LookUp>, DbError> {
    let at = session.now().unsigned_abs();
    let candidates = session.records.candidates(batch.iter().map(|c| &c.key.0));
    let claims = batch.iter().zip(candidates);
    claims
        .map(|(claim, candidates)| look_up_one(session, claim, candidates, at))
        .collect()
}

fn look_up_one(
    session: &Session,
    claim: &Claim,
    candidates: Vec<i64>,
    at: u64,
) -> Result<LookUp, DbError> {
    let record = session
        .records
        .find_among(&session.conn, &claim.key.0, candidates)?;
    if let Some(record) = record {
        return Ok(match record.fingerprint == claim.fingerprint.0 {
            true => LookUp::Completed {
                outcome: record.outcome.map(Bytes::from),
            },
            false => LookUp::PayloadMismatch,
        });
    }
    let mut find = session
        .conn
        .prepare_cached("SELECT 1 FROM onlyonce_claim WHERE key = ?1")?;
    Ok(match find.exists([claim.key.0])? {
        true => LookUp::Claimed,
        false => LookUp::New(LookedUp::new(claim.key, at)),
    })
}

fn verdict(applied: bool) -> Result<(), Fenced> {
    if applied { Ok(()) } else { Err(Fenced) }
}
