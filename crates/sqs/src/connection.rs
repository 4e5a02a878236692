use aws_sdk_sqs::Client;
use onlyonce_core::Error;
use onlyonce_core::driver::Standing;

use crate::Config;

/// A client and how it stands with its credentials.
#[derive(Debug)]
pub(crate) struct Connection {
    client: tokio::sync::Mutex<Option<Client>>,
    /// The client is the user's, and so are its credentials.
    given: bool,
    standing: Standing,
}

impl Connection {
    pub(crate) fn new(client: Option<Client>) -> Self {
        Self {
            given: client.is_some(),
            client: tokio::sync::Mutex::new(client),
            standing: Standing::new(),
        }
    }

    pub(crate) async fn client(&self, config: &Config) -> Result<Client, Error> {
        let mut known = self.client.lock().await;
        let stale = self.standing.is_stale() && !self.given;
        let client = match &*known {
            Some(client) if !stale => return Ok(client.clone()),
            Some(client) => config.with_fresh_credentials(client).await,
            None => config.connect().await?,
        };
        self.standing.renewed();
        *known = Some(client.clone());
        Ok(client)
    }

    /// A request was granted.
    pub(crate) fn accepted(&self) {
        self.standing.accepted();
    }

    /// What it means that AWS refused the credentials: those that were good before may have been replaced.
    pub(crate) fn refused(&self, error: Error) -> Error {
        self.standing.refused(error)
    }
}
