use std::time::Duration;

/// Delays between tries of the pipeline's own calls: 50 ms doubling to 10 s, with jitter.
pub(crate) struct Backoff {
    next: Duration,
}

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(10);

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { next: FIRST }
    }

    pub(crate) fn reset(&mut self) {
        self.next = FIRST;
    }

    pub(crate) fn next(&mut self) -> Duration {
        let full = self.next;
        self.next = (full * 2).min(LONGEST);
        full.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}
