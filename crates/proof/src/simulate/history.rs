//! What the handlers of a run did.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

/// What became of one message's handler runs.
#[derive(Clone, Debug, Default)]
pub struct Runs {
    pub started: u32,
    pub succeeded: u32,
    pub failed: u32,
    /// How often it was put back from the dead-letter queue.
    pub redriven: u32,
    /// Runs after all attempts, alone, that were cut off.
    pub cut_off: u32,
    /// The runs whose effect was in doubt when it was put back: whoever did so has decided on them.
    pub decided: u32,
    /// A failure, or a run that was cut off, that may have been the last one allowed.
    pub may_be_given_up: bool,
}

/// How many runs alone may fail to end before a message is given up, and no fewer.
pub const RUNS_ALONE: u32 = 3;

#[derive(Debug, Default)]
pub struct History {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    runs: BTreeMap<usize, Runs>,
    running: BTreeMap<u64, usize>,
    /// By message, the handlers that run now.
    beside: BTreeMap<usize, Vec<Running>>,
    runs_so_far: u64,
    most_running: usize,
    breaches: Vec<String>,
}

/// A handler that runs.
#[derive(Debug)]
struct Running {
    number: u64,
    worker: u64,
    /// When another one started that must not run beside it.
    overtaken: Option<Instant>,
}

impl History {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A handler starts; returns its number, and what was known of the message before. It must run beside no other of the
    /// message: of this worker, or if it is `exclusive` of any.
    pub fn start(&self, worker: u64, message: usize, exclusive: bool) -> (u64, Runs) {
        let mut state = self.state();
        state.runs_so_far += 1;
        let number = state.runs_so_far;
        let beside = state.beside.entry(message).or_default();
        for other in beside.iter_mut() {
            if exclusive || other.worker == worker {
                other.overtaken.get_or_insert_with(Instant::now);
            }
        }
        beside.push(Running {
            number,
            worker,
            overtaken: None,
        });
        let running = state.running.entry(worker).or_default();
        *running += 1;
        state.most_running = state.most_running.max(state.running[&worker]);
        let runs = state.runs.entry(message).or_default();
        let before = runs.clone();
        runs.started += 1;
        (number, before)
    }

    /// A handler ends; returns since when another one has been running beside it that must not.
    pub fn end(&self, worker: u64, message: usize, number: u64) -> Option<Instant> {
        let mut state = self.state();
        if let Some(running) = state.running.get_mut(&worker) {
            *running -= 1;
        }
        let beside = state.beside.get_mut(&message)?;
        let place = beside.iter().position(|other| other.number == number)?;
        beside.swap_remove(place).overtaken
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

    /// A run beyond `attempts` did not end.
    pub fn cut_off(&self, message: usize, attempts: u32) {
        self.update(message, |runs| {
            runs.cut_off += 1;
            runs.may_be_given_up |= runs.cut_off >= RUNS_ALONE || runs.started > attempts;
        });
    }

    pub fn redriven(&self, messages: impl Iterator<Item = usize>) {
        for message in messages {
            self.update(message, |runs| {
                runs.redriven += 1;
                runs.decided = runs.started.saturating_sub(runs.failed);
            });
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
