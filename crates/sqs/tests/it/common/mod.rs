//! What the tests against emulators share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_sqs::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_sqs::types::QueueAttributeName as Attribute;
use onlyonce_core::driver::{ReceiveLimits, Sink as _};
use onlyonce_core::{BoxError, Message};
use onlyonce_sqs::{Config, SqsSink, SqsSource, aws_sdk_sqs};
use onlyonce_testkit::proxy::Proxy;

/// The account that both emulators have.
pub(crate) const ACCOUNT: &str = "000000000000";

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Emulator {
    MiniStack,
    LocalStack,
}

impl Emulator {
    pub(crate) fn endpoint(self) -> String {
        let name = match self {
            Self::MiniStack => "ONLYONCE_MINISTACK_URL",
            Self::LocalStack => "ONLYONCE_LOCALSTACK_URL",
        };
        let endpoint = std::env::var(name);
        endpoint.unwrap_or_else(|_| panic!("set {name}, see `./tests/run sqs`"))
    }

    pub(crate) async fn proxy(self) -> Proxy {
        let endpoint = self.endpoint();
        let address = endpoint.strip_prefix("http://").unwrap();
        Proxy::to(address.trim_end_matches('/')).await.unwrap()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Fifo,
    Standard,
}

/// A queue of a test's own, with a dead-letter queue.
pub(crate) struct Queue {
    pub(crate) client: Client,
    pub(crate) name: String,
    pub(crate) url: String,
    pub(crate) dead_url: String,
}

impl Queue {
    /// With a visibility timeout of `visibility` seconds.
    pub(crate) async fn create(emulator: Emulator, kind: Kind, visibility: u64) -> Self {
        Self::with(emulator, kind, visibility, &[]).await
    }

    pub(crate) async fn with(
        emulator: Emulator,
        kind: Kind,
        visibility: u64,
        more: &[(Attribute, &str)],
    ) -> Self {
        let suffix = if kind == Kind::Fifo { ".fifo" } else { "" };
        let name = format!("test-{:x}{suffix}", fastrand::u64(..));
        let dead = format!("dead-{name}");
        let config: Config = format!("sqs://{name}?endpoint={}", emulator.endpoint())
            .parse()
            .unwrap();
        let client = config.connect().await.unwrap();
        let mut attributes = vec![];
        if kind == Kind::Fifo {
            attributes.push((Attribute::FifoQueue, "true".to_owned()));
        }
        let dead_url = create(&client, &dead, &attributes).await;
        let policy = format!(
            r#"{{"deadLetterTargetArn":"arn:aws:sqs:us-east-1:{ACCOUNT}:{dead}","maxReceiveCount":1000}}"#
        );
        attributes.push((Attribute::RedrivePolicy, policy));
        attributes.push((Attribute::VisibilityTimeout, visibility.to_string()));
        for (name, value) in more {
            attributes.retain(|(set, _)| set != name);
            attributes.push((name.clone(), (*value).to_owned()));
        }
        let url = create(&client, &name, &attributes).await;
        Self {
            client,
            name,
            url,
            dead_url,
        }
    }

    pub(crate) fn config(&self) -> Config {
        self.url.parse().unwrap()
    }

    /// A queue of the same name in another region.
    pub(crate) async fn in_another_region(&self) -> Config {
        let mut config: Config = format!("sqs://{}?region=eu-west-3", self.name)
            .parse()
            .unwrap();
        config.endpoint = self.config().endpoint;
        let fifo = (Attribute::FifoQueue, "true".to_owned());
        let fifo = self.name.ends_with(".fifo").then_some(fifo);
        let client = config.connect().await.unwrap();
        create(&client, &self.name, fifo.as_slice()).await;
        config
    }

    pub(crate) fn through(&self, proxy: &Proxy) -> Config {
        let mut config = self.config();
        config.endpoint = Some(format!("http://127.0.0.1:{}", proxy.port()));
        config
    }

    pub(crate) fn source(&self) -> SqsSource {
        SqsSource::new(self.config()).unwrap()
    }

    pub(crate) fn sink(&self) -> SqsSink {
        SqsSink::new(self.config()).unwrap()
    }

    pub(crate) async fn publish(&self, messages: &[Message]) {
        for result in self.sink().publish(messages).await {
            result.unwrap();
        }
    }

    /// Visible and in flight, as the emulator tells.
    pub(crate) async fn counts(&self) -> (u32, u32) {
        let answer = self
            .client
            .get_queue_attributes()
            .queue_url(&self.url)
            .attribute_names(Attribute::All)
            .send()
            .await
            .unwrap();
        let attributes = answer.attributes.unwrap();
        let number = |name| attributes[&name].parse().unwrap();
        (
            number(Attribute::ApproximateNumberOfMessages),
            number(Attribute::ApproximateNumberOfMessagesNotVisible),
        )
    }
}

async fn create(client: &Client, name: &str, attributes: &[(Attribute, String)]) -> String {
    let attributes = attributes.iter().cloned().collect();
    let queue = client
        .create_queue()
        .queue_name(name)
        .set_attributes(Some(attributes))
        .send()
        .await;
    queue.unwrap().queue_url.unwrap()
}

/// Counts what a client sends, by operation.
#[derive(Clone, Debug, Default)]
pub(crate) struct Requests(Arc<Mutex<HashMap<String, usize>>>);

impl Requests {
    /// The same client, counted.
    pub(crate) fn of(&self, client: &Client) -> Client {
        let config = client.config().to_builder();
        Client::from_conf(config.interceptor(self.clone()).build())
    }

    pub(crate) fn count(&self, operation: &str) -> usize {
        let counts = self.0.lock().unwrap();
        counts.get(operation).copied().unwrap_or_default()
    }
}

impl Intercept for Requests {
    fn name(&self) -> &'static str {
        "Requests"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let target = context.request().headers().get("x-amz-target").unwrap();
        let operation = target.strip_prefix("AmazonSQS.").unwrap().to_owned();
        *self.0.lock().unwrap().entry(operation).or_default() += 1;
        Ok(())
    }
}

pub(crate) fn limit(messages: usize, wait: Duration) -> ReceiveLimits {
    ReceiveLimits::new(messages, wait)
}
