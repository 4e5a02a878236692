//! A relay: it lives, crashes or is stopped, and is started again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fastrand::Rng;
use onlyonce_core::{Error, Relay, RelayReport, RetryPolicy};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::outbox::Outbox;
use super::worker::{Fate, Lives, expected, fate, killed, stopped};
use super::world::World;

/// Numbers of relays, so that none is a worker's.
const FIRST: u64 = 99_000;

pub async fn lives(world: Arc<World>, number: u64) -> Lives {
    let mut rng = Rng::with_seed(world.plan.seed.rotate_left(29) ^ number);
    let born = Instant::now();
    let mut all = Lives::default();
    loop {
        all.1 += 1;
        let id = FIRST + number * 1_000 + all.1;
        let ended = life(&world, id, fate(&world, &mut rng, born)).await;
        world.faults.log(|| format!("relay {id} ends: {ended:?}"));
        if let Some(Err(error)) = ended
            && !expected(&error)
        {
            all.2.push(format!("relay {id} ended: {error}"));
        }
        if world.end.is_cancelled() {
            return all;
        }
        sleep(Duration::from_millis(rng.u64(..3_000))).await;
    }
}

/// Runs a relay to its end, or drops it: a crash, after which only the outbox and the queues are left.
async fn life(world: &World, id: u64, fate: Fate) -> Option<Result<RelayReport, Error>> {
    let outbox = world.plan.outbox.as_ref()?;
    let stop = world.end.child_token();
    let death = world.faults.death_of(id);
    let mut run = std::pin::pin!(relay(world, outbox, id, &stop).run());
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
}

fn relay(world: &World, outbox: &Outbox, id: u64, stop: &CancellationToken) -> Relay {
    let second = world.plan.second(id);
    let connection = world.storage.relay(id).with_second(second);
    let retry = RetryPolicy::default()
        .max_attempts(outbox.max_attempts)
        .delays(Duration::from_millis(50), Duration::from_secs(4));
    let relay = Relay::new(connection.with_attempts(outbox.max_attempts))
        .batch(outbox.batch, 1 << 20)
        .lease(outbox.lease)
        .poll(outbox.poll)
        .retry(retry)
        .wait_behind_set_aside(outbox.waits)
        .drain_timeout(Duration::from_secs(5))
        .shutdown(stop.clone().cancelled_owned());
    let all = world.downstream.iter();
    all.fold(relay, |relay, queue| {
        relay.to(queue.name(), queue.connect(id, second))
    })
}

/// Puts back what was set aside while everything goes on going wrong.
pub async fn requeue_early(world: Arc<World>) {
    let begun = Instant::now();
    let Some(outbox) = &world.plan.outbox else {
        return;
    };
    for at in &outbox.requeues {
        sleep_until(begun + *at).await;
        requeue(&world).await;
    }
}

async fn requeue(world: &World) {
    for queue in &world.downstream {
        world
            .faults
            .log(|| format!("requeued for {}", queue.name()));
        if let Err(error) = world.storage.requeue(queue.name()).await {
            world.history.breach(error.to_string());
        }
    }
}

/// Resolves when nothing is left in the outbox but what is set aside, and if the queues are repaired not even that.
pub async fn drained(world: &World) {
    let Some(outbox) = &world.plan.outbox else {
        return;
    };
    world.repaired.store(outbox.is_repaired, Ordering::Relaxed);
    loop {
        if outbox.is_repaired {
            requeue(world).await;
        }
        let messages = world.storage.outgoing_messages();
        let set_aside = messages.iter().filter(|message| message.set_aside).count();
        let queues = world.downstream.iter();
        let left: usize = queues.map(|queue| world.storage.left(queue.name())).sum();
        if left == set_aside && !(outbox.is_repaired && left > 0) {
            return;
        }
        sleep(Duration::from_secs(1)).await;
    }
}
