use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, timeout};

use crate::driver::{ExtendResult, HeldClaim, Receipt, Source, Store};

use super::lease_state::LeaseState;

/// Knows every lease and claim that must be renewed, and renews them together, in batches, [in time](extended_after).
/// What fails is tried again at every tick until the deadline; the workers watch the deadlines themselves, so a renewer
/// that hangs lets nothing run on.
pub(crate) struct LeaseRenewer {
    kept: Mutex<BTreeMap<u64, Arc<LeaseState>>>,
}

/// A lease's place with the renewer; given up on drop.
pub(crate) struct Renewal {
    renewer: Arc<LeaseRenewer>,
    seq: u64,
}

impl Drop for Renewal {
    fn drop(&mut self) {
        self.renewer.kept().remove(&self.seq);
    }
}

/// How long after its beginning a lease is extended: early enough for several tries.
pub(crate) fn extended_after(length: Duration) -> Duration {
    length / 3
}

/// Whether it is time to extend what lasts for `length` and ends at `deadline`.
fn due(deadline: Instant, length: Duration) -> bool {
    deadline.saturating_duration_since(Instant::now()) < length - extended_after(length)
}

impl LeaseRenewer {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            kept: Mutex::default(),
        })
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<LeaseState>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn keep(self: &Arc<Self>, seq: u64, lease: Arc<LeaseState>) -> Renewal {
        self.kept().insert(seq, lease);
        Renewal {
            renewer: self.clone(),
            seq,
        }
    }

    /// Extends the leases at the broker; runs for as long as the pipeline.
    pub(crate) async fn extend_leases(&self, source: &dyn Source, lease: Duration) {
        let mut shortest = lease;
        loop {
            sleep(between_tries(shortest)).await;
            let leases = self.due_leases();
            if !leases.is_empty() {
                self.extend(source, &leases, lease).await;
            }
            shortest = self.shortest_lease(lease);
        }
    }

    /// Of those that share a lease, the first that is due is enough.
    fn due_leases(&self) -> Vec<Arc<LeaseState>> {
        let mut shared = HashSet::new();
        let is_due = |state: &&Arc<LeaseState>| {
            let deadline = state.source_deadline();
            state.leased() && deadline.is_some_and(|(until, length)| due(until, length))
        };
        let kept = self.kept();
        let due = kept.values().filter(is_due);
        due.filter(|state| {
            state
                .lease
                .shared
                .is_none_or(|number| shared.insert(number))
        })
        .cloned()
        .collect()
    }

    async fn extend(&self, source: &dyn Source, leases: &[Arc<LeaseState>], lease: Duration) {
        let receipts: Vec<Receipt> = leases.iter().map(|one| one.receipt.clone()).collect();
        let sent = Instant::now();
        let Ok(answers) = timeout(lease / 3, source.extend(&receipts, lease)).await else {
            tracing::warn!(queue = source.name(), "extending leases timed out");
            return;
        };
        for (state, answer) in leases.iter().zip(answers) {
            let until = match answer {
                ExtendResult::Extended(until) => until,
                ExtendResult::LeaseLost => sent,
                ExtendResult::Unknown(error) => {
                    tracing::warn!(queue = source.name(), %error, "a lease was not extended");
                    continue;
                }
            };
            let same = self.sharing(state);
            same.iter().for_each(|state| state.extended(until));
        }
    }

    /// All that have the same lease: those too that were not due, or have come meanwhile.
    fn sharing(&self, one: &Arc<LeaseState>) -> Vec<Arc<LeaseState>> {
        let Some(number) = one.lease.shared else {
            return vec![one.clone()];
        };
        let kept = self.kept();
        let same = kept
            .values()
            .filter(|other| other.lease.shared == Some(number));
        same.cloned().collect()
    }

    /// The shortest lease that the broker has given, where it gives less than what it is asked for.
    fn shortest_lease(&self, asked: Duration) -> Duration {
        let kept = self.kept();
        let lengths = kept.values().filter_map(|state| {
            let (_, length) = state.source_deadline()?;
            state.leased().then_some(length)
        });
        lengths.fold(asked, Duration::min)
    }

    /// Renews the claims in the store; runs for as long as the pipeline.
    pub(crate) async fn renew_claims(&self, store: &dyn Store, lease: Duration) {
        let mut ticks = ticks(lease);
        loop {
            ticks.tick().await;
            let claims = self.due_claims(lease);
            if !claims.is_empty() {
                renew(store, &claims, lease).await;
            }
        }
    }

    fn due_claims(&self, lease: Duration) -> Vec<(Arc<LeaseState>, HeldClaim)> {
        let due_claim = |state: &Arc<LeaseState>| {
            let (held, deadline) = state.claim_deadline()?;
            due(deadline, lease).then(|| (state.clone(), held))
        };
        self.kept().values().filter_map(due_claim).collect()
    }
}

async fn renew(store: &dyn Store, claims: &[(Arc<LeaseState>, HeldClaim)], lease: Duration) {
    let batch: Vec<HeldClaim> = claims.iter().map(|(_, held)| *held).collect();
    let sent = Instant::now();
    match timeout(lease / 3, store.renew(&batch, lease)).await {
        Ok(Ok(verdicts)) => {
            for ((state, held), verdict) in claims.iter().zip(verdicts) {
                state.renewed(*held, verdict.map_or(sent, |()| sent + lease));
            }
        }
        Ok(Err(error)) => tracing::warn!(%error, "claims were not renewed"),
        Err(_) => tracing::warn!("renewing claims timed out"),
    }
}

/// Ninths of the lease: several tries between the first and the deadline.
fn between_tries(lease: Duration) -> Duration {
    (lease / 9).max(Duration::from_millis(1))
}

fn ticks(lease: Duration) -> Interval {
    let mut ticks = interval(between_tries(lease));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
