use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::{Error, ErrorKind};

/// Credentials are read again no more often than this.
const READ_AGAIN: Duration = Duration::from_secs(5);
/// Credentials that were good are waited for no longer. After that the people who run this process have to know.
const PATIENCE: Duration = Duration::from_secs(300);

/// How a client stands with its credentials: whether they are to be read again, and whether a refusal may pass.
///
/// The clients of clouds read a file of credentials once and keep what it says for as long as they live. So when the service
/// refuses them, everything is read again: they may have been replaced. Those that were never good are a mistake.
#[derive(Debug)]
pub struct Standing(Mutex<State>);

#[derive(Debug)]
struct State {
    read: Instant,
    /// They are to be read again before the next request.
    stale: bool,
    /// They, or those before them, were good.
    accepted: bool,
    /// Since when none have been good.
    refused: Option<Instant>,
}

impl Standing {
    /// Of credentials that are read now, or when they are first needed.
    #[must_use]
    pub fn new() -> Self {
        Self(Mutex::new(State {
            read: Instant::now(),
            stale: false,
            accepted: false,
            refused: None,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether they are to be read again before the next request.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.state().stale
    }

    /// They were read.
    pub fn renewed(&self) {
        let mut state = self.state();
        state.stale = false;
        state.read = Instant::now();
    }

    /// A request was granted.
    pub fn accepted(&self) {
        let mut state = self.state();
        state.accepted = true;
        state.refused = None;
    }

    /// What it means that the service refused them with this error. It may be tried again for five minutes, where they were
    /// good before or the error is retryable.
    #[must_use]
    pub fn refused(&self, error: Error) -> Error {
        let mut state = self.state();
        let now = Instant::now();
        state.stale |= now - state.read >= READ_AGAIN;
        let since = *state.refused.get_or_insert(now);
        if !state.accepted && !error.is_retryable() {
            return error;
        }
        if now - since < PATIENCE {
            return error.retryable(true);
        }
        let text = format!(
            "the credentials have been refused for {PATIENCE:?}, although they were read again"
        );
        Error::new(ErrorKind::Permission, text).caused_by(error)
    }
}

impl Default for Standing {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    fn refusal(retryable: bool) -> Error {
        Error::new(ErrorKind::Permission, "refused").retryable(retryable)
    }

    /// A key that never worked is a mistake; one that did may have been replaced.
    #[tokio::test(start_paused = true)]
    async fn credentials_that_were_good_are_waited_for_but_not_forever() {
        let standing = Standing::new();
        assert!(!standing.refused(refusal(false)).is_retryable());
        for _ in 0..2 {
            standing.accepted();
            assert!(standing.refused(refusal(false)).is_retryable());
            sleep(PATIENCE - Duration::from_secs(1)).await;
            assert!(standing.refused(refusal(false)).is_retryable());
        }
        sleep(Duration::from_secs(1)).await;
        let error = standing.refused(refusal(false));
        assert!(!error.is_retryable(), "{error}");
        assert!(error.to_string().contains("300s"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn credentials_that_have_expired_at_the_start_are_waited_for_too() {
        let standing = Standing::new();
        assert!(standing.refused(refusal(true)).is_retryable());
        sleep(PATIENCE).await;
        assert!(!standing.refused(refusal(true)).is_retryable());
    }

    #[tokio::test(start_paused = true)]
    async fn credentials_are_read_again_every_five_seconds_at_most() {
        let standing = Standing::new();
        let _ = standing.refused(refusal(true));
        assert!(!standing.is_stale());
        sleep(READ_AGAIN).await;
        let _ = standing.refused(refusal(true));
        assert!(standing.is_stale());
        standing.renewed();
        assert!(!standing.is_stale());
    }
}
