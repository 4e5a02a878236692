//! A worker's way to the dead-letter queue, which watches that it sets aside only what it has a lease of.

use async_trait::async_trait;
use onlyonce_core::driver::{Sink, SinkInfo};
use onlyonce_core::{Error, Message};
use onlyonce_testkit::simulated::Sender;

use super::handler::Worker;

#[derive(Debug)]
pub struct Letters {
    sender: Sender,
    worker: Worker,
}

impl Letters {
    pub fn of(worker: &Worker) -> Self {
        Self {
            sender: worker.world.broker.dead_letters().connect(worker.id),
            worker: worker.clone(),
        }
    }
}

#[async_trait]
impl Sink for Letters {
    fn name(&self) -> &str {
        self.sender.name()
    }

    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        self.sender.sink_info().await
    }

    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        for letter in batch {
            let id = letter.broker_id.as_deref().unwrap_or_default();
            let what = format!("left a dead letter of {}", letter.label());
            self.worker.check_lease(id, &what);
        }
        self.sender.publish(batch).await
    }

    async fn close(&self) -> Result<(), Error> {
        self.sender.close().await
    }
}
