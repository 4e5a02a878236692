use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{Instant, sleep_until};

use super::in_flight::InFlight;

/// Who runs next. Messages of one group share a lane and go one after another; a message without a group is alone and
/// waits for nobody. A lane is *locked* while its head is being claimed, run, completed or waits for a retry.
pub(crate) struct Lanes {
    state: Mutex<State>,
    ready: Notify,
    /// For those who already have a message, and wait for others to run with it.
    more: Notify,
    waiting: Notify,
    /// Workers that are on the processor now; see [`Working`].
    working: AtomicUsize,
    processors: usize,
    exits: Exits,
}

/// Where messages go that cannot run.
pub(crate) struct Exits {
    /// Heads that have no claim yet; `None` in the modes that claim nothing.
    pub(crate) claim: Option<UnboundedSender<Box<InFlight>>>,
    /// Whatever comes after the lanes were closed.
    pub(crate) give_back: UnboundedSender<Box<InFlight>>,
}

#[derive(Default)]
struct State {
    /// A lane exists while it is locked; these are the ones behind the head.
    lanes: HashMap<Arc<str>, VecDeque<Box<InFlight>>>,
    ready: VecDeque<Box<InFlight>>,
    waiting: BinaryHeap<Reverse<Waiting>>,
    closed: bool,
    /// What could not be sent on because the pipeline has stopped. Dropping it here would take the lock again.
    orphans: Vec<Box<InFlight>>,
}

struct Waiting {
    until: Instant,
    in_flight: Box<InFlight>,
}

impl Waiting {
    fn rank(&self) -> (Instant, u64) {
        (self.until, self.in_flight.seq)
    }
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.rank() == other.rank()
    }
}
impl Eq for Waiting {}
impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.rank().cmp(&other.rank())
    }
}

impl Lanes {
    pub(crate) fn new(exits: Exits) -> Arc<Self> {
        // The runtime's threads, not the machine's: a handler on a runtime of one thread has nobody to run beside.
        let processors = Handle::current().metrics().num_workers();
        Arc::new(Self {
            state: Mutex::default(),
            ready: Notify::new(),
            more: Notify::new(),
            waiting: Notify::new(),
            working: AtomicUsize::new(0),
            processors,
            exits,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts each behind the others of its group.
    pub(crate) fn push(self: &Arc<Self>, messages: impl IntoIterator<Item = Box<InFlight>>) {
        let mut state = self.state();
        for mut in_flight in messages {
            if let Some(group) = in_flight.delivery.message.group.as_deref()
                && in_flight.lane.is_none()
                && !state.closed
            {
                if let Some(lane) = state.lanes.get_mut(group) {
                    in_flight.permit.stall();
                    lane.push_back(in_flight);
                    continue;
                }
                in_flight.lane = Some(self.open(&mut state, group));
            }
            self.route(&mut state, in_flight);
        }
    }

    fn open(self: &Arc<Self>, state: &mut State, group: &str) -> LaneLock {
        let group: Arc<str> = group.into();
        state.lanes.insert(group.clone(), VecDeque::new());
        LaneLock {
            group,
            lanes: self.clone(),
        }
    }

    /// Sends a message that holds its lane, or needs none, where it can go on.
    fn route(&self, state: &mut State, mut in_flight: Box<InFlight>) {
        in_flight.permit.resume();
        let sent = match &self.exits.claim {
            _ if state.closed => self.exits.give_back.send(in_flight),
            Some(claim) if in_flight.needs_claim() => claim.send(in_flight),
            _ => {
                state.ready.push_back(in_flight);
                self.ready.notify_one();
                self.more.notify_waiters();
                Ok(())
            }
        };
        if let Err(unsent) = sent {
            state.orphans.push(unsent.0);
        }
    }

    /// Keeps a message, and with it its lane, until `until`.
    pub(crate) fn wait(&self, mut in_flight: Box<InFlight>, until: Instant) {
        let mut state = self.state();
        if state.closed {
            return self.route(&mut state, in_flight);
        }
        in_flight.permit.stall();
        state.waiting.push(Reverse(Waiting { until, in_flight }));
        self.waiting.notify_one();
    }

    /// Moves on what has waited long enough; runs for as long as the pipeline.
    pub(crate) async fn run_timer(&self) {
        loop {
            let next = self.release_due();
            let changed = self.waiting.notified();
            match next {
                Some(until) => tokio::select! {
                    biased;
                    () = sleep_until(until) => {}
                    () = changed => {}
                },
                None => changed.await,
            }
        }
    }

    fn release_due(&self) -> Option<Instant> {
        let mut state = self.state();
        let now = Instant::now();
        while let Some(Reverse(first)) = state.waiting.peek() {
            if first.until > now {
                return Some(first.until);
            }
            if let Some(Reverse(due)) = state.waiting.pop() {
                self.route(&mut state, due.in_flight);
            }
        }
        None
    }

    /// The next message to run, with the mark that its worker is at work.
    pub(crate) async fn next(&self) -> (Box<InFlight>, Working<'_>) {
        loop {
            let ready = self.ready.notified();
            if let Some(in_flight) = self.pop() {
                return (in_flight, Working::begin(self));
            }
            ready.await;
        }
    }

    fn pop(&self) -> Option<Box<InFlight>> {
        self.state().ready.pop_front()
    }

    /// The next message to run, if it may be taken out.
    pub(crate) fn pop_if(&self, may: impl FnOnce(&mut InFlight) -> bool) -> Option<Box<InFlight>> {
        self.state().ready.pop_front_if(|next| may(next))
    }

    /// Resolves when more messages can be run than when it was called.
    pub(crate) fn more(&self) -> Notified<'_> {
        self.more.notified()
    }

    fn wake_another(&self) {
        if self.working.load(Ordering::Relaxed) < self.processors && !self.state().ready.is_empty()
        {
            self.ready.notify_one();
        }
    }

    /// Ends the lanes: returns all that is not running, in order of arrival. What comes later is given back too.
    pub(crate) fn close(&self) -> Vec<Box<InFlight>> {
        let mut state = self.state();
        state.closed = true;
        let mut messages: Vec<_> = state.ready.drain(..).collect();
        messages.append(&mut state.orphans);
        messages.extend(state.waiting.drain().map(|Reverse(w)| w.in_flight));
        messages.extend(state.lanes.values_mut().flat_map(std::mem::take));
        drop(state);
        messages.sort_by_key(|in_flight| in_flight.seq);
        messages
    }
}

/// A worker that is using a processor. As long as handlers return at once, one worker per processor runs them all and
/// nobody is woken; when one waits, the next worker takes its place.
pub(crate) struct Working<'a> {
    lanes: &'a Lanes,
}

impl<'a> Working<'a> {
    fn begin(lanes: &'a Lanes) -> Self {
        lanes.working.fetch_add(1, Ordering::Relaxed);
        lanes.wake_another();
        Self { lanes }
    }

    /// Runs what may wait, counted as not at work.
    pub(crate) async fn pause<T>(&self, waiting: impl Future<Output = T>) -> T {
        let _paused = Paused::begin(self.lanes);
        waiting.await
    }
}

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.lanes.working.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Paused<'a>(&'a Lanes);

impl<'a> Paused<'a> {
    fn begin(lanes: &'a Lanes) -> Self {
        lanes.working.fetch_sub(1, Ordering::Relaxed);
        lanes.wake_another();
        Self(lanes)
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.working.fetch_add(1, Ordering::Relaxed);
    }
}

/// The right to be the one of a group that is going on; when dropped, the next of the group has it.
pub(crate) struct LaneLock {
    group: Arc<str>,
    lanes: Arc<Lanes>,
}

impl LaneLock {
    /// The next of the lane, if it may be taken out; the lock stays where it is.
    pub(crate) fn next(&self, may: impl FnOnce(&mut InFlight) -> bool) -> Option<Box<InFlight>> {
        let mut state = self.lanes.state();
        let lane = state.lanes.get_mut(&self.group)?;
        let mut next = lane.pop_front_if(|next| may(next))?;
        next.permit.resume();
        Some(next)
    }

    /// Whether this is the message's lane.
    pub(crate) fn is_of(&self, one: &InFlight) -> bool {
        one.delivery.message.group.as_deref() == Some(&*self.group)
    }

    /// Puts messages back at the front of the lane, in their order.
    pub(crate) fn put_back(&self, messages: Vec<Box<InFlight>>) {
        let mut state = self.lanes.state();
        if state.closed {
            // Last first, as all that is given back.
            for in_flight in messages.into_iter().rev() {
                self.lanes.route(&mut state, in_flight);
            }
        } else if let Some(lane) = state.lanes.get_mut(&self.group) {
            for mut in_flight in messages.into_iter().rev() {
                in_flight.permit.stall();
                lane.push_front(in_flight);
            }
        }
    }

    /// Takes out all that waits behind the head, in order.
    pub(crate) fn rest(&self) -> Vec<Box<InFlight>> {
        let mut state = self.lanes.state();
        state
            .lanes
            .get_mut(&self.group)
            .map(|lane| lane.drain(..).collect())
            .unwrap_or_default()
    }
}

impl Drop for LaneLock {
    fn drop(&mut self) {
        let lanes = &self.lanes;
        let mut state = lanes.state();
        match state.lanes.get_mut(&self.group).map(VecDeque::pop_front) {
            Some(Some(mut next)) => {
                next.lane = Some(LaneLock {
                    group: self.group.clone(),
                    lanes: lanes.clone(),
                });
                lanes.route(&mut state, next);
            }
            Some(None) => {
                state.lanes.remove(&self.group);
            }
            None => {}
        }
    }
}
