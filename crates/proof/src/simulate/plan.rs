//! What one seed means: the broker, the messages, the workers and how often what goes wrong.

use std::time::Duration;

use fastrand::Rng;
use onlyonce_core::driver::{Acks, Capabilities, Ordering};
use onlyonce_testkit::simulated::{Fault, Mix};

use super::cut::Cut;
use super::outbox::{self, Outbox, Outgoing};

/// What the pipeline promises in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Transactional,
    RunAgain,
    Quarantine,
    AtLeastOnce,
    AtMostOnce,
}

/// What becomes of a message's handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    Succeeds,
    /// Fails this many times first.
    Fails(u32),
    Panics(u32),
    /// Can never be handled.
    Poison,
    /// Each run ends its worker's process.
    Kills,
    /// No run ever ends.
    Hangs,
}

impl Behaviour {
    /// Whether no run of it ends, well or badly.
    pub fn never_ends(self) -> bool {
        matches!(self, Self::Kills | Self::Hangs)
    }
}

/// One message, as its producer means it.
#[derive(Clone, Debug)]
pub struct Planned {
    /// `None`: the producer forgot it.
    pub key: Option<String>,
    pub group: Option<u64>,
    pub behaviour: Behaviour,
    /// The adapter cannot read it whole.
    pub malformed: bool,
    /// The longest that its handler takes.
    pub takes: Duration,
    /// When it is published, and published again.
    pub published: Vec<Duration>,
    /// What its handler publishes.
    pub publishes: Vec<Outgoing>,
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub mode: Mode,
    pub capabilities: Capabilities,
    pub lease: Duration,
    /// Whether all that a consumer holds of a group has one lease.
    pub sessions: bool,
    /// Whether a group comes back from one message on, as with Google Pub/Sub.
    pub replay: bool,
    pub claim_lease: Duration,
    /// How long a second is by each worker's clock; `None`: all agree.
    pub seconds: Option<[f64; 3]>,
    pub max_deliveries: Option<u32>,
    pub max_attempts: u32,
    pub handler_timeout: Option<Duration>,
    /// Whether duplicates are handed what the handler left.
    pub replays: bool,
    /// Whether dead letters are put back once everything else is settled.
    pub redrive: bool,
    /// When dead letters are put back besides, in the midst of it all.
    pub early_redrives: Vec<Duration>,
    pub workers: u64,
    pub concurrency: usize,
    pub prefetch: usize,
    /// If handlers take batches: how many messages at once, and how long the first waits for others.
    pub batch: Option<(usize, Duration)>,
    pub messages: Vec<Planned>,
    pub outbox: Option<Outbox>,
    pub mix: Mix,
    pub fault_limit: usize,
    /// Whether workers crash, and are stopped and started again, at any time.
    pub restarts: bool,
    /// From then on nothing goes wrong any more.
    pub calm: Duration,
}

impl Plan {
    pub fn new(seed: u64, cut: &Cut) -> Self {
        let mut rng = Rng::with_seed(seed);
        let rng = &mut rng;
        let mode = match rng.u32(..10) {
            0..5 => Mode::Transactional,
            5..7 => Mode::RunAgain,
            7 => Mode::Quarantine,
            8 => Mode::AtLeastOnce,
            _ => Mode::AtMostOnce,
        };
        let capabilities = capabilities(rng, mode);
        let lease = Duration::from_millis(rng.u64(2_000..12_000));
        let claim_lease = Duration::from_millis(rng.u64(1_000..10_000));
        let mut second = || 0.7 + rng.f64() * 0.7;
        let seconds = (seed % 4 == 3).then(|| [second(), second(), second()]);
        let mut plan = Self {
            seed,
            mode,
            capabilities,
            lease,
            sessions: false,
            replay: false,
            claim_lease,
            seconds,
            max_deliveries: (rng.u32(..6) == 0).then_some(30),
            max_attempts: rng.u32(2..6),
            handler_timeout: (mode != Mode::Quarantine && rng.u32(..5) == 0)
                .then(|| Duration::from_millis(rng.u64(100..5_000))),
            replays: rng.u32(..3) == 0,
            redrive: rng.u32(..3) == 0,
            early_redrives: Vec::new(),
            workers: rng.u64(1..=3),
            concurrency: rng.usize(1..=6),
            prefetch: rng.usize(1..=24),
            batch: None,
            messages: Vec::new(),
            outbox: None,
            mix: mix(rng, mode),
            fault_limit: cut.faults.unwrap_or(usize::MAX),
            restarts: rng.bool(),
            calm: Duration::from_secs(rng.u64(5..40)),
        };
        // Otherwise it refuses to start.
        plan.handler_timeout = plan
            .handler_timeout
            .filter(|limit| plan.lease_is_endless() || *limit < plan.lease);
        plan.messages = messages(rng, &plan);
        // Last, so that seeds known by now keep the rest of their plans.
        plan.capabilities.settle_batch = rng.bool().then(|| rng.usize(1..=4));
        plan.capabilities.close_gives_back = rng.bool();
        if rng.u32(..4) == 0 {
            never_ends(rng, &mut plan);
        }
        if rng.u32(..4) == 0 {
            plan.early_redrives = moments(rng, plan.calm, 2);
        }
        shared_or_revoked(rng, &mut plan);
        plan.batch = (rng.u32(..4) == 0).then(|| batch(rng, &plan));
        replay(rng, &mut plan);
        outbox::draw(rng, &mut plan);
        cut.apply(&mut plan);
        plan
    }

    fn lease_is_endless(&self) -> bool {
        self.capabilities.extend || !self.capabilities.timed_lease
    }

    /// How long a second is by this worker's clock.
    pub fn second(&self, worker: u64) -> f64 {
        let number = usize::try_from(worker / 1_000).unwrap_or(1);
        self.seconds
            .map_or(1.0, |seconds| seconds[(number - 1) % seconds.len()])
    }

    /// Whether no worker takes a lease or a claim for longer than it is.
    pub fn clocks_agree(&self) -> bool {
        self.seconds
            .is_none_or(|seconds| seconds.iter().all(|second| *second <= 1.0))
    }

    pub fn has_no_transaction(&self) -> bool {
        self.mode != Mode::Transactional
    }

    pub fn has_store(&self) -> bool {
        matches!(
            self.mode,
            Mode::Transactional | Mode::RunAgain | Mode::Quarantine
        )
    }
}

/// So many moments before all is calm, in order.
pub fn moments(rng: &mut Rng, calm: Duration, many: usize) -> Vec<Duration> {
    let calm = u64::try_from(calm.as_millis()).unwrap_or(u64::MAX);
    let at = |_| Duration::from_millis(rng.u64(..calm));
    let mut moments: Vec<_> = (0..many).map(at).collect();
    moments.sort_unstable();
    moments
}

/// A broker that can do some things and not others.
fn capabilities(rng: &mut Rng, mode: Mode) -> Capabilities {
    let mut it = Capabilities::default();
    it.timed_lease = rng.u32(..3) > 0;
    it.extend = it.timed_lease && rng.u32(..4) > 0;
    it.acks = match mode == Mode::AtMostOnce || rng.u32(..3) > 0 {
        true => Acks::Confirmed,
        false => Acks::Unconfirmed,
    };
    it.delayed_nack = rng.bool();
    it.dead_letter = rng.bool();
    it.counts_attempts = rng.u32(..4) > 0;
    it.ordering = match rng.u32(..5) {
        0 => Ordering::None,
        1..4 if !it.timed_lease => Ordering::Delivery,
        _ => Ordering::Group,
    };
    it
}

/// How likely a fault is at most.
fn worst(rng: &mut Rng) -> f64 {
    [0.0, 0.02, 0.1, 0.25][rng.usize(..4)]
}

/// Some kinds of faults, each seldom or often.
fn mix(rng: &mut Rng, mode: Mode) -> Mix {
    let mut mix = Mix::nothing();
    let worst = worst(rng);
    // What came later is drawn last: see `shared_or_revoked`.
    for fault in Fault::ALL.into_iter().filter(|it| *it != Fault::Revoke) {
        let probability = match fault {
            _ if rng.bool() => 0.0,
            // Then the broker, not the pipeline, runs it twice.
            Fault::Echo if mode == Mode::AtMostOnce => 0.0,
            Fault::Refused | Fault::Amnesia | Fault::Death => worst * 0.1,
            Fault::Cut => worst * 0.5,
            Fault::Outage => worst * 0.4,
            _ => worst * rng.f64(),
        };
        mix = mix.with(fault, probability);
    }
    mix
}

fn messages(rng: &mut Rng, plan: &Plan) -> Vec<Planned> {
    let groups = rng.u64(0..4);
    let many = 1 + rng.usize(..14);
    let mut messages: Vec<Planned> = Vec::with_capacity(many);
    for index in 0..many {
        let behaviour = match rng.u32(..20) {
            0 => Behaviour::Poison,
            1 => Behaviour::Fails(u32::MAX),
            2..4 => Behaviour::Fails(rng.u32(1..7)),
            4 => Behaviour::Panics(1),
            _ => Behaviour::Succeeds,
        };
        let key = match rng.u32(..30) {
            0 => None,
            // Another message took it before: a conflict.
            1 if index > 0 => messages[index - 1].key.clone(),
            _ => Some(format!("key-{index}")),
        };
        let mut published = vec![Duration::from_millis(rng.u64(..8_000))];
        if rng.u32(..5) == 0 {
            published.push(published[0] + Duration::from_millis(rng.u64(..20_000)));
        }
        messages.push(Planned {
            key,
            group: (groups > 0 && rng.u32(..4) > 0).then(|| rng.u64(..groups)),
            behaviour,
            malformed: rng.u32(..30) == 0,
            takes: takes(rng, plan),
            published,
            publishes: Vec::new(),
        });
    }
    messages
}

/// How many messages a handler gets at once, and how long the first waits for others.
fn batch(rng: &mut Rng, plan: &Plan) -> (usize, Duration) {
    let wait = Duration::from_millis(rng.u64(..2) * rng.u64(..500));
    // Otherwise it refuses to start.
    let lasts =
        plan.lease_is_endless() || plan.handler_timeout.unwrap_or_default() + wait < plan.lease;
    (rng.usize(1..=8), if lasts { wait } else { Duration::ZERO })
}

/// A broker whose leases belong to several messages, or are taken away with notice.
fn shared_or_revoked(rng: &mut Rng, plan: &mut Plan) {
    let (shared, revoked) = (rng.u32(..4) == 0, rng.u32(..4) == 0);
    let timed = plan.capabilities.timed_lease;
    plan.sessions = shared && timed && plan.capabilities.ordering == Ordering::Group;
    if revoked && (!timed || plan.sessions) {
        let probability = worst(rng) * 2.0;
        plan.mix = plan.mix.clone().with(Fault::Revoke, probability);
    }
}

/// A subscription of Google Pub/Sub with exactly-once delivery, with ordering keys or without.
fn replay(rng: &mut Rng, plan: &mut Plan) {
    let capabilities = &mut plan.capabilities;
    plan.replay = rng.bool() && capabilities.extend && !plan.sessions;
    if plan.replay {
        capabilities.acks = Acks::Confirmed;
        capabilities.delayed_nack = true;
        capabilities.dead_letter = false;
        // It counts for its dead-letter policy alone.
        capabilities.counts_attempts = plan.max_deliveries.is_some();
    }
}

/// Lets the runs of one message never end, where something else ends them or counts them.
fn never_ends(rng: &mut Rng, plan: &mut Plan) {
    let leased = plan.capabilities.timed_lease && !plan.capabilities.extend;
    // Without a store its runs are counted only as long as the worker knows it again.
    let is_cut = leased && plan.has_store();
    let behaviour = match rng.bool() {
        true if plan.has_store() => Behaviour::Kills,
        false if is_cut || plan.handler_timeout.is_some() => Behaviour::Hangs,
        _ => return,
    };
    let chosen = rng.usize(..plan.messages.len());
    plan.messages[chosen].behaviour = behaviour;
}

/// Mostly short; sometimes several leases long, where leases can be extended.
fn takes(rng: &mut Rng, plan: &Plan) -> Duration {
    let lease = plan.lease.min(plan.claim_lease);
    let long = match plan.capabilities.timed_lease && !plan.capabilities.extend {
        true => plan.lease / 4,
        false => lease * 3,
    };
    match rng.u32(..8) {
        0 => long.mul_f64(rng.f64()),
        1..4 => Duration::from_millis(rng.u64(..200)),
        _ => Duration::from_millis(rng.u64(..5)),
    }
}
