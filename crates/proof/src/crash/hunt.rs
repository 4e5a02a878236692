//! Kills worker after worker at the points that a dry run has found, until each had its turn and enough are dead.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use onlyonce_core::driver::Sink;
use onlyonce_core::{BoxError, Error, Message};
use tokio::runtime::Runtime;

use super::audit::{self, Audit};
use super::broker::Broker;
use super::instrument::{LastWords, Passes, Trap};
use super::postgres;
use super::traffic::Traffic;
use super::worker::{Mode, Work};

/// A worker that finds no more messages for this long gives up waiting for its trap.
const IDLE: Duration = Duration::from_millis(500);
/// The last worker waits until every lease of the dead has ended.
const DRAIN: Duration = Duration::from_secs(3);
/// How often a point is tried that was not reached.
const TRIES: u32 = 12;
/// Most workers die before they have done a portion; what they leave is there for the next.
const JOBS_PER_PORTION: usize = 3;
/// A point that was passed less often in the dry run depends on chance: a second suspension, a commit whose last message failed.
/// The dry run does the work of a dozen workers, so such a point may well be passed by none of those that are told to die there.
const OFTEN: u64 = 10;
const SIGKILL: i32 = 9;

/// What is hunted, and where.
pub struct Hunt {
    pub name: &'static str,
    pub mode: Mode,
    pub broker: Broker,
    pub file: PathBuf,
    /// The database of store, ledger and outbox, if they are not in the file.
    pub postgres: Option<String>,
    /// Workers at the same time.
    pub workers: usize,
    pub kills: u64,
    pub seed: u64,
}

/// What came of it.
pub struct Bag {
    pub name: &'static str,
    pub kills: BTreeMap<String, u64>,
    /// Points at which no worker died although it was told to, with how often the dry run had passed them.
    pub missed: BTreeMap<String, u64>,
    pub audit: Audit,
    pub sent: u64,
    pub duplicates: u64,
    pub poison: u64,
    pub took: Duration,
}

/// A trap that is still to be set.
struct Job {
    trap: Trap,
    tries: u32,
}

/// What the threads share.
struct Field {
    traffic: Traffic,
    jobs: Vec<Job>,
    kills: BTreeMap<String, u64>,
    missed: Vec<String>,
}

impl Bag {
    /// Points that the dry run passed again and again, and at which no worker died.
    pub fn unreached(&self) -> impl Iterator<Item = &String> {
        let often = self.missed.iter().filter(|(_, passes)| **passes >= OFTEN);
        often.map(|(point, _)| point)
    }
}

impl Hunt {
    pub fn run(&self, runtime: &Runtime) -> Result<Bag, BoxError> {
        let began = Instant::now();
        drop(super::book::open(&self.file)?);
        let mut traffic = Traffic::new(self.seed);
        for _ in 0..4 {
            self.send(runtime, &traffic.portion())?;
        }
        let points = self.dry_run()?;
        let field = Mutex::new(Field {
            traffic,
            jobs: self.jobs(&points),
            kills: BTreeMap::new(),
            missed: Vec::new(),
        });
        thread::scope(|scope| {
            let threads: Vec<_> = (0..self.workers)
                .map(|_| scope.spawn(|| self.kill_all(runtime, &field)))
                .collect();
            threads.into_iter().try_for_each(|thread| {
                let ended = thread.join();
                ended.unwrap_or_else(|_| Err("a thread of the hunt panicked".into()))
            })
        })?;
        let field = field.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.work(None, DRAIN)?;
        let audit = runtime.block_on(audit::of(self, &field.traffic))?;
        runtime.block_on(self.broker.delete())?;
        if let Some(url) = &self.postgres {
            runtime.block_on(postgres::remove(url))?;
        }
        // What died there at another try was reached.
        let missed = field
            .missed
            .into_iter()
            .filter(|point| !field.kills.contains_key(point));
        Ok(Bag {
            name: self.name,
            missed: missed
                .map(|point| (point.clone(), points[&point]))
                .collect(),
            kills: field.kills,
            audit,
            sent: field.traffic.sent.len() as u64,
            duplicates: field.traffic.duplicates,
            poison: field.traffic.poison().count() as u64,
            took: began.elapsed(),
        })
    }

    /// Lets one worker do everything unharmed: these are the points.
    fn dry_run(&self) -> Result<Passes, BoxError> {
        match self.work(None, DRAIN)? {
            LastWords::Idle(passes) => Ok(passes),
            LastWords::Trapped(_) => Err("a worker without a trap was trapped".into()),
        }
    }

    /// Each point once, at its first hit; then points and hits at random. The last is the next to be done.
    fn jobs(&self, points: &Passes) -> Vec<Job> {
        let mut rng = Rng::with_seed(self.seed);
        let points: Vec<_> = points.iter().collect();
        let more = self.kills.saturating_sub(points.len() as u64);
        let any = (0..more).filter_map(|_| {
            let (point, passes) = rng.choice(&points)?;
            Some((*point, 1 + rng.u64(0..(*passes / 8).clamp(1, 12))))
        });
        let mut traps: Vec<_> = any.collect();
        rng.shuffle(&mut traps);
        traps.extend(points.iter().map(|(point, _)| (*point, 1)));
        let job = |(point, hit): (&String, u64)| Job {
            trap: Trap {
                point: point.clone(),
                hit,
            },
            tries: 0,
        };
        traps.into_iter().map(job).collect()
    }

    fn send(&self, runtime: &Runtime, portion: &[Message]) -> Result<(), BoxError> {
        runtime.block_on(async {
            let sink = self.broker.sink().await?;
            publish(&*sink, portion).await?;
            sink.close().await
        })?;
        Ok(())
    }

    /// One thread: a portion of traffic, a worker with a trap, its death; again and again.
    fn kill_all(&self, runtime: &Runtime, field: &Mutex<Field>) -> Result<(), BoxError> {
        loop {
            let mut shared = lock(field);
            let Some(mut job) = shared.jobs.pop() else {
                return Ok(());
            };
            if job.tries > 0 || shared.jobs.len().is_multiple_of(JOBS_PER_PORTION) {
                // Sent under the lock: the order of sending is the order that is audited.
                let portion = shared.traffic.portion();
                self.send(runtime, &portion)?;
            }
            drop(shared);
            let words = self.work(Some(job.trap.clone()), IDLE)?;
            let mut shared = lock(field);
            match words {
                LastWords::Trapped(trap) if trap == job.trap => {
                    *shared.kills.entry(trap.point).or_default() += 1;
                }
                LastWords::Trapped(trap) => {
                    return Err(format!("died at {trap:?} instead of {:?}", job.trap).into());
                }
                LastWords::Idle(_) if job.tries < TRIES => {
                    job.tries += 1;
                    // Another worker may have had the messages that lead there.
                    job.trap.hit = 1;
                    shared.jobs.push(job);
                }
                LastWords::Idle(_) => shared.missed.push(job.trap.point),
            }
        }
    }

    /// Starts a worker, waits for its end and makes sure that it ended as it said.
    fn work(&self, trap: Option<Trap>, idle: Duration) -> Result<LastWords, BoxError> {
        let work = Work {
            mode: self.mode,
            broker: self.broker.clone(),
            file: self.file.clone(),
            postgres: self.postgres.clone(),
            trap,
            idle,
        };
        let mut child = Command::new(std::env::current_exe()?)
            .args(["crash", "--worker", &serde_json::to_string(&work)?])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = String::new();
        if let Some(mut stdout) = child.stdout.take() {
            stdout.read_to_string(&mut said)?;
        }
        let status = child.wait()?;
        let words = serde_json::from_str(&said)
            .map_err(|_| format!("a worker ended with {status} and said {said:?}"))?;
        match &words {
            LastWords::Trapped(_) if status.signal() == Some(SIGKILL) => Ok(words),
            LastWords::Idle(_) if status.success() => Ok(words),
            _ => Err(format!("a worker said {said:?} and ended with {status}").into()),
        }
    }
}

fn lock(field: &Mutex<Field>) -> std::sync::MutexGuard<'_, Field> {
    field.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Publishes all or fails; what was published without our knowing is one more duplicate.
async fn publish(sink: &dyn Sink, messages: &[Message]) -> Result<(), Error> {
    loop {
        let results = sink.publish(messages).await;
        // Those after a failed one would be ahead of it in their group.
        let none = results.iter().all(Result::is_err);
        match results.into_iter().find_map(Result::err) {
            None => return Ok(()),
            Some(error) if none && error.is_retryable() => {}
            Some(error) => return Err(error),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
