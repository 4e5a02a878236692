use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use onlyonce_core::memory::MemoryStore;
use onlyonce_core::{
    Claim, Claimed, Completion, Error, Held, KeyDigest, Owner, Store, TransactionalStore, Verdicts,
};

use super::faults::{Call, Faults};
use super::network::send;
use super::tx::Tx;

/// The server of a [`MemoryStore`], reached over a bad network.
#[derive(Clone, Debug)]
pub struct Storage {
    records: MemoryStore,
    done: Arc<Mutex<HashSet<KeyDigest>>>,
    faults: Faults,
    drift: f64,
}

impl Storage {
    /// An empty store.
    pub fn new(faults: &Faults) -> Self {
        Self {
            records: MemoryStore::new(),
            done: Arc::default(),
            faults: faults.clone(),
            drift: 1.0,
        }
    }

    /// A claim of one second lasts so many seconds by the clock of the workers.
    #[must_use]
    pub fn with_drift(mut self, drift: f64) -> Self {
        self.drift = drift;
        self
    }

    /// Every effect that was committed, in that order.
    pub fn effects(&self) -> Vec<Bytes> {
        self.records.effects()
    }

    /// Whether a [`complete`](Store::complete) has recorded this key.
    pub fn is_done(&self, key: &KeyDigest) -> bool {
        self.done().contains(key)
    }

    fn done(&self) -> MutexGuard<'_, HashSet<KeyDigest>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker's way to it.
    pub fn connect(&self, worker: u64) -> Connection {
        Connection {
            storage: Arc::new(self.clone()),
            worker,
        }
    }
}

/// One worker's connection to a [`Storage`].
#[derive(Clone, Debug)]
pub struct Connection {
    storage: Arc<Storage>,
    worker: u64,
}

impl Connection {
    pub(super) async fn call<T: Send + 'static>(
        &self,
        call: Call,
        request: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let disturbance = self.storage.faults.on(self.worker, call);
        if disturbance.amnesia {
            self.storage.records.forget_claims();
        }
        send(&disturbance, request).await?
    }

    /// A call whose effect is on the client's side of the connection.
    pub(super) async fn pass(&self, call: Call) -> Result<(), Error> {
        self.call(call, async { Ok(()) }).await
    }

    fn records(&self) -> MemoryStore {
        self.storage.records.clone()
    }

    fn lease(&self, lease: Duration) -> Duration {
        lease.mul_f64(self.storage.drift)
    }
}

#[async_trait]
impl Store for Connection {
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<Claimed>, Error> {
        let (storage, worker) = (self.storage.clone(), self.worker);
        let (batch, lease) = (batch.to_vec(), self.lease(lease));
        self.call(Call::Claim, async move {
            let answers = storage.records.claim(owner, &batch, lease).await?;
            for (claim, answer) in batch.iter().zip(&answers) {
                (storage.faults)
                    .log(|| format!("worker {worker} claims {:?}: {answer:?}", claim.key));
            }
            Ok(answers)
        })
        .await
    }

    async fn renew(&self, batch: &[Held], lease: Duration) -> Result<Verdicts, Error> {
        let (records, batch, lease) = (self.records(), batch.to_vec(), self.lease(lease));
        self.call(
            Call::Renew,
            async move { records.renew(&batch, lease).await },
        )
        .await
    }

    async fn start(&self, batch: &[Held]) -> Result<Verdicts, Error> {
        let (records, batch) = (self.records(), batch.to_vec());
        self.call(Call::Start, async move { records.start(&batch).await })
            .await
    }

    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        let (storage, batch) = (self.storage.clone(), batch.to_vec());
        self.call(Call::Complete, async move {
            let verdicts = storage.records.complete(&batch).await?;
            let recorded = batch.iter().zip(&verdicts).filter(|(_, v)| v.is_ok());
            storage.done().extend(recorded.map(|(one, _)| one.held.key));
            Ok(verdicts)
        })
        .await
    }

    async fn release(&self, batch: &[Held]) -> Result<Verdicts, Error> {
        let (records, batch) = (self.records(), batch.to_vec());
        self.call(Call::Release, async move { records.release(&batch).await })
            .await
    }

    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        self.records().prune(limit).await
    }
}

#[async_trait]
impl TransactionalStore for Connection {
    type Tx = Tx;

    async fn begin(&self) -> Result<Tx, Error> {
        let records = self.records();
        let inner = self
            .call(Call::Begin, async move { records.begin().await })
            .await?;
        Ok(Tx::new(inner, self.clone()))
    }
}
