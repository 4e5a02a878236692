//! Source, store, transaction and sink with the instrument around every call. They add nothing else.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, Delivery, Disposition, ExtendResult, Fenced, Fetch,
    FetchResult, HeldClaim, LookUp, Outbox, OutboxSettlement, OutgoingId, Owner, QueueInfo,
    Receipt, ReceiveLimits, SetAside, SettleResult, Settlement, Sink, SinkInfo, Source, Store,
    StoreInfo, Transaction, TransactionalStore, Verdicts,
};
use onlyonce_core::{Error, Message};

use super::instrument::Instrument;

pub struct Watched<T> {
    pub inner: T,
    pub instrument: Arc<Instrument>,
}

impl<T> Watched<T> {
    pub fn new(inner: T, instrument: &Arc<Instrument>) -> Self {
        Self {
            inner,
            instrument: instrument.clone(),
        }
    }
}

/// A batch that settles in several ways is named after the rarest.
fn settling(batch: &[Settlement]) -> &'static str {
    let any = |is: fn(&Disposition) -> bool| batch.iter().any(|s| is(&s.disposition));
    if any(|disposition| matches!(disposition, Disposition::DeadLetter { .. })) {
        "settle, dead letter"
    } else if any(|disposition| matches!(disposition, Disposition::Nack { .. })) {
        "settle, nack"
    } else {
        "settle, ack"
    }
}

#[async_trait]
impl<S: Source> Source for Watched<S> {
    fn name(&self) -> &str {
        self.inner.name()
    }
    async fn receive(&self, limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        let call = self.inner.receive(limits);
        self.instrument.watch("receive", call).await
    }
    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let call = self.inner.settle(batch);
        self.instrument.watch(settling(batch), call).await
    }
    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        let call = self.inner.extend(batch, lease);
        self.instrument.watch("extend", call).await
    }
    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        self.inner.queue_info().await
    }
    async fn close(&self) -> Result<(), Error> {
        self.inner.close().await
    }
}

#[async_trait]
impl<S: Store> Store for Watched<S> {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        self.inner.store_info().await
    }
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        let call = self.inner.claim(owner, batch, lease);
        self.instrument.watch("claim", call).await
    }
    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        let call = self.inner.renew(batch, lease);
        self.instrument.watch("renew", call).await
    }
    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        let call = self.inner.start(batch);
        self.instrument.watch("start", call).await
    }
    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        let call = self.inner.complete(batch);
        self.instrument.watch("complete", call).await
    }
    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        let call = self.inner.release(batch);
        self.instrument.watch("release", call).await
    }
    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        let call = self.inner.prune(limit);
        self.instrument.watch("prune", call).await
    }
}

#[async_trait]
impl<S: TransactionalStore> TransactionalStore for Watched<S> {
    type Tx = Watched<S::Tx>;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        let call = self.inner.look_up(batch);
        self.instrument.watch("look up", call).await
    }

    async fn begin(&self) -> Result<Self::Tx, Error> {
        let tx = self.instrument.watch("begin", self.inner.begin()).await?;
        Ok(Watched::new(tx, &self.instrument))
    }

    async fn begin_alone(&self) -> Result<Self::Tx, Error> {
        let call = self.inner.begin_alone();
        let tx = self.instrument.watch("begin alone", call).await?;
        Ok(Watched::new(tx, &self.instrument))
    }
}

#[async_trait]
impl<T: Transaction> Transaction for Watched<T> {
    async fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        let call = self.inner.complete(completions);
        self.instrument.watch("complete in transaction", call).await
    }
    async fn rollback(&mut self) -> Result<(), Error> {
        self.instrument
            .watch("rollback", self.inner.rollback())
            .await
    }
    fn is_conflict(&self, error: &(dyn std::error::Error + 'static)) -> bool {
        self.inner.is_conflict(error)
    }
    async fn commit(self) -> Result<(), Error> {
        self.instrument.watch("commit", self.inner.commit()).await
    }
    async fn complete_and_commit(self, last: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        let call = self.inner.complete_and_commit(last);
        self.instrument.watch("complete and commit", call).await
    }
}

#[async_trait]
impl<S: Sink> Sink for Watched<S> {
    fn name(&self) -> &str {
        self.inner.name()
    }
    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        self.inner.sink_info().await
    }
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        let call = self.inner.publish(batch);
        self.instrument.watch("publish dead letter", call).await
    }
    async fn close(&self) -> Result<(), Error> {
        self.inner.close().await
    }
}

/// Where a relay publishes to.
pub struct Downstream<S>(pub Watched<S>);

#[async_trait]
impl<S: Sink> Sink for Downstream<S> {
    fn name(&self) -> &str {
        self.0.inner.name()
    }
    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        self.0.inner.sink_info().await
    }
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        let call = self.0.inner.publish(batch);
        self.0.instrument.watch("relay publishes", call).await
    }
    async fn close(&self) -> Result<(), Error> {
        self.0.inner.close().await
    }
}

#[async_trait]
impl<O: Outbox> Outbox for Watched<O> {
    fn name(&self) -> &str {
        self.inner.name()
    }
    async fn fetch(&self, destination: &str, fetch: Fetch) -> Result<FetchResult, Error> {
        let call = self.inner.fetch(destination, fetch);
        self.instrument.watch("outbox fetch", call).await
    }
    async fn settle(
        &self,
        relay: Owner,
        destination: &str,
        batch: &[OutboxSettlement],
    ) -> Result<Verdicts, Error> {
        let call = self.inner.settle(relay, destination, batch);
        self.instrument.watch("outbox settle", call).await
    }
    async fn wait(&self, destination: &str, mark: u64, longest: Duration) -> Result<(), Error> {
        let call = self.inner.wait(destination, mark, longest);
        self.instrument.watch("outbox wait", call).await
    }
    async fn release(&self, relay: Owner, destination: &str) -> Result<(), Error> {
        let call = self.inner.release(relay, destination);
        self.instrument.watch("outbox release", call).await
    }
    async fn set_aside(&self, destination: &str, limit: usize) -> Result<Vec<SetAside>, Error> {
        self.inner.set_aside(destination, limit).await
    }
    async fn requeue(&self, destination: &str, ids: &[OutgoingId]) -> Result<usize, Error> {
        self.inner.requeue(destination, ids).await
    }
}
