//! Power failures, thousands of them, on files that real workers have written.
//!
//! The worker is this program again, an ordinary pipeline on SQLite. A small library that is loaded into it writes down
//! what it does to its files ([`trace`]), and it notes itself what it was promised ([`notes`]). Each cut is a point of that
//! [`recording`]: what was synced before is on the [`disk`], of the rest [`luck`] decides. The [`audit`] opens what is
//! there with the library itself. That it would notice is shown with [`planted`] faults.

mod audit;
mod cuts;
mod disk;
mod luck;
mod machine;
mod notes;
mod pipeline;
mod planted;
mod promised;
mod recording;
mod table;
mod trace;
mod worker;

use std::path::{Path, PathBuf};
use std::time::Instant;

use fastrand::Rng;
use onlyonce_core::BoxError;
use tokio::runtime::Builder;

use crate::{Verdict, options};
use audit::Broken;
use cuts::{Cuts, Outcome};
use machine::Machine;
use pipeline::Mode;
use planted::LIES;
use recording::{Recorder, Scene};
use trace::Event;

/// So many records nearly fill the log.
const NEARLY_FULL: u32 = 32_500;
/// Where the power has failed before.
const AGAIN: [&str; 3] = ["after 1 failure", "after 2 failures", "after 3 failures"];
/// Their share of the cuts, each.
const AGAIN_PERCENT: usize = 5;
/// How many more each planted fault gets.
const PLANTED_PERCENT: usize = 5;
/// A disk in memory: nothing here has to survive a power failure in truth.
const MEMORY: &str = "/dev/shm";

pub fn run(options: &options::Power) -> Result<Verdict, String> {
    if !cfg!(target_os = "linux") {
        table::left_out();
        return Ok(Verdict::Kept);
    }
    fail_and_audit(options).map_err(|error| error.to_string())
}

fn fail_and_audit(options: &options::Power) -> Result<Verdict, BoxError> {
    if let Some(work) = &options.worker {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(worker::run(&serde_json::from_str(work)?))?;
        return Ok(Verdict::Kept);
    }
    let began = Instant::now();
    let folder = tempfile::tempdir_in(memory())?;
    let power = Power {
        recorder: Recorder::compile(folder.path())?,
        folder: folder.path(),
        seed: options.seed.unwrap_or_else(|| fastrand::u64(..1 << 32)),
        cuts: options.cuts,
    };
    table::heading(power.seed);
    let mut outcomes = Vec::new();
    for (scene, percent) in scenes(power.seed) {
        let events = power.recorder.record(&scene)?;
        let first = match scene.ballast {
            0 => 0,
            _ => machine::prelude(&events),
        };
        outcomes.push(power.fail(&scene, &events, first, percent)?);
    }
    let first = transactional(power.seed);
    let truth = power.recorder.record(&first)?;
    outcomes.extend(power.fail_again(&first, truth.clone())?);
    let noticed = power.planted(&first, &truth)?;
    table::promises(&outcomes);
    let found = noticed.iter().filter(|noticed| **noticed).count();
    table::summary(&outcomes, (found, noticed.len()), began.elapsed());
    let kept = outcomes.iter().all(|(_, outcome)| outcome.bad == 0);
    match kept && found == noticed.len() {
        true => Ok(Verdict::Kept),
        false => Ok(Verdict::Broken),
    }
}

fn memory() -> PathBuf {
    let memory = PathBuf::from(MEMORY);
    if memory.is_dir() {
        memory
    } else {
        std::env::temp_dir()
    }
}

fn transactional(seed: u64) -> Scene {
    Scene {
        name: "transactional",
        mode: Mode::Transactional,
        durable_acks: false,
        ballast: 0,
        seed,
    }
}

fn at_most_once(durable_acks: bool, seed: u64) -> Scene {
    Scene {
        name: "at most once",
        mode: Mode::AtMostOnce,
        durable_acks,
        ..transactional(seed)
    }
}

/// What is recorded, and its share of the cuts in percent.
fn scenes(seed: u64) -> [(Scene, usize); 5] {
    let transactional = transactional(seed);
    let idempotent = Scene {
        name: "idempotent",
        mode: Mode::Idempotent,
        ..transactional
    };
    let durable_acks = Scene {
        name: "durable acks",
        durable_acks: true,
        ..transactional
    };
    let sealing = Scene {
        name: "sealing",
        ballast: NEARLY_FULL,
        ..transactional
    };
    [
        (transactional, 30),
        (idempotent, 20),
        (durable_acks, 15),
        (at_most_once(true, seed), 15),
        // Large files, for which a cut takes longer.
        (sealing, 5),
    ]
}

/// What all cuts have in common.
struct Power<'a> {
    recorder: Recorder,
    folder: &'a Path,
    seed: u64,
    cuts: usize,
}

type Named = (&'static str, Outcome);

impl Power<'_> {
    /// Lets the power fail anywhere after the `first` events.
    fn fail(
        &self,
        scene: &Scene,
        events: &[Event],
        first: usize,
        percent: usize,
    ) -> Result<Named, BoxError> {
        let points: Vec<_> = (first..=events.len()).collect();
        let outcome = self.cut(scene, events, &points, percent)?;
        if let Some((case, broken)) = &outcome.first {
            // For whoever wants to know why.
            let folder = tempfile::Builder::new().prefix("power-").tempdir()?.keep();
            disk::write_all(&case.image, &folder)?;
            table::broken(scene.name, case.at, broken, &folder);
        }
        Ok((scene.name, outcome))
    }

    fn cut(
        &self,
        scene: &Scene,
        events: &[Event],
        points: &[usize],
        percent: usize,
    ) -> Result<Outcome, BoxError> {
        cuts::run(&Cuts {
            scene,
            events,
            points,
            many: (self.cuts * percent / 100).max(1),
            folder: self.folder,
        })
    }

    /// Lets a worker begin with what a power failure has left, and the power fail again.
    fn fail_again(&self, scene: &Scene, mut events: Vec<Event>) -> Result<Vec<Named>, BoxError> {
        let mut rng = Rng::with_seed(self.seed);
        let mut outcomes = Vec::new();
        for (failures, name) in (1..).zip(AGAIN) {
            let mut machine = Machine::new(&events);
            machine.run(rng.usize(machine::prelude(&events)..events.len()))?;
            let case = machine.fail(rng.u64(..));
            events = self.recorder.record_after(scene, &case, failures)?;
            let scene = Scene { name, ..*scene };
            let first = case.events().len();
            outcomes.push(self.fail(&scene, &events, first, AGAIN_PERCENT)?);
        }
        Ok(outcomes)
    }

    /// Whether each planted fault is noticed.
    fn planted(&self, scene: &Scene, truth: &[Event]) -> Result<Vec<bool>, BoxError> {
        let mut noticed = Vec::new();
        for lie in LIES {
            let spoilt = lie.tell(truth);
            let outcome = self.cut(scene, &spoilt.events, &spoilt.points, PLANTED_PERCENT)?;
            noticed.push(table::planted(lie.name, lie.breaks, &outcome));
        }
        // Nothing else keeps a message from running twice there.
        let scene = at_most_once(false, self.seed);
        let events = self.recorder.record(&scene)?;
        let points: Vec<_> = (0..=events.len()).collect();
        let outcome = self.cut(&scene, &events, &points, PLANTED_PERCENT)?;
        let name = "at most once, and acks are not durable";
        noticed.push(table::planted(name, Broken::RunsAgain, &outcome));
        Ok(noticed)
    }
}
