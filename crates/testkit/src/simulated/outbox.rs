use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::Error;
use onlyonce_core::driver::{
    Fetch, FetchResult, Outbox, OutboxSettlement, OutgoingId, Owner, SetAside, Verdicts,
};

use super::faults::Call;
use super::store::Connection;

/// One relay's connection to the outbox of a [`Storage`](super::Storage).
#[derive(Clone, Debug)]
pub struct OutboxConnection {
    connection: Connection,
    most: u32,
}

impl OutboxConnection {
    pub(super) fn new(connection: Connection) -> Self {
        Self {
            connection,
            most: 0,
        }
    }

    /// How many seconds a second by this relay's clock is: with more than one it takes leases for longer than they are.
    #[must_use]
    pub fn with_second(mut self, second: f64) -> Self {
        self.connection = self.connection.with_second(second);
        self
    }

    /// With how many failures a message may be set aside, and no fewer.
    #[must_use]
    pub fn with_attempts(mut self, most: u32) -> Self {
        self.most = most;
        self
    }
}

#[async_trait]
impl Outbox for OutboxConnection {
    fn name(&self) -> &str {
        "simulated"
    }

    async fn fetch(&self, destination: &str, mut fetch: Fetch) -> Result<FetchResult, Error> {
        let (storage, relay) = (self.connection.storage().clone(), self.connection.worker());
        let destination = destination.to_owned();
        fetch.lease = self.connection.lease(fetch.lease);
        let request = async move {
            let answer = storage.outbox().fetch(&destination, fetch).await?;
            storage.fetched(relay, &destination, &fetch, &answer);
            Ok(answer)
        };
        self.connection.call(Call::Fetch, request).await
    }

    async fn settle(
        &self,
        relay: Owner,
        destination: &str,
        batch: &[OutboxSettlement],
    ) -> Result<Verdicts, Error> {
        let (storage, most) = (self.connection.storage().clone(), self.most);
        let (destination, batch) = (destination.to_owned(), batch.to_vec());
        let request = async move {
            let verdicts = storage.outbox().settle(relay, &destination, &batch).await?;
            let mut outgoing = storage.outgoing();
            outgoing.settled(relay, &destination, most, &batch, &verdicts);
            Ok(verdicts)
        };
        self.connection.call(Call::SettleOutgoing, request).await
    }

    async fn wait(&self, destination: &str, mark: u64, longest: Duration) -> Result<(), Error> {
        let (storage, destination) = (self.connection.storage().clone(), destination.to_owned());
        let request =
            async move { Outbox::wait(&storage.outbox(), &destination, mark, longest).await };
        self.connection.call(Call::Wait, request).await
    }

    async fn release(&self, relay: Owner, destination: &str) -> Result<(), Error> {
        let (storage, destination) = (self.connection.storage().clone(), destination.to_owned());
        let request = async move {
            Outbox::release(&storage.outbox(), relay, &destination).await?;
            storage.outgoing().released(relay, &destination);
            Ok(())
        };
        self.connection.call(Call::ReleaseOutgoing, request).await
    }

    async fn set_aside(&self, destination: &str, limit: usize) -> Result<Vec<SetAside>, Error> {
        let storage = self.connection.storage();
        storage.outbox().set_aside(destination, limit).await
    }

    async fn requeue(&self, destination: &str, ids: &[OutgoingId]) -> Result<usize, Error> {
        let storage = self.connection.storage();
        let requeued = storage.outbox().requeue(destination, ids).await?;
        storage.outgoing().requeued(ids);
        Ok(requeued)
    }
}
