//! A worker: it lives, crashes or is stopped, and is started again.

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use onlyonce_core::driver::Transaction;
use onlyonce_core::{
    Builder, ConfigRisk, Error, ErrorKind, InDoubt, Pipeline, Report, RetryPolicy, RunError,
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::batch;
use super::handler::{Worker, handle, replay, transactional};
use super::letters::Letters;
use super::plan::Mode;
use super::world::World;

/// What all lives of a worker did, how many there were, and what they broke.
pub type Lives = (Report, u64, Vec<String>);

/// How a life ends before its time.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    None,
    Killed(Duration),
    Stopped(Duration),
}

pub async fn lives(world: Arc<World>, number: u64) -> Lives {
    let mut rng = Rng::with_seed(world.plan.seed.rotate_left(17) ^ number);
    let born = Instant::now();
    let mut all = Lives::default();
    loop {
        all.1 += 1;
        let worker = Worker {
            id: number * 1_000 + all.1,
            world: world.clone(),
        };
        let (report, ended) = life(&worker, fate(&world, &mut rng, born)).await;
        all.0 += report;
        if let Some(Err(error)) = ended
            && !expected(&error.error)
        {
            all.2.push(format!("worker {} ended: {error}", worker.id));
        }
        if worker.world.end.is_cancelled() {
            return all;
        }
        sleep(Duration::from_millis(rng.u64(..3_000))).await;
    }
}

pub fn fate(world: &World, rng: &mut Rng, born: Instant) -> Fate {
    let after = Duration::from_millis(rng.u64(..20_000));
    if !world.plan.restarts || born.elapsed() + after >= world.plan.calm {
        return Fate::None;
    }
    match rng.u32(..3) {
        0 => Fate::None,
        1 => Fate::Stopped(after),
        _ => Fate::Killed(after),
    }
}

/// A source or store that refuses for good ends a pipeline; so does a broker that cannot be told of the end, and a queue whose
/// first messages, dead letters that were put back among them, all have no key.
pub fn expected(error: &Error) -> bool {
    let text = error.to_string();
    if error.kind() == ErrorKind::Config && text.contains("cannot be told apart") {
        return true;
    }
    matches!(error.kind(), ErrorKind::Other | ErrorKind::Timeout) && text.starts_with("simulated")
}

/// Runs a pipeline to its end, or drops it: a crash, after which only broker and store are left.
async fn life(worker: &Worker, fate: Fate) -> (Report, Option<Result<Report, RunError>>) {
    let stop = worker.world.end.child_token();
    let mut counters = None;
    let run = run(worker, stop.clone(), &mut counters);
    let death = worker.world.faults.death_of(worker.id);
    let ended = {
        let mut run = std::pin::pin!(run);
        tokio::select! {
            biased;
            () = death.cancelled() => None,
            () = killed(fate) => None,
            ended = &mut run => Some(ended),
            () = stopped(fate) => {
                stop.cancel();
                tokio::select! {
                    biased;
                    () = death.cancelled() => None,
                    ended = run => Some(ended),
                }
            }
        }
    };
    worker
        .world
        .faults
        .log(|| format!("worker {} ends: {ended:?}", worker.id));
    let report = counters
        .map(|counters| counters.report())
        .unwrap_or_default();
    (report, ended)
}

pub async fn killed(fate: Fate) {
    match fate {
        Fate::Killed(after) => sleep(after).await,
        _ => std::future::pending().await,
    }
}

pub async fn stopped(fate: Fate) {
    match fate {
        Fate::Stopped(after) => sleep(after).await,
        _ => std::future::pending().await,
    }
}

type Counters = Option<Arc<onlyonce_core::Counters>>;

async fn run(
    worker: &Worker,
    stop: CancellationToken,
    counters: &mut Counters,
) -> Result<Report, RunError> {
    let world = &worker.world;
    let second = world.plan.second(worker.id);
    let source = world.broker.connect(worker.id).with_second(second);
    let store = world.storage.connect(worker.id).with_second(second);
    match world.plan.mode {
        Mode::Transactional => {
            let pipeline = Pipeline::transactional(source, store);
            let pipeline = settings(pipeline, worker, stop, counters);
            match world.plan.batch {
                Some(_) => pipeline.run(batch::transactional).await,
                None => pipeline.run(transactional).await,
            }
        }
        mode => {
            let pipeline = match mode {
                Mode::AtLeastOnce => Pipeline::at_least_once(source),
                Mode::AtMostOnce => Pipeline::at_most_once(source),
                Mode::Quarantine => {
                    Pipeline::idempotent(source, store).on_in_doubt(InDoubt::Quarantine)
                }
                _ => Pipeline::idempotent(source, store),
            };
            let pipeline = settings(pipeline, worker, stop, counters);
            match world.plan.batch {
                Some(_) => pipeline.run(batch::handle).await,
                None => pipeline.run(handle).await,
            }
        }
    }
}

fn settings<Tx: Transaction>(
    mut pipeline: Builder<Tx>,
    worker: &Worker,
    stop: CancellationToken,
    counters: &mut Counters,
) -> Builder<Tx> {
    let world = &worker.world;
    *counters = Some(pipeline.counters());
    if world.sink {
        pipeline = pipeline.dead_letter(Letters::of(worker));
    }
    if let Some(limit) = world.plan.handler_timeout {
        pipeline = pipeline.handler_timeout(limit);
    }
    if world.plan.replays {
        let worker = worker.clone();
        pipeline = pipeline.on_duplicate(move |context, outcome| {
            let worker = worker.clone();
            async move { replay(&worker, &context, &outcome) }
        });
    }
    if let Some((messages, wait)) = world.plan.batch {
        pipeline = pipeline.batch(messages, 1 << 20, wait);
    }
    pipeline
        .concurrency(world.plan.concurrency)
        .prefetch(world.plan.prefetch, 1 << 20)
        .claim_lease(world.plan.claim_lease)
        .retry(
            RetryPolicy::default()
                .max_attempts(world.plan.max_attempts)
                .delays(Duration::from_millis(50), Duration::from_secs(4))
                .in_place(Duration::from_secs(1)),
        )
        .drain_timeout(Duration::from_secs(5))
        .allow(ConfigRisk::DeliveryLimit)
        .state(worker.clone())
        .shutdown(stop.cancelled_owned())
}
