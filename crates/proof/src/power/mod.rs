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

use onlyonce_core::BoxError;
use tokio::runtime::Builder;

use crate::{Verdict, options};
use audit::Broken;
use cuts::{Cuts, Outcome};
use pipeline::Mode;
use planted::LIES;
use recording::{Recorder, Scene};
use trace::{Event, Note};

/// Of the cuts in percent, how many more each planted fault gets.
const PLANTED: usize = 5;
/// So many records nearly fill the log.
const NEARLY_FULL: u32 = 32_500;
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
    let (mut outcomes, mut noticed) = (Vec::new(), Vec::new());
    for (scene, percent) in scenes(power.seed) {
        let events = power.recorder.record(&scene)?;
        let outcome = power.fail(&scene, &events, percent)?;
        power.keep(&scene, &outcome)?;
        if outcomes.is_empty() {
            noticed = power.lie(&scene, &events)?;
        }
        outcomes.push((scene.name, outcome));
    }
    noticed.push(power.promise_less()?);
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

/// What is recorded, and its share of the cuts in percent.
fn scenes(seed: u64) -> [(Scene, usize); 5] {
    let scene = |name, mode, durable_acks| Scene {
        name,
        mode,
        durable_acks,
        ballast: 0,
        seed,
    };
    let sealing = Scene {
        ballast: NEARLY_FULL,
        ..scene("sealing", Mode::Transactional, false)
    };
    [
        (scene("transactional", Mode::Transactional, false), 40),
        (scene("idempotent", Mode::Idempotent, false), 20),
        (scene("durable acks", Mode::Transactional, true), 15),
        (scene("at most once", Mode::AtMostOnce, true), 20),
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

impl Power<'_> {
    fn fail(&self, scene: &Scene, events: &[Event], percent: usize) -> Result<Outcome, BoxError> {
        // Not while the ballast is taken on.
        let loading = |event: &Event| !matches!(event, Event::Note(Note::Published(_)));
        let first = match scene.ballast {
            0 => 0,
            _ => events.iter().take_while(|event| loading(event)).count(),
        };
        let points: Vec<_> = (first..=events.len()).collect();
        self.cut(scene, events, &points, percent)
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

    /// Keeps the first image in which something is broken, for whoever wants to know why.
    fn keep(&self, scene: &Scene, outcome: &Outcome) -> Result<(), BoxError> {
        let Some((case, broken)) = &outcome.first else {
            return Ok(());
        };
        let folder = tempfile::Builder::new().prefix("power-").tempdir()?.keep();
        for (name, bytes) in &case.image {
            std::fs::write(folder.join(name), bytes)?;
        }
        table::kept(scene.name, case.at, broken, &folder);
        Ok(())
    }

    /// Whether each lie of the disk is noticed.
    fn lie(&self, scene: &Scene, truth: &[Event]) -> Result<Vec<bool>, BoxError> {
        let mut noticed = Vec::new();
        for lie in LIES {
            let spoilt = lie.tell(truth);
            let outcome = self.cut(scene, &spoilt.events, &spoilt.points, PLANTED)?;
            noticed.push(table::planted(lie.name, lie.breaks, &outcome));
        }
        Ok(noticed)
    }

    /// Whether it is noticed that acks are not synced where nothing else keeps a message from running twice.
    fn promise_less(&self) -> Result<bool, BoxError> {
        let scene = Scene {
            name: "at most once, and acks are not durable",
            mode: Mode::AtMostOnce,
            durable_acks: false,
            ballast: 0,
            seed: self.seed,
        };
        let events = self.recorder.record(&scene)?;
        let outcome = self.fail(&scene, &events, PLANTED)?;
        Ok(table::planted(scene.name, Broken::RunsAgain, &outcome))
    }
}
