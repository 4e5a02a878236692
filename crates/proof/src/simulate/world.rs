//! One run: a broker, a store and workers in virtual time, from a plan to what came of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering as Atomic};
use std::time::Duration;

use onlyonce_core::driver::{KeyDigest, Ordering, Scope};
use onlyonce_core::{DedupKey, Error, Message, Report};
use onlyonce_testkit::simulated::{Broker, Downstream, Fault, Faults, MALFORMED, Storage};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::handler::REFUSED;
use super::history::{History, RUNS_ALONE};
use super::plan::{Behaviour, Mode, Plan, Planned};
use super::relayed::{self, Relayed};
use super::{promises, relay, worker};

/// Everything of a run that outlives a worker.
#[derive(Debug)]
pub struct World {
    pub plan: Plan,
    pub faults: Faults,
    pub broker: Broker,
    pub storage: Storage,
    /// Where relays publish to.
    pub downstream: Vec<Downstream>,
    /// They take everything from now on.
    pub repaired: Arc<AtomicBool>,
    /// How many messages handlers have published so far.
    outgoing: AtomicU64,
    pub history: History,
    /// Whether dead letters go to a queue of their own, or to the source's.
    pub sink: bool,
    /// Workers end now.
    pub end: CancellationToken,
}

/// What came of a run.
#[derive(Debug, Default)]
pub struct Outcome {
    pub breaches: Vec<String>,
    pub report: Report,
    pub relayed: Relayed,
    pub faults: BTreeMap<Fault, usize>,
    pub lives: u64,
    pub lasted: Duration,
}

/// What is settled at all is settled within this time after the last fault.
const PATIENCE: Duration = Duration::from_secs(1_800);
/// Workers that are told to stop have stopped after this.
const DRAIN: Duration = Duration::from_secs(120);

/// Who is told what happens.
pub type Log = Box<dyn FnMut(String) + Send>;

/// Runs a plan, on this thread alone.
pub fn run(plan: Plan, log: Option<Log>) -> Outcome {
    // The pipeline's jitter and the names of its owners.
    fastrand::seed(plan.seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(live(plan, log)),
        Err(error) => Outcome {
            breaches: vec![format!("no runtime: {error}")],
            ..Outcome::default()
        },
    }
}

async fn live(plan: Plan, log: Option<Log>) -> Outcome {
    let begun = Instant::now();
    let world = Arc::new(World::new(plan));
    if let Some(log) = log {
        world.faults.log_to(log);
    }
    let publishing = tokio::spawn(publish(world.clone()));
    let redriving = tokio::spawn(redrive_early(world.clone()));
    let mut workers = JoinSet::new();
    for number in 1..=world.plan.workers {
        workers.spawn(worker::lives(world.clone(), number));
    }
    let relays = world.plan.outbox.as_ref().map_or(0, |outbox| outbox.relays);
    for number in 1..=relays {
        workers.spawn(relay::lives(world.clone(), number));
    }
    let requeueing = tokio::spawn(relay::requeue_early(world.clone()));
    let _ = publishing.await;
    let mut outcome = Outcome::default();
    if let Ok(Err(error)) = redriving.await {
        outcome.breaches.push(error.to_string());
    }
    sleep_until(begun + world.plan.calm).await;
    outcome.breaches.extend(worked_off(&world).await);
    let _ = requeueing.await;
    outcome.breaches.extend(is_relayed(&world).await);
    world.end.cancel();
    match timeout(DRAIN, workers.join_all()).await {
        Ok(lives) => {
            for (report, lived, breaches) in lives {
                outcome.report += report;
                outcome.lives += lived;
                outcome.breaches.extend(breaches);
            }
        }
        Err(_) => outcome
            .breaches
            .push("a worker or relay does not stop".into()),
    }
    match promises::broken(&world).await {
        Ok(broken) => outcome.breaches.extend(broken),
        Err(error) => outcome.breaches.push(error.to_string()),
    }
    outcome.relayed = relayed::count(&world);
    outcome.faults = world.faults.struck();
    outcome.lasted = begun.elapsed();
    outcome
}

/// Waits until all messages are settled, those too that are put back at the end; says what was not.
async fn worked_off(world: &World) -> Vec<String> {
    let mut breaches = Vec::new();
    if timeout(PATIENCE, settled(world)).await.is_err() {
        let left = world.broker.unsettled();
        breaches.push(format!("{left} messages were never settled"));
    }
    if world.plan.redrive {
        match timeout(PATIENCE, redrive(world)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => breaches.push(error.to_string()),
            Err(_) => breaches.push("redriven messages were never settled".into()),
        }
    }
    breaches
}

/// Waits until the outbox is empty; says if it never is.
async fn is_relayed(world: &World) -> Option<String> {
    let drained = timeout(PATIENCE, relay::drained(world)).await;
    let never = "messages in the outbox were never published";
    drained.is_err().then(|| never.into())
}

async fn publish(world: Arc<World>) {
    let begun = Instant::now();
    let messages = world.plan.messages.iter().enumerate();
    let mut all: Vec<_> = messages
        .flat_map(|(index, planned)| planned.published.iter().map(move |at| (*at, index)))
        .collect();
    all.sort_unstable();
    for (at, index) in all {
        sleep_until(begun + at).await;
        world
            .faults
            .log(|| format!("published {index}: {:?}", world.plan.messages[index]));
        world.broker.publish(world.message(index)).await;
    }
}

/// Resolves when nothing is left to be settled, and stays so.
async fn settled(world: &World) {
    let mut quiet = 0;
    while quiet < 20 {
        quiet = if world.broker.unsettled() == 0 {
            quiet + 1
        } else {
            0
        };
        sleep(Duration::from_secs(1)).await;
    }
}

/// Puts dead letters back while everything goes on going wrong.
async fn redrive_early(world: Arc<World>) -> Result<(), Error> {
    let begun = Instant::now();
    for at in &world.plan.early_redrives {
        sleep_until(begun + *at).await;
        put_back(&world).await?;
    }
    Ok(())
}

/// Puts back what is in the dead-letter queue, and waits until it is settled.
async fn redrive(world: &World) -> Result<(), Error> {
    put_back(world).await?;
    settled(world).await;
    Ok(())
}

/// Puts back what is in the dead-letter queue, as a person does after a fix.
async fn put_back(world: &World) -> Result<(), Error> {
    let letters = world.broker.dead_letters().take_all().await?;
    let poison = |message: &Message| world.is_hopeless(index_of(message));
    let (poison, repaired): (Vec<_>, Vec<_>) = letters.into_iter().partition(poison);
    world.broker.dead_letters().put_back(poison).await;
    world.history.redriven(repaired.iter().map(index_of));
    for message in repaired {
        world.faults.log(|| format!("redriven {}", message.label()));
        world.broker.publish(message).await;
    }
    Ok(())
}

/// The queues that relays publish to.
fn downstream(
    plan: &Plan,
    storage: &Storage,
    faults: &Faults,
    repaired: &Arc<AtomicBool>,
) -> Vec<Downstream> {
    let Some(outbox) = &plan.outbox else {
        return Vec::new();
    };
    let messages: Arc<[Planned]> = plan.messages.clone().into();
    let one = |number: usize| {
        let (messages, repaired) = (messages.clone(), repaired.clone());
        let refuses = move |message: &Message, before| {
            let (index, place) = relayed::origin(message)?;
            let is_repaired = repaired.load(Atomic::Relaxed);
            let planned = messages.get(index)?.publishes.get(place)?;
            planned.refusal(before).filter(|_| !is_repaired)
        };
        Downstream::new(format!("out-{number}"), storage, faults)
            .stopping_groups(outbox.stops_groups)
            .refusing(refuses)
    };
    (0..outbox.destinations).map(one).collect()
}

/// The message of the plan that this one is.
pub fn index_of(message: &Message) -> usize {
    let body = std::str::from_utf8(&message.body).ok();
    body.and_then(|body| body.parse().ok())
        .unwrap_or(usize::MAX)
}

impl World {
    fn new(plan: Plan) -> Self {
        let faults = Faults::new(plan.seed, plan.mix.clone(), plan.calm);
        faults.limit(plan.fault_limit);
        let mut broker = Broker::new("queue", &faults)
            .with_capabilities(plan.capabilities)
            .with_lease(plan.lease);
        if let Some(max) = plan.max_deliveries {
            broker = broker.with_max_deliveries(max);
        }
        if plan.sessions {
            broker = broker.with_sessions();
        }
        if plan.replay {
            broker = broker.with_replay();
        }
        let sink =
            !plan.capabilities.dead_letter || plan.mode == Mode::AtMostOnce || plan.seed % 2 == 1;
        let storage = Storage::new(&faults).refusing(|effect| effect == REFUSED.as_bytes());
        let repaired = Arc::new(AtomicBool::new(false));
        Self {
            downstream: downstream(&plan, &storage, &faults, &repaired),
            repaired,
            outgoing: AtomicU64::new(0),
            storage,
            history: History::default(),
            end: CancellationToken::new(),
            sink,
            broker,
            faults,
            plan,
        }
    }

    fn message(&self, index: usize) -> Message {
        let planned = &self.plan.messages[index];
        let mut message = Message::new(index.to_string());
        message.dedup_id = planned.key.clone();
        if planned.malformed {
            message.attributes.insert(MALFORMED, "unreadable");
        }
        message.group = planned.group.map(|group| format!("group-{group}"));
        message
    }

    /// What a handler of this message publishes, each time under a number of its own.
    pub fn outgoing_of(&self, index: usize) -> impl Iterator<Item = (&str, Message)> {
        let planned = self.plan.messages[index].publishes.iter().enumerate();
        planned.map(move |(place, planned)| {
            let number = self.outgoing.fetch_add(1, Atomic::Relaxed);
            let mut message = Message::new(format!("{index}/{place}/{number}"));
            message.group = planned.group.map(|group| format!("group-{group}"));
            message.attributes.insert("place", place.to_string());
            if planned.is_named {
                message.dedup_id = Some(format!("{index}/{place}"));
            }
            (self.downstream[planned.destination].name(), message)
        })
    }

    /// Whether a run of this message failed or was cut off after all its attempts, or may have been: the store was told of
    /// enough runs alone, and not that one ended.
    pub fn may_be_given_up(&self, index: usize) -> bool {
        let enough = match self.plan.mode {
            Mode::Quarantine => 1,
            _ => RUNS_ALONE as usize,
        };
        self.history.of(index).may_be_given_up || self.starts(index) >= enough
    }

    /// How many runs of it the store was told to mark as started.
    fn starts(&self, index: usize) -> usize {
        let Some(key) = &self.plan.messages[index].key else {
            return 0;
        };
        let scope = Scope::new("default", "queue");
        let key = KeyDigest::new(&scope, &DedupKey::new(key.as_str()));
        self.storage.starts(&key)
    }

    /// The messages of the same group that were published before this one, in order.
    pub fn before(&self, index: usize) -> Vec<usize> {
        let mut before = self.group_of(index);
        before.retain(|other| self.first(*other) < self.first(index));
        before
    }

    /// The messages of the same group that were published after this one, in order.
    pub fn after(&self, index: usize) -> Vec<usize> {
        let mut after = self.group_of(index);
        after.retain(|other| self.first(*other) > self.first(index));
        after
    }

    /// When a message was published first; its number decides between equals.
    fn first(&self, index: usize) -> (Duration, usize) {
        (self.plan.messages[index].published[0], index)
    }

    /// All messages of the same group, in order.
    fn group_of(&self, index: usize) -> Vec<usize> {
        let group = self.plan.messages[index].group;
        let all = 0..self.plan.messages.len();
        let mut same: Vec<_> = all
            .filter(|other| group.is_some() && self.plan.messages[*other].group == group)
            .collect();
        same.sort_unstable_by_key(|other| self.first(*other));
        same
    }

    /// Whether a message that was given up, and is out of the queue, may be delivered again all the same: no record is kept
    /// of it.
    pub fn may_come_again(&self, index: usize) -> bool {
        self.plan.messages[index].published.len() > 1
            || self.history.of(index).redriven > 0
            || self.faults.struck().contains_key(&Fault::Echo)
            || !self.plan.capabilities.acks.confirms()
    }

    /// Whether a message may end in the dead-letter queue without a failure of its handler.
    pub fn is_set_aside(&self, index: usize) -> bool {
        let planned = &self.plan.messages[index];
        planned.behaviour == Behaviour::Poison
            || planned.behaviour.never_ends()
            || planned.malformed
            || self.plan.max_deliveries.is_some()
            || self.times_out(index)
            || (self.plan.has_store() && (planned.key.is_none() || self.shares_its_key(index)))
    }

    /// Whether no redrive makes it a message that can be handled.
    fn is_hopeless(&self, index: usize) -> bool {
        let planned = &self.plan.messages[index];
        let store = self.plan.has_store();
        planned.behaviour == Behaviour::Poison
            || planned.malformed
            || (store && (planned.key.is_none() || self.shares_its_key(index)))
            || self.times_out(index)
    }

    /// Whether its handler may take longer than it may.
    fn times_out(&self, index: usize) -> bool {
        let limit = self.plan.handler_timeout;
        limit.is_some_and(|limit| self.plan.messages[index].takes >= limit)
    }

    /// Whether another message uses the same key.
    pub fn shares_its_key(&self, index: usize) -> bool {
        let key = &self.plan.messages[index].key;
        let others = self.plan.messages.iter().enumerate();
        key.is_some() && others.filter(|(_, other)| other.key == *key).count() > 1
    }

    /// Whether the store keeps claims for as long as it says.
    pub fn keeps_claims(&self) -> bool {
        self.plan.clocks_agree() && !self.faults.struck().contains_key(&Fault::Amnesia)
    }

    pub fn keeps_order(&self) -> bool {
        let loses = matches!(self.plan.mode, Mode::Quarantine | Mode::AtMostOnce);
        self.plan.capabilities.ordering != Ordering::None && self.plan.clocks_agree() && !loses
    }

    /// What is in the dead-letter queues, with its reason.
    pub async fn dead(&self) -> Result<Vec<(usize, String)>, Error> {
        let reason = |message: &Message| {
            let reason = message
                .attributes
                .get(onlyonce_core::attributes::DEAD_LETTER_REASON);
            reason.unwrap_or_default().to_owned()
        };
        let letters = self.broker.dead_letters().take_all().await?;
        let given_up = self.broker.given_up();
        Ok(letters
            .iter()
            .map(|message| (index_of(message), reason(message)))
            .chain(
                given_up
                    .iter()
                    .map(|dead| (index_of(&dead.message), dead.reason.clone())),
            )
            .collect())
    }
}
