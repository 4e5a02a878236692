use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::outbox::Messages;
use super::{MemoryTx, later};
use crate::driver::{
    Claim, ClaimResult, Completion, Durability, Fenced, Fingerprint, HeldClaim, KeyDigest, LookUp,
    LookedUp, Owner, Precondition, Starts, Store, StoreInfo, Token, TransactionalStore, Verdicts,
};
use crate::{Error, ErrorKind};

/// A store in memory; clones share one set of records. Its transactions carry [effects](MemoryTx::push) that become
/// visible in [`effects`](Self::effects) with the record, or not at all; and so do the messages that they
/// [publish](MemoryTx::publish), in its [`outbox`](Self::outbox).
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    records: Arc<Mutex<Records>>,
    /// Wakes all who wait for messages in the outbox.
    pub(super) committed: Arc<Notify>,
}

#[derive(Debug, Default)]
pub(super) struct Records {
    by_key: HashMap<KeyDigest, Record>,
    /// Ends of retention, so that pruning looks only at what it removes.
    expiries: BTreeSet<(Instant, KeyDigest)>,
    /// One counter for all keys: a key that was released and forgotten still never sees a lower token.
    last_token: u64,
    /// When the first key was looked up; look-ups count milliseconds from then.
    began: Option<Instant>,
    pub(super) effects: Vec<Bytes>,
    pub(super) outgoing: Messages,
    pub(super) is_refused: Option<fn(&[u8]) -> bool>,
}

#[derive(Debug)]
struct Record {
    fingerprint: Fingerprint,
    state: State,
}

impl Record {
    /// Whether the key belongs to its payload: an expired claim that was never started has had no effect.
    fn is_binding(&self, now: Instant) -> bool {
        match self.state {
            State::Claimed { until, starts, .. } => starts.is_some() || until > now,
            State::Done { .. } => true,
        }
    }
}

#[derive(Debug)]
enum State {
    Claimed {
        owner: Owner,
        token: Token,
        until: Instant,
        starts: Option<Starts>,
        takeovers: u32,
    },
    Done {
        outcome: Option<Bytes>,
    },
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Refuses to commit the effects and to record the outcomes for which `is_refused` says so, as a database does whose
    /// constraint is broken.
    #[must_use]
    pub fn refusing(self, is_refused: fn(&[u8]) -> bool) -> Self {
        self.lock().is_refused = Some(is_refused);
        self
    }

    /// Every effect that was committed, in that order.
    #[must_use]
    pub fn effects(&self) -> Vec<Bytes> {
        self.lock().effects.clone()
    }

    /// Forgets all claims and keeps all records: what a crash of a real store may do.
    pub fn forget_claims(&self) {
        let done = |record: &Record| matches!(record.state, State::Done { .. });
        self.lock().by_key.retain(|_, record| done(record));
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn each<T>(
        &self,
        batch: &[T],
        one: impl FnMut(&mut Records, &T) -> Result<(), Fenced>,
    ) -> Verdicts {
        let (mut records, mut one) = (self.lock(), one);
        batch.iter().map(|entry| one(&mut records, entry)).collect()
    }
}

impl Records {
    fn clock(&mut self) -> u64 {
        let now = Instant::now();
        millis(now - *self.began.get_or_insert(now))
    }

    fn look_up(&mut self, claim: &Claim) -> LookUp {
        let at = self.clock();
        let Some(record) = self.by_key.get(&claim.key) else {
            return LookUp::New(LookedUp::new(claim.key, at));
        };
        match &record.state {
            State::Claimed { .. } => LookUp::Claimed,
            State::Done { .. } if record.fingerprint != claim.fingerprint => {
                LookUp::PayloadMismatch
            }
            State::Done { outcome } => LookUp::Completed {
                outcome: outcome.clone(),
            },
        }
    }

    /// `first` is the first token that this batch can give: a claim with such a token was made by the batch itself.
    fn claim(&mut self, owner: Owner, claim: &Claim, until: Instant, first: Token) -> ClaimResult {
        let now = Instant::now();
        let (mut in_doubt, mut takeovers) = (None, 0);
        if let Some(record) = self.by_key.get(&claim.key) {
            if record.fingerprint != claim.fingerprint && record.is_binding(now) {
                return ClaimResult::PayloadMismatch;
            }
            match &record.state {
                State::Done { outcome } => {
                    return ClaimResult::Completed {
                        outcome: outcome.clone(),
                    };
                }
                State::Claimed {
                    owner: holder,
                    token,
                    until,
                    ..
                } if *until > now && (*holder != owner || *token >= first) => {
                    return ClaimResult::InProgress {
                        retry_in: *until - now,
                    };
                }
                State::Claimed {
                    starts,
                    until,
                    takeovers: before,
                    ..
                } => {
                    in_doubt = *starts;
                    takeovers = before.saturating_add(u32::from(*until <= now));
                }
            }
        }
        self.last_token += 1;
        let token = Token(self.last_token);
        let record = Record {
            fingerprint: claim.fingerprint,
            state: State::Claimed {
                owner,
                token,
                until,
                // Kept: if this claim expires too, the next must still hear of it.
                starts: in_doubt,
                takeovers,
            },
        };
        self.by_key.insert(claim.key, record);
        ClaimResult::Acquired {
            token,
            in_doubt,
            takeovers,
        }
    }

    /// The lease and the marked starts of the claim, if its token is still the newest.
    fn held(&mut self, held: &HeldClaim) -> Result<(&mut Instant, &mut Option<Starts>), Fenced> {
        match self.by_key.get_mut(&held.key).map(|r| &mut r.state) {
            Some(State::Claimed {
                token,
                until,
                starts,
                ..
            }) if *token == held.token => Ok((until, starts)),
            _ => Err(Fenced),
        }
    }

    /// Whether the precondition holds.
    pub(super) fn verify(&mut self, completion: &Completion) -> Result<(), Fenced> {
        match &completion.precondition {
            Precondition::Claim(held) => self.held(held).map(|_| ()),
            Precondition::NoRecord(looked_up) => self.no_record(looked_up, completion.retention),
        }
    }

    /// Whether there is no record, and none can have been pruned since.
    fn no_record(&mut self, looked_up: &LookedUp, retention: Duration) -> Result<(), Fenced> {
        let is_done = |record: &Record| matches!(record.state, State::Done { .. });
        let ends = looked_up.at.saturating_add(millis(retention));
        match self.by_key.get(&looked_up.key).is_some_and(is_done) || self.clock() >= ends {
            true => Err(Fenced),
            false => Ok(()),
        }
    }

    /// Whether it may all be written.
    pub(super) fn accept<'a>(
        &self,
        written: impl IntoIterator<Item = &'a Bytes>,
    ) -> Result<(), Error> {
        let is_refused = self.is_refused.unwrap_or(|_| false);
        match written.into_iter().find(|bytes| is_refused(bytes)) {
            Some(bytes) => Err(Error::new(
                ErrorKind::Refused,
                format!("the store refuses {bytes:?}"),
            )),
            None => Ok(()),
        }
    }

    pub(super) fn complete(&mut self, completion: &Completion) -> Result<(), Fenced> {
        self.verify(completion)?;
        let key = completion.precondition.key();
        let expires = later(Instant::now(), completion.retention);
        self.expiries.insert((expires, key));
        let record = Record {
            fingerprint: completion.fingerprint,
            state: State::Done {
                outcome: completion.outcome.clone(),
            },
        };
        self.by_key.insert(key, record);
        Ok(())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[async_trait]
impl Store for MemoryStore {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        Ok(StoreInfo::new("memory", Durability::Process))
    }
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        let mut records = self.lock();
        let first = Token(records.last_token + 1);
        let until = later(Instant::now(), lease);
        let claim = |one| records.claim(owner, one, until, first);
        Ok(batch.iter().map(claim).collect())
    }

    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        let end = later(Instant::now(), lease);
        Ok(self.each(batch, |records, held| {
            records.held(held).map(|(until, _)| *until = end)
        }))
    }

    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        Ok(self.each(batch, |records, held| {
            let (_, starts) = records.held(held)?;
            *starts = Some(Starts::with(*starts, held.token));
            Ok(())
        }))
    }

    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        self.lock()
            .accept(batch.iter().filter_map(|one| one.outcome.as_ref()))?;
        Ok(self.each(batch, Records::complete))
    }

    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        Ok(self.each(batch, |records, held| {
            records.held(held)?;
            records.by_key.remove(&held.key);
            Ok(())
        }))
    }

    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        let mut records = self.lock();
        let now = Instant::now();
        let mut removed = 0;
        while removed < limit
            && let Some(&(at, key)) = records.expiries.first()
            && at <= now
        {
            records.expiries.pop_first();
            records.by_key.remove(&key);
            removed += 1;
        }
        Ok(removed)
    }
}

#[async_trait]
impl TransactionalStore for MemoryStore {
    type Tx = MemoryTx;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        let mut records = self.lock();
        Ok(batch.iter().map(|claim| records.look_up(claim)).collect())
    }

    async fn begin(&self) -> Result<MemoryTx, Error> {
        Ok(MemoryTx::new(self.clone()))
    }

    /// No commit is shared.
    async fn begin_alone(&self) -> Result<MemoryTx, Error> {
        self.begin().await
    }
}
