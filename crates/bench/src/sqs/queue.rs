//! A fresh queue per run, filled before the clock starts.

use onlyonce::Message;
use onlyonce::driver::Sink as _;
use onlyonce::sqs::aws_sdk_sqs::Client;
use onlyonce::sqs::aws_sdk_sqs::types::QueueAttributeName as Attribute;
use onlyonce::sqs::{Config, SqsSink, SqsSource};

use super::calls::Calls;
use crate::Error;

const BODY: [u8; 256] = [b'x'; 256];

pub(crate) struct Queue {
    /// Counted.
    pub(crate) client: Client,
    pub(crate) url: String,
}

impl Queue {
    pub(crate) async fn create(
        endpoint: &str,
        fifo: bool,
        visibility: u32,
        calls: &Calls,
    ) -> Result<Self, Error> {
        let suffix = if fifo { ".fifo" } else { "" };
        let name = format!("onlyonce-bench-{}-{visibility}{suffix}", std::process::id());
        let config: Config = format!("sqs://{name}?endpoint={endpoint}").parse()?;
        let client = calls.of(&config.connect().await?);
        let create = client.create_queue().queue_name(name);
        let create = create.attributes(Attribute::VisibilityTimeout, visibility.to_string());
        let create = match fifo {
            true => create.attributes(Attribute::FifoQueue, "true"),
            false => create,
        };
        let url = create.send().await?.queue_url.ok_or("no queue URL")?;
        Ok(Self { client, url })
    }

    /// How many messages of one group stand together, and in how many groups; none: no message has a group.
    pub(crate) async fn fill(&self, count: usize, groups: usize, run: usize) -> Result<(), Error> {
        let message = |n: usize| {
            let message = Message::new(BODY.as_slice()).with_dedup_id(format!("message-{n}"));
            match groups {
                0 => message,
                _ => message.with_group(format!("group-{}", n / run % groups)),
            }
        };
        let messages: Vec<_> = (0..count).map(message).collect();
        let sink = SqsSink::with_client(self.url.parse()?, self.client.clone())?;
        for result in sink.publish(&messages).await {
            result?;
        }
        Ok(())
    }

    pub(crate) fn source(&self) -> Result<SqsSource, Error> {
        let config = self.url.parse()?;
        Ok(SqsSource::with_client(config, self.client.clone())?)
    }

    pub(crate) async fn delete(self) -> Result<(), Error> {
        self.client
            .delete_queue()
            .queue_url(self.url)
            .send()
            .await?;
        Ok(())
    }
}
