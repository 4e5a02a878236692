//! Copies that take a message's place. For a delayed retry one waits in a queue whose messages expire into the original
//! queue, since AMQP cannot give a message back for later. And one at the queue's end renews a message that the broker
//! would soon give up on.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use onlyonce_core::{Error, ErrorKind};

use crate::publisher::{Outgoing, Publisher};
use crate::{Config, config, headers};

/// What is kept of a delivery so that a copy can be made of it.
#[derive(Clone, Debug)]
pub(crate) struct Original {
    pub(crate) properties: headers::Packed,
    pub(crate) body: Bytes,
    pub(crate) attempt: u32,
}

/// In seconds. A delay is rounded up to one of these, since a queue expires messages only from its head: each step has a
/// queue of its own.
const STEPS: [u64; 14] = [
    1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1_800, 3_600, 21_600, 86_400,
];
const SHORT_STEPS: [u64; 3] = [100, 250, 500];

pub(crate) struct Copies {
    queue: String,
    user: Option<String>,
    publisher: Publisher,
}

impl Copies {
    pub(crate) fn new(config: Config, queue: &str) -> Self {
        Self {
            queue: queue.to_owned(),
            user: config.user().map(str::to_owned),
            // Whoever makes a copy goes on with other messages.
            publisher: Publisher::new(
                config,
                "copies",
                ShortString::default(),
                queue,
                Duration::MAX,
            ),
        }
    }

    /// Puts a copy of each at the queue's end, with the broker's counts at zero; `Ok` when the broker has confirmed it.
    pub(crate) async fn renew(&self, originals: &[Original]) -> Vec<Result<(), Error>> {
        let routing_key = match config::name("queue", &self.queue) {
            Ok(name) => name,
            Err(error) => return refuse(originals.len(), error),
        };
        let mut copies = Vec::with_capacity(originals.len());
        for original in originals {
            // This delivery has not been an attempt: nobody is given it.
            match self.copy(original, routing_key.clone(), original.attempt - 1) {
                Ok(copy) => copies.push(copy),
                Err(error) => return refuse(originals.len(), error),
            }
        }
        self.publisher.publish(BTreeMap::new(), copies).await
    }

    /// Queues a copy of each to come back after its delay; `Ok` when the broker has confirmed the copy.
    pub(crate) async fn delay(&self, originals: &[(Original, Duration)]) -> Vec<Result<(), Error>> {
        let mut queues = BTreeMap::new();
        let mut copies = Vec::with_capacity(originals.len());
        for (original, delay) in originals {
            let step = step(*delay);
            let name = match config::name("queue", &format!("{}.delay.{step}", self.queue)) {
                Ok(name) => name,
                Err(error) => return refuse(originals.len(), error),
            };
            match self.copy(original, name.clone(), original.attempt) {
                Ok(copy) => copies.push(copy),
                Err(error) => return refuse(originals.len(), error),
            }
            queues
                .entry(name)
                .or_insert_with(|| arguments(&self.queue, step));
        }
        self.publisher.publish(queues, copies).await
    }

    fn copy(
        &self,
        original: &Original,
        routing_key: ShortString,
        attempts: u32,
    ) -> Result<Outgoing, Error> {
        let properties = original.properties.unpack()?;
        Ok(Outgoing {
            routing_key,
            properties: headers::copy(&properties, attempts, self.user.as_deref()),
            body: original.body.clone(),
        })
    }

    /// Ends when the broker blocks the connection; see [`Publisher::blocked`].
    pub(crate) async fn blocked(&self) {
        self.publisher.blocked().await;
    }

    pub(crate) fn blocked_error(&self) -> Error {
        self.publisher.blocked_error()
    }

    /// Waits for the copies under way, then closes. If the broker blocks the connection it does not wait for ever: the
    /// originals are given back with their channel, so nothing is lost.
    pub(crate) async fn close(&self) -> Result<(), Error> {
        match self.publisher.close().await {
            Err(error) if error.kind() == ErrorKind::Throttled => {
                tracing::warn!(%error, "copies of delayed messages may come besides the messages themselves");
                Ok(())
            }
            closed => closed,
        }
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
