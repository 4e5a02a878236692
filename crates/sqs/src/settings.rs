use std::collections::HashMap;
use std::time::Duration;

use aws_sdk_sqs::types::QueueAttributeName as Attribute;
use onlyonce_core::Error;
use onlyonce_core::driver::{Acks, Capabilities, Ordering, QueueInfo};
use serde_json::Value;

use crate::Config;
use crate::config::Address;
use crate::queue::{BATCH, Queue};

/// Within this time a FIFO queue drops what was sent before:
/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/using-messagededuplicationid-property.html>
const DEDUP_WINDOW: Duration = Duration::from_secs(300);
/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html>
const IN_FLIGHT: &str = "120000";

/// The queue's attributes, as SQS tells them.
pub(crate) struct Settings {
    attributes: HashMap<Attribute, String>,
}

/// Where SQS itself puts what was received too often.
pub(crate) struct Redrive {
    arn: String,
    max_receives: Option<u32>,
}

impl Settings {
    /// # Errors
    /// The queue does not exist, or `sqs:GetQueueAttributes` is not allowed.
    pub(crate) async fn read(queue: &Queue) -> Result<Self, Error> {
        let request = queue
            .client()
            .await?
            .get_queue_attributes()
            .queue_url(queue.url().await?)
            .attribute_names(Attribute::All);
        let what = "cannot read the queue's attributes (sqs:GetQueueAttributes)";
        let limit = queue.config.timeout;
        let answer = queue.call(what, limit, request.send()).await?;
        Ok(Self {
            attributes: answer.attributes.unwrap_or_default(),
        })
    }

    fn text(&self, name: &Attribute) -> Option<&str> {
        self.attributes.get(name).map(String::as_str)
    }

    fn seconds(&self, name: &Attribute) -> Option<Duration> {
        let seconds = self.text(name)?.parse().ok()?;
        Some(Duration::from_secs(seconds))
    }

    /// # Errors
    /// It is zero, or not told.
    pub(crate) fn visibility(&self, queue: &str) -> Result<Duration, Error> {
        let visibility = self.seconds(&Attribute::VisibilityTimeout);
        visibility.filter(|time| !time.is_zero()).ok_or_else(|| {
            Error::config(
                "the queue has no visibility timeout, so that every message would be delivered again at once; set one there, or `visibility_timeout=30s` in the URL",
            )
            .on_queue(queue)
        })
    }

    pub(crate) fn arn(&self) -> Option<String> {
        self.text(&Attribute::QueueArn).map(str::to_owned)
    }

    pub(crate) fn redrive(&self) -> Option<Redrive> {
        let policy: Value = serde_json::from_str(self.text(&Attribute::RedrivePolicy)?).ok()?;
        // It is a number or, where it was set so, a text.
        let max = match policy.get("maxReceiveCount")? {
            Value::String(text) => text.parse().ok(),
            number => number.as_u64().and_then(|number| number.try_into().ok()),
        };
        Some(Redrive {
            arn: policy.get("deadLetterTargetArn")?.as_str()?.to_owned(),
            max_receives: max,
        })
    }

    /// How long after it was sent a message may be delivered, with a redrive from its dead-letter queue: that makes a new
    /// message of it, and a move to a FIFO dead-letter queue begins its time anew.
    /// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/setting-up-dead-letter-queue-retention.html>
    /// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-configure-dead-letter-queue-redrive.html>
    pub(crate) fn horizon(&self, dead: &Self, fifo: bool) -> Option<Duration> {
        let own = self.seconds(&Attribute::MessageRetentionPeriod)?;
        let dead = dead.seconds(&Attribute::MessageRetentionPeriod)?;
        Some(if fifo {
            own + dead + own
        } else {
            own.max(dead) + own
        })
    }

    pub(crate) fn queue_info(&self, config: &Config) -> Result<QueueInfo, Error> {
        let fifo = config.is_fifo();
        let redrive = self.redrive();
        let mut info = QueueInfo::default();
        info.identity = self.text(&Attribute::QueueArn).map(str::to_owned);
        info.lease = Some(match config.visibility_timeout {
            Some(asked) => asked,
            None => self.visibility(config.name())?,
        });
        info.retention = self.seconds(&Attribute::MessageRetentionPeriod);
        info.max_deliveries = redrive.as_ref().and_then(|redrive| redrive.max_receives);
        info.dead_letter = redrive.map(|redrive| redrive.arn);
        info.dedup_window = fifo.then_some(DEDUP_WINDOW);
        info.capabilities = capabilities(fifo, info.dead_letter.is_some());
        info.settings = self.shown(fifo);
        Ok(info)
    }

    /// What else decides how the queue behaves, under SQS's own names.
    fn shown(&self, fifo: bool) -> Vec<(String, String)> {
        let mut shown = vec![("Type", if fifo { "FIFO" } else { "standard" })];
        shown.push(("InFlightLimit", IN_FLIGHT));
        let names = [
            Attribute::VisibilityTimeout,
            Attribute::MessageRetentionPeriod,
            Attribute::ContentBasedDeduplication,
            Attribute::DeduplicationScope,
            Attribute::FifoThroughputLimit,
            Attribute::DelaySeconds,
            Attribute::MaximumMessageSize,
            Attribute::RedrivePolicy,
            Attribute::SqsManagedSseEnabled,
            Attribute::KmsMasterKeyId,
        ];
        for name in &names {
            if let Some(value) = self.text(name) {
                shown.push((name.as_str(), value));
            }
        }
        let owned = shown.into_iter();
        owned
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }
}

fn capabilities(fifo: bool, dead_letter: bool) -> Capabilities {
    let mut can = Capabilities::default();
    can.acks = Acks::Confirmed;
    can.extend = true;
    can.timed_lease = true;
    can.delayed_nack = true;
    can.dead_letter = dead_letter;
    can.counts_attempts = true;
    can.settle_batch = Some(BATCH);
    can.ordering = match fifo {
        true => Ordering::Group,
        false => Ordering::None,
    };
    can
}

impl Redrive {
    /// # Errors
    /// Its ARN is no queue's.
    pub(crate) fn target(&self) -> Result<Address, Error> {
        match Address::of_arn(&self.arn) {
            Some((address, _)) => Ok(address),
            None => Err(Error::config(format!(
                "the redrive policy names no queue: {}",
                self.arn
            ))),
        }
    }
}
