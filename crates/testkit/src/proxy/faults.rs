use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    ToServer,
    /// From the server to the client.
    ToClient,
}

impl Direction {
    pub(super) fn opposite(self) -> Self {
        match self {
            Self::ToServer => Self::ToClient,
            Self::ToClient => Self::ToServer,
        }
    }
}

/// What is wrong in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Every byte, and the end of the stream, arrives later by this time.
    Delay(Duration),
    /// This many bytes pass in a second, over each connection. With 0 nothing moves and nothing is lost, until it is
    /// healed.
    Throttle(u64),
    /// What is sent vanishes, and the connection stays open. A connection that has lost something stays a black hole
    /// in this direction for good, since TCP delivers nothing past a hole; nor does either side hear that the other
    /// has gone.
    BlackHole,
    /// This many more bytes pass; the connection that carries the next one is cut there, in the middle of whatever it
    /// was ([finished](super::End::Finish), so that what did pass arrives). Then the fault is over.
    Truncate(usize),
}

/// Both directions.
#[derive(Debug, Default)]
pub(super) struct Lanes([Lane; 2]);

impl Lanes {
    pub(super) fn of(&self, direction: Direction) -> &Lane {
        &self.0[direction as usize]
    }

    pub(super) fn heal(&self) {
        self.0.iter().for_each(|lane| lane.set(None));
    }
}

/// The fault of one direction, and its counts.
#[derive(Debug, Default)]
pub(super) struct Lane {
    fault: watch::Sender<Option<Fault>>,
    passed: AtomicU64,
    swallowed: AtomicU64,
}

impl Lane {
    pub(super) fn set(&self, fault: Option<Fault>) {
        self.fault.send_replace(fault);
    }

    pub(super) fn watch(&self) -> watch::Receiver<Option<Fault>> {
        self.fault.subscribe()
    }

    /// Takes up to `wanted` bytes of a truncation's rest. `None`: there is nothing left of it, and it is over.
    pub(super) fn take(&self, wanted: usize) -> Option<usize> {
        let mut taken = Some(wanted);
        self.fault.send_if_modified(|fault| {
            match fault {
                Some(Fault::Truncate(0)) => {
                    taken = None;
                    *fault = None;
                }
                Some(Fault::Truncate(left)) => {
                    let some = wanted.min(*left);
                    taken = Some(some);
                    *left -= some;
                }
                _ => {}
            }
            taken.is_none()
        });
        taken
    }

    pub(super) fn count_passed(&self, bytes: usize) {
        self.passed.fetch_add(bytes as u64, Ordering::SeqCst);
    }

    pub(super) fn count_swallowed(&self, bytes: usize) {
        self.swallowed.fetch_add(bytes as u64, Ordering::SeqCst);
    }

    pub(super) fn passed(&self) -> u64 {
        self.passed.load(Ordering::SeqCst)
    }

    pub(super) fn swallowed(&self) -> u64 {
        self.swallowed.load(Ordering::SeqCst)
    }
}
