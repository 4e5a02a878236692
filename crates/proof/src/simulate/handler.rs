//! The handler of a simulated worker: it takes its time, fails, panics, and watches what no handler may see.

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use onlyonce_core::driver::{KeyDigest, Scope};
use onlyonce_core::{Context, DedupKey, Error, Failure, Message, Outcome, State};
use onlyonce_testkit::simulated::Tx;
use tokio::time::{Instant, sleep};

use super::plan::{Behaviour, Mode};
use super::world::World;

/// One life of one worker.
#[derive(Clone, Debug)]
pub struct Worker {
    pub id: u64,
    pub world: Arc<World>,
}

impl Worker {
    /// Does `what` with the message of this id, which nobody may do whose lease has ended.
    pub fn check_lease(&self, broker_id: &str, what: &str) {
        let world = &*self.world;
        let until = world.broker.leased_until(self.id, broker_id);
        let over = until.is_none_or(|until| Instant::now() > until + TICK);
        // That mode acks before it runs.
        if over && world.plan.second(self.id) <= 1.0 && world.plan.mode != Mode::AtMostOnce {
            world.history.breach(format!(
                "worker {} {what} after its lease had ended",
                self.id
            ));
        }
    }
}

/// The effect that the store refuses to commit.
pub const REFUSED: &str = "refused";
/// What a handler that panics says.
pub const PANIC: &str = "a handler's panic";
/// Timers are as fine as this.
const TICK: Duration = Duration::from_millis(2);

pub async fn transactional(
    message: Arc<Message>,
    context: Context,
    State(worker): State<Worker>,
    tx: &mut Tx,
) -> Result<Outcome, Failure> {
    let run = Run::begin(&worker, &message, &context);
    tx.push(run.message.to_string());
    if let Err(error) = publish(&worker.world, run.message, tx).await {
        run.fails(true, context.attempt >= worker.world.plan.max_attempts);
        return Err(Failure::retry(error));
    }
    let planned = &worker.world.plan.messages[run.message];
    if planned.behaviour == Behaviour::Poison && run.message % 2 == 1 {
        // Its handler notices nothing, and the store refuses it.
        tx.push(REFUSED);
        return end(&run, &context).await.or(Ok(Outcome::default()));
    }
    end(&run, &context).await
}

/// Publishes what a message's handler has to publish.
pub async fn publish(world: &World, index: usize, tx: &mut Tx) -> Result<(), Error> {
    for (destination, message) in world.outgoing_of(index) {
        tx.publish(destination, message).await?;
    }
    Ok(())
}

pub async fn handle(
    message: Arc<Message>,
    context: Context,
    State(worker): State<Worker>,
) -> Result<Outcome, Failure> {
    end(&Run::begin(&worker, &message, &context), &context).await
}

/// Takes its time, and ends as the plan has it.
async fn end(run: &Run<'_>, context: &Context) -> Result<Outcome, Failure> {
    let worker = run.worker;
    let planned = &worker.world.plan.messages[run.message];
    let mut rng = Rng::with_seed(
        worker.world.plan.seed ^ (run.message as u64) << 32 ^ u64::from(run.before_started),
    );
    let takes = planned.takes.mul_f64(rng.f64());
    // Some return at once, as the fastest handlers do.
    if takes > TICK {
        sleep(takes / 2).await;
        tokio::task::yield_now().await;
        sleep(takes / 2).await;
    }
    let failures = run.before_failed;
    let last = context.attempt >= worker.world.plan.max_attempts;
    let history = &worker.world.history;
    match planned.behaviour {
        Behaviour::Poison => {
            history.failed(run.message, true);
            Err(Failure::dead_letter("poison"))
        }
        Behaviour::Fails(times) if failures < times => {
            history.failed(run.message, last);
            Err(match rng.bool() {
                true => Failure::retry("not yet"),
                false => Failure::retry_after(Duration::from_millis(rng.u64(..3_000)), "not yet"),
            })
        }
        Behaviour::Panics(times) if failures < times => {
            history.failed(run.message, last);
            std::panic::panic_any(PANIC)
        }
        Behaviour::Kills => {
            worker.world.faults.death_of(worker.id).cancel();
            std::future::pending().await
        }
        Behaviour::Hangs => std::future::pending().await,
        _ => {
            history.succeeded(run.message);
            Ok(Outcome::new(run.message.to_string()))
        }
    }
}

/// Called with what the handler left, when its message comes again.
pub fn replay(worker: &Worker, context: &Context, outcome: &Outcome) -> Result<(), Failure> {
    let world = &*worker.world;
    let left = outcome
        .0
        .as_deref()
        .and_then(|left| std::str::from_utf8(left).ok());
    let message = left.and_then(|left| left.parse::<usize>().ok());
    let key = context.key.as_ref().map(DedupKey::as_str);
    let right = message.is_some_and(|index| {
        let planned = world.plan.messages.get(index);
        planned.is_some_and(|planned| planned.key.as_deref() == key)
    });
    if !right {
        world
            .history
            .breach(format!("a duplicate of {key:?} was handed {left:?}"));
    }
    // Now and then it fails too, but never for the last time.
    if context.attempt == 1 && fastrand::u32(..4) == 0 {
        return Err(Failure::retry("not repeated"));
    }
    Ok(())
}

/// A handler that is running, until it is dropped.
pub struct Run<'a> {
    worker: &'a Worker,
    number: u64,
    pub message: usize,
    broker_id: String,
    pub before_started: u32,
    pub before_failed: u32,
    /// It has had all its attempts: if it is cut off, it may be given up.
    last: bool,
}

impl<'a> Run<'a> {
    pub fn begin(worker: &'a Worker, message: &Message, context: &Context) -> Self {
        let world = &*worker.world;
        let index = super::world::index_of(message);
        // In a transaction the record excludes all runs but one; outside, claims do.
        let exclusive = world.plan.mode != Mode::Transactional;
        let (number, before) = world.history.start(worker.id, index, exclusive);
        world.faults.log(|| {
            format!(
                "worker {} runs {index}, attempt {}",
                worker.id, context.attempt
            )
        });
        let run = Self {
            worker,
            number,
            message: index,
            broker_id: message.broker_id.clone().unwrap_or_default(),
            before_started: before.started,
            before_failed: before.failed,
            last: context.attempt > world.plan.max_attempts,
        };
        run.check_lease("started");
        run.check_revoked();
        run.check_order();
        if world.plan.messages[index].malformed {
            world
                .history
                .breach(format!("message {index} ran although it could not be read"));
        }
        if world.plan.mode == Mode::Quarantine
            && before.started.saturating_sub(before.failed) > before.decided
            && world.keeps_claims()
        {
            world.history.breach(format!(
                "message {index} ran again although its outcome was in doubt"
            ));
        }
        if let Some(key) = &context.key {
            run.check_record(key, context);
        }
        run
    }

    /// Its handler fails it. A batch that fails is run again in parts, which is no failure of its messages.
    pub fn fails(&self, alone: bool, last: bool) {
        if alone {
            self.worker.world.history.failed(self.message, last);
        }
    }

    /// Nothing that was recorded runs again.
    fn check_record(&self, key: &DedupKey, context: &Context) {
        let world = &*self.worker.world;
        let scope = Scope::new(context.consumer.to_string(), context.queue.to_string());
        let done = world.storage.is_done(&KeyDigest::new(&scope, key));
        if done && world.plan.has_store() && world.keeps_claims() {
            world.history.breach(format!(
                "message {} ran although it was recorded as done",
                self.message
            ));
        }
    }

    fn check_lease(&self, what: &str) {
        let what = format!("{what} the handler of message {}", self.message);
        self.worker.check_lease(&self.broker_id, &what);
    }

    /// Nothing starts on a delivery that will soon be taken away.
    fn check_revoked(&self) {
        let world = &*self.worker.world;
        let revoked = world.broker.is_revoked(self.worker.id, &self.broker_id);
        // That mode acks before it runs.
        if revoked && world.plan.mode != Mode::AtMostOnce {
            world.history.breach(format!(
                "worker {} started the handler of message {} after its lease had been revoked",
                self.worker.id, self.message
            ));
        }
    }

    /// Without transactions, all earlier messages of the group have had their effect.
    fn check_order(&self) {
        let world = &*self.worker.world;
        if world.plan.mode == Mode::Transactional || !world.keeps_order() {
            return;
        }
        for earlier in world.before(self.message) {
            let runs = world.history.of(earlier);
            if runs.succeeded == 0
                && !world.may_be_given_up(earlier)
                && runs.redriven == 0
                && !world.is_set_aside(earlier)
            {
                world.history.breach(format!(
                    "message {} ran before message {earlier} of its group",
                    self.message
                ));
            }
        }
        if world.history.of(self.message).succeeded > 0 || world.may_come_again(self.message) {
            return;
        }
        // What was given up, and could not be set aside, must not come back behind those that went on without it.
        for later in world.after(self.message) {
            if world.history.of(later).succeeded > 0 {
                world.history.breach(format!(
                    "message {} ran although message {later}, which follows it in its group, had run",
                    self.message
                ));
            }
        }
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        let world = &*self.worker.world;
        let beside = world.history.end(self.worker.id, self.message, self.number);
        if beside.is_some_and(|since| Instant::now() > since + TICK)
            && world.plan.has_store()
            && world.keeps_claims()
        {
            world.history.breach(format!(
                "message {} was run by two at the same time",
                self.message
            ));
        }
        if self.last {
            world.history.cut_off(self.message, world.plan.max_attempts);
        }
        world
            .faults
            .log(|| format!("worker {} leaves {}", self.worker.id, self.message));
        self.check_lease("left");
    }
}
