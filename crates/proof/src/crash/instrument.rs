//! The instrument: it sees every await boundary, counts it, and kills the process at the one that was asked for.
#![expect(
    clippy::print_stdout,
    reason = "how the parent learns where its child is"
)]

use std::collections::BTreeMap;
use std::fmt;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};

/// Suspensions of one call are told apart up to this one.
const SUSPENSIONS: u8 = 3;

/// Where in a call the process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// Nothing was asked yet.
    Before,
    /// How many times it has been suspended: the call is under way.
    UnderWay(u8),
    /// The answer is there; nobody has acted on it.
    Answered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    call: &'static str,
    moment: Moment,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.moment {
            Moment::Before => write!(f, "{}, before", self.call),
            Moment::UnderWay(times) => write!(f, "{}, under way {times}", self.call),
            Moment::Answered => write!(f, "{}, then answered", self.call),
        }
    }
}

/// Where to die: at the `hit`-th pass of this point.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Trap {
    pub point: String,
    pub hit: u64,
}

/// How often each point was passed.
pub type Passes = BTreeMap<String, u64>;

/// What a worker says before its end.
#[derive(Debug, Deserialize, Serialize)]
pub enum LastWords {
    /// It is about to kill itself here.
    Trapped(Trap),
    /// It stopped because nothing was left to do.
    Idle(Passes),
}

impl LastWords {
    pub fn say(&self) {
        // A struct of texts and numbers is always JSON.
        println!("{}", serde_json::to_string(self).unwrap_or_default());
    }
}

#[derive(Debug, Default)]
pub struct Instrument {
    trap: Option<Trap>,
    passes: Mutex<Passes>,
}

impl Instrument {
    pub fn new(trap: Option<Trap>) -> Arc<Self> {
        Arc::new(Self {
            trap,
            passes: Mutex::default(),
        })
    }

    pub fn passes(&self) -> Passes {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Passes> {
        self.passes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a call, with every boundary of it in sight.
    pub async fn watch<T>(&self, call: &'static str, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        let mut suspensions = 0;
        self.pass(call, Moment::Before);
        let answer = poll_fn(|context| {
            let polled = future.as_mut().poll(context);
            if polled.is_pending() && suspensions < SUSPENSIONS {
                suspensions += 1;
                self.pass(call, Moment::UnderWay(suspensions));
            }
            polled
        });
        let answer = answer.await;
        self.pass(call, Moment::Answered);
        answer
    }

    fn pass(&self, call: &'static str, moment: Moment) {
        let point = Point { call, moment }.to_string();
        let mut passes = self.lock();
        let hit = passes.entry(point.clone()).or_default();
        *hit += 1;
        let here = Trap { point, hit: *hit };
        if self.trap.as_ref() == Some(&here) {
            die(here);
        }
    }
}

/// SIGKILL: nothing of this process gets a chance to end anything.
fn die(here: Trap) -> ! {
    LastWords::Trapped(here).say();
    loop {
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_boundary_of_a_call_is_passed() {
        let instrument = Instrument::default();
        instrument.watch("nap", tokio::task::yield_now()).await;
        instrument.watch("nap", std::future::ready(())).await;
        let passes = instrument.passes();
        let passes: Vec<_> = passes.iter().map(|(p, n)| (p.as_str(), *n)).collect();
        assert_eq!(
            passes,
            [
                ("nap, before", 2),
                ("nap, then answered", 2),
                ("nap, under way 1", 1)
            ]
        );
    }
}
