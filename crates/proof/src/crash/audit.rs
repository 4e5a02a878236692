//! What the tables and the queues say after all the kills, compared with what was sent.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::time::Duration;

use onlyonce_core::Error;
use onlyonce_core::attributes::DEAD_LETTER_REASON;
use onlyonce_core::driver::{Delivery, Disposition, ReceiveLimits, Settlement, Source};
use onlyonce_sqlite::rusqlite::{self, Connection};

use super::broker::Broker;
use super::hunt::Hunt;
use super::postgres;
use super::traffic::{Obstacle, POISONED, Traffic, Transfer};
use super::worker::Mode;
use crate::error::failed;

/// How long an empty queue is listened to.
const LISTEN: Duration = Duration::from_millis(1_500);

/// Everything that should be zero, and a few figures.
#[derive(Debug, Default)]
pub struct Audit {
    pub applied: u64,
    pub twice: u64,
    pub lost: u64,
    /// Half applied, or with other accounts or amounts than were sent.
    pub wrong: u64,
    /// Applied, or published, before an earlier one of the same group.
    pub out_of_order: u64,
    /// Money that was made or destroyed.
    pub imbalance: i64,
    /// Poison that is not in the dead-letter queue with its reason.
    pub poison_missing: u64,
    /// Other messages that are there.
    pub wrongly_dead: u64,
    pub left_in_queue: u64,
    /// Transfers that the downstream service was asked for under different keys.
    pub unstable_keys: u64,
    /// Applied, and published through the outbox.
    pub published: u64,
    /// Applied, and never published.
    pub unpublished: u64,
    /// Published, and not sent like that, or poison.
    pub wrongly_published: u64,
    /// `idempotent`: calls beyond the first.
    pub repeated_calls: i64,
}

impl Audit {
    pub fn is_sound(&self) -> bool {
        let broken = self.twice
            + self.lost
            + self.wrong
            + self.out_of_order
            + self.poison_missing
            + self.wrongly_dead
            + self.left_in_queue
            + self.unstable_keys
            + self.unpublished
            + self.wrongly_published;
        broken == 0 && self.imbalance == 0
    }
}

pub async fn of(hunt: &Hunt, traffic: &Traffic) -> Result<Audit, Error> {
    let mut audit = Audit::default();
    let entries = match &hunt.postgres {
        Some(url) => {
            outbox(url, &hunt.broker, traffic, &mut audit).await?;
            let (entries, imbalance) = postgres::books(url).await?;
            audit.imbalance = imbalance;
            entries
        }
        None => {
            books(&hunt.file, hunt.mode, &mut audit).map_err(|error| failed("the audit", error))?
        }
    };
    let by_transfer = by_transfer(&entries);
    for transfer in &traffic.sent {
        count(transfer, &by_transfer, &mut audit);
    }
    let booked = entries.iter().map(|(transfer, ..)| *transfer);
    audit.out_of_order += out_of_order(booked, traffic);
    audit.left_in_queue += all(&*hunt.broker.source().await?).await?.len() as u64;
    dead_letters(
        &all(&*hunt.broker.dead().await?).await?,
        traffic,
        &mut audit,
    );
    Ok(audit)
}

/// One line of the ledger: transfer, account and amount.
pub type Entry = (u32, u32, i64);

/// What was booked, in order.
fn books(file: &Path, mode: Mode, audit: &mut Audit) -> rusqlite::Result<Vec<Entry>> {
    let db = Connection::open(file)?;
    let sum = |sql| db.query_row(sql, [], |row| row.get::<_, i64>(0));
    audit.imbalance = sum("SELECT IFNULL(SUM(balance), 0) FROM balances")?;
    if mode == Mode::Idempotent {
        let calls = "SELECT COUNT(*) - COUNT(DISTINCT transfer) FROM calls";
        audit.repeated_calls = sum(calls)?;
        let keys = "SELECT COUNT(DISTINCT key) - COUNT(DISTINCT transfer) FROM calls";
        audit.unstable_keys = sum(keys)?.unsigned_abs();
    }
    let mut entries = db.prepare("SELECT transfer, account, amount FROM entries ORDER BY rowid")?;
    let entries = entries.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    entries.collect()
}

type Entries = HashMap<u32, Vec<(u32, i64)>>;

fn by_transfer(all: &[Entry]) -> Entries {
    let mut entries = Entries::new();
    for (transfer, account, amount) in all {
        let of_transfer = entries.entry(*transfer).or_default();
        of_transfer.push((*account, *amount));
    }
    entries
}

/// What was published is what took effect, in the order of its groups, and nothing is left to be published.
async fn outbox(
    url: &str,
    broker: &Broker,
    traffic: &Traffic,
    audit: &mut Audit,
) -> Result<(), Error> {
    audit.left_in_queue = postgres::left(url).await?;
    let published = all(&*broker.booked().await?).await?;
    let read = |delivery: &Delivery| -> Option<Transfer> {
        let transfer: Transfer = serde_json::from_slice(&delivery.message.body).ok()?;
        let is_sent = traffic.sent.get(transfer.id as usize) == Some(&transfer);
        (is_sent && transfer.obstacle != Obstacle::Poison).then_some(transfer)
    };
    let known: Vec<Transfer> = published.iter().filter_map(read).collect();
    let ids: BTreeSet<u32> = known.iter().map(|transfer| transfer.id).collect();
    let due = traffic.sent.len() - traffic.poison().count();
    audit.published = ids.len() as u64;
    audit.unpublished = (due - ids.len()) as u64;
    audit.wrongly_published = (published.len() - known.len()) as u64;
    audit.out_of_order = out_of_order(known.iter().map(|transfer| transfer.id), traffic);
    Ok(())
}

fn count(transfer: &Transfer, entries: &Entries, audit: &mut Audit) {
    let booked = entries.get(&transfer.id).map_or(&[][..], Vec::as_slice);
    let Transfer {
        from, to, amount, ..
    } = *transfer;
    let poison = transfer.obstacle == Obstacle::Poison;
    *match booked.len() {
        0 if poison => return,
        0 => &mut audit.lost,
        3.. => &mut audit.twice,
        _ if booked == [(from, -amount), (to, amount)] && !poison => &mut audit.applied,
        _ => &mut audit.wrong,
    } += 1;
}

/// How many transfers came, for the first time, behind a later one of their group.
fn out_of_order(all: impl Iterator<Item = u32>, traffic: &Traffic) -> u64 {
    let mut seen = BTreeSet::new();
    let mut newest: BTreeMap<u32, u32> = BTreeMap::new();
    let mut late = 0;
    for id in all.filter(|id| seen.insert(*id)) {
        let Some(group) = traffic.sent.get(id as usize).and_then(|t| t.group) else {
            continue;
        };
        let newest = newest.entry(group).or_default();
        late += u64::from(id < *newest);
        *newest = id.max(*newest);
    }
    late
}

/// Takes out everything that is there.
async fn all(source: &dyn Source) -> Result<Vec<Delivery>, Error> {
    let limit = ReceiveLimits::new(1_000, LISTEN).with_bytes(1 << 20);
    let mut all = Vec::new();
    loop {
        let deliveries = source.receive(limit).await?;
        if deliveries.is_empty() {
            source.close().await?;
            return Ok(all);
        }
        let acks: Vec<_> = deliveries.iter().map(ack).collect();
        source.settle(&acks).await;
        all.extend(deliveries);
    }
}

fn ack(delivery: &Delivery) -> Settlement {
    Settlement::new(delivery.receipt.clone(), Disposition::Ack)
}

fn dead_letters(dead: &[Delivery], traffic: &Traffic, audit: &mut Audit) {
    let mut missing: BTreeSet<u32> = traffic.poison().map(|t| t.id).collect();
    let poison = missing.clone();
    for delivery in dead {
        let transfer: Option<Transfer> = serde_json::from_slice(&delivery.message.body).ok();
        let reason = delivery.message.attributes.get(DEAD_LETTER_REASON);
        match transfer {
            Some(t) if poison.contains(&t.id) && reason == Some(POISONED) => {
                missing.remove(&t.id);
            }
            _ => audit.wrongly_dead += 1,
        }
    }
    audit.poison_missing = missing.len() as u64;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn audited(booked: &[(u32, i64)]) -> Audit {
        let transfer = Transfer {
            id: 7,
            group: None,
            from: 1,
            to: 2,
            amount: 30,
            obstacle: Obstacle::None,
        };
        let mut audit = Audit::default();
        count(
            &transfer,
            &Entries::from([(7, booked.to_vec())]),
            &mut audit,
        );
        audit
    }

    #[test]
    fn every_kind_of_wrong_is_counted() {
        let once = [(1, -30), (2, 30)];
        assert!(audited(&once).is_sound() && audited(&once).applied == 1);
        assert_eq!(audited(&[]).lost, 1);
        assert_eq!(audited(&[once, once].concat()).twice, 1);
        assert_eq!(audited(&once[..1]).wrong, 1);
        assert_eq!(audited(&[(1, -30), (2, 31)]).wrong, 1);
    }
}
