//! Power failures, thousands of them, on files that real workers have written.
//!
//! The worker is this program again, an ordinary pipeline on SQLite. A small library that is loaded into it writes down
//! what it does to its files ([`trace`]), and it notes itself what it was promised ([`notes`]). Each cut is a point of that
//! [`recording`]: what was synced before is on the [`disk`], of the rest [`luck`] decides. The [`audit`] opens what is
//! there with the library itself. That it would notice is shown with [`planted`] faults.

mod audit;
mod broken;
mod cuts;
mod disk;
mod found;
mod luck;
mod machine;
mod notes;
mod pipeline;
mod planted;
mod promised;
mod recording;
mod scenes;
mod table;
mod trace;
mod worker;

use std::path::{Path, PathBuf};
use std::time::Instant;

use fastrand::Rng;
use onlyonce_core::BoxError;
use tokio::runtime::Builder;

use crate::{Verdict, options};
use cuts::{Cuts, Outcome};
use machine::Machine;
use planted::{ACKS_NOT_DURABLE, Fault, LIES};
use recording::Recorder;
use scenes::Scene;
use trace::Event;

/// Where the power has failed before.
const AGAIN: [&str; 3] = ["after 1 failure", "after 2 failures", "after 3 failures"];
/// Their share of the cuts, each.
const AGAIN_PERCENT: usize = 5;
/// How many more each planted fault gets: enough to be noticed, whatever chance does.
const PLANTED_CUTS: usize = 100;
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
    for (scene, percent) in scenes::all(power.seed) {
        let events = power.recorder.record(&scene)?;
        let first = match scene.ballast {
            0 => 0,
            _ => machine::prelude(&events),
        };
        outcomes.push(power.fail(&scene, &events, first, percent)?);
    }
    let first = scenes::transactional(power.seed);
    let truth = power.recorder.record(&first)?;
    outcomes.extend(power.fail_again(&first, truth.clone())?);
    let planted = power.plant(&first, &truth)?;
    table::outcomes(&outcomes);
    let noticed = table::planted(&planted);
    table::summary(&outcomes, (noticed, planted.len()), began.elapsed());
    let kept = outcomes.iter().all(|(_, outcome)| outcome.bad == 0);
    match kept && noticed == planted.len() {
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
        let outcome = self.cut(scene, events, &points, self.cuts * percent / 100)?;
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
        many: usize,
    ) -> Result<Outcome, BoxError> {
        cuts::run(&Cuts {
            scene,
            events,
            points,
            many,
            folder: self.folder,
        })
    }

    /// Lets a worker begin with what a power failure has left, and the power fail again.
    fn fail_again(&self, scene: &Scene, mut events: Vec<Event>) -> Result<Vec<Named>, BoxError> {
        let mut rng = Rng::with_seed(self.seed);
        let mut outcomes = Vec::new();
        let mut first = machine::prelude(&events);
        for (failures, name) in (1..).zip(AGAIN) {
            let mut machine = Machine::new(&events);
            machine.run(rng.usize(first..=events.len()))?;
            let case = machine.fail(rng.u64(..));
            events = self.recorder.record_after(scene, &case, failures)?;
            let scene = Scene { name, ..*scene };
            first = case.events().len();
            outcomes.push(self.fail(&scene, &events, first, AGAIN_PERCENT)?);
        }
        Ok(outcomes)
    }

    /// What each planted fault breaks.
    fn plant(&self, scene: &Scene, truth: &[Event]) -> Result<Vec<(Fault, Outcome)>, BoxError> {
        let mut outcomes = Vec::new();
        for lie in LIES {
            let spoilt = lie.tell(truth);
            let outcome = self.cut(scene, &spoilt.events, &spoilt.points, PLANTED_CUTS)?;
            outcomes.push((lie.fault, outcome));
        }
        let scene = scenes::at_most_once(false, self.seed);
        let events = self.recorder.record(&scene)?;
        let points: Vec<_> = (0..=events.len()).collect();
        let outcome = self.cut(&scene, &events, &points, PLANTED_CUTS)?;
        outcomes.push((ACKS_NOT_DURABLE, outcome));
        Ok(outcomes)
    }
}
