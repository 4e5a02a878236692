use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::later;
use crate::Message;
use crate::driver::{Disposition, ExtendResult, Receipt, ReceiveLimits, SettleResult};

/// A message that will not be delivered again, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadLetter {
    /// What was published.
    pub message: Arc<Message>,
    /// The reason of [`Disposition::DeadLetter`], or that it was delivered too often.
    pub reason: String,
}

/// The queue's settings.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) lease: Duration,
    pub(super) max_deliveries: Option<u32>,
    pub(super) retention: Option<Duration>,
}

/// A delivery from memory: which consumer has it, and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemoryReceipt {
    /// The consumer's number.
    pub consumer: u64,
    /// The delivery's number.
    pub tag: u64,
}

/// What [`State::take`] hands out: one leased message.
pub(super) struct Taken {
    pub(super) message: Arc<Message>,
    pub(super) receipt: Receipt,
    pub(super) until: Instant,
    pub(super) attempt: u32,
}

/// A message's place in the queue: messages are numbered as they are published.
type Sequence = u64;

/// All messages of one queue. Every operation costs O(log n) for each message that it touches.
#[derive(Debug)]
pub(super) struct State {
    pub(super) options: Options,
    /// One instant on both clocks, so that publish times follow tokio's.
    epoch: (Instant, SystemTime),
    entries: HashMap<Sequence, Entry>,
    groups: HashMap<String, Group>,
    /// What can go out now, oldest first: messages without a group, and the head of each group that is not withheld.
    ready: BTreeSet<Sequence>,
    /// Tag to lease. Sorted, so that closing gives back in a fixed order.
    leases: BTreeMap<u64, Leased>,
    timers: BTreeSet<(Instant, Timer)>,
    dead: Vec<DeadLetter>,
    last_sequence: Sequence,
    last_tag: u64,
    last_consumer: u64,
}

#[derive(Debug)]
struct Entry {
    message: Arc<Message>,
    attempts: u32,
    /// Given back with a delay that ends then.
    delayed_until: Option<Instant>,
    /// End of the queue's retention.
    expires: Option<Instant>,
    leased: bool,
}

#[derive(Debug, Default)]
struct Group {
    waiting: BTreeSet<Sequence>,
    leased: usize,
}

#[derive(Debug)]
struct Leased {
    sequence: Sequence,
    consumer: u64,
    until: Instant,
}

/// What ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Lease(u64),
    Delay(Sequence),
    Retention(Sequence),
}

impl State {
    #[expect(clippy::disallowed_methods, reason = "for `published_at`")]
    pub(super) fn new() -> Self {
        Self {
            options: Options {
                lease: Duration::from_secs(30),
                max_deliveries: None,
                retention: None,
            },
            epoch: (Instant::now(), SystemTime::now()),
            entries: HashMap::new(),
            groups: HashMap::new(),
            ready: BTreeSet::new(),
            leases: BTreeMap::new(),
            timers: BTreeSet::new(),
            dead: Vec::new(),
            last_sequence: 0,
            last_tag: 0,
            last_consumer: 0,
        }
    }

    pub(super) fn new_consumer(&mut self) -> u64 {
        self.last_consumer += 1;
        self.last_consumer
    }

    /// Messages that are not leased.
    pub(super) fn depth(&self) -> usize {
        self.entries.len() - self.leases.len()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.leases.len()
    }

    pub(super) fn dead_letters(&self) -> Vec<DeadLetter> {
        self.dead.clone()
    }

    /// When something next happens by itself.
    pub(super) fn next_event(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    pub(super) fn publish(&mut self, now: Instant, message: &Message) {
        self.last_sequence += 1;
        let sequence = self.last_sequence;
        let mut message = message.clone();
        message.broker_id = Some(sequence.to_string());
        if message.published_at.is_none() {
            message.published_at = Some(self.epoch.1 + (now - self.epoch.0));
        }
        let expires = self
            .options
            .retention
            .map(|retention| later(now, retention));
        if let Some(at) = expires {
            self.timers.insert((at, Timer::Retention(sequence)));
        }
        let entry = Entry {
            message: Arc::new(message),
            attempts: 0,
            delayed_until: None,
            expires,
            leased: false,
        };
        if let Some(name) = &entry.message.group {
            // Looked up first: a name is only copied for a new group.
            match self.groups.get_mut(name) {
                Some(group) => group.waiting.insert(sequence),
                None => self
                    .groups
                    .entry(name.clone())
                    .or_default()
                    .waiting
                    .insert(sequence),
            };
        }
        let message = Arc::clone(&entry.message);
        self.entries.insert(sequence, entry);
        self.refresh(sequence, message.group.as_deref());
    }

    /// Lets whatever has expired by `now` take effect.
    pub(super) fn advance(&mut self, now: Instant) {
        while let Some(&(at, timer)) = self.timers.first()
            && at <= now
        {
            self.timers.pop_first();
            match timer {
                Timer::Lease(tag) => {
                    if let Some(lease) = self.leases.remove(&tag) {
                        self.give_back(now, lease.sequence, Duration::ZERO);
                    }
                }
                Timer::Delay(sequence) => self.end_delay(sequence),
                Timer::Retention(sequence) => {
                    if self.entries.get(&sequence).is_some_and(|e| !e.leased) {
                        self.remove(sequence);
                    }
                }
            }
        }
    }

    /// Leases what is ready to `consumer`: the oldest message of every group first, and further ones of the same groups
    /// only when no other has anything, so that one group alone never fills a batch while others wait.
    pub(super) fn take(
        &mut self,
        now: Instant,
        consumer: u64,
        limits: ReceiveLimits,
    ) -> Vec<Taken> {
        let mut taken: Vec<Taken> = Vec::new();
        let mut bytes = 0;
        let mut followers = VecDeque::new();
        while limits.allows_more(taken.len(), bytes) {
            let Some(sequence) = self.ready.pop_first().or_else(|| followers.pop_front()) else {
                break;
            };
            let next = self.lease(now, consumer, sequence);
            bytes += next.message.size();
            followers.extend(self.follower(next.message.group.as_deref()));
            taken.push(next);
        }
        taken
    }

    fn lease(&mut self, now: Instant, consumer: u64, sequence: Sequence) -> Taken {
        let until = later(now, self.options.lease);
        self.last_tag += 1;
        let tag = self.last_tag;
        let lease = Leased {
            sequence,
            consumer,
            until,
        };
        self.leases.insert(tag, lease);
        self.timers.insert((until, Timer::Lease(tag)));
        let entry = self
            .entries
            .get_mut(&sequence)
            .expect("ready, so it is there");
        entry.attempts += 1;
        entry.leased = true;
        if let Some(name) = &entry.message.group {
            let group = self.groups.get_mut(name).expect("it has a message");
            group.waiting.remove(&sequence);
            group.leased += 1;
        }
        Taken {
            message: Arc::clone(&entry.message),
            receipt: Receipt::new(MemoryReceipt { consumer, tag }),
            until,
            attempt: entry.attempts,
        }
    }

    /// The group's first waiting message, unless it is delayed.
    fn follower(&self, group: Option<&str>) -> Option<Sequence> {
        let head = *self.groups.get(group?)?.waiting.first()?;
        self.entries[&head].delayed_until.is_none().then_some(head)
    }

    pub(super) fn settle(
        &mut self,
        now: Instant,
        receipt: &Receipt,
        disposition: &Disposition,
    ) -> SettleResult {
        let Some(tag) = self.find(receipt) else {
            return SettleResult::LeaseLost;
        };
        let lease = self.leases.remove(&tag).expect("found just now");
        self.timers.remove(&(lease.until, Timer::Lease(tag)));
        match disposition {
            Disposition::Ack => self.remove(lease.sequence),
            Disposition::Nack { delay } => self.give_back(now, lease.sequence, *delay),
            Disposition::DeadLetter { reason } => self.dead_letter(lease.sequence, reason.clone()),
        }
        SettleResult::Applied
    }

    pub(super) fn extend(
        &mut self,
        now: Instant,
        receipt: &Receipt,
        lease: Duration,
    ) -> ExtendResult {
        let Some(tag) = self.find(receipt) else {
            return ExtendResult::LeaseLost;
        };
        let leased = self.leases.get_mut(&tag).expect("found just now");
        self.timers.remove(&(leased.until, Timer::Lease(tag)));
        leased.until = later(now, lease);
        self.timers.insert((leased.until, Timer::Lease(tag)));
        ExtendResult::Extended(leased.until)
    }

    /// Gives back, in order, what `consumer` holds.
    pub(super) fn close(&mut self, now: Instant, consumer: u64) {
        let held: Vec<u64> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.consumer == consumer)
            .map(|(tag, _)| *tag)
            .collect();
        let nack = Disposition::Nack {
            delay: Duration::ZERO,
        };
        for tag in held {
            let receipt = Receipt::new(MemoryReceipt { consumer, tag });
            self.settle(now, &receipt, &nack);
        }
    }

    /// The tag of a receipt whose lease lasts.
    fn find(&self, receipt: &Receipt) -> Option<u64> {
        let MemoryReceipt { consumer, tag } = *receipt.get()?;
        (self.leases.get(&tag)?.consumer == consumer).then_some(tag)
    }

    /// A delivery that is over, without having taken effect.
    fn give_back(&mut self, now: Instant, sequence: Sequence, delay: Duration) {
        let entry = self.entries.get_mut(&sequence).expect("it was leased");
        if entry.expires.is_some_and(|at| at <= now) {
            return self.remove(sequence);
        }
        if let Some(max) = self.options.max_deliveries
            && entry.attempts >= max
        {
            let reason = format!("delivered {} times, the queue's maximum", entry.attempts);
            return self.dead_letter(sequence, reason);
        }
        if !delay.is_zero() {
            let until = later(now, delay);
            entry.delayed_until = Some(until);
            self.timers.insert((until, Timer::Delay(sequence)));
        }
        entry.leased = false;
        let message = Arc::clone(&entry.message);
        if let Some(name) = &message.group {
            let group = self.groups.get_mut(name).expect("one of it was leased");
            group.leased -= 1;
            group.waiting.insert(sequence);
        }
        self.refresh(sequence, message.group.as_deref());
    }

    fn end_delay(&mut self, sequence: Sequence) {
        if let Some(entry) = self.entries.get_mut(&sequence) {
            entry.delayed_until = None;
            let message = Arc::clone(&entry.message);
            self.refresh(sequence, message.group.as_deref());
        }
    }

    fn dead_letter(&mut self, sequence: Sequence, reason: String) {
        let message = Arc::clone(&self.entries[&sequence].message);
        self.dead.push(DeadLetter { message, reason });
        self.remove(sequence);
    }

    /// Takes a message out for good.
    fn remove(&mut self, sequence: Sequence) {
        let Some(entry) = self.entries.remove(&sequence) else {
            return;
        };
        self.ready.remove(&sequence);
        if let Some(at) = entry.expires {
            self.timers.remove(&(at, Timer::Retention(sequence)));
        }
        if let Some(at) = entry.delayed_until {
            self.timers.remove(&(at, Timer::Delay(sequence)));
        }
        if let Some(name) = &entry.message.group {
            let group = self.groups.get_mut(name).expect("it had a message");
            if !group.waiting.remove(&sequence) {
                group.leased -= 1;
            }
            self.refresh(sequence, Some(name));
        }
    }

    /// Makes ready what nothing withholds: the message itself, or its group's head.
    fn refresh(&mut self, sequence: Sequence, group: Option<&str>) {
        let Some(name) = group else {
            if self.entries[&sequence].delayed_until.is_none() {
                self.ready.insert(sequence);
            }
            return;
        };
        let group = &self.groups[name];
        if group.leased > 0 {
            return;
        }
        if group.waiting.is_empty() {
            self.groups.remove(name);
        } else {
            self.ready.extend(self.follower(Some(name)));
        }
    }
}
