//! What must hold in every reachable state.

use stateright::Property;

use super::protocol::{Mode, Protocol};
use super::state::{Dead, InFlight, Phase, Queued, Record, State};

pub const ONCE: &str = "no effect happens twice";
pub const NOT_LOST: &str = "no message is lost";
pub const FENCED: &str = "a fenced worker never commits";
pub const IN_ORDER: &str = "a group stays in order";
pub const SETTLED: &str = "everything is settled in the end";
/// Not a promise: shows that the model goes where it is dangerous.
pub const ZOMBIE: &str = "a worker that was taken over from wakes up";

/// The promises of this configuration's mode.
pub fn of(protocol: &Protocol) -> Vec<Property<Protocol>> {
    let mut promises = vec![Property::always(SETTLED, settled)];
    if protocol.promises_once() || protocol.breaks == Some(ONCE) {
        promises.push(Property::always(ONCE, once));
    }
    if protocol.mode != Mode::AtMostOnce {
        promises.push(Property::always(NOT_LOST, not_lost));
    }
    if protocol.mode.has_store() {
        promises.push(Property::always(FENCED, never_fenced));
        promises.push(Property::sometimes(ZOMBIE, zombie));
    }
    if protocol.grouped {
        promises.push(Property::always(IN_ORDER, in_order));
    }
    promises
}

fn once(_: &Protocol, state: &State) -> bool {
    state.effects.iter().all(|&times| times <= 1)
}

/// What is gone from the queue took effect, or is in the dead-letter queue.
fn not_lost(protocol: &Protocol, state: &State) -> bool {
    protocol.keys.iter().zip(state.queue).all(|(&key, queued)| {
        let kept = state.effects[key] > 0 || state.dead[key] == Dead::Confirmed;
        queued != Queued::Gone || kept
    })
}

fn never_fenced(_: &Protocol, state: &State) -> bool {
    !state.fenced_commit
}

/// Nothing takes effect before what is earlier, unless that was given up.
fn in_order(protocol: &Protocol, state: &State) -> bool {
    let passed = |earlier: usize| state.effects[earlier] > 0 || state.dead[earlier] != Dead::No;
    (0..protocol.keys.len()).all(|m| state.effects[m] == 0 || (0..m).all(passed))
}

fn settled(protocol: &Protocol, state: &State) -> bool {
    protocol.settles_in_calm(state)
}

fn zombie(protocol: &Protocol, state: &State) -> bool {
    let stale = |phase| phase == Phase::Ran;
    let overtaken = |f: InFlight| match f.looked_up {
        true => state.records[protocol.keys[f.message]] == Record::Done,
        false => !f.newest_token,
    };
    state
        .all_in_flight()
        .any(|(_, f)| stale(f.phase) && overtaken(f))
}
