use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_sdk_sqs::Client;
use onlyonce_core::{Error, ErrorKind};
use tokio::time::Instant;

use crate::Config;

/// Credentials are read again no more often than this.
const READ_AGAIN: Duration = Duration::from_secs(5);
/// Credentials that were good are waited for no longer. After that the people who run this process have to know.
const PATIENCE: Duration = Duration::from_secs(300);

/// A client and how it stands with its credentials.
///
/// The SDK reads a profile's file once and keeps its credentials for as long as the client lives. So when AWS refuses them,
/// the whole chain is read again.
#[derive(Debug)]
pub(crate) struct Connection {
    client: tokio::sync::Mutex<Option<Client>>,
    /// The client is the user's, and so are its credentials.
    given: bool,
    standing: Mutex<Standing>,
}

/// What AWS has said of the credentials.
#[derive(Debug)]
struct Standing {
    read: Instant,
    /// They are to be read again before the next request.
    stale: bool,
    /// They, or those before them, were good.
    accepted: bool,
    /// Since when none have been good.
    refused: Option<Instant>,
}

impl Connection {
    pub(crate) fn new(client: Option<Client>) -> Self {
        Self {
            given: client.is_some(),
            client: tokio::sync::Mutex::new(client),
            standing: Mutex::new(Standing {
                read: Instant::now(),
                stale: false,
                accepted: false,
                refused: None,
            }),
        }
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) async fn client(&self, config: &Config) -> Result<Client, Error> {
        let mut known = self.client.lock().await;
        let stale = self.standing().stale;
        let client = match &*known {
            Some(client) if !stale => return Ok(client.clone()),
            Some(client) => config.with_fresh_credentials(client).await,
            None => config.connect().await?,
        };
        self.standing().renew();
        *known = Some(client.clone());
        Ok(client)
    }

    /// A request was granted.
    pub(crate) fn accepted(&self) {
        let mut standing = self.standing();
        standing.accepted = true;
        standing.refused = None;
    }

    /// What it means that AWS refused the credentials: those that were good before may have been replaced.
    pub(crate) fn refused(&self, error: Error) -> Error {
        let mut standing = self.standing();
        let now = Instant::now();
        standing.stale |= !self.given && now - standing.read >= READ_AGAIN;
        let since = *standing.refused.get_or_insert(now);
        if !standing.accepted && !error.is_retryable() {
            return error;
        }
        if now - since < PATIENCE {
            return error.retryable(true);
        }
        let text = format!(
            "AWS has refused the credentials for {PATIENCE:?}, although they were read again"
        );
        Error::new(ErrorKind::Permission, text).caused_by(error)
    }
}

impl Standing {
    fn renew(&mut self) {
        self.stale = false;
        self.read = Instant::now();
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
        let connection = Connection::new(None);
        assert!(!connection.refused(refusal(false)).is_retryable());
        for _ in 0..2 {
            connection.accepted();
            assert!(connection.refused(refusal(false)).is_retryable());
            sleep(PATIENCE - Duration::from_secs(1)).await;
            assert!(connection.refused(refusal(false)).is_retryable());
        }
        sleep(Duration::from_secs(1)).await;
        let error = connection.refused(refusal(false));
        assert!(!error.is_retryable(), "{error}");
        assert!(error.to_string().contains("300s"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn credentials_that_have_expired_at_the_start_are_waited_for_too() {
        let connection = Connection::new(None);
        assert!(connection.refused(refusal(true)).is_retryable());
        sleep(PATIENCE).await;
        assert!(!connection.refused(refusal(true)).is_retryable());
    }

    #[tokio::test(start_paused = true)]
    async fn credentials_are_read_again_every_five_seconds_at_most() {
        let connection = Connection::new(None);
        let _ = connection.refused(refusal(true));
        assert!(!connection.standing().stale);
        sleep(READ_AGAIN).await;
        let _ = connection.refused(refusal(true));
        assert!(connection.standing().stale);
    }
}
