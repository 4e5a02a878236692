//! Time, CPU and counts of one run; medians of several.

use std::fmt;
use std::future::Future;
use std::time::{Duration, Instant};

use onlyonce::sqlite::Commits;

use crate::queue::Kind;
use crate::{Args, Error, VARIANTS, ratio};

/// What a run counted itself.
#[derive(Clone, Copy, Default)]
pub(crate) struct Done {
    full_commits: u64,
    normal_commits: u64,
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
    client_cpu: Duration,
    broker_cpu: Option<Duration>,
    done: Done,
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
        write!(f, "{median:.2} ({min:.2}–{max:.2})")
    }
}

pub(crate) fn print(kind: Kind, args: &Args, samples: &[Vec<Sample>]) {
    let speed = |i: usize| -> Vec<f64> {
        let each = samples[i].iter();
        each.map(|s| s.per_second(args.messages)).collect()
    };
    let micros = |time: Duration| time.as_secs_f64() * 1e6 / args.messages as f64;
    let (awaited, multiple) = (speed(0), speed(2));
    println!(
        "\n{kind:?} queue, {} messages of 256 bytes, persistent, prefetch 1000, {} rounds: median (least–most)",
        args.messages, args.rounds
    );
    println!(
        "| | messages/s | × awaited | × `multiple` | CPU µs/message, client + broker | fsynced / other commits per message |"
    );
    println!("|---|---|---|---|---|---|");
    for (i, (_, name)) in VARIANTS.iter().enumerate() {
        let of = &samples[i];
        let client = Summary::of(of.iter().map(|s| micros(s.client_cpu)));
        let broker = Summary::of(of.iter().filter_map(|s| s.broker_cpu.map(micros)));
        let per_message = |n: u64| n as f64 / args.messages as f64;
        let full = Summary::of(of.iter().map(|s| per_message(s.done.full_commits)));
        let normal = Summary::of(of.iter().map(|s| per_message(s.done.normal_commits)));
        println!(
            "| {name} | {:.0} | {} | {} | {:.0} + {:.0} | {:.4} / {:.4} |",
            Summary::of(speed(i)).median,
            ratio(&speed(i), &awaited),
            ratio(&speed(i), &multiple),
            client.median,
            broker.median,
            full.median,
            normal.median,
        );
    }
}
