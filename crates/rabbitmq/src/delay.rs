//! Delayed retry. AMQP cannot give a message back for later, so a copy waits in a queue whose messages expire into the
//! original queue.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use onlyonce_core::Error;

use crate::publisher::{Outgoing, Publisher};
use crate::{Config, config, headers};

/// What is kept of a delivery so that a copy can be made of it.
#[derive(Clone, Debug)]
pub(crate) struct Original {
    pub(crate) properties: BasicProperties,
    pub(crate) body: Bytes,
    pub(crate) attempt: u32,
}

/// In seconds. A delay is rounded up to one of these, since a queue expires messages only from its head: each step has a
/// queue of its own.
const STEPS: [u64; 14] = [
    1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1_800, 3_600, 21_600, 86_400,
];
const SHORT_STEPS: [u64; 3] = [100, 250, 500];

pub(crate) struct Delayer {
    queue: String,
    user: String,
    publisher: Publisher,
}

impl Delayer {
    pub(crate) fn new(config: Config, queue: &str) -> Self {
        Self {
            queue: queue.to_owned(),
            user: config.user().to_owned(),
            // Whoever delays a message goes on with others.
            publisher: Publisher::new(
                config,
                "delayed retry",
                ShortString::default(),
                queue,
                Duration::MAX,
            ),
        }
    }

    /// Queues a copy of each to come back after its delay; `Ok` when the broker has confirmed the copy.
    pub(crate) async fn publish(
        &self,
        originals: &[(Original, Duration)],
    ) -> Vec<Result<(), Error>> {
        let mut queues = BTreeMap::new();
        let mut copies = Vec::with_capacity(originals.len());
        for (original, delay) in originals {
            let step = step(*delay);
            let name = match config::name("queue", &format!("{}.delay.{step}", self.queue)) {
                Ok(name) => name,
                Err(error) => return refuse(originals.len(), error),
            };
            copies.push(Outgoing {
                routing_key: name.clone(),
                properties: headers::copy(&original.properties, original.attempt, &self.user),
                body: original.body.clone(),
            });
            queues
                .entry(name)
                .or_insert_with(|| arguments(&self.queue, step));
        }
        self.publisher.publish(queues, copies).await
    }

    /// Ends when the broker blocks the connection; see [`Publisher::blocked`].
    pub(crate) async fn blocked(&self) {
        self.publisher.blocked().await;
    }

    pub(crate) fn blocked_error(&self) -> Error {
        self.publisher.blocked_error()
    }

    pub(crate) async fn close(&self) -> Result<(), Error> {
        self.publisher.close().await
    }
}

fn refuse(many: usize, error: Error) -> Vec<Result<(), Error>> {
    let what = error.to_string();
    (0..many)
        .map(|_| Err(Error::config(what.clone())))
        .collect()
}

/// The step for `delay`, in milliseconds: at least as long, up to a day; whole weeks' delays end after a day.
fn step(delay: Duration) -> u64 {
    let steps = SHORT_STEPS
        .into_iter()
        .chain(STEPS.map(|seconds| seconds * 1_000));
    let mut last = 0;
    for step in steps {
        last = step;
        if Duration::from_millis(step) >= delay {
            break;
        }
    }
    last
}

/// A quorum queue, since only there a message leaves for its target with a confirmation
/// (<https://www.rabbitmq.com/docs/quorum-queues#dead-lettering>). It goes away when it has not been declared for longer
/// than any message stays in it; every use declares it again.
fn arguments(target: &str, step: u64) -> FieldTable {
    let millis = |n: u64| AMQPValue::LongLongInt(i64::try_from(n).unwrap_or(i64::MAX));
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-message-ttl".into(), millis(step));
    arguments.insert("x-expires".into(), millis(2 * step + 3_600_000));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert("x-dead-letter-routing-key".into(), text(target));
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_are_rounded_up_to_few_steps() {
        for (delay, expected) in [
            (1, 100),
            (100, 100),
            (101, 250),
            (999, 1_000),
            (1_001, 2_000),
            (61_000, 120_000),
        ] {
            assert_eq!(step(Duration::from_millis(delay)), expected, "{delay}");
        }
        assert_eq!(step(Duration::from_secs(86_400)), 86_400_000);
        assert_eq!(step(Duration::MAX), 86_400_000);
    }
}
