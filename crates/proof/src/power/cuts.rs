//! Lets the power fail at thousands of points of a recording, and audits what each leaves.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use onlyonce_core::BoxError;
use tokio::runtime::Builder;

use super::audit::{self, Audit};
use super::broken::Broken;
use super::machine::{Case, Machine};
use super::pipeline::Mode;
use super::scenes::Scene;
use super::trace::Event;

/// After every group of this many cuts, all that is left is worked off.
const ENDINGS: usize = 10;
/// Images that wait for an audit.
const WAITING: usize = 4;

/// Where the power fails.
pub struct Cuts<'a> {
    pub scene: &'a Scene,
    pub events: &'a [Event],
    /// How many events may have happened by then.
    pub points: &'a [usize],
    pub many: usize,
    /// For the images.
    pub folder: &'a Path,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    pub cuts: usize,
    /// Cuts at which something was not synced.
    pub unsynced: usize,
    /// Cuts after which all that was left was worked off.
    pub ended: usize,
    /// Cuts that have taken back an acknowledgement, where that is not promised.
    pub taken_back: usize,
    /// Cuts after the log of records had been sealed.
    pub sealed: usize,
    broken: BTreeMap<Broken, usize>,
    /// Cuts at which anything did not hold.
    pub bad: usize,
    /// The first of them, and what did not hold.
    pub first: Option<(Case, Vec<Broken>)>,
    pub took: Duration,
}

pub fn run(cuts: &Cuts<'_>) -> Result<Outcome, BoxError> {
    let began = Instant::now();
    let outcome = Mutex::new(Outcome::default());
    let (send, receive) = sync_channel(WAITING);
    let receive = Mutex::new(receive);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let audits: Vec<_> = (0..threads)
            .map(|_| scope.spawn(|| audit_all(cuts, &receive, &outcome)))
            .collect();
        let fed = fail(cuts, &send);
        drop(send);
        for audit in audits {
            audit.join().map_err(|_| "an audit panicked")??;
        }
        fed
    })?;
    let mut outcome = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
    outcome.took = began.elapsed();
    Ok(outcome)
}

/// Goes through the recording once, and sends what each cut leaves, and whether that is to be worked off.
fn fail(cuts: &Cuts<'_>, send: &SyncSender<(Case, bool)>) -> Result<(), BoxError> {
    let mut rng = Rng::with_seed(cuts.scene.seed);
    let points = (0..cuts.many).filter_map(|_| rng.choice(cuts.points).copied());
    let mut points: Vec<usize> = points.collect();
    points.sort_unstable();
    let mut machine = Machine::new(cuts.events);
    for (n, at) in points.into_iter().enumerate() {
        machine.run(at)?;
        let to_the_end = n % ENDINGS == 0 && cuts.scene.mode != Mode::AtMostOnce;
        if send.send((machine.fail(rng.u64(..)), to_the_end)).is_err() {
            // Whoever audits says why.
            break;
        }
    }
    Ok(())
}

fn audit_all(
    cuts: &Cuts<'_>,
    cases: &Mutex<Receiver<(Case, bool)>>,
    outcome: &Mutex<Outcome>,
) -> Result<(), BoxError> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    loop {
        let case = cases.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((case, to_the_end)) = case else {
            return Ok(());
        };
        let image = tempfile::tempdir_in(cuts.folder)?;
        let audit = runtime.block_on(audit::of(cuts.scene, &case, to_the_end, image.path()))?;
        let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
        outcome.ended += usize::from(to_the_end);
        outcome.add(case, audit);
    }
}

impl Outcome {
    /// At how many cuts this did not hold.
    pub fn times(&self, what: Broken) -> usize {
        self.broken.get(&what).copied().unwrap_or_default()
    }

    fn add(&mut self, case: Case, audit: Audit) {
        self.cuts += 1;
        self.unsynced += usize::from(case.unsynced > 0);
        self.taken_back += usize::from(audit.taken_back);
        self.sealed += usize::from(audit.sealed);
        for what in &audit.broken {
            *self.broken.entry(*what).or_default() += 1;
        }
        if !audit.broken.is_empty() {
            self.bad += 1;
            let broken = audit.broken.into_iter().collect();
            self.first.get_or_insert((case, broken));
        }
    }
}
