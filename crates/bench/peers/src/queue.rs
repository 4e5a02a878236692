//! A fresh queue per run, filled before the clock starts.

use std::time::Duration;

use futures_util::future::try_join_all;
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use tokio::time::sleep;

use crate::Error;

/// The length of every message.
const BODY: usize = 256;
const WINDOW: usize = 1_000;

/// The type of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    Classic,
    Quorum,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
        }
    }
}

pub(crate) struct Queue {
    pub(crate) name: String,
    connection: Connection,
    channel: Channel,
}

impl Queue {
    pub(crate) async fn declare(url: &str, kind: Kind, name: String) -> Result<Self, Error> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        let mut arguments = FieldTable::default();
        // A classic queue is what an application gets that asks for nothing, as one of the peers does.
        if kind != Kind::Classic {
            let kind = AMQPValue::LongString(kind.name().into());
            arguments.insert("x-queue-type".into(), kind);
        }
        let durable = QueueDeclareOptions {
            durable: true,
            ..Default::default()
        };
        channel
            .queue_declare(name.as_str().into(), durable, arguments)
            .await?;
        Ok(Self {
            name,
            connection,
            channel,
        })
    }

    /// Publishes persistent messages and waits for every confirm.
    pub(crate) async fn fill(&self, count: usize) -> Result<(), Error> {
        for window in (0..count).step_by(WINDOW) {
            let ids = window..count.min(window + WINDOW);
            try_join_all(ids.map(|n| self.publish(n))).await?;
        }
        Ok(())
    }

    pub(crate) async fn publish(&self, n: usize) -> Result<(), Error> {
        // Ids without order, as UUIDs are: a store cannot profit from their neighbourhood.
        let id = format!(
            "{:016x}",
            (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        );
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_message_id(id.as_str().into());
        let confirm = self
            .channel
            .basic_publish(
                "".into(),
                self.name.as_str().into(),
                BasicPublishOptions::default(),
                &body(&id),
                properties,
            )
            .await?;
        confirm.await?;
        Ok(())
    }

    /// How many messages wait for a consumer; what one holds is not counted.
    async fn waiting(&self) -> Result<u32, Error> {
        let passive = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        let queue = self
            .channel
            .queue_declare(self.name.as_str().into(), passive, FieldTable::default())
            .await?;
        Ok(queue.message_count())
    }

    /// How many messages nobody has acknowledged, once their consumer is gone. A quorum queue's count is some seconds old, so
    /// it is asked again.
    pub(crate) async fn left(&self) -> Result<u32, Error> {
        let mut left = self.waiting().await?;
        for _ in 0..50 {
            if left == 0 {
                break;
            }
            sleep(Duration::from_millis(200)).await;
            left = self.waiting().await?;
        }
        Ok(left)
    }

    pub(crate) async fn connect_again(&mut self, url: &str, kind: Kind) -> Result<(), Error> {
        *self = Self::declare(url, kind, self.name.clone()).await?;
        Ok(())
    }

    /// Whether the queue's own connection still stands.
    pub(crate) fn is_connected(&self) -> bool {
        self.connection.status().connected()
    }

    pub(crate) async fn remove(&self) -> Result<(), Error> {
        self.channel
            .queue_delete(self.name.as_str().into(), QueueDeleteOptions::default())
            .await?;
        Ok(())
    }

    pub(crate) async fn delete(self) -> Result<(), Error> {
        self.remove().await?;
        self.connection.close(200, "done".into()).await?;
        Ok(())
    }
}

/// A job as JSON, which some peers want, with its id, which some peers do not pass on from the properties.
fn body(id: &str) -> Vec<u8> {
    let frame = br#"{"id":"","pad":""}"#.len() + id.len();
    let pad = "x".repeat(BODY.saturating_sub(frame));
    format!(r#"{{"id":"{id}","pad":"{pad}"}}"#).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_a_job_of_256_bytes() {
        let body = body("0123456789abcdef");
        assert_eq!(body.len(), BODY);
        let job: crate::work::Job = serde_json::from_slice(&body).unwrap();
        assert_eq!(job.id, "0123456789abcdef");
    }
}
