use std::time::Duration;

use bytes::Bytes;
use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, Fenced, Fingerprint, HeldClaim, KeyDigest, Owner, Precondition,
    Starts, Store, Token, Verdicts,
};

use super::StoreHarness;

pub(crate) const A: Owner = Owner(1);
pub(crate) const B: Owner = Owner(2);
pub(crate) const C: Owner = Owner(3);

/// Longer than any check runs.
pub(crate) const LONG: Duration = Duration::from_secs(3600);

pub(crate) const FENCED: Result<(), Fenced> = Err(Fenced);

pub(crate) fn key(name: &str) -> KeyDigest {
    KeyDigest(Fingerprint::of(name.as_bytes()).0)
}

pub(crate) fn fingerprint(payload: &str) -> Fingerprint {
    Fingerprint::of(payload.as_bytes())
}

/// A claim on key `name` for the payload that all checks use unless they say so.
pub(crate) fn claim(name: &str) -> Claim {
    claim_for(name, "payload")
}

pub(crate) fn claim_for(name: &str, payload: &str) -> Claim {
    Claim::new(key(name), fingerprint(payload))
}

pub(crate) fn completion(precondition: impl Into<Precondition>) -> Completion {
    Completion::new(
        precondition,
        fingerprint("payload"),
        Some(Bytes::from_static(b"outcome")),
        LONG,
    )
}

pub(crate) fn done() -> ClaimResult {
    ClaimResult::Completed {
        outcome: Some(Bytes::from_static(b"outcome")),
    }
}

/// Claims, and is given one answer per claim.
pub(crate) async fn claim_all(
    store: &dyn Store,
    owner: Owner,
    batch: &[Claim],
    lease: Duration,
) -> Vec<ClaimResult> {
    let answers = store.claim(owner, batch, lease).await.expect("it claims");
    assert_eq!(answers.len(), batch.len(), "one answer per claim");
    answers
}

pub(crate) async fn ask(store: &dyn Store, owner: Owner, name: &str) -> ClaimResult {
    claim_all(store, owner, &[claim(name)], LONG)
        .await
        .remove(0)
}

/// Claims one key, must be given it, and tells what of its past is in doubt.
pub(crate) async fn take_key(
    store: &dyn Store,
    owner: Owner,
    name: &str,
    lease: Duration,
) -> (HeldClaim, Option<Starts>) {
    let answer = claim_all(store, owner, &[claim(name)], lease)
        .await
        .remove(0);
    let ClaimResult::Acquired {
        token, in_doubt, ..
    } = answer
    else {
        panic!("`{name}` should be new, it is {answer:?}");
    };
    let key = key(name);
    (HeldClaim::new(key, token), in_doubt)
}

/// [`take_key`] of a key with a certain past.
pub(crate) async fn take(
    store: &dyn Store,
    owner: Owner,
    name: &str,
    lease: Duration,
) -> HeldClaim {
    let (held, in_doubt) = take_key(store, owner, name, lease).await;
    assert_eq!(in_doubt, None, "nothing was started on `{name}`");
    held
}

/// Lets a claim of [`StoreHarness::lease`] end.
pub(crate) async fn expire(harness: &dyn StoreHarness) {
    harness.expire(harness.lease() + MARGIN).await;
}

/// Stores that keep times in whole milliseconds round.
const MARGIN: Duration = Duration::from_millis(20);

/// The four calls that need a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Renew,
    Start,
    Complete,
    Release,
}

pub(crate) const CALLS: [Call; 4] = [Call::Renew, Call::Start, Call::Complete, Call::Release];

impl Call {
    /// Makes the call for a whole batch.
    pub(crate) async fn all(
        self,
        store: &dyn Store,
        batch: &[Completion],
        lease: Duration,
    ) -> Verdicts {
        let held = batch.iter().filter_map(|one| one.precondition.claim());
        let held: Vec<HeldClaim> = held.collect();
        let verdicts = match self {
            Self::Renew => store.renew(&held, lease).await,
            Self::Start => store.start(&held).await,
            Self::Complete => store.complete(batch).await,
            Self::Release => store.release(&held).await,
        };
        let verdicts = verdicts.expect("the store can be reached");
        assert_eq!(verdicts.len(), batch.len(), "one verdict per entry");
        verdicts
    }

    pub(crate) async fn each(self, store: &dyn Store, held: &[HeldClaim]) -> Verdicts {
        let batch: Vec<_> = held.iter().copied().map(completion).collect();
        self.all(store, &batch, LONG).await
    }

    pub(crate) async fn one(self, store: &dyn Store, held: HeldClaim) -> Result<(), Fenced> {
        self.each(store, &[held]).await.remove(0)
    }
}

/// A token that was never given.
pub(crate) fn made_up(held: HeldClaim) -> HeldClaim {
    HeldClaim::new(held.key, Token(held.token.0.wrapping_add(1_000_000)))
}
