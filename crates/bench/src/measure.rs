//! Time, CPU and counts of one run; medians of several.

use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use onlyonce::sqlite::Commits;
use tokio_util::sync::CancellationToken;

use crate::Error;

/// What a run counted itself.
#[derive(Clone, Copy, Default)]
pub(crate) struct Done {
    pub(crate) full_commits: u64,
    pub(crate) normal_commits: u64,
}

impl Done {
    pub(crate) fn between(before: Commits, after: Commits) -> Self {
        Self {
            full_commits: after.full - before.full,
            normal_commits: after.normal - before.normal,
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Sample {
    elapsed: Duration,
    pub(crate) client_cpu: Duration,
    pub(crate) broker_cpu: Option<Duration>,
    pub(crate) done: Done,
}

impl Sample {
    pub(crate) fn per_second(&self, count: usize) -> f64 {
        count as f64 / self.elapsed.as_secs_f64()
    }
}

/// User and system time of a process, in clock ticks of 10 ms.
fn cpu(pid: &str) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold spaces.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 10))
}

pub(crate) async fn of(
    broker: Option<u32>,
    run: impl Future<Output = Result<Done, Error>>,
) -> Result<Sample, Error> {
    let broker = broker.map(|pid| pid.to_string());
    let broker_cpu = || broker.as_deref().and_then(cpu);
    let client_cpu = || cpu("self").unwrap_or_default();
    let (client_before, broker_before) = (client_cpu(), broker_cpu());
    let began = Instant::now();
    let done = run.await?;
    Ok(Sample {
        elapsed: began.elapsed(),
        client_cpu: client_cpu() - client_before,
        broker_cpu: broker_cpu()
            .zip(broker_before)
            .map(|(after, before)| after - before),
        done,
    })
}

/// Median, least and most.
pub(crate) struct Summary {
    pub(crate) median: f64,
    min: f64,
    max: f64,
}

impl Summary {
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
        Self {
            median: at(values.len() / 2),
            min: at(0),
            max: at(values.len().saturating_sub(1)),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { median, min, max } = self;
        let digits = f.precision().unwrap_or(2);
        write!(f, "{median:.digits$} ({min:.digits$}–{max:.digits$})")
    }
}

/// The ratio of one variant to another, round by round.
pub(crate) fn ratio(of: &[f64], to: &[f64]) -> Summary {
    Summary::of(of.iter().zip(to).map(|(a, b)| a / b))
}

/// Stops a pipeline after a number of messages.
pub(crate) struct StopAfter {
    left: AtomicUsize,
    stop: CancellationToken,
    began: Instant,
    took: OnceLock<Duration>,
}

impl StopAfter {
    pub(crate) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicUsize::new(count),
            stop: CancellationToken::new(),
            began: Instant::now(),
            took: OnceLock::new(),
        })
    }

    pub(crate) fn handled(&self) {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            let _ = self.took.set(self.began.elapsed());
            self.stop.cancel();
        }
    }

    /// From its making to the last message.
    pub(crate) fn took(&self) -> Duration {
        self.took.get().copied().unwrap_or_default()
    }

    pub(crate) fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        self.stop.clone().cancelled_owned()
    }
}
