use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, sleep_until};

use super::{MemoryStore, later};
use crate::driver::{
    Fenced, Fetch, FetchResult, Outbox, OutboxDisposition, OutboxSettlement, Outgoing, OutgoingId,
    Owner, SetAside, Verdicts,
};
use crate::{Error, Message};

/// The outbox of a [`MemoryStore`]: what its transactions [publish](super::MemoryTx::publish).
///
/// ```
/// use onlyonce_core::Message;
/// use onlyonce_core::memory::MemoryStore;
///
/// let outbox = MemoryStore::new().outbox();
/// outbox.publish("orders", Message::new("one order"));
/// assert_eq!(outbox.depth("orders"), 1);
/// ```
#[derive(Clone, Debug)]
pub struct MemoryOutbox {
    store: MemoryStore,
}

/// All messages of one store that are to be published.
#[derive(Debug, Default)]
pub(super) struct Messages {
    destinations: HashMap<String, Destination>,
    last: u64,
}

#[derive(Debug, Default)]
struct Destination {
    rows: BTreeMap<u64, Row>,
    places: HashMap<OutgoingId, u64>,
    lease: Option<(Owner, Instant)>,
    /// Grows with each commit and whatever else lets more be fetched.
    mark: u64,
}

#[derive(Debug)]
struct Row {
    outgoing: Outgoing,
    state: State,
}

#[derive(Debug)]
enum State {
    /// May be published from then on.
    Waits(Option<Instant>),
    SetAside(String),
}

/// A message that a transaction has written, with the place that it has from then on.
#[derive(Debug)]
pub(super) struct Written {
    place: u64,
    destination: String,
    outgoing: Outgoing,
}

impl Written {
    pub(super) fn id(&self) -> OutgoingId {
        self.outgoing.id
    }
}

impl Messages {
    /// Numbers are given when a message is written, as a sequence of a database gives them: what commits later can have a lower
    /// one.
    pub(super) fn write(&mut self, destination: &str, message: Message) -> Written {
        self.last += 1;
        let kept = Message {
            body: message.body,
            attributes: message.attributes,
            dedup_id: message.dedup_id,
            group: message.group,
            ..Message::default()
        };
        Written {
            place: self.last,
            destination: destination.to_owned(),
            outgoing: Outgoing::new(OutgoingId::random(), kept, 0),
        }
    }

    pub(super) fn commit(&mut self, written: Written) {
        let Written {
            place,
            destination,
            outgoing,
        } = written;
        let destination = self.destinations.entry(destination).or_default();
        destination.mark += 1;
        destination.places.insert(outgoing.id, place);
        let state = State::Waits(None);
        destination.rows.insert(place, Row { outgoing, state });
    }

    fn of(&mut self, destination: &str) -> &mut Destination {
        self.destinations.entry(destination.to_owned()).or_default()
    }
}

impl Destination {
    fn fetch(&mut self, now: Instant, fetch: Fetch) -> FetchResult {
        if let Some((holder, until)) = self.lease
            && holder != fetch.relay
            && until > now
        {
            return FetchResult::Busy {
                retry_in: until - now,
            };
        }
        self.lease = Some((fetch.relay, later(now, fetch.lease)));
        let ends = self.rows.values().filter_map(|row| row.delayed_until(now));
        FetchResult::Fetched {
            ready_in: ends.min().map(|at| at - now),
            mark: self.mark,
            messages: self.ready(now, fetch),
        }
    }

    fn ready(&self, now: Instant, fetch: Fetch) -> Vec<Outgoing> {
        let mut blocked = HashSet::new();
        let mut ready = Vec::new();
        let mut bytes = 0;
        for row in self.rows.values() {
            if !fetch.allows_more(ready.len(), bytes) {
                break;
            }
            let group = row.outgoing.message.group.as_deref();
            let is_ready = match &row.state {
                State::Waits(_) => row.delayed_until(now).is_none(),
                State::SetAside(_) if fetch.waits_for_set_aside => false,
                State::SetAside(_) => continue,
            };
            match group {
                Some(group) if blocked.contains(group) => continue,
                Some(group) if !is_ready => drop(blocked.insert(group)),
                _ if is_ready => {
                    bytes += row.outgoing.message.size();
                    ready.push(row.outgoing.clone());
                }
                _ => {}
            }
        }
        ready
    }

    fn settle(
        &mut self,
        relay: Owner,
        settlement: &OutboxSettlement,
        now: Instant,
    ) -> Result<(), Fenced> {
        let held = self.lease.is_some_and(|(holder, _)| holder == relay);
        let place = self.places.get(&settlement.id).copied();
        let row = place.and_then(|place| self.rows.get_mut(&place));
        let Some((row, place)) = row.zip(place) else {
            return Ok(());
        };
        match &settlement.disposition {
            OutboxDisposition::Sent => {
                self.rows.remove(&place);
                self.places.remove(&settlement.id);
            }
            _ if !held => return Err(Fenced),
            OutboxDisposition::Failed { retry_in, .. } => {
                row.outgoing.attempts = row.outgoing.attempts.saturating_add(1);
                row.state = State::Waits(Some(later(now, *retry_in)));
            }
            OutboxDisposition::SetAside { reason } => {
                row.outgoing.attempts = row.outgoing.attempts.saturating_add(1);
                row.state = State::SetAside(reason.clone());
            }
        }
        Ok(())
    }

    fn set_aside(&self, limit: usize) -> Vec<SetAside> {
        let set_aside = self.rows.values().filter_map(|row| match &row.state {
            State::SetAside(reason) => Some(SetAside::new(row.outgoing.clone(), reason.as_str())),
            State::Waits(_) => None,
        });
        set_aside.take(limit).collect()
    }

    fn requeue(&mut self, id: OutgoingId) -> bool {
        let place = self.places.get(&id);
        let row = place.and_then(|place| self.rows.get_mut(place));
        let Some(row) = row.filter(|row| matches!(row.state, State::SetAside(_))) else {
            return false;
        };
        row.outgoing.attempts = 0;
        row.state = State::Waits(None);
        self.mark += 1;
        true
    }
}

impl Row {
    fn delayed_until(&self, now: Instant) -> Option<Instant> {
        match self.state {
            State::Waits(at) => at.filter(|at| *at > now),
            State::SetAside(_) => None,
        }
    }
}

impl MemoryStore {
    /// What its transactions publish, for a [`Relay`](crate::Relay).
    #[must_use]
    pub fn outbox(&self) -> MemoryOutbox {
        MemoryOutbox {
            store: self.clone(),
        }
    }
}

impl MemoryOutbox {
    /// Publishes without a transaction, as code outside of any pipeline does.
    pub fn publish(&self, destination: &str, message: Message) -> OutgoingId {
        let mut records = self.store.lock();
        let written = records.outgoing.write(destination, message);
        let id = written.id();
        records.outgoing.commit(written);
        drop(records);
        self.store.committed.notify_waiters();
        id
    }

    /// How many messages of a destination are here, those that are delayed or set aside too.
    #[must_use]
    pub fn depth(&self, destination: &str) -> usize {
        let records = self.store.lock();
        let destination = records.outgoing.destinations.get(destination);
        destination.map_or(0, |destination| destination.rows.len())
    }
}

#[async_trait]
impl Outbox for MemoryOutbox {
    fn name(&self) -> &str {
        "memory"
    }

    async fn fetch(&self, destination: &str, fetch: Fetch) -> Result<FetchResult, Error> {
        let mut records = self.store.lock();
        let destination = records.outgoing.of(destination);
        Ok(destination.fetch(Instant::now(), fetch))
    }

    async fn settle(
        &self,
        relay: Owner,
        destination: &str,
        batch: &[OutboxSettlement],
    ) -> Result<Verdicts, Error> {
        let now = Instant::now();
        let mut records = self.store.lock();
        let destination = records.outgoing.of(destination);
        let each = batch.iter().map(|one| destination.settle(relay, one, now));
        Ok(each.collect())
    }

    async fn wait(&self, destination: &str, mark: u64, longest: Duration) -> Result<(), Error> {
        let deadline = later(Instant::now(), longest);
        loop {
            // Registered before looking, so that nothing that happens in between is missed.
            let committed = self.store.committed.notified();
            tokio::pin!(committed);
            committed.as_mut().enable();
            if self.store.lock().outgoing.of(destination).mark != mark {
                return Ok(());
            }
            tokio::select! {
                biased;
                () = committed => {}
                () = sleep_until(deadline) => return Ok(()),
            }
        }
    }

    async fn release(&self, relay: Owner, destination: &str) -> Result<(), Error> {
        let mut records = self.store.lock();
        let lease = &mut records.outgoing.of(destination).lease;
        if lease.is_some_and(|(holder, _)| holder == relay) {
            *lease = None;
        }
        Ok(())
    }

    async fn set_aside(&self, destination: &str, limit: usize) -> Result<Vec<SetAside>, Error> {
        Ok(self.store.lock().outgoing.of(destination).set_aside(limit))
    }

    async fn requeue(&self, destination: &str, ids: &[OutgoingId]) -> Result<usize, Error> {
        let mut records = self.store.lock();
        let destination = records.outgoing.of(destination);
        let requeued = ids.iter().filter(|id| destination.requeue(**id)).count();
        drop(records);
        self.store.committed.notify_waiters();
        Ok(requeued)
    }
}
