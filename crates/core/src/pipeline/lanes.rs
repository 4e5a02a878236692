use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{Instant, sleep_until};

use super::in_flight::Flight;

/// Who runs next. Messages of one group share a lane and go one after another; a message without a group is alone and
/// waits for nobody. A lane's *turn* is out while its head is being claimed, run, completed or waits for a retry.
pub(crate) struct Lanes {
    state: Mutex<State>,
    ready: Notify,
    waiting: Notify,
    /// Workers that are on the processor now; see [`Working`].
    working: AtomicUsize,
    processors: usize,
    exits: Exits,
}

/// Where flights go that cannot run.
pub(crate) struct Exits {
    /// Heads that have no claim yet; `None` in the modes that claim nothing.
    pub(crate) claim: Option<UnboundedSender<Flight>>,
    /// Whatever comes after the lanes were closed.
    pub(crate) give_back: UnboundedSender<Flight>,
}

#[derive(Default)]
struct State {
    /// A lane exists while its turn is out; these are the ones behind the head.
    lanes: HashMap<Arc<str>, VecDeque<Flight>>,
    ready: VecDeque<Flight>,
    waiting: BinaryHeap<Reverse<Waiting>>,
    closed: bool,
    /// What could not be sent on because the pipeline has stopped. Dropping it here would take the lock again.
    orphans: Vec<Flight>,
}

struct Waiting {
    until: Instant,
    flight: Flight,
}

impl Waiting {
    fn rank(&self) -> (Instant, u64) {
        (self.until, self.flight.seq)
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
    pub(crate) fn push(self: &Arc<Self>, flights: impl IntoIterator<Item = Flight>) {
        let mut state = self.state();
        for mut flight in flights {
            if let Some(group) = flight.delivery.message.group.as_deref()
                && flight.turn.is_none()
                && !state.closed
            {
                if let Some(lane) = state.lanes.get_mut(group) {
                    flight.permit.stall();
                    lane.push_back(flight);
                    continue;
                }
                flight.turn = Some(self.open(&mut state, group));
            }
            self.route(&mut state, flight);
        }
    }

    fn open(self: &Arc<Self>, state: &mut State, group: &str) -> Turn {
        let group: Arc<str> = group.into();
        state.lanes.insert(group.clone(), VecDeque::new());
        Turn {
            group,
            lanes: self.clone(),
        }
    }

    /// Sends a flight whose turn it is where it can go on.
    fn route(&self, state: &mut State, mut flight: Flight) {
        flight.permit.resume();
        let sent = match &self.exits.claim {
            _ if state.closed => self.exits.give_back.send(flight),
            Some(claim) if flight.needs_claim() => claim.send(flight),
            _ => {
                state.ready.push_back(flight);
                self.ready.notify_one();
                Ok(())
            }
        };
        if let Err(unsent) = sent {
            state.orphans.push(unsent.0);
        }
    }

    /// Keeps a flight, and with it its lane, until `until`.
    pub(crate) fn wait(&self, mut flight: Flight, until: Instant) {
        let mut state = self.state();
        if state.closed {
            return self.route(&mut state, flight);
        }
        flight.permit.stall();
        state.waiting.push(Reverse(Waiting { until, flight }));
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
                self.route(&mut state, due.flight);
            }
        }
        None
    }

    /// The next flight to run, with the mark that its worker is at work.
    pub(crate) async fn next(&self) -> (Flight, Working<'_>) {
        loop {
            let ready = self.ready.notified();
            if let Some(flight) = self.pop() {
                return (flight, Working::begin(self));
            }
            ready.await;
        }
    }

    fn pop(&self) -> Option<Flight> {
        self.state().ready.pop_front()
    }

    fn wake_another(&self) {
        if self.working.load(Ordering::Relaxed) < self.processors && !self.state().ready.is_empty()
        {
            self.ready.notify_one();
        }
    }

    /// Ends the lanes: returns all that is not running, in order of arrival. What comes later is given back too.
    pub(crate) fn close(&self) -> Vec<Flight> {
        let mut state = self.state();
        state.closed = true;
        let mut flights: Vec<_> = state.ready.drain(..).collect();
        flights.append(&mut state.orphans);
        flights.extend(state.waiting.drain().map(|Reverse(w)| w.flight));
        flights.extend(state.lanes.values_mut().flat_map(std::mem::take));
        drop(state);
        flights.sort_by_key(|flight| flight.seq);
        flights
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
pub(crate) struct Turn {
    group: Arc<str>,
    lanes: Arc<Lanes>,
}

impl Turn {
    /// The next of the lane, if it could run at once, in a transaction with others, and has had no more than so many attempts;
    /// the turn stays where it is.
    pub(crate) fn next(&self, most: u32) -> Option<Flight> {
        let mut state = self.lanes.state();
        let lane = state.lanes.get_mut(&self.group)?;
        let next = lane.front()?;
        let ready = next.lease.held().is_some() && next.replay.is_none() && next.doomed.is_none();
        if !ready || next.alone || next.attempt() > most {
            return None;
        }
        let mut next = lane.pop_front()?;
        next.permit.resume();
        Some(next)
    }

    /// Puts flights back at the front of the lane, in their order.
    pub(crate) fn put_back(&self, flights: Vec<Flight>) {
        let mut state = self.lanes.state();
        if state.closed {
            // Last first, as all that is given back.
            for flight in flights.into_iter().rev() {
                self.lanes.route(&mut state, flight);
            }
        } else if let Some(lane) = state.lanes.get_mut(&self.group) {
            for mut flight in flights.into_iter().rev() {
                flight.permit.stall();
                lane.push_front(flight);
            }
        }
    }

    /// Takes out all that waits behind the head, in order.
    pub(crate) fn rest(&self) -> Vec<Flight> {
        let mut state = self.lanes.state();
        state
            .lanes
            .get_mut(&self.group)
            .map(|lane| lane.drain(..).collect())
            .unwrap_or_default()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let lanes = &self.lanes;
        let mut state = lanes.state();
        match state.lanes.get_mut(&self.group).map(VecDeque::pop_front) {
            Some(Some(mut next)) => {
                next.turn = Some(Turn {
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
