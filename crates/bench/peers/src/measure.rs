//! Time and CPU of one run; medians of several.

use std::fmt;
use std::time::Duration;

#[derive(Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) elapsed: Duration,
    pub(crate) client_cpu: Duration,
    pub(crate) broker_cpu: Option<Duration>,
}

impl Sample {
    pub(crate) fn per_second(&self, count: usize) -> f64 {
        count as f64 / self.elapsed.as_secs_f64()
    }
}

/// User and system time of this process and of the broker's.
#[derive(Clone, Copy)]
pub(crate) struct Cpu {
    client: Duration,
    broker: Option<Duration>,
}

impl Cpu {
    pub(crate) fn now(broker: Option<u32>) -> Self {
        Self {
            client: cpu("self").unwrap_or_default(),
            broker: broker.and_then(|pid| cpu(&pid.to_string())),
        }
    }

    /// Until now, with the time that the run took.
    pub(crate) fn sample(self, broker: Option<u32>, elapsed: Duration) -> Sample {
        let now = Self::now(broker);
        let both = now.broker.zip(self.broker);
        Sample {
            elapsed,
            client_cpu: now.client.saturating_sub(self.client),
            broker_cpu: both.map(|(after, before)| after.saturating_sub(before)),
        }
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
