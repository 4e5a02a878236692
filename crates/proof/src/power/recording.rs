//! Compiles the recorder and lets workers run under it.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use onlyonce_core::BoxError;

use super::disk::Disk;
use super::luck::Luck;
use super::pipeline::Mode;
use super::trace::{self, Event};
use super::worker::Work;

const SOURCE: &str = include_str!("../../power/record.c");

/// The recorder, ready to be loaded.
pub struct Recorder {
    library: PathBuf,
    folder: PathBuf,
}

/// What is recorded.
pub struct Scene {
    pub name: &'static str,
    pub mode: Mode,
    pub durable_acks: bool,
    /// See [`Work::ballast`]; a worker makes it before the others start.
    pub ballast: u32,
    pub seed: u64,
}

/// The first message, and the first no more, of each worker; those of a shift run at the same time, after those before.
const SHIFTS: [&[(u32, u32)]; 4] = [
    &[(0, 90), (90, 180)],
    &[(180, 270)],
    &[(270, 360)],
    &[(360, 360)],
];

impl Recorder {
    /// Compiles it in `folder`, where traces go, too.
    pub fn compile(folder: &Path) -> Result<Self, BoxError> {
        let (source, library) = (folder.join("record.c"), folder.join("record.so"));
        std::fs::write(&source, SOURCE)?;
        let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
        let compiled = Command::new(&compiler)
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&library, &source])
            .args(["-ldl", "-pthread"])
            .status();
        match compiled {
            Ok(status) if status.success() => Ok(Self {
                library,
                folder: folder.to_owned(),
            }),
            Ok(status) => Err(format!("{compiler:?} ended with {status}").into()),
            Err(error) => Err(format!("{compiler:?} cannot be run: {error}").into()),
        }
    }

    /// Everything that workers did to the files of an empty folder.
    pub fn record(&self, scene: &Scene) -> Result<Vec<Event>, BoxError> {
        let watched = tempfile::tempdir_in(&self.folder)?;
        // As the kernel tells it.
        let folder = watched.path().canonicalize()?;
        let trace = self.folder.join("trace");
        let start = |messages, ballast| self.start(scene, &folder, &trace, messages, ballast);
        if scene.ballast > 0 {
            end(start(0..0, scene.ballast)?)?;
        }
        for shift in SHIFTS {
            let workers = shift.iter().map(|(first, end)| start(*first..*end, 0));
            let workers: Result<Vec<_>, _> = workers.collect();
            workers?.into_iter().try_for_each(end)?;
        }
        let events = trace::read(&std::fs::read(&trace)?)?;
        std::fs::remove_file(&trace)?;
        check(&events, &folder)?;
        Ok(events)
    }

    fn start(
        &self,
        scene: &Scene,
        folder: &Path,
        trace: &Path,
        messages: Range<u32>,
        ballast: u32,
    ) -> Result<Child, BoxError> {
        let work = Work {
            folder: folder.to_owned(),
            mode: scene.mode,
            durable_acks: scene.durable_acks,
            ballast,
            messages,
            seed: scene.seed,
        };
        let worker = Command::new(std::env::current_exe()?)
            .args(["power", "--worker", &serde_json::to_string(&work)?])
            .env("LD_PRELOAD", &self.library)
            .env("POWER_FOLDER", folder)
            .env("POWER_TRACE", trace)
            .stdin(Stdio::null())
            .spawn();
        Ok(worker?)
    }
}

fn end(mut worker: Child) -> Result<(), BoxError> {
    let status = worker.wait()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("a worker ended with {status}").into()),
    }
}

/// What the recorder did not see would be missing from every image: it has to know what the folder holds in the end.
fn check(events: &[Event], folder: &Path) -> Result<(), BoxError> {
    let mut disk = Disk::default();
    events.iter().try_for_each(|event| disk.apply(event))?;
    let known = disk.image(&mut Luck::everything());
    let mut files = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if trace::matters(&name) {
            files += 1;
            if known.get(&name) != Some(&std::fs::read(entry.path())?) {
                return Err(format!("{name} is not what the recorder saw").into());
            }
        }
    }
    match files == known.len() && files > 0 {
        true => Ok(()),
        false => Err("the recorder saw other files than there are".into()),
    }
}
