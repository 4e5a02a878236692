use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use onlyonce_core::Message;
use onlyonce_core::driver::{Capabilities, Ordering, Receipt, Sink as _, Source as _};
use onlyonce_core::memory::{DeadLetter, MemoryQueue};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::faults::Faults;
use super::replay::Outstanding;
use super::sessions::Sessions;
use super::sink::DeadLetters;
use super::source::Consumer;

/// Where a message's group is kept from the [`MemoryQueue`], which would withhold the group.
pub(super) const GROUP: &str = "simulated-group";
/// A message with this attribute is delivered as one that could not be read whole, with the attribute's value as the
/// reason.
pub const MALFORMED: &str = "simulated-malformed";
/// A lease that ends with its connection alone.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 86_400);

/// The server of a [`MemoryQueue`], reached over a bad network.
#[derive(Clone, Debug)]
pub struct Broker {
    pub(super) queue: MemoryQueue,
    pub(super) settings: Settings,
    pub(super) faults: Faults,
    pub(super) shared: Arc<Shared>,
    dead_letters: DeadLetters,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) capabilities: Capabilities,
    pub(super) lease: Duration,
    pub(super) max_deliveries: Option<u32>,
    pub(super) sessions: bool,
    pub(super) replay: bool,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    outstanding: Mutex<Outstanding>,
    /// The single active consumer has changed.
    pub(super) changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// The channel of the single active consumer.
    active: Option<u64>,
    last_channel: u64,
    leases: HashMap<Receipt, Instant>,
    sessions: Sessions,
    /// What was delivered and will soon be taken away, or has been.
    revoked: HashSet<Receipt>,
    /// By worker and the broker's id of the message.
    latest: HashMap<(u64, String), Receipt>,
    breaches: Vec<String>,
    most_held: usize,
}

impl Broker {
    /// A broker that can do everything, with an empty queue and leases of 10 seconds.
    #[must_use]
    pub fn new(name: &str, faults: &Faults) -> Self {
        let queue = MemoryQueue::new(name);
        let lease = Duration::from_secs(10);
        Self {
            settings: Settings {
                capabilities: MemoryQueue::CAPABILITIES,
                lease,
                max_deliveries: None,
                sessions: false,
                replay: false,
            },
            queue: queue.with_lease(lease),
            faults: faults.clone(),
            shared: Arc::default(),
            dead_letters: DeadLetters::new(name, faults),
        }
    }

    /// Another kind of broker. Without a [timed lease](Capabilities::timed_lease), a delivery is leased for as long as its
    /// connection lasts. With [`Ordering::Delivery`] one consumer at a time is active.
    #[must_use]
    pub fn with_capabilities(mut self, capabilities: Capabilities) -> Self {
        self.settings.capabilities = capabilities;
        self.lend()
    }

    /// Sets for how long a delivery is leased.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.settings.lease = lease;
        self.lend()
    }

    /// Sets after how many deliveries the broker itself gives up on a message.
    #[must_use]
    pub fn with_max_deliveries(mut self, max: u32) -> Self {
        self.settings.max_deliveries = Some(max);
        self.queue = self.queue.clone().with_max_deliveries(max);
        self
    }

    /// Gives one lease for all messages of a group that a consumer holds: whoever extends one of them extends all. It concerns
    /// [timed leases](Capabilities::timed_lease) of a broker with [`Ordering::Group`].
    #[must_use]
    pub fn with_sessions(mut self) -> Self {
        self.settings.sessions = true;
        self
    }

    /// Brings a group back from one message on, as Google Pub/Sub does with exactly-once delivery: what is given back, or whose
    /// lease ends, takes with it all later messages of its group that are not acked, whatever their leases. It concerns
    /// [timed leases](Capabilities::timed_lease) without [sessions](Self::with_sessions).
    ///
    /// - Giving back sets the lease to the delay.
    /// - An ack fails, and may be tried again, while an earlier message of its group is out.
    /// - Without [counts](Capabilities::counts_attempts) nothing tells a first delivery from a later one.
    /// - [`Fault::Partial`](super::Fault::Partial) lets an entry of a request fail before or after it took effect.
    #[must_use]
    pub fn with_replay(mut self) -> Self {
        self.settings.replay = true;
        self
    }

    fn lend(mut self) -> Self {
        self.queue = self.queue.clone().with_lease(self.lease_length());
        self
    }

    /// Adds a message.
    pub async fn publish(&self, mut message: Message) {
        let withholds = self.settings.capabilities.ordering == Ordering::Group;
        if let Some(group) = message.group.take_if(|_| !withholds) {
            message.attributes.insert(GROUP, group);
        }
        self.queue.publish(&[message]).await;
    }

    /// A worker's way to it. A consumer that is dropped without being closed has crashed.
    pub fn connect(&self, worker: u64) -> Consumer {
        Consumer::new(self.clone(), worker)
    }

    /// Where workers put what cannot be processed.
    pub fn dead_letters(&self) -> &DeadLetters {
        &self.dead_letters
    }

    /// What the broker itself has given up on.
    pub fn given_up(&self) -> Vec<DeadLetter> {
        self.queue.dead_letters()
    }

    /// How many messages are not settled.
    pub fn unsettled(&self) -> usize {
        self.queue.depth() + self.queue.in_flight()
    }

    /// Until when `worker` may work on the message with this id, by its latest delivery; `None` if it never came.
    pub fn leased_until(&self, worker: u64, broker_id: &str) -> Option<Instant> {
        let state = self.state();
        let receipt = state.latest.get(&(worker, broker_id.into()))?;
        state.leases.get(receipt).copied()
    }

    /// Whether the broker has announced to `worker` that it will take its latest delivery of the message with this id away.
    pub fn is_revoked(&self, worker: u64, broker_id: &str) -> bool {
        let state = self.state();
        let latest = state.latest.get(&(worker, broker_id.into()));
        latest.is_some_and(|receipt| state.revoked.contains(receipt))
    }

    /// What workers did that no worker may: settling a delivery after its lease had ended, extending a shared lease more than
    /// once.
    pub fn breaches(&self) -> Vec<String> {
        self.state().breaches.clone()
    }

    pub(super) fn breach(&self, what: String) {
        self.faults.log(|| format!("BREACH: {what}"));
        self.state().breaches.push(what);
    }

    /// A worker settled what was no longer its own.
    pub(super) fn late(&self, worker: u64, message: &Message) {
        let label = message.label();
        self.breach(format!(
            "worker {worker} settled {label} after its lease had ended"
        ));
    }

    pub(super) fn holds(&self, messages: usize) {
        let mut state = self.state();
        state.most_held = state.most_held.max(messages);
    }

    /// How many messages any worker held at most at one time.
    pub fn most_held(&self) -> usize {
        self.state().most_held
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// By the server's clock, the lease of `receipt` now ends at `until`.
    pub(super) fn lease(&self, receipt: &Receipt, until: Instant) {
        let mut state = self.state();
        for same in state.sessions.all_with(receipt) {
            state.leases.insert(same, until);
        }
    }

    /// Whether all that a consumer holds of a group has one lease.
    fn has_sessions(&self) -> bool {
        let Settings {
            capabilities,
            sessions,
            ..
        } = self.settings;
        sessions && capabilities.timed_lease && capabilities.ordering == Ordering::Group
    }

    /// `channel` got a message under a lease until then. Returns when that ends: if it has others of the group, with theirs.
    pub(super) fn begin_lease(
        &self,
        channel: u64,
        message: &Message,
        receipt: &Receipt,
        until: Instant,
    ) -> Instant {
        let mut state = self.state();
        let state = &mut *state;
        let mut until = until;
        if let Some(group) = message.group.clone().filter(|_| self.has_sessions()) {
            let end = |other: &Receipt| state.leases.get(other).copied();
            let lasts = |other: &Receipt| end(other).is_some_and(|end| end > Instant::now());
            let other = state.sessions.join((channel, group), receipt, lasts);
            until = other.and_then(|other| end(&other)).unwrap_or(until);
        }
        state.leases.insert(receipt.clone(), until);
        until
    }

    /// Whether a group comes back from one message on.
    pub(super) fn replays(&self) -> bool {
        self.settings.replay && self.settings.capabilities.timed_lease
    }

    pub(super) fn outstanding(&self) -> MutexGuard<'_, Outstanding> {
        let outstanding = self.shared.outstanding.lock();
        outstanding.unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the lease that it shares.
    pub(super) fn session(&self, receipt: &Receipt) -> Option<u64> {
        self.state().sessions.number(receipt)
    }

    /// Those that have the same lease as `receipt` and are not settled.
    pub(super) fn sharing(&self, receipt: &Receipt) -> Vec<Receipt> {
        self.state().sessions.held_with(receipt)
    }

    /// Takes away what is held of the session of `receipt`.
    pub(super) async fn end_session(&self, receipt: &Receipt) {
        let held = self.sharing(receipt);
        for one in &held {
            self.lease(one, Instant::now());
        }
        self.queue.extend(&held, Duration::ZERO).await;
    }

    pub(super) fn settled(&self, receipt: &Receipt) {
        self.state().sessions.settled(receipt);
    }

    /// It was announced that `receipt` will be taken away.
    pub(super) fn revoked(&self, receipt: &Receipt) {
        self.state().revoked.insert(receipt.clone());
    }

    pub(super) fn delivered(&self, worker: u64, broker_id: &str, receipt: &Receipt) {
        let mut state = self.state();
        state
            .latest
            .insert((worker, broker_id.into()), receipt.clone());
    }

    pub(super) fn lease_end(&self, receipt: &Receipt) -> Option<Instant> {
        self.state().leases.get(receipt).copied()
    }

    /// The lease that a delivery gets.
    fn lease_length(&self) -> Duration {
        match self.settings.capabilities.timed_lease {
            true => self.settings.lease,
            false => FOR_EVER,
        }
    }

    pub(super) fn new_channel(&self) -> u64 {
        let mut state = self.state();
        state.last_channel += 1;
        state.last_channel
    }

    /// Waits until `channel` may receive.
    pub(super) async fn activate(&self, channel: u64) {
        if self.settings.capabilities.ordering != Ordering::Delivery {
            return;
        }
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if *self.state().active.get_or_insert(channel) == channel {
                return;
            }
            changed.await;
        }
    }

    /// Another channel may become the active one.
    pub(super) fn deactivate(&self, channel: u64) {
        let mut state = self.state();
        if state.active.take_if(|active| *active == channel).is_some() {
            self.shared.changed.notify_waiters();
        }
    }

    /// The message was acked; a broker that delivers at least once may repeat it.
    pub(super) fn acked(&self, message: Arc<Message>) {
        if let Some(later) = self.faults.echoes() {
            let queue = self.queue.clone();
            self.faults
                .log(|| format!("the broker will repeat {}", message.label()));
            tokio::spawn(async move {
                sleep(later).await;
                queue.publish(&[Message::clone(&message)]).await;
            });
        }
    }
}
