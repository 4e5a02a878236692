use std::error::Error as StdError;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::http::HttpResponse;
use aws_sdk_sqs::error::{ProvideErrorMetadata, SdkError};
use futures_util::{StreamExt as _, stream};
use onlyonce_core::{Error, ErrorKind};
use tokio::sync::OnceCell;
use tokio::time::timeout;

use crate::Config;
use crate::config::Address;
use crate::connection::Connection;
use crate::error;

/// As many entries fit into one request:
/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-batch-api-actions.html>
pub(crate) const BATCH: usize = 10;
/// As many requests of one batch are under way at most.
const CALLS: usize = 10;

/// A queue and the client to reach it by. Both are found out when they are first needed.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) config: Config,
    address: Address,
    connection: Arc<Connection>,
    url: OnceCell<String>,
}

impl Queue {
    pub(crate) fn new(config: Config, client: Option<Client>) -> Result<Self, Error> {
        Self::by(config, Arc::new(Connection::new(client)))
    }

    fn by(config: Config, connection: Arc<Connection>) -> Result<Self, Error> {
        config.check()?;
        Ok(Self {
            address: config.address.clone(),
            connection,
            url: OnceCell::new_with(config.address.url.clone()),
            config,
        })
    }

    /// Another queue, reached by the same client.
    pub(crate) fn beside(&self, address: Address) -> Result<Self, Error> {
        let mut config = self.config.clone();
        config.address = address;
        Self::by(config, self.connection.clone())
    }

    pub(crate) fn name(&self) -> &str {
        &self.address.name
    }

    pub(crate) fn is_fifo(&self) -> bool {
        self.address.is_fifo()
    }

    pub(crate) async fn client(&self) -> Result<Client, Error> {
        self.connection.client(&self.config).await
    }

    pub(crate) async fn url(&self) -> Result<&str, Error> {
        let find = || async {
            let request = self.client().await?.get_queue_url();
            let request = request
                .queue_name(self.name())
                .set_queue_owner_aws_account_id(self.address.account.clone());
            let limit = self.config.timeout;
            let found = self.call("cannot find the queue", limit, request.send());
            let url = found.await?.queue_url;
            url.ok_or_else(|| Error::new(ErrorKind::NotFound, "SQS names no URL of the queue"))
        };
        let url = self.url.get_or_try_init(find).await;
        url.map(String::as_str)
    }

    /// The queues whose redrive policies name this one, the first thousand of them.
    pub(crate) async fn sources_of_dead_letters(&self) -> Result<Vec<String>, Error> {
        let what =
            "cannot list the queues whose dead letters come here (sqs:ListDeadLetterSourceQueues)";
        let request = self
            .client()
            .await?
            .list_dead_letter_source_queues()
            .queue_url(self.url().await?);
        let answer = self.call(what, self.config.timeout, request.send()).await?;
        let urls = answer.queue_urls().iter();
        let name = |url: &String| url.rsplit('/').next().unwrap_or_default().to_owned();
        Ok(urls.map(name).collect())
    }

    /// Waits for the answer to a request, for at most this long.
    pub(crate) async fn call<T, E>(
        &self,
        what: &str,
        limit: Duration,
        request: impl Future<Output = Result<T, SdkError<E, HttpResponse>>>,
    ) -> Result<T, Error>
    where
        E: ProvideErrorMetadata + StdError + 'static,
    {
        let result = match timeout(limit, request).await {
            Ok(answer) => self.judged(what, answer),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                format!("{what}: SQS did not answer within {limit:?}"),
            )),
        };
        result.map_err(|error| error.on_queue(self.name()))
    }

    fn judged<T, E>(
        &self,
        what: &str,
        answer: Result<T, SdkError<E, HttpResponse>>,
    ) -> Result<T, Error>
    where
        E: ProvideErrorMetadata + StdError + 'static,
    {
        answer
            .inspect(|_| self.connection.accepted())
            .map_err(|answer| {
                let error = error::of_request(what, &answer);
                match error::refuses_credentials(&answer) {
                    true => self.connection.refused(error),
                    false => error,
                }
            })
    }
}

/// Makes the requests side by side or one after another, and returns all their results in order.
pub(crate) async fn all_of<R, F>(requests: Vec<F>, side_by_side: bool) -> Vec<R>
where
    F: Future<Output = Vec<R>>,
{
    let calls = if side_by_side { CALLS } else { 1 };
    stream::iter(requests).buffered(calls).concat().await
}
