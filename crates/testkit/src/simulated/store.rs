use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use onlyonce_core::Error;
use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, Durability, Fetch, FetchResult, HeldClaim, KeyDigest, LookUp,
    Outbox as _, OutgoingId, Owner, Precondition, SetAside, Store, StoreInfo, Token,
    TransactionalStore, Verdicts,
};
use onlyonce_core::memory::{MemoryOutbox, MemoryStore};

use super::faults::{Call, Faults};
use super::network::send;
use super::outbox::OutboxConnection;
use super::outgoing::{Committed, Outgoings, label};
use super::tx::Tx;

/// What the store has answered so far.
#[derive(Debug, Default)]
struct Seen {
    newest: HashMap<KeyDigest, Token>,
    done: HashSet<KeyDigest>,
    /// All that was recorded, in a transaction or not.
    recorded: HashSet<KeyDigest>,
    /// Claims whose start was asked for.
    started: HashMap<KeyDigest, HashSet<Token>>,
    breaches: Vec<String>,
}

/// The server of a [`MemoryStore`], reached over a bad network.
#[derive(Clone, Debug)]
pub struct Storage {
    records: MemoryStore,
    seen: Arc<Mutex<Seen>>,
    outgoing: Arc<Mutex<Outgoings>>,
    faults: Faults,
}

impl Storage {
    /// An empty store.
    #[must_use]
    pub fn new(faults: &Faults) -> Self {
        Self {
            records: MemoryStore::new(),
            seen: Arc::default(),
            outgoing: Arc::default(),
            faults: faults.clone(),
        }
    }

    /// Refuses to commit the effects for which `is_refused` says so.
    #[must_use]
    pub fn refusing(mut self, is_refused: fn(&[u8]) -> bool) -> Self {
        self.records = self.records.refusing(is_refused);
        self
    }

    /// Every effect that was committed, in that order.
    #[must_use]
    pub fn effects(&self) -> Vec<Bytes> {
        self.records.effects()
    }

    /// Whether a [`complete`](Store::complete) has recorded this key.
    #[must_use]
    pub fn is_done(&self, key: &KeyDigest) -> bool {
        self.seen().done.contains(key)
    }

    /// How many claims of this key workers have asked to be marked as [started](Store::start).
    #[must_use]
    pub fn starts(&self, key: &KeyDigest) -> usize {
        self.seen().started.get(key).map_or(0, HashSet::len)
    }

    /// Where a promise about the store was broken: a token that was not higher than the one before, one that counted
    /// although it was not the newest, a commit of what should have been rolled back, a message that was published too early, changed or
    /// out of order.
    #[must_use]
    pub fn breaches(&self) -> Vec<String> {
        let mut breaches = self.seen().breaches.clone();
        breaches.extend_from_slice(self.outgoing().breaches());
        breaches
    }

    /// Every message that was committed for a destination, in that order.
    #[must_use]
    pub fn outgoing_messages(&self) -> Vec<Committed> {
        self.outgoing().committed()
    }

    /// How many messages of a destination are in the outbox, those that are set aside too.
    #[must_use]
    pub fn left(&self, destination: &str) -> usize {
        self.outbox().depth(destination)
    }

    /// A relay's way to the outbox.
    #[must_use]
    pub fn relay(&self, relay: u64) -> OutboxConnection {
        OutboxConnection::new(self.connect(relay))
    }

    /// Lets everything that was set aside be published again, as a person does after a fix.
    ///
    /// # Errors
    /// What the outbox in memory says: none.
    pub async fn requeue(&self, destination: &str) -> Result<(), Error> {
        let outbox = self.outbox();
        let set_aside = outbox.set_aside(destination, usize::MAX).await?;
        let id = |one: &SetAside| one.outgoing.id;
        let ids: Vec<OutgoingId> = set_aside.iter().map(id).collect();
        outbox.requeue(destination, &ids).await?;
        self.outgoing().requeued(&ids);
        Ok(())
    }

    pub(super) fn outbox(&self) -> MemoryOutbox {
        self.records.outbox()
    }

    pub(super) fn outgoing(&self) -> MutexGuard<'_, Outgoings> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn fetched(
        &self,
        relay: u64,
        destination: &str,
        fetch: &Fetch,
        answer: &FetchResult,
    ) {
        self.faults.log(|| match answer {
            FetchResult::Busy { .. } => format!("relay {relay} finds {destination} leased"),
            FetchResult::Fetched { messages, .. } => {
                let labels = messages.iter().map(|one| label(&one.message));
                let labels: Vec<_> = labels.collect();
                format!("relay {relay} fetches {labels:?} for {destination}")
            }
        });
        self.outgoing().fetched(relay, destination, fetch, answer);
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claimed(&self, worker: u64, batch: &[Claim], answers: &[ClaimResult]) {
        let mut seen = self.seen();
        for (claim, answer) in batch.iter().zip(answers) {
            (self.faults).log(|| format!("worker {worker} claims {:?}: {answer:?}", claim.key));
            if let ClaimResult::Acquired { token, .. } = answer
                && let Some(before) = seen.newest.insert(claim.key, *token)
                && before >= *token
            {
                seen.breaches
                    .push(format!("{token:?} was given after {before:?}"));
            }
        }
    }

    /// The store accepted this token.
    pub(super) fn accepted(&self, what: &str, held: &HeldClaim) {
        let mut seen = self.seen();
        if seen.newest.get(&held.key) != Some(&held.token) {
            let token = held.token;
            seen.breaches.push(format!(
                "the store let {token:?} {what} although it was not the newest"
            ));
        }
    }

    /// The store made a record under this precondition.
    pub(super) fn recorded(&self, what: &str, precondition: &Precondition) {
        match precondition {
            Precondition::Claim(held) => self.accepted(what, held),
            Precondition::NoRecord(_) => {}
        }
        let key = precondition.key();
        if !self.seen().recorded.insert(key) {
            self.breach(&format!("the store let {what} record {key:?} once more"));
        }
    }

    pub(super) fn breach(&self, what: &str) {
        self.seen().breaches.push(what.into());
    }

    fn accepted_all(&self, what: &str, batch: &[HeldClaim], verdicts: &Verdicts) {
        let accepted = batch.iter().zip(verdicts).filter(|(_, v)| v.is_ok());
        accepted.for_each(|(held, _)| self.accepted(what, held));
    }

    /// A worker's way to it.
    #[must_use]
    pub fn connect(&self, worker: u64) -> Connection {
        Connection {
            storage: Arc::new(self.clone()),
            worker,
            second: 1.0,
        }
    }
}

/// One worker's connection to a [`Storage`].
#[derive(Clone, Debug)]
pub struct Connection {
    storage: Arc<Storage>,
    worker: u64,
    second: f64,
}

impl Connection {
    /// How many seconds a second by this worker's clock is: with more than one it takes claims for longer than they are.
    #[must_use]
    pub fn with_second(mut self, second: f64) -> Self {
        self.second = second;
        self
    }

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

    pub(super) fn storage(&self) -> &Arc<Storage> {
        &self.storage
    }

    fn records(&self) -> MemoryStore {
        self.storage.records.clone()
    }

    pub(super) fn worker(&self) -> u64 {
        self.worker
    }

    pub(super) fn lease(&self, lease: Duration) -> Duration {
        lease.div_f64(self.second)
    }
}

#[async_trait]
impl Store for Connection {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        Ok(StoreInfo::new("simulated", Durability::Disk))
    }
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        let (storage, worker) = (self.storage.clone(), self.worker);
        let (batch, lease) = (batch.to_vec(), self.lease(lease));
        self.call(Call::Claim, async move {
            let answers = storage.records.claim(owner, &batch, lease).await?;
            storage.claimed(worker, &batch, &answers);
            Ok(answers)
        })
        .await
    }

    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        let (storage, batch) = (self.storage.clone(), batch.to_vec());
        let lease = self.lease(lease);
        self.call(Call::Renew, async move {
            let verdicts = storage.records.renew(&batch, lease).await?;
            storage.accepted_all("renew", &batch, &verdicts);
            Ok(verdicts)
        })
        .await
    }

    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        let (storage, batch) = (self.storage.clone(), batch.to_vec());
        for held in &batch {
            let mut seen = storage.seen();
            seen.started.entry(held.key).or_default().insert(held.token);
        }
        self.call(Call::Start, async move {
            let verdicts = storage.records.start(&batch).await?;
            storage.accepted_all("start", &batch, &verdicts);
            Ok(verdicts)
        })
        .await
    }

    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        let (storage, batch) = (self.storage.clone(), batch.to_vec());
        self.call(Call::Complete, async move {
            let verdicts = storage.records.complete(&batch).await?;
            let recorded = batch.iter().zip(&verdicts).filter(|(_, v)| v.is_ok());
            for (completion, _) in recorded {
                let precondition = completion.precondition;
                storage.recorded("complete", &precondition);
                storage.seen().done.insert(precondition.key());
            }
            Ok(verdicts)
        })
        .await
    }

    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        let (storage, batch) = (self.storage.clone(), batch.to_vec());
        self.call(Call::Release, async move {
            let verdicts = storage.records.release(&batch).await?;
            storage.accepted_all("release", &batch, &verdicts);
            Ok(verdicts)
        })
        .await
    }

    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        self.records().prune(limit).await
    }
}

#[async_trait]
impl TransactionalStore for Connection {
    type Tx = Tx;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        let (storage, worker, batch) = (self.storage.clone(), self.worker, batch.to_vec());
        self.call(Call::Claim, async move {
            let answers = storage.records.look_up(&batch).await?;
            for (claim, answer) in batch.iter().zip(&answers) {
                (storage.faults)
                    .log(|| format!("worker {worker} looks up {:?}: {answer:?}", claim.key));
            }
            Ok(answers)
        })
        .await
    }

    async fn begin_alone(&self) -> Result<Tx, Error> {
        self.begin().await
    }

    async fn begin(&self) -> Result<Tx, Error> {
        let records = self.records();
        let inner = self
            .call(Call::Begin, async move { records.begin().await })
            .await?;
        Ok(Tx::new(inner, self.clone()))
    }
}
