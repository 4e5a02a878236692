//! Compiles the recorder and lets workers run under it.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use onlyonce_core::BoxError;
use tempfile::TempDir;

use super::disk::{self, Disk};
use super::luck::Luck;
use super::machine::Case;
use super::scenes::Scene;
use super::trace::{self, Event};
use super::worker::Work;

const SOURCE: &str = include_str!("../../power/record.c");

/// The recorder, ready to be loaded.
pub struct Recorder {
    library: PathBuf,
    /// Where everything goes.
    folder: PathBuf,
}

/// The messages of the workers that run first, at the same time; after them two others do, and at last one that only works.
const FIRST: [Range<u32>; 2] = [0..90, 90..180];
const THEN: [Range<u32>; 3] = [180..270, 270..360, 360..360];

/// The messages of the worker after `failures` power failures.
fn after(failures: u32) -> Range<u32> {
    let first = 270 + 90 * failures;
    first..first + 90
}

impl Recorder {
    /// Compiles it.
    pub fn compile(folder: &Path) -> Result<Self, BoxError> {
        let (source, library) = (folder.join("record.c"), folder.join("record.so"));
        std::fs::write(&source, SOURCE)?;
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let mut words = compiler.split_whitespace();
        let compiled = Command::new(words.next().unwrap_or("cc"))
            .args(words)
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&library, &source])
            .args(["-ldl", "-pthread"])
            .status();
        match compiled {
            Ok(status) if status.success() => Ok(Self {
                library,
                folder: folder.to_owned(),
            }),
            Ok(status) => Err(format!("the C compiler {compiler} ended with {status}").into()),
            Err(error) => Err(format!("the C compiler {compiler} cannot be run: {error}").into()),
        }
    }

    /// Everything that workers did to the files of an empty folder.
    pub fn record(&self, scene: &Scene) -> Result<Vec<Event>, BoxError> {
        let stage = self.stage(scene)?;
        if scene.ballast > 0 {
            end(stage.start(0..0, scene.ballast)?)?;
        }
        let first: Result<Vec<_>, _> = FIRST.map(|ids| stage.start(ids, 0)).into_iter().collect();
        first?.into_iter().try_for_each(end)?;
        for ids in THEN {
            end(stage.start(ids, 0)?)?;
        }
        stage.events(Vec::new())
    }

    /// What leads to this power failure, in short, and what the next worker makes of it.
    pub fn record_after(
        &self,
        scene: &Scene,
        case: &Case,
        failures: u32,
    ) -> Result<Vec<Event>, BoxError> {
        let stage = self.stage(scene)?;
        disk::write_all(&case.image, &stage.folder)?;
        end(stage.start(after(failures), 0)?)?;
        stage.events(case.events())
    }

    fn stage<'a>(&'a self, scene: &'a Scene) -> Result<Stage<'a>, BoxError> {
        let temporary = tempfile::tempdir_in(&self.folder)?;
        Ok(Stage {
            recorder: self,
            scene,
            // As the kernel tells it.
            folder: temporary.path().canonicalize()?,
            trace: tempfile::NamedTempFile::new_in(&self.folder)?,
            _temporary: temporary,
        })
    }
}

/// A folder that is watched.
struct Stage<'a> {
    recorder: &'a Recorder,
    scene: &'a Scene,
    folder: PathBuf,
    trace: tempfile::NamedTempFile,
    _temporary: TempDir,
}

impl Stage<'_> {
    fn start(&self, messages: Range<u32>, ballast: u32) -> Result<Child, BoxError> {
        let work = Work {
            folder: self.folder.clone(),
            mode: self.scene.mode,
            durable_acks: self.scene.durable_acks,
            messages,
            ballast,
            checkpoints: self.scene.ballast == 0,
            seed: self.scene.seed,
        };
        let worker = Command::new(std::env::current_exe()?)
            .args(["power", "--worker", &serde_json::to_string(&work)?])
            .env("LD_PRELOAD", &self.recorder.library)
            .env("POWER_FOLDER", &self.folder)
            .env("POWER_TRACE", self.trace.path())
            .stdin(Stdio::null())
            .spawn();
        Ok(worker?)
    }

    /// What happened after `before`.
    fn events(&self, mut before: Vec<Event>) -> Result<Vec<Event>, BoxError> {
        before.extend(trace::read(&std::fs::read(self.trace.path())?)?);
        check(&before, &self.folder)?;
        Ok(before)
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
