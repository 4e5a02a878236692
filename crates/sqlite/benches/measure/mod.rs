//! What the benchmarks share.

use std::time::Duration;

/// The median, with the least and the most; there is one value at least.
pub(crate) fn spread(mut values: Vec<f64>, digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let median = values[values.len() / 2];
    let (least, most) = (values[0], values[values.len() - 1]);
    format!("{median:.digits$} ({least:.digits$}–{most:.digits$})")
}

/// How long processors have worked for this process.
#[cfg(unix)]
pub(crate) fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

#[cfg(not(unix))]
pub(crate) fn cpu() -> Duration {
    Duration::ZERO
}
