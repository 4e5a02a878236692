//! Random histories against a reference model.

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, Fingerprint, HeldClaim, Owner, Starts, Store, Token,
};
use tokio::time::Instant;

use super::StoreHarness;
use super::tools::*;
use crate::random::histories;

const KEYS: usize = 4;
const STEPS: usize = 60;
/// What one key should be.
#[derive(Clone, Debug, Default)]
enum Key {
    #[default]
    Absent,
    Claimed {
        owner: Owner,
        token: Token,
        payload: Fingerprint,
        expired: bool,
        /// When a short lease was taken.
        short: Option<Instant>,
        starts: Option<Starts>,
    },
    Done {
        payload: Fingerprint,
    },
}

/// What the whole store should be.
#[derive(Debug, Default)]
struct Model {
    keys: [Key; KEYS],
    last: [u64; KEYS],
    /// Every token that was ever given.
    given: Vec<Given>,
}

/// A token, and what it was given for.
#[derive(Clone, Copy, Debug)]
struct Given {
    n: usize,
    token: Token,
    payload: Fingerprint,
}

/// An answer, but for what the model cannot foresee.
#[derive(Debug, PartialEq, Eq)]
enum Expected {
    Acquired { in_doubt: Option<Starts> },
    Completed,
    InProgress,
    PayloadMismatch,
}

impl Model {
    /// What `claim` should say; `batch` holds the keys that this batch has been given already.
    fn expect(&self, owner: Owner, n: usize, payload: Fingerprint, batch: &[usize]) -> Expected {
        match &self.keys[n] {
            Key::Absent => Expected::Acquired { in_doubt: None },
            Key::Done { payload: p } if *p != payload => Expected::PayloadMismatch,
            Key::Done { .. } => Expected::Completed,
            Key::Claimed {
                payload: p,
                expired,
                starts,
                ..
            } if *p != payload && (!expired || starts.is_some()) => Expected::PayloadMismatch,
            Key::Claimed {
                owner: holder,
                expired,
                ..
            } if batch.contains(&n) || (!expired && *holder != owner) => Expected::InProgress,
            Key::Claimed { starts, .. } => Expected::Acquired { in_doubt: *starts },
        }
    }

    /// What any call with this token should say.
    fn holds(&self, n: usize, held: Token) -> Result<(), onlyonce_core::driver::Fenced> {
        match &self.keys[n] {
            Key::Claimed { token, .. } if *token == held => Ok(()),
            _ => FENCED,
        }
    }

    fn apply(&mut self, call: Call, n: usize, short: Option<Instant>) {
        let Key::Claimed {
            payload,
            expired,
            short: end,
            starts,
            token,
            ..
        } = &mut self.keys[n]
        else {
            unreachable!("only what holds is applied");
        };
        match call {
            Call::Renew => (*expired, *end) = (false, short),
            Call::Start => *starts = Some(Starts::with(*starts, *token)),
            Call::Complete => self.keys[n] = Key::Done { payload: *payload },
            Call::Release => self.keys[n] = Key::Absent,
        }
    }

    fn expire(&mut self) {
        for key in &mut self.keys {
            if let Key::Claimed {
                expired,
                short: Some(_),
                ..
            } = key
            {
                *expired = true;
            }
        }
    }

    /// Whether a short lease may be near its end, so that only the store's clock could tell.
    fn is_unclear(&self, lease: Duration) -> bool {
        self.keys.iter().any(|key| {
            matches!(key, Key::Claimed { expired: false, short: Some(since), .. }
                if since.elapsed() > lease / 2)
        })
    }
}

struct History<'a> {
    harness: &'a dyn StoreHarness,
    stores: Vec<Arc<dyn Store>>,
    seed: u64,
    rng: Rng,
    model: Model,
}

impl History<'_> {
    /// Histories share a store, but no key.
    fn name(&self, n: usize) -> String {
        format!("{}-k{n}", self.seed)
    }

    /// A lease, and when it was taken if it is one that ends.
    fn lease(&mut self) -> (Duration, Option<Instant>) {
        if self.rng.bool() {
            (LONG, None)
        } else {
            (self.harness.lease(), Some(Instant::now()))
        }
    }

    async fn step(&mut self) {
        let store = self.stores[self.rng.usize(..self.stores.len())].clone();
        if self.rng.u8(..20) == 0 || self.model.is_unclear(self.harness.lease()) {
            expire(self.harness).await;
            self.model.expire();
        }
        match self.rng.u8(..12) {
            0..5 => self.claim(&*store).await,
            5 => assert_eq!(store.prune(10).await.expect("it prunes"), 0),
            _ => self.call(&*store).await,
        }
    }

    async fn claim(&mut self, store: &dyn Store) {
        let owner = [A, B, C][self.rng.usize(..3)];
        let (lease, short) = self.lease();
        let mut chosen = Vec::new();
        for _ in 0..self.rng.usize(1..=3) {
            let n = self.rng.usize(..KEYS);
            let payload = ["payload", "other"][usize::from(self.rng.u8(..10) == 0)];
            chosen.push((n, claim_for(&self.name(n), payload)));
        }
        let batch: Vec<Claim> = chosen.iter().map(|(_, claim)| *claim).collect();
        let answers = claim_all(store, owner, &batch, lease).await;
        let mut given = Vec::new();
        for ((n, claim), answer) in chosen.into_iter().zip(answers) {
            let expected = self.model.expect(owner, n, claim.fingerprint, &given);
            let got = match &answer {
                ClaimResult::Acquired { in_doubt, .. } => Expected::Acquired {
                    in_doubt: *in_doubt,
                },
                ClaimResult::Completed { .. } => Expected::Completed,
                ClaimResult::InProgress { .. } => Expected::InProgress,
                ClaimResult::PayloadMismatch => Expected::PayloadMismatch,
            };
            assert_eq!(got, expected, "{owner:?} claims k{n}: {:?}", self.model);
            let ClaimResult::Acquired {
                token, in_doubt, ..
            } = answer
            else {
                continue;
            };
            assert!(token.0 > self.model.last[n], "k{n}: {:?}", self.model);
            self.model.last[n] = token.0;
            let payload = claim.fingerprint;
            self.model.given.push(Given { n, token, payload });
            given.push(n);
            self.model.keys[n] = Key::Claimed {
                owner,
                token,
                payload,
                expired: false,
                short,
                starts: in_doubt,
            };
        }
    }

    async fn call(&mut self, store: &dyn Store) {
        let count = self.model.given.len();
        if count == 0 {
            return;
        }
        let call = CALLS[self.rng.usize(..CALLS.len())];
        let (lease, short) = self.lease();
        // Recent tokens: old ones are all fenced.
        let chosen: Vec<Given> = (0..self.rng.usize(1..=3))
            .map(|_| self.model.given[count - 1 - self.rng.usize(..count.min(6))])
            .collect();
        let completion = |given: &Given| {
            let held = HeldClaim::new(key(&self.name(given.n)), given.token);
            let mut completion = completion(held);
            completion.fingerprint = given.payload;
            completion
        };
        let batch: Vec<Completion> = chosen.iter().map(completion).collect();
        let verdicts = call.all(store, &batch, lease).await;
        for (Given { n, token, .. }, verdict) in chosen.into_iter().zip(verdicts) {
            let expected = self.model.holds(n, token);
            assert_eq!(verdict, expected, "{call:?} k{n}: {:?}", self.model);
            if verdict.is_ok() {
                self.model.apply(call, n, short);
            }
        }
    }
}

async fn history(harness: &dyn StoreHarness, seed: u64) {
    let mut history = History {
        harness,
        stores: vec![harness.store().await, harness.store().await],
        seed,
        rng: Rng::with_seed(seed),
        model: Model::default(),
    };
    for _ in 0..STEPS {
        history.step().await;
    }
}

/// Random claims, renewals, starts, completions, releases and expiries by three owners over four keys, through two
/// handles, answer by answer as a model says.
pub async fn random_histories_agree_with_the_model(harness: &dyn StoreHarness) {
    histories(async |seed| history(harness, seed).await).await;
}
