//! Many seeds, on all processors.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use onlyonce_core::Report;
use onlyonce_testkit::simulated::Fault;

use super::cut::Cut;
use super::plan::Plan;
use super::relayed::Relayed;
use super::world::{self, Outcome};

/// What all runs together did.
#[derive(Debug, Default)]
pub struct Totals {
    pub seeds: u64,
    pub lives: u64,
    pub report: Report,
    pub relayed: Relayed,
    pub faults: BTreeMap<Fault, usize>,
    pub lasted: Duration,
    pub took: Duration,
}

/// The first seed that broke a promise, and how.
pub type FailedSeed = (u64, Outcome);

/// A run that takes longer by the wall's clock hangs without ever waiting.
const HANGS: Duration = Duration::from_secs(60);

/// What the threads of a campaign share.
struct Campaign {
    first: u64,
    seeds: u64,
    next: AtomicU64,
    bar: ProgressBar,
    totals: Mutex<Totals>,
    failure: Mutex<Option<FailedSeed>>,
    over: AtomicBool,
}

/// Runs `seeds` seeds from `first` on, or up to the first that breaks a promise.
pub fn run(first: u64, seeds: u64) -> (Totals, Option<FailedSeed>) {
    let begun = Instant::now();
    let campaign = Campaign {
        first,
        seeds,
        next: AtomicU64::new(0),
        bar: progress(seeds),
        totals: Mutex::default(),
        failure: Mutex::default(),
        over: AtomicBool::new(false),
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| campaign.work());
        }
    });
    campaign.bar.finish_and_clear();
    let mut totals = take(campaign.totals);
    totals.took = begun.elapsed();
    (totals, take(campaign.failure))
}

fn take<T>(mutex: Mutex<T>) -> T {
    mutex.into_inner().unwrap_or_else(PoisonError::into_inner)
}

impl Campaign {
    fn work(&self) {
        let watch = Watch::begin();
        let mut mine = Totals::default();
        while !self.over.load(Ordering::Relaxed) {
            let offset = self.next.fetch_add(1, Ordering::Relaxed);
            if offset >= self.seeds {
                break;
            }
            let seed = self.first.wrapping_add(offset);
            let outcome = watch.run(seed, &Cut::default());
            mine.join(Totals::of(&outcome));
            self.bar.inc(1);
            if !outcome.breaches.is_empty() {
                self.over.store(true, Ordering::Relaxed);
                let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert((seed, outcome));
            }
        }
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        totals.join(mine);
    }
}

/// One run, watched; one that panics, or never waits and so never ends, has broken a promise too.
pub fn run_seed(seed: u64, cut: &Cut) -> Outcome {
    Watch::begin().run(seed, cut)
}

/// Somebody beside a thread that runs seeds, who ends the program when a run does not end.
struct Watch {
    begun: mpsc::Sender<u64>,
}

impl Watch {
    fn begin() -> Self {
        let (begun, runs) = mpsc::channel();
        thread::spawn(move || watch(&runs));
        Self { begun }
    }

    fn run(&self, seed: u64, cut: &Cut) -> Outcome {
        // An error: nobody watches any more.
        let _ = self.begun.send(seed);
        let plan = Plan::new(seed, cut);
        let outcome = catch_unwind(AssertUnwindSafe(|| world::run(plan, None)));
        outcome.unwrap_or_else(|_| Outcome {
            breaches: vec!["a panic".into()],
            ..Outcome::default()
        })
    }
}

/// Waits for the next run to begin, or for the last to be over.
fn watch(runs: &mpsc::Receiver<u64>) {
    let mut running = None;
    loop {
        match (runs.recv_timeout(HANGS), running) {
            (Ok(seed), _) => running = Some(seed),
            (Err(RecvTimeoutError::Timeout), Some(seed)) => {
                eprintln!("seed {seed} does not end: simulate --seed {seed}");
                std::process::exit(1);
            }
            (Err(RecvTimeoutError::Timeout), None) => {}
            (Err(RecvTimeoutError::Disconnected), _) => return,
        }
    }
}

fn progress(seeds: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} seeds, {per_sec}, {eta} left");
    ProgressBar::new(seeds).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

impl Totals {
    fn of(outcome: &Outcome) -> Self {
        Self {
            seeds: 1,
            lives: outcome.lives,
            report: outcome.report,
            relayed: outcome.relayed,
            faults: outcome.faults.clone(),
            lasted: outcome.lasted,
            took: Duration::ZERO,
        }
    }

    fn join(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.lives += other.lives;
        self.report += other.report;
        self.relayed += other.relayed;
        self.lasted += other.lasted;
        for (fault, times) in other.faults {
            *self.faults.entry(fault).or_default() += times;
        }
    }
}
