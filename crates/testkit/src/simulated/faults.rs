use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fastrand::Rng;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A call that a worker makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(
    missing_docs,
    reason = "the names of the traits' methods, an outbox's apart from a source's"
)]
#[non_exhaustive]
pub enum Call {
    Receive,
    Settle,
    Extend,
    Claim,
    Renew,
    Start,
    Complete,
    Release,
    Begin,
    CompletePart,
    Rollback,
    Commit,
    Publish,
    PublishPart,
    Fetch,
    SettleOutgoing,
    ReleaseOutgoing,
    Wait,
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// A request never arrives.
    LostRequest,
    /// From now on, for a while, no request of this kind arrives.
    Outage,
    /// A request arrives late, whether or not its sender still waits, or lives.
    LateRequest,
    /// The call takes effect, and nobody is told.
    LostReply,
    /// The call takes effect, and its sender is told late.
    LateReply,
    /// Some entries of a batch fail.
    Partial,
    /// An error that says not to try again.
    Refused,
    /// A connection breaks, and with it the leases that last as long as it does.
    Cut,
    /// The broker delivers a message again that was acked.
    Echo,
    /// The store forgets claims that were not yet durable.
    Amnesia,
    /// The worker dies just before its request, or just after its reply. Whoever runs it must see to that: see
    /// [`Faults::death_of`].
    Death,
    /// The broker announces that it will take a connection's deliveries away, and does so a little later. It concerns leases
    /// that last as long as their connection.
    Revoke,
}

impl Fault {
    /// Every kind.
    pub const ALL: [Self; 12] = [
        Self::LostRequest,
        Self::Outage,
        Self::LateRequest,
        Self::LostReply,
        Self::LateReply,
        Self::Partial,
        Self::Refused,
        Self::Cut,
        Self::Echo,
        Self::Amnesia,
        Self::Death,
        Self::Revoke,
    ];

    fn concerns(self, call: Call) -> bool {
        match self {
            Self::Partial => matches!(call, Call::Settle | Call::Extend | Call::Publish),
            Self::Cut => matches!(call, Call::Receive | Call::Settle),
            Self::Amnesia => call == Call::Claim,
            Self::Revoke => call == Call::Receive,
            Self::Refused => matches!(call, Call::Receive | Call::Claim | Call::Fetch),
            _ => true,
        }
    }
}

/// How likely each fault is, for each call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mix(BTreeMap<Fault, f64>);

impl Mix {
    /// Nothing goes wrong.
    #[must_use]
    pub fn nothing() -> Self {
        Self::default()
    }

    /// Everything goes wrong with this probability that a worker can repair by itself.
    #[must_use]
    pub fn everything(probability: f64) -> Self {
        let fatal = [Fault::Refused, Fault::Death];
        let repairable = Fault::ALL.into_iter().filter(|f| !fatal.contains(f));
        Self(repairable.map(|fault| (fault, probability)).collect())
    }

    /// Sets how likely `fault` is.
    #[must_use]
    pub fn with(mut self, fault: Fault, probability: f64) -> Self {
        self.0.insert(fault, probability);
        self
    }

    fn of(&self, fault: Fault) -> f64 {
        self.0.get(&fault).copied().unwrap_or(0.0)
    }
}

/// Decides what goes wrong. Clones decide together.
///
/// Every worker's every kind of call has a stream of decisions of its own, so that leaving out one fault changes as little
/// as possible of the others.
#[derive(Clone)]
pub struct Faults {
    state: Arc<Mutex<State>>,
}

struct State {
    seed: u64,
    mix: Mix,
    until: Instant,
    left: usize,
    struck: BTreeMap<Fault, usize>,
    streams: BTreeMap<(u64, Call, Option<Fault>), Rng>,
    deaths: BTreeMap<u64, CancellationToken>,
    outages: BTreeMap<(u64, Call), Instant>,
    log: Option<Box<dyn FnMut(String) + Send>>,
    begun: Instant,
}

/// What happens to one call.
#[derive(Debug, Default)]
pub(super) struct Disturbance {
    pub(super) before: Duration,
    pub(super) lost: bool,
    pub(super) after: Duration,
    pub(super) unanswered: bool,
    pub(super) refused: bool,
    pub(super) partial: Option<Rng>,
    pub(super) cut: bool,
    /// How long after the notice the deliveries are taken away.
    pub(super) revoked: Option<Duration>,
    pub(super) amnesia: bool,
    pub(super) death: Option<Death>,
}

/// When a worker dies.
#[derive(Clone, Debug)]
pub(super) struct Death {
    /// After the reply; otherwise before the request.
    after: bool,
    token: CancellationToken,
}

impl Disturbance {
    /// Never returns if the worker dies before its request.
    pub(super) async fn before(&self) {
        self.dies(false).await;
    }

    /// Never returns if the worker dies after the reply.
    pub(super) async fn after(&self) {
        self.dies(true).await;
    }

    async fn dies(&self, after: bool) {
        if let Some(death) = self.death.as_ref().filter(|death| death.after == after) {
            death.token.cancel();
            std::future::pending().await
        }
    }
}

/// The longest that a call is late: longer than any lease in a simulation.
const LATE: u64 = 12_000;
/// How long what runs may go on after a notice, in milliseconds.
const GRACE: RangeInclusive<u64> = 1_000..=3_000;
/// The usual way there or back.
const LATENCY: u64 = 4;

impl Faults {
    /// Faults of `mix` for this time from now, decided by `seed`. Must be called within a tokio runtime.
    #[must_use]
    pub fn new(seed: u64, mix: Mix, lasting: Duration) -> Self {
        let begun = Instant::now();
        Self {
            state: Arc::new(Mutex::new(State {
                seed,
                mix,
                until: begun + lasting,
                left: usize::MAX,
                struck: BTreeMap::new(),
                streams: BTreeMap::new(),
                deaths: BTreeMap::new(),
                outages: BTreeMap::new(),
                log: None,
                begun,
            })),
        }
    }

    /// At most this many faults.
    pub fn limit(&self, most: usize) {
        self.state().left = most;
    }

    /// From now on, `write` gets a line for everything that happens.
    pub fn log_to(&self, write: impl FnMut(String) + Send + 'static) {
        self.state().log = Some(Box::new(write));
    }

    /// Cancelled when `worker` must die: whoever runs it drops it then.
    #[must_use]
    pub fn death_of(&self, worker: u64) -> CancellationToken {
        self.state().death_of(worker)
    }

    /// Adds a line to the log, if there is one.
    pub fn log(&self, line: impl FnOnce() -> String) {
        let mut state = self.state();
        let at = state.begun.elapsed().as_secs_f64();
        if let Some(write) = &mut state.log {
            write(format!("{at:9.3}  {}", line()));
        }
    }

    /// How often each fault has struck.
    #[must_use]
    pub fn struck(&self) -> BTreeMap<Fault, usize> {
        self.state().struck.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What happens to this call of this worker.
    pub(super) fn on(&self, worker: u64, call: Call) -> Disturbance {
        let mut state = self.state();
        let mut latency =
            |_| Duration::from_millis(state.stream(worker, call, None).u64(..=LATENCY));
        let mut it = Disturbance {
            before: latency(0),
            after: latency(1),
            ..Disturbance::default()
        };
        it.lost = state.strikes(worker, call, Fault::LostRequest) || state.is_out(worker, call);
        it.unanswered = state.strikes(worker, call, Fault::LostReply);
        it.refused = state.strikes(worker, call, Fault::Refused);
        it.cut = state.strikes(worker, call, Fault::Cut);
        if state.strikes(worker, call, Fault::LateRequest) {
            it.before += state.late(worker, call, Fault::LateRequest);
        }
        if state.strikes(worker, call, Fault::LateReply) {
            it.after += state.late(worker, call, Fault::LateReply);
        }
        if state.strikes(worker, call, Fault::Partial) {
            let rng = state.stream(worker, call, Some(Fault::Partial));
            it.partial = Some(rng.fork());
        }
        it.amnesia = state.strikes(worker, call, Fault::Amnesia);
        if state.strikes(worker, call, Fault::Revoke) {
            let rng = state.stream(worker, call, Some(Fault::Revoke));
            it.revoked = Some(Duration::from_millis(rng.u64(GRACE)));
        }
        if state.strikes(worker, call, Fault::Death) {
            it.death = Some(Death {
                after: state.stream(worker, call, Some(Fault::Death)).bool(),
                token: state.death_of(worker),
            });
        }
        drop(state);
        self.log(|| format!("worker {worker} {call:?}: {it}"));
        it
    }

    /// Whether the broker repeats a message that was acked, and how much later.
    pub(super) fn echoes(&self) -> Option<Duration> {
        let mut state = self.state();
        let strikes = state.strikes(0, Call::Receive, Fault::Echo);
        strikes.then(|| state.late(0, Call::Receive, Fault::Echo))
    }
}

impl State {
    fn death_of(&mut self, worker: u64) -> CancellationToken {
        self.deaths.entry(worker).or_default().clone()
    }

    fn stream(&mut self, worker: u64, call: Call, fault: Option<Fault>) -> &mut Rng {
        let seed = self.seed;
        self.streams
            .entry((worker, call, fault))
            .or_insert_with(|| {
                let fault = fault.map_or(0, |fault| 1 + fault as u64);
                let stream = (worker << 16) | ((call as u64) << 8) | fault;
                Rng::with_seed(
                    seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)
                        ^ stream.wrapping_mul(0xD6E8_FEB8_6659_FD93),
                )
            })
    }

    fn strikes(&mut self, worker: u64, call: Call, fault: Fault) -> bool {
        let probability = self.mix.of(fault);
        if probability == 0.0 || !fault.concerns(call) {
            return false;
        }
        let hit = self.stream(worker, call, Some(fault)).f64() < probability;
        if !hit || self.left == 0 || Instant::now() >= self.until {
            return false;
        }
        self.left -= 1;
        *self.struck.entry(fault).or_default() += 1;
        true
    }

    /// Whether this kind of call does not get through for now.
    fn is_out(&mut self, worker: u64, call: Call) -> bool {
        if self.strikes(worker, call, Fault::Outage) {
            let until = Instant::now() + self.late(worker, call, Fault::Outage) * 2;
            self.outages.insert((worker, call), until.min(self.until));
        }
        let until = self.outages.get(&(worker, call));
        until.is_some_and(|until| *until > Instant::now())
    }

    /// Mostly a little, sometimes longer than a lease.
    fn late(&mut self, worker: u64, call: Call, fault: Fault) -> Duration {
        let rng = self.stream(worker, call, Some(fault));
        let most = LATE >> rng.u32(..8);
        Duration::from_millis(rng.u64(1..=most))
    }
}

impl fmt::Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ms there, {} ms back",
            self.before.as_millis(),
            self.after.as_millis()
        )?;
        let faults = [
            (self.lost, "request lost"),
            (self.unanswered, "reply lost"),
            (self.refused, "refused"),
            (self.partial.is_some(), "some entries fail"),
            (self.cut, "connection cut"),
            (self.revoked.is_some(), "deliveries revoked"),
            (self.amnesia, "claims forgotten"),
            (self.death.is_some(), "the worker dies"),
        ];
        let named = faults.iter().filter(|(strikes, _)| *strikes);
        named
            .clone()
            .try_for_each(|(_, name)| write!(f, ", {name}"))
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("Faults")
            .field("seed", &state.seed)
            .field("mix", &state.mix)
            .field("struck", &state.struck)
            .finish_non_exhaustive()
    }
}
