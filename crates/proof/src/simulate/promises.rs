//! What must be true once everything is settled.

use std::collections::BTreeMap;

use onlyonce_core::Error;

use super::history::RUNS_ALONE;
use super::plan::{Behaviour, Mode};
use super::relayed;
use super::world::World;

/// Says which promises were broken, and how.
pub async fn broken(world: &World) -> Result<Vec<String>, Error> {
    let mut broken = world.broker.breaches();
    broken.extend(world.history.breaches());
    broken.extend(world.storage.breaches());
    let dead = world.dead().await?;
    let effects = effects(world);
    if world.plan.mode == Mode::AtMostOnce {
        broken.extend(at_most_once(world));
    } else {
        broken.extend(not_lost(world, &effects, &dead));
    }
    if world.plan.mode == Mode::Transactional {
        broken.extend(once(world, &effects));
        broken.extend(in_order(world, &effects));
    }
    broken.extend(dead_for_a_reason(world, &dead));
    broken.extend(dead_once(world));
    broken.extend(poison(world, &effects));
    broken.extend(runs_bounded(world, &dead));
    broken.extend(bounded(world));
    broken.extend(relayed::broken(world, &effects));
    broken.sort();
    broken.dedup();
    Ok(broken)
}

/// The messages that took effect, in that order.
fn effects(world: &World) -> Vec<usize> {
    if world.plan.mode == Mode::Transactional {
        let effects = world.storage.effects();
        let texts = effects
            .iter()
            .filter_map(|effect| std::str::from_utf8(effect).ok());
        texts.filter_map(|text| text.parse().ok()).collect()
    } else {
        let all = 0..world.plan.messages.len();
        all.filter(|index| world.history.of(*index).succeeded > 0)
            .collect()
    }
}

fn not_lost(world: &World, effects: &[usize], dead: &[(usize, String)]) -> Vec<String> {
    let all = 0..world.plan.messages.len();
    all.filter(|index| !effects.contains(index) && !dead.iter().any(|(i, _)| i == index))
        .map(|index| format!("message {index} was lost"))
        .collect()
}

fn once(world: &World, effects: &[usize]) -> Vec<String> {
    let mut times: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for index in effects {
        let key = world.plan.messages[*index].key.as_deref();
        times
            .entry(key.unwrap_or_default())
            .or_default()
            .push(*index);
    }
    let twice = times.into_iter().filter(|(_, messages)| messages.len() > 1);
    twice
        .map(|(key, messages)| format!("{key:?} took effect more than once: messages {messages:?}"))
        .collect()
}

fn in_order(world: &World, effects: &[usize]) -> Vec<String> {
    if !world.keeps_order() {
        return Vec::new();
    }
    let mut broken = Vec::new();
    for (place, index) in effects.iter().enumerate() {
        for earlier in world.before(*index) {
            let later = effects[place..].contains(&earlier) && !world.may_come_again(earlier);
            let given_up = world.is_set_aside(earlier) || world.may_be_given_up(earlier);
            if later || (!effects[..place].contains(&earlier) && !given_up) {
                broken.push(format!(
                    "message {index} took effect before message {earlier} of its group"
                ));
            }
        }
    }
    broken
}

fn at_most_once(world: &World) -> Vec<String> {
    let all = world.plan.messages.iter().enumerate();
    all.filter(|(index, planned)| {
        let runs = world.history.of(*index);
        runs.started as usize > planned.published.len() + runs.redriven as usize
    })
    .map(|(index, _)| format!("message {index} was run more often than it was published"))
    .collect()
}

/// Nothing is set aside without a reason, and nothing that could have been handled.
fn dead_for_a_reason(world: &World, dead: &[(usize, String)]) -> Vec<String> {
    let mut broken = Vec::new();
    for (index, reason) in dead {
        if reason.is_empty() {
            broken.push(format!("message {index} is a dead letter without a reason"));
        }
        let fine = world.plan.messages[*index].behaviour == Behaviour::Succeeds;
        let doubtful =
            world.plan.mode == Mode::Quarantine && world.history.of(*index).redriven == 0;
        // What had its effect is given up if that cannot be repeated.
        let replayed = world.plan.replays && world.history.of(*index).succeeded > 0;
        let given_up = world.may_be_given_up(*index) || replayed;
        if fine && !given_up && !world.is_set_aside(*index) && !doubtful {
            broken.push(format!(
                "message {index} is a dead letter although it can be handled: {reason}"
            ));
        }
    }
    broken
}

/// A worker that has set a message aside, and whose ack was lost, does not do so again.
fn dead_once(world: &World) -> Vec<String> {
    if !world.plan.capabilities.acks.confirms() {
        return Vec::new();
    }
    let repeated = world.broker.dead_letters().repeated().into_iter();
    let broken =
        repeated.map(|(worker, id)| format!("worker {worker} has dead-lettered {id} twice"));
    broken.collect()
}

/// What never ends is given up after a bounded number of runs, as long as the store remembers them. No record is kept of a dead
/// letter, so that a message whose ack is lost begins anew.
fn runs_bounded(world: &World, dead: &[(usize, String)]) -> Vec<String> {
    if !world.plan.has_store() || !world.keeps_claims() {
        return Vec::new();
    }
    let all = world.plan.messages.iter().enumerate();
    let endless = all.filter(|(_, planned)| planned.behaviour.never_ends());
    endless
        .filter_map(|(index, planned)| {
            let runs = world.history.of(index);
            let letters = dead.iter().filter(|(letter, _)| *letter == index).count();
            let beginnings = (planned.published.len() + letters) as u32 + runs.redriven;
            let attempts = world.plan.max_attempts;
            // A delivery to another worker counts once, however often it was retried there in place.
            let mut most = beginnings * (attempts + RUNS_ALONE) * attempts;
            if !world.plan.capabilities.counts_attempts {
                // What was given back is known to the worker that ran it, and to no other.
                most *= world.plan.workers as u32;
            }
            if world.plan.batch.is_some() {
                // A call that takes too long is made again for its halves, until a message is alone: 8, 4, 2, 1.
                most *= 4;
            }
            let started = runs.started;
            (started > most).then(|| format!("message {index} ran {started} times, not {most}"))
        })
        .collect()
}

/// Neither what its handler refuses nor what the store does has an effect, nor what never ends.
fn poison(world: &World, effects: &[usize]) -> Vec<String> {
    let all = world.plan.messages.iter().enumerate();
    let poison = all.filter(|(_, planned)| {
        planned.behaviour == Behaviour::Poison || planned.behaviour.never_ends()
    });
    poison
        .filter(|(index, _)| effects.contains(index))
        .map(|(index, _)| format!("message {index} succeeded although it is poison"))
        .collect()
}

fn bounded(world: &World) -> Vec<String> {
    let mut broken = Vec::new();
    let each = world.plan.batch.map_or(1, |(messages, _)| messages);
    let (most, limit) = (world.history.most_running(), world.plan.concurrency * each);
    if most > limit {
        broken.push(format!("{most} messages ran at once, {limit} were allowed"));
    }
    let (most, limit) = (world.broker.most_held(), world.plan.prefetch);
    if most > limit {
        broken.push(format!(
            "a worker held {most} messages, {limit} were allowed"
        ));
    }
    broken
}
