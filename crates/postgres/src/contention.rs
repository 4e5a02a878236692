//! How far commits are shared: less while transactions are in each other's way.

use std::time::Duration;

use tokio::time::Instant;

/// How many may share a commit. PostgreSQL keeps the numbers of 64 subtransactions of each backend where others can see them at once:
/// <https://www.postgresql.org/docs/current/subxacts.html>.
pub(crate) const MOST: usize = 64;
/// A shared transaction of this length keeps others waiting, and holds its locks, for too long.
const LONG: Duration = Duration::from_millis(100);
/// For how long all commits are not shared after a conflict, at first and at most.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// After how long a way of running them is judged by what it gets done.
const TRIAL: Duration = Duration::from_millis(300);
/// For how long one shared transaction at a time may keep all others waiting.
pub(crate) const STALLED: Duration = Duration::from_millis(500);
/// For how long after a change conflicts may be of transactions that began before it.
const GRACE: Duration = Duration::from_millis(100);

/// How transactions run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Shared, on all connections.
    AllShared,
    /// Each on its own, on all connections.
    Single,
    /// Shared, one at a time: those that want the same rows do not meet, and are done in one commit.
    OneShared,
}

/// Learns from commits and conflicts how transactions should run.
///
/// After a conflict they run singly, then for a moment one shared one at a time, and then in the way that got more done, until all
/// are shared again.
#[derive(Debug)]
pub(crate) struct Contention {
    mode: Mode,
    since: Instant,
    /// How many messages were committed since, and when the last one was, or else when the mode began.
    messages: u32,
    last: Instant,
    /// How many a second were, when they ran singly.
    singly: Option<f64>,
    pause: Duration,
    paused_until: Instant,
    /// How many may share a commit, if commits are shared.
    most: usize,
}

impl Contention {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            mode: Mode::AllShared,
            since: now,
            messages: 0,
            last: now,
            singly: None,
            pause: PAUSE,
            paused_until: now,
            most: 1,
        }
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// How many messages may share a commit now.
    pub(crate) fn most(&self) -> usize {
        match self.mode {
            Mode::Single => 1,
            Mode::OneShared | Mode::AllShared => self.most,
        }
    }

    /// How many messages may share a transaction that began then: one that began in another mode takes in nobody.
    pub(crate) fn most_since(&self, began: Instant) -> usize {
        match began < self.since {
            true => 1,
            false => self.most(),
        }
    }

    /// A transaction of so many messages was committed: more may share the next one if somebody waits.
    pub(crate) fn committed(
        &mut self,
        now: Instant,
        messages: u32,
        took: Duration,
        others_wait: bool,
    ) {
        if took >= LONG && messages > 1 {
            self.most = (self.most / 2).max(1);
        } else if others_wait {
            self.most = (self.most * 2).min(MOST);
        }
        self.last = now;
        let lasted = now.duration_since(self.since);
        if took <= lasted {
            self.messages = self.messages.saturating_add(messages);
        }
        let a_second = f64::from(self.messages) / lasted.as_secs_f64();
        let is_judged = lasted >= TRIAL;
        match (self.mode, self.singly) {
            (Mode::AllShared, _) => {}
            _ if now >= self.paused_until => self.change(now, Mode::AllShared),
            (Mode::Single, None) if is_judged => {
                self.singly = Some(a_second);
                self.change(now, Mode::OneShared);
            }
            (Mode::OneShared, Some(singly)) if is_judged && a_second < singly => {
                self.change(now, Mode::Single);
            }
            _ => {}
        }
    }

    /// Somebody waits to begin a transaction: it may be that the only one there may be takes long.
    pub(crate) fn waits(&mut self, now: Instant) {
        if self.mode == Mode::OneShared && now.duration_since(self.last) >= STALLED {
            self.singly = Some(f64::INFINITY);
            self.change(now, Mode::Single);
        }
    }

    /// Another transaction was in the way.
    pub(crate) fn conflicted(&mut self, now: Instant) {
        let lasted = now.duration_since(self.since);
        if lasted < GRACE || self.mode == Mode::Single {
            return;
        }
        if self.mode == Mode::AllShared {
            self.pause = match lasted > self.pause {
                true => PAUSE,
                false => (self.pause * 2).min(LONGEST_PAUSE),
            };
            self.paused_until = now + self.pause;
            self.singly = None;
        }
        self.change(now, Mode::Single);
    }

    fn change(&mut self, now: Instant, mode: Mode) {
        tracing::debug!(before = ?self.mode, now = ?mode, pause = ?self.pause, "transactions run in another way");
        (self.mode, self.since, self.messages, self.last) = (mode, now, 0, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_millis(10);

    /// What happens to it, at which time.
    struct Scene(Contention, Instant);

    impl Scene {
        fn new() -> Self {
            let now = Instant::now();
            Self(Contention::new(now), now)
        }

        fn later(&mut self, by: Duration) -> &mut Self {
            self.1 += by;
            self
        }

        fn commit(&mut self, messages: u32, took: Duration) -> (Mode, usize) {
            self.0.committed(self.1, messages, took, true);
            (self.0.mode(), self.0.most())
        }

        fn conflict(&mut self) -> Mode {
            self.0.conflicted(self.1);
            self.0.mode()
        }

        /// After a conflict, and so many messages one by one.
        fn after_trial(messages: u32) -> Self {
            let mut scene = Self::new();
            scene.commit(1, QUICK);
            assert_eq!(scene.later(2 * PAUSE).conflict(), Mode::Single);
            assert_eq!(scene.0.most(), 1);
            let mode = scene.later(TRIAL).commit(messages, QUICK).0;
            assert_eq!(mode, Mode::OneShared);
            scene
        }
    }

    #[test]
    fn more_share_a_commit_while_others_wait_up_to_64() {
        let mut scene = Scene::new();
        let shares: Vec<usize> = (0..8).map(|_| scene.commit(64, QUICK).1).collect();
        assert_eq!(shares, [2, 4, 8, 16, 32, 64, 64, 64]);
        scene.0.committed(scene.1, 1, QUICK, false);
        assert_eq!(scene.0.most(), 64);
    }

    #[test]
    fn less_share_a_commit_that_takes_long() {
        let mut scene = Scene::new();
        for _ in 0..6 {
            scene.commit(64, QUICK);
        }
        assert_eq!(scene.commit(64, LONG), (Mode::AllShared, 32));
        assert_eq!(scene.commit(1, LONG), (Mode::AllShared, 64));
    }

    #[test]
    fn one_at_a_time_goes_on_while_it_gets_more_done() {
        let mut scene = Scene::after_trial(100);
        assert_eq!(scene.later(TRIAL).commit(120, QUICK).0, Mode::OneShared);
        assert_eq!(scene.later(PAUSE).commit(120, QUICK).0, Mode::AllShared);
    }

    #[test]
    fn one_at_a_time_ends_when_it_gets_less_done() {
        let mut scene = Scene::after_trial(100);
        assert_eq!(
            scene.later(QUICK).commit(1, QUICK).0,
            Mode::OneShared,
            "too early"
        );
        assert_eq!(scene.later(TRIAL).commit(80, QUICK).0, Mode::Single);
        assert_eq!(scene.later(QUICK).commit(1, QUICK).0, Mode::Single);
        assert_eq!(scene.later(PAUSE).commit(1, QUICK).0, Mode::AllShared);
    }

    #[test]
    fn what_began_before_a_change_neither_counts_nor_takes_in_more() {
        let mut scene = Scene::after_trial(100);
        let before = scene.1 - QUICK;
        assert_eq!(scene.0.most_since(before), 1);
        assert!(scene.0.most_since(scene.1) > 1);
        scene.commit(1_000, QUICK);
        assert_eq!(scene.conflict(), Mode::OneShared);
        assert_eq!(scene.later(TRIAL).commit(1, QUICK).0, Mode::Single);
    }

    #[test]
    fn a_conflict_of_one_at_a_time_ends_it() {
        let mut scene = Scene::after_trial(100);
        assert_eq!(scene.later(GRACE).conflict(), Mode::Single);
        assert_eq!(scene.later(QUICK).commit(1, QUICK).0, Mode::Single);
    }

    #[test]
    fn a_long_transaction_does_not_keep_the_others_waiting() {
        let mut scene = Scene::after_trial(1);
        for _ in 0..2 {
            scene.later(STALLED / 2);
            scene.0.waits(scene.1);
            assert_eq!(scene.commit(10, QUICK).0, Mode::OneShared);
        }
        scene.later(STALLED);
        scene.0.waits(scene.1);
        assert_eq!(scene.0.mode(), Mode::Single);
    }

    #[test]
    fn pauses_grow_while_all_are_shared_in_vain() {
        let mut scene = Scene::after_trial(100);
        for _ in 0..10 {
            let mode = scene.later(LONGEST_PAUSE).commit(64, QUICK).0;
            assert_eq!(mode, Mode::AllShared);
            assert_eq!(scene.later(GRACE).conflict(), Mode::Single);
        }
        assert_eq!(scene.0.pause, LONGEST_PAUSE);
        scene.later(LONGEST_PAUSE).commit(64, QUICK);
        assert_eq!(scene.later(2 * LONGEST_PAUSE).conflict(), Mode::Single);
        assert_eq!(scene.0.pause, PAUSE);
    }
}
