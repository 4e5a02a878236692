use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use onlyonce_core::Message;
use onlyonce_core::driver::{
    Fetch, FetchResult, OutboxDisposition, OutboxSettlement, Outgoing, OutgoingId, Owner, Verdicts,
};
use tokio::time::Instant;

/// Timers are as fine as this.
const TICK: Duration = Duration::from_millis(2);

/// A message that a transaction has written.
#[derive(Clone, Debug)]
pub(super) struct Written {
    id: OutgoingId,
    destination: String,
    message: Message,
    at: u64,
}

/// A message that a transaction has committed for a destination.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Committed {
    /// Where it goes.
    pub destination: String,
    /// What is to be published.
    pub message: Message,
    /// How often its queue has got it.
    pub published: u32,
    /// Whether it is set aside.
    pub set_aside: bool,
}

#[derive(Debug)]
struct Row {
    committed: Committed,
    /// By the one clock that counts what is written and what is committed.
    written_at: u64,
    committed_at: u64,
    /// Failures that were counted since it was written, or requeued.
    failures: u32,
    /// How often its queue has refused it for good.
    refusals: u32,
    not_before: Option<Instant>,
    was_set_aside: bool,
    /// How often its queue had refused it when it was set aside.
    refusals_then: u32,
    is_removed: bool,
}

#[derive(Debug)]
struct Lease {
    owner: Owner,
    until: Instant,
}

/// What must be true of the messages in an outbox, kept beside it.
#[derive(Debug, Default)]
pub(super) struct Outgoings {
    clock: u64,
    /// In the order of their commits, and of one commit as they were written.
    rows: Vec<Row>,
    places: HashMap<OutgoingId, usize>,
    by_dedup_id: HashMap<String, usize>,
    /// Who may say what failed.
    leases: BTreeMap<String, Lease>,
    /// Until when each relay may publish to a destination.
    allowed: BTreeMap<(u64, String), Instant>,
    /// Whether groups wait for what was set aside.
    waits: bool,
    breaches: Vec<String>,
}

impl Outgoings {
    pub(super) fn breaches(&self) -> &[String] {
        &self.breaches
    }

    pub(super) fn committed(&self) -> Vec<Committed> {
        self.rows.iter().map(|row| row.committed.clone()).collect()
    }

    pub(super) fn write(
        &mut self,
        id: OutgoingId,
        destination: &str,
        message: &Message,
    ) -> Written {
        self.clock += 1;
        Written {
            id,
            destination: destination.to_owned(),
            message: Outgoing::new(id, message.clone(), 0).to_publish(),
            at: self.clock,
        }
    }

    pub(super) fn commit(&mut self, all: Vec<Written>) {
        self.clock += 1;
        for written in all {
            let place = self.rows.len();
            self.places.insert(written.id, place);
            let dedup_id = written.message.dedup_id.clone();
            self.by_dedup_id.extend(dedup_id.map(|id| (id, place)));
            self.rows.push(Row {
                committed: Committed {
                    destination: written.destination,
                    message: written.message,
                    published: 0,
                    set_aside: false,
                },
                written_at: written.at,
                committed_at: self.clock,
                failures: 0,
                refusals: 0,
                not_before: None,
                was_set_aside: false,
                refusals_then: 0,
                is_removed: false,
            });
        }
    }

    /// The outbox gave this answer to a relay.
    pub(super) fn fetched(
        &mut self,
        relay: u64,
        destination: &str,
        fetch: &Fetch,
        answer: &FetchResult,
    ) {
        let FetchResult::Fetched { messages, .. } = answer else {
            return;
        };
        let now = Instant::now();
        let before = self.leases.get(destination);
        if before.is_some_and(|lease| lease.owner != fetch.relay && lease.until > now) {
            self.breach(format!("{destination} was leased to two relays"));
        }
        self.waits = fetch.waits_for_set_aside;
        let (owner, until) = (fetch.relay, now + fetch.lease);
        let lease = Lease { owner, until };
        self.leases.insert(destination.to_owned(), lease);
        self.allowed.insert((relay, destination.to_owned()), until);
        for outgoing in messages {
            if let Some(what) = self.why_not_fetched(outgoing, now) {
                let label = label(&outgoing.message);
                self.breach(format!("the outbox gave {label} to a relay, {what}"));
            }
        }
    }

    fn why_not_fetched(&self, outgoing: &Outgoing, now: Instant) -> Option<&'static str> {
        let place = self.places.get(&outgoing.id);
        let Some(row) = place.and_then(|place| self.rows.get(*place)) else {
            return Some("which no transaction has committed");
        };
        if row.committed.message != outgoing.to_publish() {
            return Some("which is not what was written");
        }
        if row.is_removed {
            return Some("which was removed");
        }
        if row.committed.set_aside {
            return Some("which was set aside");
        }
        let is_delayed = row.not_before.is_some_and(|at| at > now);
        is_delayed.then_some("which was delayed")
    }

    /// The outbox gave these verdicts.
    pub(super) fn settled(
        &mut self,
        owner: Owner,
        destination: &str,
        most: u32,
        batch: &[OutboxSettlement],
        verdicts: &Verdicts,
    ) {
        let lease = self.leases.get(destination);
        let is_holder = lease.is_some_and(|lease| lease.owner == owner);
        let accepted = batch.iter().zip(verdicts).filter(|(_, v)| v.is_ok());
        let mut broken = Vec::new();
        for (
            OutboxSettlement {
                id, disposition, ..
            },
            _,
        ) in accepted
        {
            let place = self.places.get(id);
            let row = place.and_then(|place| self.rows.get_mut(*place));
            if let Some(row) = row.filter(|row| !row.is_removed) {
                let label = label(&row.committed.message);
                let what = row.settle(disposition, is_holder, most);
                broken.extend(what.map(|what| format!("{label} {what}")));
            }
        }
        broken.into_iter().for_each(|what| self.breach(what));
    }

    pub(super) fn released(&mut self, owner: Owner, destination: &str) {
        let lease = self.leases.get(destination);
        if lease.is_some_and(|lease| lease.owner == owner) {
            self.leases.remove(destination);
        }
    }

    pub(super) fn requeued(&mut self, ids: &[OutgoingId]) {
        for place in ids.iter().filter_map(|id| self.places.get(id)) {
            let row = self.rows.get_mut(*place);
            if let Some(row) = row.filter(|row| row.committed.set_aside) {
                row.committed.set_aside = false;
                row.failures = 0;
                row.not_before = None;
            }
        }
    }

    /// A destination's queue got this message.
    pub(super) fn arrived(&mut self, destination: &str, message: &Message) {
        let dedup_id = message.dedup_id.as_ref();
        let Some(place) = dedup_id.and_then(|id| self.by_dedup_id.get(id).copied()) else {
            let label = label(message);
            return self.breach(format!(
                "{label} was published, which no transaction has committed"
            ));
        };
        if let Some(what) = self.why_not_published(place, destination, message) {
            let label = label(message);
            self.breach(format!("{label} was published {what}"));
        }
        self.rows[place].committed.published += 1;
    }

    /// A destination's queue has refused this message for good.
    pub(super) fn refused(&mut self, message: &Message) {
        let dedup_id = message.dedup_id.as_ref();
        let place = dedup_id.and_then(|id| self.by_dedup_id.get(id));
        if let Some(row) = place.and_then(|place| self.rows.get_mut(*place)) {
            row.refusals += 1;
        }
    }

    fn why_not_published(
        &self,
        place: usize,
        destination: &str,
        message: &Message,
    ) -> Option<String> {
        let row = &self.rows[place];
        if row.committed.destination != destination {
            return Some(format!("to {destination}, which is not where it was to go"));
        }
        if row.committed.message != *message {
            return Some("as another message than was written".into());
        }
        if row.committed.published > 0 {
            return None;
        }
        let late = self.rows.iter().find(|other| {
            let is_excused = other.was_set_aside && !self.waits;
            other.committed.published == 0 && !is_excused && other.precedes(row)
        });
        late.map(|other| {
            let other = label(&other.committed.message);
            format!("before {other}, which precedes it in its group")
        })
    }

    /// Until when a relay may publish to a destination, by the store's clock.
    pub(super) fn is_allowed(&self, relay: u64, destination: &str) -> bool {
        let until = self.allowed.get(&(relay, destination.to_owned()));
        until.is_some_and(|until| Instant::now() <= *until + TICK)
    }

    pub(super) fn breach(&mut self, what: String) {
        self.breaches.push(what);
    }
}

impl Row {
    /// Says what is wrong with what was accepted.
    fn settle(
        &mut self,
        disposition: &OutboxDisposition,
        is_holder: bool,
        most: u32,
    ) -> Option<&'static str> {
        if *disposition == OutboxDisposition::Sent {
            self.is_removed = true;
            self.committed.set_aside = false;
            let is_lost = self.committed.published == 0;
            return is_lost.then_some("was removed, and its queue does not have it");
        }
        self.failures += 1;
        match disposition {
            OutboxDisposition::SetAside { reason } => {
                // It was requeued before the relay repeated a settlement whose answer was lost.
                let is_repeated = self.was_set_aside && self.refusals == self.refusals_then;
                self.committed.set_aside = true;
                self.was_set_aside = true;
                self.refusals_then = self.refusals;
                if reason.is_empty() {
                    return Some("was set aside without a reason");
                }
                if self.refusals == 0 {
                    return Some("was set aside although its queue has never refused it");
                }
                if self.failures < most && !is_repeated {
                    return Some("was set aside before it had all its attempts");
                }
            }
            OutboxDisposition::Failed { retry_in, .. } => {
                self.committed.set_aside = false;
                self.not_before = Some(Instant::now() + *retry_in);
            }
            OutboxDisposition::Sent => {}
        }
        (!is_holder).then_some("was held up or given up by a relay that has lost its destination")
    }

    /// Whether it has to be published before another one: it was committed before that one was written, or was written earlier
    /// by the same transaction.
    fn precedes(&self, other: &Self) -> bool {
        let (mine, its) = (&self.committed, &other.committed);
        let same_group = mine.destination == its.destination
            && mine.message.group.is_some()
            && mine.message.group == its.message.group;
        let is_earlier = self.committed_at < other.written_at
            || (self.committed_at == other.committed_at && self.written_at < other.written_at);
        same_group && is_earlier
    }
}

/// What people call it: its text, since ids are drawn anew in each run.
pub(super) fn label(message: &Message) -> String {
    String::from_utf8_lossy(&message.body).into_owned()
}
