//! A pipeline's counts as JSON: one line each on stdout, the last one when the worker ends by itself.

use std::sync::Arc;
use std::time::Duration;

use onlyonce::{Counters, Report};
/// Prints the counts at this interval, until the process ends.
pub fn print_every(every: Duration, counters: Arc<Counters>) {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(every);
        loop {
            ticks.tick().await;
            print(counters.report());
        }
    });
}

/// Prints the counts.
#[expect(clippy::print_stdout, reason = "the program's output")]
pub fn print(report: Report) {
    let figures = serde_json::to_string(&report);
    println!("{}", figures.unwrap_or_default());
}
