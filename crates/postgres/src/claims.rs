//! What is asked of the tables, and how the answers are read. Each call is one round trip.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, Fenced, HeldClaim, KeyDigest, LookUp, LookedUp, Owner,
    Precondition, Starts, Token, Verdicts,
};
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use crate::literal;
use crate::names::Names;

/// Of the time of a look-up, the bits that are its milliseconds; those before them are the generation.
const MILLIS_BITS: u32 = 44;
/// When nobody knows how long to wait for another's claim.
const SOON: Duration = Duration::from_millis(5);

/// A duration in the database's unit, at most some million years, so that sums do not overflow.
pub(crate) fn millis(duration: Duration) -> i64 {
    const MOST: i64 = 100_000 * 365 * 86_400_000;
    i64::try_from(duration.as_millis()).map_or(MOST, |ms| ms.min(MOST))
}

/// Tokens come from an `i64`; a larger one was never given, and fits none.
fn token(token: Token) -> i64 {
    i64::try_from(token.0).unwrap_or(-1)
}

/// The places of a batch, in so many calls that none has a key with two payloads. That is one, but for mistaken producers.
pub(crate) fn rounds(batch: &[Claim]) -> Vec<Vec<usize>> {
    let mut rounds: Vec<Vec<usize>> = Vec::new();
    let mut payloads: HashMap<KeyDigest, Vec<_>> = HashMap::new();
    for (place, claim) in batch.iter().enumerate() {
        let of_key = payloads.entry(claim.key).or_default();
        let known = of_key
            .iter()
            .position(|payload| *payload == claim.fingerprint);
        let round = known.unwrap_or_else(|| {
            of_key.push(claim.fingerprint);
            of_key.len() - 1
        });
        if rounds.len() <= round {
            rounds.push(Vec::new());
        }
        rounds[round].push(place);
    }
    rounds
}

pub(crate) fn claim(names: &Names, owner: Owner, batch: &[Claim], lease: Duration) -> String {
    format!(
        "SELECT * FROM {}({}, {}, {}, {})",
        names.of("claim_keys"),
        literal::uuids(batch.iter().map(|claim| &claim.key.0)),
        literal::uuids(batch.iter().map(|claim| &claim.fingerprint.0)),
        owner.0.cast_signed(),
        millis(lease),
    )
}

pub(crate) fn claimed(row: &PgRow) -> Result<ClaimResult, sqlx::Error> {
    Ok(match row.try_get::<&str, _>("answer")? {
        "acquired" => ClaimResult::Acquired {
            token: Token(row.try_get::<i64, _>("token")?.cast_unsigned()),
            in_doubt: starts(row)?,
            takeovers: row.try_get::<i32, _>("takeovers")?.cast_unsigned(),
        },
        "completed" => ClaimResult::Completed {
            outcome: outcome(row)?,
        },
        "busy" => ClaimResult::InProgress {
            retry_in: row
                .try_get::<Option<i64>, _>("retry_in")?
                .map_or(SOON, |ms| {
                    Duration::from_millis(ms.unsigned_abs()).max(SOON)
                }),
        },
        "mismatch" => ClaimResult::PayloadMismatch,
        other => return Err(unexpected(other)),
    })
}

/// As the row has them: no start has the token 0.
fn starts(row: &PgRow) -> Result<Option<Starts>, sqlx::Error> {
    let last = Token(row.try_get::<i64, _>("started")?.cast_unsigned());
    let count = row.try_get::<i32, _>("starts")?.cast_unsigned();
    Ok((last != Token(0)).then_some(Starts::new(last, count)))
}

fn outcome(row: &PgRow) -> Result<Option<Bytes>, sqlx::Error> {
    let text = row.try_get::<Option<&str>, _>("outcome")?;
    let bytes = text.map(|text| literal::unhex(text).ok_or_else(|| unexpected(text)));
    Ok(bytes.transpose()?.map(Bytes::from))
}

fn unexpected(answer: &str) -> sqlx::Error {
    sqlx::Error::Protocol(format!("an answer that is not the store's: {answer}"))
}

/// A call of `renew`, `start` or `release`; `more` is what it takes besides.
pub(crate) fn of_held(names: &Names, function: &str, batch: &[HeldClaim], more: &str) -> String {
    format!(
        "SELECT key::text, token FROM {}({}, {}{more})",
        names.of(function),
        literal::uuids(batch.iter().map(|held| &held.key.0)),
        literal::numbers(batch.iter().map(|held| token(held.token))),
    )
}

/// Which claims of the batch are held, by the rows that came back. `once`: of two that are the same, the second is not.
pub(crate) fn verdicts(
    rows: &[PgRow],
    batch: &[HeldClaim],
    once: bool,
) -> Result<Verdicts, sqlx::Error> {
    let mut held = HashSet::new();
    for row in rows {
        let key = row.try_get::<&str, _>("key")?.replace('-', "");
        held.insert((key, row.try_get::<i64, _>("token")?));
    }
    let verdict = |one: &HeldClaim| {
        let mut key = String::with_capacity(32);
        literal::hex(&mut key, &one.key.0);
        let entry = (key, token(one.token));
        let is_held = match once {
            true => held.remove(&entry),
            false => held.contains(&entry),
        };
        if is_held { Ok(()) } else { Err(Fenced) }
    };
    Ok(batch.iter().map(verdict).collect())
}

pub(crate) fn look_up(names: &Names, batch: &[Claim]) -> String {
    format!(
        "SELECT * FROM {}({}, {})",
        names.of("look_up"),
        literal::uuids(batch.iter().map(|claim| &claim.key.0)),
        literal::uuids(batch.iter().map(|claim| &claim.fingerprint.0)),
    )
}

pub(crate) fn looked_up(key: KeyDigest, row: &PgRow) -> Result<LookUp, sqlx::Error> {
    Ok(match row.try_get::<&str, _>("answer")? {
        "new" => {
            let generation = row.try_get::<i64, _>("generation")?.cast_unsigned();
            let at = row.try_get::<i64, _>("at")?.cast_unsigned();
            LookUp::New(LookedUp::new(key, generation << MILLIS_BITS | at))
        }
        "completed" => LookUp::Completed {
            outcome: outcome(row)?,
        },
        "claimed" => LookUp::Claimed,
        "mismatch" => LookUp::PayloadMismatch,
        other => return Err(unexpected(other)),
    })
}

/// Of a precondition: the claim's token, or the generation of the look-up and when that ends to count.
struct Terms {
    token: Option<i64>,
    generation: Option<i64>,
    ends: Option<i64>,
}

impl Terms {
    fn of(completion: &Completion) -> Self {
        match completion.precondition {
            Precondition::Claim(held) => Self {
                token: Some(token(held.token)),
                generation: None,
                ends: None,
            },
            Precondition::NoRecord(looked_up) => {
                let at = (looked_up.at & ((1 << MILLIS_BITS) - 1)).cast_signed();
                Self {
                    token: None,
                    generation: Some((looked_up.at >> MILLIS_BITS).cast_signed()),
                    ends: Some(at.saturating_add(millis(completion.retention))),
                }
            }
        }
    }
}

/// Records these. Within the handler's transaction of this number it is all of them, or the error that they are fenced.
pub(crate) fn complete(names: &Names, batch: &[Completion], transaction: Option<u64>) -> String {
    let terms: Vec<Terms> = batch.iter().map(Terms::of).collect();
    let of_transaction = transaction.map_or("NULL".into(), |number| format!("'{number}'"));
    if let (Some(call), Some(_)) = (
        complete_looked_up(names, batch, &terms, &of_transaction),
        transaction,
    ) {
        return call;
    }
    format!(
        "SELECT unnest({}({}, {}, {}, {}, {}, {}, {}, {of_transaction})) AS is_recorded",
        names.of("complete"),
        keys(batch),
        literal::optional_numbers(terms.iter().map(|one| one.token)),
        literal::optional_numbers(terms.iter().map(|one| one.generation)),
        literal::optional_numbers(terms.iter().map(|one| one.ends)),
        fingerprints(batch),
        outcomes(batch),
        retentions(batch),
    )
}

/// Where all were looked up while new records went to one partition.
fn complete_looked_up(
    names: &Names,
    batch: &[Completion],
    terms: &[Terms],
    transaction: &str,
) -> Option<String> {
    let generation = terms.first()?.generation?;
    let of_one = terms.iter().all(|one| one.generation == Some(generation));
    let ends = terms.iter().filter_map(|one| one.ends).min()?;
    let longest = batch.iter().map(|one| millis(one.retention)).max()?;
    of_one.then(|| {
        format!(
            "SELECT {}({}, {generation}, {ends}, {}, {}, {}, {longest}, {transaction})",
            names.of("complete_looked_up"),
            keys(batch),
            fingerprints(batch),
            outcomes(batch),
            retentions(batch),
        )
    })
}

fn keys(batch: &[Completion]) -> String {
    let keys: Vec<KeyDigest> = batch.iter().map(|one| one.precondition.key()).collect();
    literal::uuids(keys.iter().map(|key| &key.0))
}

fn fingerprints(batch: &[Completion]) -> String {
    literal::uuids(batch.iter().map(|one| &one.fingerprint.0))
}

fn outcomes(batch: &[Completion]) -> String {
    literal::optional_bytes(batch.iter().map(|one| one.outcome.as_deref()))
}

fn retentions(batch: &[Completion]) -> String {
    literal::numbers(batch.iter().map(|one| millis(one.retention)))
}

/// Which of a batch are recorded.
pub(crate) fn recorded(rows: &[PgRow]) -> Result<Verdicts, sqlx::Error> {
    let verdict = |row: &PgRow| {
        let is_recorded = row.try_get::<bool, _>("is_recorded")?;
        Ok(if is_recorded { Ok(()) } else { Err(Fenced) })
    };
    rows.iter().map(verdict).collect()
}
