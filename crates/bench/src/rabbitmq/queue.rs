//! A fresh queue per run, filled before the clock starts.

use futures_util::future::try_join_all;
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};

use crate::Error;

const BODY: [u8; 256] = [b'x'; 256];
const WINDOW: usize = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Classic,
    Quorum,
}

pub(crate) struct Queue {
    pub(crate) connection: Connection,
    pub(crate) name: String,
    url: String,
    channel: Channel,
}

impl Queue {
    pub(crate) async fn declare(url: &str, kind: Kind) -> Result<Self, Error> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        let mut arguments = FieldTable::default();
        if kind == Kind::Quorum {
            let quorum = AMQPValue::LongString("quorum".into());
            arguments.insert("x-queue-type".into(), quorum);
        }
        let name = format!("onlyonce-bench-{}", std::process::id());
        let durable = QueueDeclareOptions {
            durable: true,
            ..Default::default()
        };
        channel
            .queue_declare(name.as_str().into(), durable, arguments)
            .await?;
        Ok(Self {
            connection,
            name,
            url: url.to_owned(),
            channel,
        })
    }

    /// Publishes persistent messages of 256 bytes, with ids, and waits for every confirm.
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
            .with_message_id(id.into());
        let confirm = self
            .channel
            .basic_publish(
                "".into(),
                self.name.as_str().into(),
                BasicPublishOptions::default(),
                &BODY,
                properties,
            )
            .await?;
        confirm.await?;
        Ok(())
    }

    /// The queue as the adapter's URL, with the bench's prefetch.
    pub(crate) fn url(&self) -> String {
        format!("{}?queue={}&prefetch=1000", self.url, self.name)
    }

    pub(crate) async fn delete(self) -> Result<(), Error> {
        self.channel
            .queue_delete(self.name.as_str().into(), QueueDeleteOptions::default())
            .await?;
        self.connection.close(200, "done".into()).await?;
        Ok(())
    }
}
