use std::cell::OnceCell;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

tokio::task_local! {
    /// Made when somebody asks for it: most handlers wait for nothing.
    static CURRENT: OnceCell<Running>;
}

/// While a handler waits, its time-out is looked at once in this time.
const TICK: Duration = Duration::from_millis(10);

/// One run of a handler, for the stores and sinks that are called within it: what it waits for, and what it keeps others
/// waiting for.
#[derive(Clone, Debug)]
pub struct Running(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    began: Instant,
    /// How many things it waits for now, since when, and how long it has waited before.
    waits: usize,
    since: Instant,
    waited: Duration,
    locks: Vec<usize>,
}

/// A handler waits for something that is not its own doing, until this is dropped.
#[derive(Debug)]
pub struct Waiting(Running);

impl Running {
    pub(crate) fn new() -> Self {
        let now = Instant::now();
        Self(Arc::new(Mutex::new(State {
            began: now,
            waits: 0,
            since: now,
            waited: Duration::ZERO,
            locks: Vec::new(),
        })))
    }

    /// The run that this code is part of. A task that a handler has spawned is part of none.
    #[must_use]
    pub fn current() -> Option<Self> {
        let running = |current: &OnceCell<Self>| current.get_or_init(Self::new).clone();
        CURRENT.try_with(running).ok()
    }

    /// Calls a handler as this run, or else as one that is made when the handler asks for it.
    pub(crate) async fn scope<T>(run: Option<Self>, handler: impl Future<Output = T>) -> T {
        let current = run.map_or_else(OnceCell::new, OnceCell::from);
        CURRENT.scope(current, handler).await
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the clock of the handler's time-out, until what is returned is dropped; on any thread.
    #[must_use]
    pub fn wait(&self) -> Waiting {
        let mut state = self.state();
        if state.waits == 0 {
            state.since = Instant::now();
        }
        state.waits += 1;
        drop(state);
        Waiting(self.clone())
    }

    /// Notes that it has, or does not have, to itself what `resource` stands for: until its end, or until it is noted
    /// otherwise.
    pub fn set_locked(&self, resource: usize, locked: bool) {
        let mut state = self.state();
        state.locks.retain(|other| *other != resource);
        if locked {
            state.locks.push(resource);
        }
    }

    /// Whether it has `resource` to itself. To wait for that would be to wait for its own end.
    #[must_use]
    pub fn has_locked(&self, resource: usize) -> bool {
        self.state().locks.contains(&resource)
    }

    /// Resolves when it has run for `limit`, without what it waited.
    pub(crate) async fn has_run_for(&self, limit: Duration) {
        loop {
            let left = limit.saturating_sub(self.elapsed());
            if left.is_zero() {
                return;
            }
            let waits = self.state().waits > 0;
            sleep(if waits { left.max(TICK) } else { left }).await;
        }
    }

    fn elapsed(&self) -> Duration {
        let state = self.state();
        let waiting = match state.waits {
            0 => Duration::ZERO,
            _ => state.since.elapsed(),
        };
        state.began.elapsed().saturating_sub(state.waited + waiting)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.waits -= 1;
        if state.waits == 0 {
            let waited = state.since.elapsed();
            state.waited += waited;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_it_waits_for_is_not_its_own_time() {
        let running = Running::new();
        let second = Duration::from_secs(1);
        sleep(second).await;
        let (one, two) = (running.wait(), running.wait());
        sleep(second * 5).await;
        drop(one);
        sleep(second * 5).await;
        assert_eq!(running.elapsed(), second);
        drop(two);
        let before = Instant::now();
        running.has_run_for(second * 3).await;
        assert_eq!(before.elapsed(), second * 2);
    }

    #[tokio::test]
    async fn whoever_asks_within_a_run_gets_that_run() {
        let run = Running::scope(None, async {
            Running::current()?.set_locked(1, true);
            Running::current()
        });
        assert!(run.await.is_some_and(|run| run.has_locked(1)));
        assert!(Running::current().is_none(), "it has ended");
    }
}
