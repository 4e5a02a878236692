use std::time::Duration;

/// When a message whose handler failed is tried again, and when no more.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct RetryPolicy {
    /// The message is dead-lettered after this many attempts. At least 1.
    ///
    /// Attempts are runs, as far as this worker knows them: what it gave back without running it has lost none, and its
    /// retries in place are not forgotten when it gives the message back. Deliveries to other workers count as one attempt
    /// each, whether they ran or not, where the broker counts deliveries.
    pub max_attempts: u32,
    /// The delay before the second attempt; doubled for each further one.
    pub first_delay: Duration,
    /// No delay is longer.
    pub max_delay: Duration,
    /// Up to this delay the message is kept and retried in place, its lease extended; beyond, it is given back to the
    /// broker for the time, where the broker can delay without upsetting the order.
    pub in_place: Duration,
}

impl Default for RetryPolicy {
    /// 10 attempts, 200 ms doubling to 60 s, up to 2 s in place.
    fn default() -> Self {
        Self {
            max_attempts: 10,
            first_delay: Duration::from_millis(200),
            max_delay: Duration::from_secs(60),
            in_place: Duration::from_secs(2),
        }
    }
}

/// No message waits longer, whatever a handler asks for; nor can more always be added to the clock.
pub(crate) const LONGEST_DELAY: Duration = Duration::from_secs(365 * 86_400);

impl RetryPolicy {
    /// At most this many attempts.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = attempts.max(1);
        self
    }

    /// Delays from `first`, doubling, to `max`; none is longer than a year.
    #[must_use]
    pub fn delays(mut self, first: Duration, max: Duration) -> Self {
        self.first_delay = first.min(LONGEST_DELAY);
        self.max_delay = max.min(LONGEST_DELAY);
        self
    }

    /// Delays up to this are waited for in place.
    #[must_use]
    pub fn in_place(mut self, up_to: Duration) -> Self {
        self.in_place = up_to;
        self
    }

    /// The delay after attempt number `attempt` (from 1), between half and all of the doubled one, so that messages that
    /// failed together do not come back together.
    pub(crate) fn delay(&self, attempt: u32) -> Duration {
        let doublings = attempt.saturating_sub(1).min(20);
        let full = self
            .first_delay
            .saturating_mul(1 << doublings)
            .min(self.max_delay);
        full.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_longest() {
        let policy = RetryPolicy::default();
        for attempt in [1, 2, 5, 50, u32::MAX] {
            let full = Duration::from_millis(200 << (attempt - 1).min(20)).min(policy.max_delay);
            let delay = policy.delay(attempt);
            assert!(delay <= full && delay >= full / 2, "{attempt}: {delay:?}");
        }
    }
}
