//! Checks one configuration, breadth first, so that a counterexample is as short as can be.

use std::time::{Duration, Instant};

use stateright::{Checker as _, Model as _, Path};

use super::promises::ZOMBIE;
use super::protocol::Protocol;
use super::state::State;
use super::step::Step;

/// What was found.
pub struct Found {
    pub states: usize,
    pub depth: usize,
    pub took: Duration,
    /// A promise that breaks, and how.
    pub broken: Option<(&'static str, Path<State, Step>)>,
    /// The dangerous states were not reached: the model does not model enough.
    pub harmless: bool,
}

pub fn check(protocol: &Protocol) -> Found {
    let began = Instant::now();
    let properties = protocol.properties();
    // It ends early once every property is decided.
    let checker = protocol.clone().checker().spawn_bfs().join();
    let mut discoveries = checker.discoveries();
    let dangerous = discoveries.remove(ZOMBIE).is_some();
    Found {
        states: checker.unique_state_count(),
        depth: checker.max_depth(),
        took: began.elapsed(),
        broken: discoveries.into_iter().next(),
        harmless: !dangerous && properties.iter().any(|p| p.name == ZOMBIE),
    }
}
