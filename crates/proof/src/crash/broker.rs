//! The two brokers, and the queues on them.

use std::path::PathBuf;
use std::sync::Arc;

use onlyonce_core::Error;
use onlyonce_core::driver::{Sink, Source};
use onlyonce_rabbitmq::lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use onlyonce_rabbitmq::lapin::types::{AMQPValue, FieldTable};
use onlyonce_rabbitmq::{RabbitSink, RabbitSource};
use onlyonce_sqlite::{Config, SqliteQueue};
use serde::{Deserialize, Serialize};

use super::worker::LEASE;
use crate::error::failed;

const QUEUE: &str = "transfers";

#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum Broker {
    /// The embedded queue in this file.
    Sqlite(PathBuf),
    RabbitMq {
        /// The server's.
        url: String,
        queue: String,
    },
}

impl Broker {
    pub async fn source(&self) -> Result<Arc<dyn Source>, Error> {
        Ok(match self {
            Self::Sqlite(file) => Arc::new(embedded(file, QUEUE).await?),
            Self::RabbitMq { .. } => Arc::new(RabbitSource::new(self.config("")?)?),
        })
    }

    pub async fn sink(&self) -> Result<Arc<dyn Sink>, Error> {
        Ok(match self {
            Self::Sqlite(file) => Arc::new(embedded(file, QUEUE).await?),
            Self::RabbitMq { .. } => Arc::new(RabbitSink::new(self.config("")?)?),
        })
    }

    /// Where workers put dead letters; the embedded queue has a place of its own.
    pub fn dead_letters(&self) -> Result<Option<Arc<dyn Sink>>, Error> {
        Ok(match self {
            Self::Sqlite(_) => None,
            Self::RabbitMq { .. } => Some(Arc::new(RabbitSink::new(self.config(".dead")?)?)),
        })
    }

    /// The queue downstream, which is embedded whatever the others are.
    pub async fn booked(&self) -> Result<Arc<SqliteQueue>, Error> {
        match self {
            Self::Sqlite(file) => Ok(Arc::new(embedded(file, "booked").await?)),
            Self::RabbitMq { .. } => Err(Error::config("nothing is published there")),
        }
    }

    /// The dead-letter queue, to be read.
    pub async fn dead(&self) -> Result<Arc<dyn Source>, Error> {
        Ok(match self {
            Self::Sqlite(file) => Arc::new(embedded(file, "transfers.dead").await?),
            Self::RabbitMq { .. } => Arc::new(RabbitSource::new(self.config(".dead")?)?),
        })
    }

    fn config(&self, suffix: &str) -> Result<onlyonce_rabbitmq::Config, Error> {
        let Self::RabbitMq { url, queue } = self else {
            return Err(Error::config("not RabbitMQ"));
        };
        let single = if suffix.is_empty() {
            "&single_active_consumer=true"
        } else {
            ""
        };
        format!("{url}?queue={queue}{suffix}&group_header=group{single}").parse()
    }

    /// Makes the queues, where they do not make themselves.
    pub async fn create(&self) -> Result<(), Error> {
        let Self::RabbitMq { queue, .. } = self else {
            return Ok(());
        };
        let channel = self.channel().await?;
        let durable = QueueDeclareOptions {
            durable: true,
            ..Default::default()
        };
        let mut single = FieldTable::default();
        single.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
        for (name, arguments) in [
            (queue.clone(), single),
            (format!("{queue}.dead"), FieldTable::default()),
        ] {
            let declared = channel.queue_declare(name.into(), durable, arguments).await;
            declared.map_err(|error| failed("cannot make the queue", error))?;
        }
        Ok(())
    }

    /// Removes the queues.
    pub async fn delete(&self) -> Result<(), Error> {
        let Self::RabbitMq { queue, .. } = self else {
            return Ok(());
        };
        let channel = self.channel().await?;
        for name in [queue.clone(), format!("{queue}.dead")] {
            let deleted = channel.queue_delete(name.into(), QueueDeleteOptions::default());
            deleted
                .await
                .map_err(|error| failed("cannot remove the queue", error))?;
        }
        Ok(())
    }

    async fn channel(&self) -> Result<onlyonce_rabbitmq::lapin::Channel, Error> {
        let connection = self.config("")?.connect().await?;
        let channel = connection.create_channel().await;
        channel.map_err(|error| failed("no channel", error))
    }
}

async fn embedded(file: &PathBuf, queue: &str) -> Result<SqliteQueue, Error> {
    let mut config = Config::new(file).queue(queue);
    config.lease = LEASE;
    SqliteQueue::open(config).await
}
