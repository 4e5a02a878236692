//! The handler of a simulated worker that takes batches.

use std::sync::Arc;

use fastrand::Rng;
use onlyonce_core::handler::Item;
use onlyonce_core::{Batch, Context, Failure, Message, Outcome, State};
use onlyonce_testkit::simulated::Tx;
use tokio::time::sleep;

use super::handler::{PANIC, REFUSED, Run, Worker, publish};
use super::plan::Behaviour;

type Messages = Batch<(Arc<Message>, Context)>;

pub async fn transactional(
    batch: Messages,
    worker: State<Worker>,
    tx: &mut Tx,
) -> Result<(), Failure> {
    let done = handle_all(&batch, &worker, |effect| tx.push(effect)).await?;
    let world = &worker.world;
    for (index, attempt) in done {
        if let Err(error) = publish(world, index, tx).await {
            if batch.len() == 1 {
                (world.history).failed(index, attempt >= world.plan.max_attempts);
            }
            return Err(Failure::retry(error));
        }
    }
    Ok(())
}

pub async fn handle(batch: Messages, worker: State<Worker>) -> Result<(), Failure> {
    handle_all(&batch, &worker, drop).await.map(drop)
}

/// Takes as long as its slowest message. Returns which were done, and in which attempt. What cannot be handled fails alone or with the whole call.
async fn handle_all(
    batch: &Messages,
    worker: &Worker,
    mut write: impl FnMut(String),
) -> Result<Vec<(usize, u32)>, Failure> {
    let begin = |item: &Item<(Arc<Message>, Context)>| Run::begin(worker, &item.0, &item.1);
    let runs: Vec<Run<'_>> = batch.iter().map(begin).collect();
    let plan = &worker.world.plan;
    let first = runs.first().map_or(0, |run| run.before_started);
    let mut rng = Rng::with_seed(plan.seed ^ (batch.len() as u64) << 48 ^ u64::from(first));
    let slowest = runs
        .iter()
        .map(|run| plan.messages[run.message].takes)
        .max();
    sleep(slowest.unwrap_or_default().mul_f64(rng.f64())).await;
    let mut done = Vec::new();
    for (item, run) in batch.iter().zip(&runs) {
        let last = item.1.attempt >= plan.max_attempts;
        let alone = batch.len() == 1;
        match plan.messages[run.message].behaviour {
            Behaviour::Kills => {
                worker.world.faults.death_of(worker.id).cancel();
                std::future::pending().await
            }
            Behaviour::Hangs => std::future::pending().await,
            Behaviour::Poison if run.message % 2 == 1 => {
                // It notices nothing, and the store refuses it.
                write(run.message.to_string());
                write(REFUSED.into());
                worker.world.history.failed(run.message, true);
                if plan.has_no_transaction() {
                    item.fail(Failure::dead_letter("poison"));
                }
            }
            Behaviour::Panics(times) if run.before_failed < times => {
                run.fails(alone, last);
                std::panic::panic_any(PANIC)
            }
            Behaviour::Poison if rng.bool() => {
                run.fails(alone, true);
                return Err(Failure::dead_letter("poison"));
            }
            Behaviour::Poison => {
                run.fails(true, true);
                item.fail(Failure::dead_letter("poison"));
            }
            Behaviour::Fails(times) if run.before_failed < times && rng.bool() => {
                run.fails(alone, last);
                return Err(Failure::retry("not yet"));
            }
            Behaviour::Fails(times) if run.before_failed < times => {
                run.fails(true, last);
                item.fail("not yet");
            }
            _ => {
                write(run.message.to_string());
                item.leave(Outcome::new(run.message.to_string()));
                done.push((run.message, item.1.attempt));
            }
        }
    }
    done.iter()
        .for_each(|(one, _)| worker.world.history.succeeded(*one));
    Ok(done)
}
