//! What the handlers of a run did.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What became of one message's handler runs.
#[derive(Clone, Debug, Default)]
pub struct Runs {
    pub started: u32,
    pub succeeded: u32,
    pub failed: u32,
    /// How often it was put back from the dead-letter queue.
    pub redriven: u32,
    /// A failure that may have been the last one allowed.
    pub may_be_given_up: bool,
}

#[derive(Debug, Default)]
pub struct History {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    runs: BTreeMap<usize, Runs>,
    running: BTreeMap<u64, usize>,
    most_running: usize,
    breaches: Vec<String>,
}

impl History {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A handler starts; returns what was known of the message before.
    pub fn start(&self, worker: u64, message: usize) -> Runs {
        let mut state = self.state();
        let running = state.running.entry(worker).or_default();
        *running += 1;
        state.most_running = state.most_running.max(state.running[&worker]);
        let runs = state.runs.entry(message).or_default();
        let before = runs.clone();
        runs.started += 1;
        before
    }

    pub fn end(&self, worker: u64) {
        if let Some(running) = self.state().running.get_mut(&worker) {
            *running -= 1;
        }
    }

    pub fn succeeded(&self, message: usize) {
        self.update(message, |runs| runs.succeeded += 1);
    }

    pub fn failed(&self, message: usize, last: bool) {
        self.update(message, |runs| {
            runs.failed += 1;
            runs.may_be_given_up |= last;
        });
    }

    pub fn redriven(&self, messages: impl Iterator<Item = usize>) {
        for message in messages {
            self.update(message, |runs| runs.redriven += 1);
        }
    }

    fn update(&self, message: usize, change: impl FnOnce(&mut Runs)) {
        change(self.state().runs.entry(message).or_default());
    }

    pub fn of(&self, message: usize) -> Runs {
        self.state().runs.get(&message).cloned().unwrap_or_default()
    }

    pub fn most_running(&self) -> usize {
        self.state().most_running
    }

    pub fn breach(&self, what: String) {
        self.state().breaches.push(what);
    }

    pub fn breaches(&self) -> Vec<String> {
        self.state().breaches.clone()
    }
}
