use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::Error;
use crate::driver::{Fingerprint, KeyDigest};

/// A fencing token: of two claims on one key, the later has the higher token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// Who claims: one random number per running pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner(pub u64);

impl Owner {
    /// A new owner, different from every other for all practical purposes.
    #[must_use]
    pub fn random() -> Self {
        Self(fastrand::u64(1..i64::MAX as u64))
    }
}

/// A wish to own one key for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Claim {
    /// Digest of scope and dedup key.
    pub key: KeyDigest,
    /// Digest of the payload.
    pub fingerprint: Fingerprint,
}

impl Claim {
    /// A wish to own this key for this payload.
    #[must_use]
    pub fn new(key: KeyDigest, fingerprint: Fingerprint) -> Self {
        Self { key, fingerprint }
    }
}

/// The store's answer to a [`Claim`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimResult {
    /// The key is ours until the lease ends.
    Acquired {
        /// Higher than every token given for this key before.
        token: Token,
        /// Claims of this key that were marked as started, if any was: the effect may or may not have happened. The marks
        /// outlive takeovers, until a claim is completed or released.
        in_doubt: Option<Starts>,
        /// How many claims of this key before this one, in a row, have expired: their owners neither completed nor released
        /// them. Where the broker does not count deliveries, this is how many workers may have died of the message.
        takeovers: u32,
    },
    /// It took effect before.
    Completed {
        /// What was recorded with it.
        outcome: Option<Bytes>,
    },
    /// Someone else owns the key.
    InProgress {
        /// When to ask again: the rest of the owner's lease, by the store's clock.
        retry_in: Duration,
    },
    /// The key was used for another payload: by a record, by a live claim, or by one that has expired but was marked as
    /// started. An expired claim that was never started had no effect: it is taken over, whatever its payload was.
    PayloadMismatch,
}

/// Claims of one key that were marked as [started](Store::start) since one was completed or released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Starts {
    /// The token of the last of them.
    pub last: Token,
    /// How many they are. A claim that is marked twice counts once.
    pub count: u32,
}

impl Starts {
    /// This many claims, of which the last had this token.
    #[must_use]
    pub fn new(last: Token, count: u32) -> Self {
        Self { last, count }
    }
}

impl Starts {
    /// These, and the claim with this token.
    #[must_use]
    pub fn with(before: Option<Self>, token: Token) -> Self {
        match before {
            Some(starts) if starts.last == token => starts,
            before => Self {
                last: token,
                count: before.map_or(0, |starts| starts.count).saturating_add(1),
            },
        }
    }
}

/// A claim that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeldClaim {
    /// The key.
    pub key: KeyDigest,
    /// The token it was claimed with.
    pub token: Token,
}

impl HeldClaim {
    /// The claim of this key under this token.
    #[must_use]
    pub fn new(key: KeyDigest, token: Token) -> Self {
        Self { key, token }
    }
}

/// A key of which there was no record, and no claim, when it was [looked up](TransactionalStore::look_up).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LookedUp {
    /// The key.
    pub key: KeyDigest,
    /// When that was, by the store's own clock and in its own unit.
    pub at: u64,
}

impl LookedUp {
    /// There was nothing under this key then.
    #[must_use]
    pub fn new(key: KeyDigest, at: u64) -> Self {
        Self { key, at }
    }
}

/// The store's answer to a [look-up](TransactionalStore::look_up).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LookUp {
    /// There is no record and no claim.
    New(LookedUp),
    /// It took effect before.
    Completed {
        /// What was recorded with it.
        outcome: Option<Bytes>,
    },
    /// There is a claim, live or expired. To [claim](Store::claim) the key tells what it means.
    Claimed,
    /// The key was recorded for another payload.
    PayloadMismatch,
}

/// What must be so for a record to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precondition {
    /// The claim under this token is the key's newest.
    Claim(HeldClaim),
    /// The key has no record, and had none since it was looked up. A claim of somebody else does not count: it is
    /// [`Fenced`] from then on.
    NoRecord(LookedUp),
}

impl Precondition {
    /// The key of the record.
    #[must_use]
    pub fn key(&self) -> KeyDigest {
        match self {
            Self::Claim(held) => held.key,
            Self::NoRecord(looked_up) => looked_up.key,
        }
    }

    /// The claim, if it is one.
    #[must_use]
    pub fn claim(&self) -> Option<HeldClaim> {
        match self {
            Self::Claim(held) => Some(*held),
            Self::NoRecord(_) => None,
        }
    }
}

impl From<HeldClaim> for Precondition {
    fn from(held: HeldClaim) -> Self {
        Self::Claim(held)
    }
}

impl From<LookedUp> for Precondition {
    fn from(looked_up: LookedUp) -> Self {
        Self::NoRecord(looked_up)
    }
}

/// The record that a message took effect.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Completion {
    /// What must be so for it to be made.
    pub precondition: Precondition,
    /// Digest of the payload.
    pub fingerprint: Fingerprint,
    /// What to hand to later duplicates.
    pub outcome: Option<Bytes>,
    /// How long the record is kept at least.
    pub retention: Duration,
}

impl Completion {
    /// The record of what took effect under this precondition.
    #[must_use]
    pub fn new(
        precondition: impl Into<Precondition>,
        fingerprint: Fingerprint,
        outcome: Option<Bytes>,
        retention: Duration,
    ) -> Self {
        Self {
            precondition: precondition.into(),
            fingerprint,
            outcome,
            retention,
        }
    }
}

/// The precondition does not hold: the token is no longer the key's newest, since somebody took the key over; or it is done
/// already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fenced;

/// One verdict per entry of a batch.
pub type Verdicts = Vec<Result<(), Fenced>>;

/// What is kept of what was confirmed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Durability {
    /// Nothing, once this process has ended.
    Process,
    /// All, until the machine or the server that has it fails.
    Machine,
    /// All: it was synced to disk before it was confirmed.
    #[default]
    Disk,
}

/// What a store is, and how well it keeps what it has confirmed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreInfo {
    /// The store's name, for people. It holds no secret.
    pub name: String,
    /// What is kept of the records that it has confirmed.
    pub durability: Durability,
    /// Why it can drop a record before its retention has passed (a limit of memory, say), and what to set so that it does not,
    /// for people; `None` where it does not, as far as is known.
    pub evicts: Option<String>,
    /// Why a failover can lose what it has confirmed (a replica that follows later), and what to set so that it does not, for
    /// people; `None` where it cannot, as far as is known.
    pub lags: Option<String>,
    /// How many transactions can be under way at once; `None`: any number. Others wait.
    pub transactions: Option<usize>,
    /// Other settings that decide how it behaves, under its own names, for people.
    pub settings: Vec<(String, String)>,
    /// What could not be found out, each with the reason, for people.
    pub unknown: Vec<String>,
}

impl StoreInfo {
    /// A store of which no more is known.
    pub fn new(name: impl Into<String>, durability: Durability) -> Self {
        Self {
            name: name.into(),
            durability,
            evicts: None,
            lags: None,
            transactions: None,
            settings: Vec::new(),
            unknown: Vec::new(),
        }
    }
}

/// Where it is remembered which messages took effect.
///
/// One record per key: absent, claimed by an owner under a token until a time, or done. Expiry is judged by the store's
/// own clock. Every call takes a batch, answers each entry in the same order, and treats the batch as if its entries
/// came one after another (two claims on one key: the second is `InProgress`, although its owner is the same).
///
/// Only `complete` must be durable when it returns. A claim may be forgotten if the store itself crashes; tokens stay
/// monotonic even so.
///
/// All methods may be called concurrently and by many processes. Each tries once: the caller retries. An error means
/// that the batch may or may not have been applied; of kind [`Refused`](crate::ErrorKind::Refused), that nothing of it was.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Looks at the store: it can be used, and how it is set. The pipeline asks once, before it receives.
    ///
    /// # Errors
    /// The store is not there or cannot be used: this ends the pipeline. Connection errors are retryable, and the pipeline
    /// asks again.
    async fn store_info(&self) -> Result<StoreInfo, Error>;

    /// Claims keys for `lease`. A live claim of the *same* owner that an *earlier call* made is taken over with a higher
    /// token, so a claim whose answer was lost can be asked for again.
    ///
    /// # Errors
    /// One that is not retryable ends the pipeline. Otherwise the pipeline asks again.
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error>;

    /// Renews claims so that they end `lease` from now. A claim that expired but was not taken over is renewed.
    ///
    /// # Errors
    /// None ends the pipeline. It tries again until the claims end; what runs under them is then cut off.
    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error>;

    /// Marks claims as started, so that whoever claims the key next is told of it by
    /// [`in_doubt`](ClaimResult::Acquired::in_doubt).
    ///
    /// # Errors
    /// None ends the pipeline. The handler does not run, and the key is claimed again.
    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error>;

    /// Turns claims into durable records. An expired claim that was not taken over completes.
    ///
    /// # Errors
    /// None ends the pipeline. It tries again what is retryable, for as long as a claim lasts. What is refused counts as a failed
    /// attempt, once it is known whose doing it is; after any other error the keys are claimed again, which tells.
    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error>;

    /// Gives claims up: the keys are as if never claimed.
    ///
    /// # Errors
    /// None ends the pipeline: the claims end by themselves.
    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error>;

    /// Removes at most `limit` records whose retention has passed, and returns how many it removed. What a store drops as a whole
    /// counts as nothing. Claims stay, even expired ones: they are the only witness of an outcome in doubt.
    ///
    /// # Errors
    /// None ends the pipeline: it tries again later.
    async fn prune(&self, limit: usize) -> Result<usize, Error>;
}

/// A store whose transactions can carry the user's effects beside the record.
#[async_trait]
pub trait TransactionalStore: Store {
    /// The transaction that handlers get as `&mut Tx`.
    type Tx: Transaction;

    /// Looks keys up, and writes nothing. What is [new](LookUp::New) may run without a claim: its record is made in the
    /// effect's transaction, and only if there is still none. So two that run one message at the same time both work, and one
    /// of them commits.
    ///
    /// A completion under [`Precondition::NoRecord`] is [`Fenced`] once its retention has passed since the look-up, by the
    /// store's clock: another's record may have been made and [pruned](Store::prune) meanwhile.
    ///
    /// # Errors
    /// As [`claim`](Store::claim).
    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error>;

    /// Begins a transaction. It may wait for others to end when it is first used, and share its commit with them.
    ///
    /// # Errors
    /// None ends the pipeline: the message is claimed again, and tried again.
    async fn begin(&self) -> Result<Self::Tx, Error>;

    /// Begins a transaction that shares its commit with no other, so that a [refusal](crate::ErrorKind::Refused) is its own
    /// doing.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    async fn begin_alone(&self) -> Result<Self::Tx, Error>;
}

/// A database transaction that several messages may share, one after another. Each message has a savepoint, which ends in
/// [`complete`](Self::complete) or [`rollback`](Self::rollback). Dropping the transaction rolls back everything.
///
/// Every method has three answers: done, refused, unknown. An error of kind [`Refused`](crate::ErrorKind::Refused) means
/// that nothing of the whole transaction happened or will, because the store refused what it did (a constraint that is
/// checked at the commit, SQL that rolled all of it back, a limit). With one message, begun
/// [alone](TransactionalStore::begin_alone), it is that message's failure; otherwise it may be another's, and each is done
/// again alone. After one of kind [`Conflict`](crate::ErrorKind::Conflict) nothing happened either, and they are done again, too; that
/// is nobody's failure. After any other error it is unknown what happened, and the next [claim](Store::claim) tells. None ends
/// the pipeline.
#[async_trait]
pub trait Transaction: Send + 'static {
    /// Ends the current savepoint: records that its messages took effect, all of them or none. If a precondition does not hold
    /// it is `Fenced`; then, and on an error, the savepoint is rolled back. Each key is in it once.
    ///
    /// Where another transaction that is still open has recorded the same key, it waits for that to end, for as long as the
    /// store lets anything wait for a lock.
    async fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, Error>;

    /// Rolls back what was done since the last savepoint ended.
    async fn rollback(&mut self) -> Result<(), Error>;

    /// Whether this error of a handler's says that another transaction was in its way. If so the message is done again, and that
    /// is no attempt of its.
    fn is_conflict(&self, error: &(dyn StdError + 'static)) -> bool;

    /// Commits every completed savepoint, durably.
    async fn commit(self) -> Result<(), Error>;

    /// [`complete`](Self::complete), then [`commit`](Self::commit): one round trip for the last savepoint, where the store
    /// has one to save. If that is `Fenced`, those before it are committed all the same.
    async fn complete_and_commit(mut self, last: &[Completion]) -> Result<Result<(), Fenced>, Error>
    where
        Self: Sized,
    {
        let verdict = self.complete(last).await?;
        self.commit().await?;
        Ok(verdict)
    }
}

#[async_trait]
impl<S: Store + ?Sized> Store for Arc<S> {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        (**self).store_info().await
    }
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        (**self).claim(owner, batch, lease).await
    }
    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        (**self).renew(batch, lease).await
    }
    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        (**self).start(batch).await
    }
    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        (**self).complete(batch).await
    }
    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        (**self).release(batch).await
    }
    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        (**self).prune(limit).await
    }
}

#[async_trait]
impl<S: TransactionalStore + ?Sized> TransactionalStore for Arc<S> {
    type Tx = S::Tx;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        (**self).look_up(batch).await
    }
    async fn begin(&self) -> Result<Self::Tx, Error> {
        (**self).begin().await
    }
    async fn begin_alone(&self) -> Result<Self::Tx, Error> {
        (**self).begin_alone().await
    }
}
