//! Feeds an embedded queue, kills the worker again and again, and audits what became of the transfers.

use std::fs::File;
use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fastrand::Rng;
use indicatif::{ProgressBar, ProgressStyle};
use onlyonce::BoxError;
use onlyonce::driver::ReceiveLimits;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::book::sqlite;
use crate::fleet::Worker;
use crate::options;
use crate::send::{Sent, feed};
use crate::table;
use crate::traffic::Traffic;
use crate::verdict::Verdict;
use onlyonce::Report;

/// How long a dead worker's messages wait for the next one: short, since here workers die all the time.
const LEASE: u64 = 2;
/// A queue that gave nothing for this long is empty: whatever a dead worker held has come back by then.
const EMPTY: u64 = LEASE + 1;
const TICK: Duration = Duration::from_millis(10);
/// Longer without any progress is a bug.
const STUCK: Duration = Duration::from_secs(60);

/// Everything the demo counts besides what the tables say.
pub struct Tally {
    pub sent: Sent,
    pub workers: Report,
    pub kills: u64,
    pub dead_letters: u64,
    pub left: u64,
    pub took: Duration,
}

struct Demo {
    folder: PathBuf,
    traffic: Traffic,
    rng: Rng,
    bar: ProgressBar,
    worker: Worker,
    started: u64,
    kills: u64,
    /// The counts of the workers that are gone.
    past: Report,
    /// When the number of deliveries was seen to change.
    progress: (u64, Instant),
}

pub async fn run(options: options::Demo) -> Result<bool, BoxError> {
    let temporary = tempfile::tempdir()?;
    let folder = options
        .keep
        .clone()
        .unwrap_or_else(|| temporary.path().to_owned());
    std::fs::create_dir_all(&folder)?;
    if folder.join("ledger.db").exists() {
        return Err(format!("there is a ledger in {} already", folder.display()).into());
    }
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    let traffic = Traffic {
        seed,
        transfers: options.transfers,
        duplicates: 10,
        poison: (options.transfers / 1_000).max(5),
        groups: 200,
    };
    table::introduce(&options, seed, &folder);
    let began = Instant::now();
    let feeder = tokio::spawn(feed_queue(queue(&folder), traffic));
    let mut demo = Demo::start(folder, traffic)?;
    for kill in 0..options.kills {
        demo.kill_when(kill, options.kills).await?;
    }
    let sent = demo.finish(feeder).await?;
    let tally = Tally {
        sent,
        workers: demo.past,
        kills: demo.kills,
        dead_letters: waiting(&format!("{}.dead", queue(&demo.folder))).await?,
        left: waiting(&queue(&demo.folder)).await?,
        took: began.elapsed(),
    };
    let path = demo.folder.join("ledger.db");
    let verdict = tokio::task::spawn_blocking(move || {
        Ok::<_, rusqlite::Error>(Verdict::new(
            &traffic,
            sqlite::entries(&path)?,
            sqlite::audit(&path)?,
        ))
    });
    Ok(table::conclude(&tally, &verdict.await??))
}

fn queue(folder: &Path) -> String {
    format!(
        "sqlite:{}?queue=transfers",
        folder.join("queue.db").display()
    )
}

async fn feed_queue(url: String, traffic: Traffic) -> Result<Sent, BoxError> {
    Ok(feed(&url, traffic).await?)
}

/// How many messages wait in a queue.
async fn waiting(url: &str) -> Result<u64, BoxError> {
    let source = onlyonce::source(url).await?;
    let limit = ReceiveLimits::new(1_000, Duration::from_millis(100));
    let mut count = 0;
    loop {
        let deliveries = source.receive(limit).await?;
        if deliveries.is_empty() {
            // Gives them all back.
            source.close().await?;
            return Ok(count);
        }
        count += deliveries.len() as u64;
    }
}

impl Demo {
    fn start(folder: PathBuf, traffic: Traffic) -> Result<Self, BoxError> {
        let bar = ProgressBar::new(traffic.transfers).with_style(ProgressStyle::with_template(
            "{bar:50} {pos} of {len} applied, {per_sec}; {msg}",
        )?);
        if !io::stderr().is_terminal() {
            bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        Ok(Self {
            worker: worker(&folder, traffic.seed, 1)?,
            rng: Rng::with_seed(!traffic.seed),
            folder,
            traffic,
            bar,
            started: 1,
            kills: 0,
            past: Report::default(),
            progress: (0, Instant::now()),
        })
    }

    /// Kills the worker at a random moment of the `kill`th part of the work.
    async fn kill_when(&mut self, kill: u64, kills: u64) -> Result<(), BoxError> {
        let part = self.traffic.transfers / (kills + 1);
        let goal = part * kill + self.rng.u64(part / 5..=part);
        let pause = Duration::from_micros(self.rng.u64(0..50_000));
        // Only a worker that has something to lose is worth killing.
        while self.figures().applied < goal || self.worker.figures().applied == 0 {
            if self.ended().await? {
                self.replace()?;
            }
        }
        sleep(pause).await;
        self.worker.kill().await?;
        self.kills += 1;
        self.replace()
    }

    /// Lets workers run until everything was sent and the queue is empty.
    async fn finish(
        &mut self,
        feeder: JoinHandle<Result<Sent, BoxError>>,
    ) -> Result<Sent, BoxError> {
        loop {
            let all_sent = feeder.is_finished();
            if !self.ended().await? {
                continue;
            }
            if all_sent && waiting(&queue(&self.folder)).await? == 0 {
                self.past = self.figures();
                self.bar.finish_and_clear();
                return feeder.await?;
            }
            self.replace()?;
        }
    }

    /// Watches the worker for a moment: whether it ended, because the queue was empty.
    async fn ended(&mut self) -> Result<bool, BoxError> {
        sleep(TICK).await;
        let figures = self.figures();
        if figures.received != self.progress.0 {
            self.progress = (figures.received, Instant::now());
        } else if self.progress.1.elapsed() > STUCK {
            return Err(format!("nothing received for {STUCK:?}: {figures:?}").into());
        }
        self.bar
            .set_position(figures.applied.min(self.traffic.transfers));
        match self.worker.ended().await? {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => Err(format!("worker {}: {status}", self.started).into()),
        }
    }

    /// The counts of all workers, as far as they told them.
    fn figures(&self) -> Report {
        let mut all = self.past;
        all += self.worker.figures();
        all
    }

    /// Starts the next worker in the place of one that is gone.
    fn replace(&mut self) -> Result<(), BoxError> {
        self.past = self.figures();
        self.started += 1;
        self.worker = worker(&self.folder, self.traffic.seed, self.started)?;
        self.bar.set_message(format!("{} kills", self.kills));
        Ok(())
    }
}

fn worker(folder: &Path, seed: u64, number: u64) -> Result<Worker, BoxError> {
    let log = File::create(folder.join(format!("worker-{number}.log")))?;
    let arguments = [
        ("--source", format!("{}&lease={LEASE}s", queue(folder))),
        (
            "--store",
            format!("sqlite:{}", folder.join("ledger.db").display()),
        ),
        ("--claim-lease", LEASE.to_string()),
        ("--drain-when-empty", EMPTY.to_string()),
        ("--report-every", "0.02".into()),
        ("--faults", (seed + number).to_string()),
    ];
    let arguments: Vec<String> = arguments
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect();
    Ok(Worker::start(&arguments, log)?)
}
