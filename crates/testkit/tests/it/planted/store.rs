use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, Fenced, Fingerprint, HeldClaim, KeyDigest, LookUp, LookedUp,
    Owner, Precondition, Starts, Store, StoreInfo, Token, Transaction, TransactionalStore,
    Verdicts,
};
use onlyonce_core::memory::{MemoryStore, MemoryTx};
use onlyonce_core::{Error, ErrorKind};
use onlyonce_testkit::store::StoreHarness;
use onlyonce_testkit::transactional_store::TransactionalStoreHarness;
use onlyonce_testkit::{store_suite, transactional_store_suite};

use super::{Gaps, noticed_by, plant};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bug {
    /// A key is marked as seen when it is claimed.
    SeenBeforeDone,
    /// Renewing a claim does not ask for its token.
    RenewIgnoresToken,
    /// Starting a claim does not ask for its token.
    StartIgnoresToken,
    /// Completing a claim does not ask for its token.
    CompleteIgnoresToken,
    /// Releasing a claim does not ask for its token.
    ReleaseIgnoresToken,
    /// Renewing answers without doing anything.
    RenewDoesNothing,
    /// Every owner is taken for the same.
    OwnersAreIgnored,
    /// An owner must wait for itself.
    OwnerIsBusyToItself,
    /// A key that stands twice in a batch is claimed twice.
    BatchClaimsTwice,
    /// Payloads are not compared.
    PayloadsAreIgnored,
    /// Takeovers are never in doubt.
    DoubtIsForgotten,
    /// Takeovers are always in doubt.
    DoubtIsInvented,
    /// Starts are not counted.
    StartsAreNotCounted,
    /// The claim that asks is named, not the one that was started.
    StartIsTakenForOnesOwn,
    /// How often a key was taken over is not kept.
    TakeoversAreForgotten,
    /// Later tokens are lower.
    TokensFall,
    /// Answers come sorted, not in the batch's order.
    AnswersAreReversed,
    /// Rows are locked in the order of the batch.
    LocksInBatchOrder,
    /// The bound on pruning is ignored.
    PruneIgnoresLimit,
    /// Records are kept for ever.
    PruneDoesNothing,
    /// Records are lost in a crash.
    CrashLosesRecords,
    /// Outcomes are cut off.
    OutcomesAreCut,
    /// Completing answers without doing anything.
    CompleteDoesNothing,
    /// Effects are written beside the transaction.
    EffectsEscape,
    /// Rollback does nothing.
    UndoDoesNothing,
    /// A transaction completes without a look at the token.
    TransactionIgnoresToken,
    /// A look-up finds no records.
    LookUpMissesRecords,
    /// A look-up finds no claims.
    LookUpMissesClaims,
    /// A look-up does not compare payloads.
    LookUpIgnoresPayloads,
    /// A look-up counts for ever.
    LookUpLasts,
    /// What was looked up is recorded although there is a record by now.
    RecordIsReplaced,
    /// A savepoint of several messages is recorded up to the one that is fenced.
    BatchIsRecordedInPart,
    /// A refused commit is answered as if it were unknown whether it happened.
    RefusalIsUnknown,
    /// A refused commit is answered as if it had happened.
    RefusalIsHidden,
}

#[derive(Clone)]
struct Buggy {
    store: MemoryStore,
    bug: Bug,
    /// The newest claim of each key.
    newest: Arc<Mutex<HashMap<KeyDigest, Token>>>,
    /// The keys whose rows are locked.
    locked: Arc<Mutex<HashSet<KeyDigest>>>,
}

/// Rows that are locked until this is dropped.
struct Locks<'a> {
    store: &'a Buggy,
    keys: Vec<KeyDigest>,
}

impl Drop for Locks<'_> {
    fn drop(&mut self) {
        let mut locked = self.store.locked.lock().expect("no panic");
        self.keys.iter().for_each(|key| {
            locked.remove(key);
        });
    }
}

/// Turns the order of tokens round, there and back.
fn fall(token: Token) -> Token {
    Token(u64::MAX - token.0)
}

impl Buggy {
    /// Locks rows one after another, as a database does, and finds a deadlock after a second.
    async fn lock(&self, keys: impl Iterator<Item = KeyDigest>) -> Result<Locks<'_>, Error> {
        let mut locks = Locks {
            store: self,
            keys: Vec::new(),
        };
        for key in keys.filter(|_| self.bug == Bug::LocksInBatchOrder) {
            let mut tries = 0;
            while !locks.keys.contains(&key) && !self.locked.lock().expect("no panic").insert(key) {
                tokio::time::sleep(Duration::from_millis(10)).await;
                tries += 1;
                if tries == 100 {
                    return Err(Error::new(ErrorKind::Conflict, "a deadlock"));
                }
            }
            locks.keys.push(key);
            tokio::task::yield_now().await;
        }
        Ok(locks)
    }

    /// The claim that the real store is asked for.
    fn held(&self, held: &HeldClaim, ignored_by: Bug) -> HeldClaim {
        let mut held = *held;
        if self.bug == ignored_by {
            let newest = self.newest.lock().expect("no panic");
            held.token = newest.get(&held.key).copied().unwrap_or(held.token);
        }
        if self.bug == Bug::TokensFall {
            held.token = fall(held.token);
        }
        held
    }

    fn all(&self, batch: &[HeldClaim], ignored_by: Bug) -> Vec<HeldClaim> {
        batch
            .iter()
            .map(|held| self.held(held, ignored_by))
            .collect()
    }

    fn completion(&self, completion: &Completion, ignored_by: Bug) -> Completion {
        let mut completion = completion.clone();
        match &mut completion.precondition {
            Precondition::Claim(held) => *held = self.held(held, ignored_by),
            Precondition::NoRecord(looked_up) if self.bug == Bug::LookUpLasts => {
                looked_up.at = u64::MAX;
            }
            Precondition::NoRecord(_) => {}
        }
        if let (Bug::OutcomesAreCut, Some(outcome)) = (self.bug, &mut completion.outcome) {
            outcome.truncate(1024);
        }
        completion
    }

    fn turned<T>(&self, mut answers: Vec<T>) -> Vec<T> {
        if self.bug == Bug::AnswersAreReversed {
            answers.reverse();
        }
        answers
    }

    async fn seen(&self, held: HeldClaim, fingerprint: Fingerprint) -> Result<(), Error> {
        let (outcome, retention) = (None, Duration::from_secs(3600));
        let completion = Completion::new(held, fingerprint, outcome, retention);
        self.store.complete(&[completion]).await.map(drop)
    }

    async fn given(&self, claim: &Claim, answer: &mut ClaimResult) -> Result<(), Error> {
        let ClaimResult::Acquired {
            token,
            in_doubt,
            takeovers,
        } = answer
        else {
            return Ok(());
        };
        let key = claim.key;
        self.newest.lock().expect("no panic").insert(key, *token);
        match self.bug {
            Bug::SeenBeforeDone => {
                let held = HeldClaim::new(key, *token);
                self.seen(held, claim.fingerprint).await?;
            }
            Bug::DoubtIsForgotten => *in_doubt = None,
            Bug::DoubtIsInvented => {
                let last = *token;
                in_doubt.get_or_insert(Starts::new(last, 1));
            }
            Bug::StartsAreNotCounted => {
                *in_doubt = in_doubt.map(|starts| Starts::new(starts.last, 1));
            }
            Bug::StartIsTakenForOnesOwn => {
                let last = *token;
                *in_doubt = in_doubt.map(|starts| Starts::new(last, starts.count));
            }
            Bug::TakeoversAreForgotten => *takeovers = 0,
            Bug::TokensFall => {
                *token = fall(*token);
                *in_doubt = in_doubt.map(|starts| Starts::new(fall(starts.last), starts.count));
            }
            _ => {}
        }
        Ok(())
    }
}

#[async_trait]
impl Store for Buggy {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        self.store.store_info().await
    }
    async fn claim(
        &self,
        mut owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        let _locks = self.lock(batch.iter().map(|claim| claim.key)).await?;
        match self.bug {
            Bug::OwnersAreIgnored => owner = Owner(1),
            Bug::OwnerIsBusyToItself => owner = Owner::random(),
            _ => {}
        }
        let mut batch = batch.to_vec();
        if self.bug == Bug::PayloadsAreIgnored {
            batch
                .iter_mut()
                .for_each(|c| c.fingerprint = Fingerprint([0; 16]));
        }
        let mut answers = if self.bug == Bug::BatchClaimsTwice {
            let mut answers = Vec::new();
            for one in &batch {
                answers.extend(self.store.claim(owner, &[*one], lease).await?);
            }
            answers
        } else {
            self.store.claim(owner, &batch, lease).await?
        };
        for (claim, answer) in batch.iter().zip(&mut answers) {
            self.given(claim, answer).await?;
        }
        Ok(self.turned(answers))
    }

    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        let batch = self.all(batch, Bug::RenewIgnoresToken);
        if self.bug == Bug::RenewDoesNothing {
            // Nothing, but for a look at the token.
            return self.store.renew(&batch, Duration::from_millis(1)).await;
        }
        Ok(self.turned(self.store.renew(&batch, lease).await?))
    }

    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        let _locks = self.lock(batch.iter().map(|held| held.key)).await?;
        let batch = self.all(batch, Bug::StartIgnoresToken);
        Ok(self.turned(self.store.start(&batch).await?))
    }

    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        let ignored_by = Bug::CompleteIgnoresToken;
        let batch: Vec<_> = batch
            .iter()
            .map(|c| self.completion(c, ignored_by))
            .collect();
        if self.bug == Bug::CompleteDoesNothing {
            let held = batch.iter().filter_map(|one| one.precondition.claim());
            return self.store.start(&held.collect::<Vec<_>>()).await;
        }
        Ok(self.turned(self.store.complete(&batch).await?))
    }

    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        let batch = self.all(batch, Bug::ReleaseIgnoresToken);
        Ok(self.turned(self.store.release(&batch).await?))
    }

    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        match self.bug {
            Bug::PruneIgnoresLimit => self.store.prune(usize::MAX).await,
            Bug::PruneDoesNothing => Ok(0),
            _ => self.store.prune(limit).await,
        }
    }
}

/// No message's.
fn rand_key() -> [u8; 16] {
    Fingerprint::of(&Owner::random().0.to_le_bytes()).0
}

struct BuggyTx {
    tx: MemoryTx,
    store: Buggy,
}

#[async_trait]
impl TransactionalStore for Buggy {
    type Tx = BuggyTx;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        let mut answers = self.store.look_up(batch).await?;
        for (claim, answer) in batch.iter().zip(&mut answers) {
            let hidden = matches!(
                (self.bug, &*answer),
                (
                    Bug::LookUpMissesRecords,
                    LookUp::Completed { .. } | LookUp::PayloadMismatch
                ) | (Bug::LookUpMissesClaims, LookUp::Claimed)
            );
            if hidden {
                *answer = LookUp::New(LookedUp::new(claim.key, 0));
            }
            if self.bug == Bug::LookUpIgnoresPayloads && *answer == LookUp::PayloadMismatch {
                *answer = LookUp::Completed { outcome: None };
            }
        }
        Ok(answers)
    }

    async fn begin(&self) -> Result<BuggyTx, Error> {
        let (tx, store) = (self.store.begin().await?, self.clone());
        Ok(BuggyTx { tx, store })
    }

    async fn begin_alone(&self) -> Result<BuggyTx, Error> {
        self.begin().await
    }
}

impl BuggyTx {
    async fn complete_one_by_one(
        &mut self,
        completions: &[Completion],
    ) -> Result<Result<(), Fenced>, Error> {
        for completion in completions {
            if let Err(Fenced) = self.tx.complete(std::slice::from_ref(completion)).await? {
                return Ok(Err(Fenced));
            }
        }
        Ok(Ok(()))
    }
}

#[async_trait]
impl Transaction for BuggyTx {
    async fn complete(&mut self, completions: &[Completion]) -> Result<Result<(), Fenced>, Error> {
        let ignored_by = Bug::TransactionIgnoresToken;
        let mut planted = Vec::with_capacity(completions.len());
        for completion in completions {
            let mut completion = self.store.completion(completion, ignored_by);
            if let (Bug::RecordIsReplaced, Precondition::NoRecord(looked_up)) =
                (self.store.bug, &mut completion.precondition)
            {
                let asked = Claim::new(looked_up.key, completion.fingerprint);
                let answers = self.store.store.look_up(&[asked]).await?;
                if let [LookUp::Completed { .. }] = answers[..] {
                    looked_up.key = KeyDigest(rand_key());
                }
            }
            planted.push(completion);
        }
        if self.store.bug == Bug::BatchIsRecordedInPart {
            return self.complete_one_by_one(&planted).await;
        }
        self.tx.complete(&planted).await
    }

    async fn rollback(&mut self) -> Result<(), Error> {
        match self.store.bug {
            Bug::UndoDoesNothing => Ok(()),
            _ => self.tx.rollback().await,
        }
    }

    fn is_conflict(&self, error: &(dyn std::error::Error + 'static)) -> bool {
        self.tx.is_conflict(error)
    }

    async fn commit(self) -> Result<(), Error> {
        let committed = self.tx.commit().await;
        match (self.store.bug, committed) {
            (Bug::RefusalIsUnknown, Err(error)) => {
                Err(Error::new(ErrorKind::Store, "planted").caused_by(error))
            }
            (Bug::RefusalIsHidden, Err(error)) if error.kind() == ErrorKind::Refused => Ok(()),
            (_, committed) => committed,
        }
    }
}

const REFUSED: &str = "refused";

struct Planted {
    store: Mutex<Buggy>,
    escaped: Mutex<Vec<String>>,
    noticed_by: Gaps,
}

impl Planted {
    fn new(bug: Bug, noticed_by: Gaps) -> Self {
        let store = MemoryStore::new().refusing(|effect| effect == REFUSED.as_bytes());
        let newest = Arc::default();
        Self {
            store: Mutex::new(Buggy {
                store,
                bug,
                newest,
                locked: Arc::default(),
            }),
            escaped: Mutex::default(),
            noticed_by,
        }
    }

    fn open(&self) -> Buggy {
        self.store.lock().expect("no panic").clone()
    }
}

#[async_trait]
impl StoreHarness for Planted {
    async fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.open())
    }

    async fn crash(&self) {
        let mut open = self.store.lock().expect("no panic");
        open.store.forget_claims();
        if open.bug == Bug::CrashLosesRecords {
            open.store = MemoryStore::new();
        }
    }

    fn gaps(&self) -> Gaps {
        self.noticed_by
    }
}

#[async_trait]
impl TransactionalStoreHarness for Planted {
    type Store = Buggy;

    async fn transactional(&self) -> Buggy {
        self.open()
    }

    async fn write(&self, tx: &mut BuggyTx, effect: &str) {
        if tx.store.bug == Bug::EffectsEscape {
            self.escaped
                .lock()
                .expect("no panic")
                .push(effect.to_owned());
        } else {
            tx.tx.push(effect.to_owned());
        }
    }

    async fn break_constraint(&self, tx: &mut BuggyTx) {
        tx.tx.push(REFUSED);
    }

    async fn effects(&self) -> Vec<String> {
        let committed = self.open().store.effects().into_iter();
        let mut all: Vec<_> = committed
            .map(|effect| String::from_utf8_lossy(&effect).into_owned())
            .collect();
        all.extend(self.escaped.lock().expect("no panic").iter().cloned());
        all
    }

    fn transaction_gaps(&self) -> Gaps {
        self.noticed_by
    }
}

plant! {
    store_suite seen_before_done: SeenBeforeDone [
        opposite_orders_do_not_block_each_other
        answers_follow_the_batch
        completed_key_is_a_duplicate
        corrected_payload_takes_over_what_never_started
        expired_claim_is_taken_over
        expired_claim_that_nobody_took_completes
        large_batches_are_taken_whole
        live_claim_is_in_progress_for_others
        one_live_owner_per_key
        other_payload_is_a_mismatch
        outcome_of_64_kib_is_replayed
        prune_removes_only_what_has_expired
        random_histories_agree_with_the_model
        record_survives_a_crash
        released_key_is_new
        renewed_claim_outlives_its_first_lease
        same_owner_claims_again_with_a_higher_token
        second_claim_in_a_batch_is_in_progress
        stale_token_is_fenced
        starts_are_counted
        takeovers_are_counted
        token_is_fenced_once_it_is_spent
        tokens_rise_across_a_crash
        in_doubt_only_after_a_start
        doubt_outlives_takeovers
    ]
    store_suite renew_ignores_token: RenewIgnoresToken [
        answers_follow_the_batch
        random_histories_agree_with_the_model
        stale_token_is_fenced
    ]
    store_suite start_ignores_token: StartIgnoresToken [
        answers_follow_the_batch
        random_histories_agree_with_the_model
        stale_token_is_fenced
    ]
    store_suite complete_ignores_token: CompleteIgnoresToken [
        answers_follow_the_batch
        corrected_payload_takes_over_what_never_started
        random_histories_agree_with_the_model
        same_owner_claims_again_with_a_higher_token
        stale_token_is_fenced
        tokens_rise_across_a_crash
    ]
    store_suite release_ignores_token: ReleaseIgnoresToken [
        random_histories_agree_with_the_model
        stale_token_is_fenced
    ]
    store_suite renew_does_nothing: RenewDoesNothing [
        random_histories_agree_with_the_model
        renewed_claim_outlives_its_first_lease
    ]
    store_suite owners_are_ignored: OwnersAreIgnored [
        opposite_orders_do_not_block_each_other
        answers_follow_the_batch
        corrected_payload_takes_over_what_never_started
        expired_claim_is_taken_over
        expired_claim_that_nobody_took_completes
        live_claim_is_in_progress_for_others
        one_live_owner_per_key
        random_histories_agree_with_the_model
        renewed_claim_outlives_its_first_lease
        stale_token_is_fenced
    ]
    store_suite owner_is_busy_to_itself: OwnerIsBusyToItself [
        random_histories_agree_with_the_model
        same_owner_claims_again_with_a_higher_token
        second_claim_in_a_batch_is_in_progress
        stale_token_is_fenced
        takeovers_are_counted
        doubt_outlives_takeovers
    ]
    store_suite batch_claims_twice: BatchClaimsTwice [
        random_histories_agree_with_the_model
        second_claim_in_a_batch_is_in_progress
    ]
    store_suite payloads_are_ignored: PayloadsAreIgnored [
        answers_follow_the_batch
        completed_key_is_a_duplicate
        corrected_payload_takes_over_what_never_started
        expired_claim_that_nobody_took_completes
        large_batches_are_taken_whole
        other_payload_is_a_mismatch
        outcome_of_64_kib_is_replayed
        prune_removes_only_what_has_expired
        random_histories_agree_with_the_model
        record_survives_a_crash
        token_is_fenced_once_it_is_spent
    ]
    store_suite doubt_is_forgotten: DoubtIsForgotten [
        expired_claim_that_nobody_took_completes
        prune_removes_only_what_has_expired
        random_histories_agree_with_the_model
        starts_are_counted
        in_doubt_only_after_a_start
        doubt_outlives_takeovers
    ]
    store_suite starts_are_not_counted: StartsAreNotCounted [
        random_histories_agree_with_the_model
        starts_are_counted
    ]
    store_suite start_is_taken_for_ones_own: StartIsTakenForOnesOwn [
        random_histories_agree_with_the_model
        starts_are_counted
        doubt_outlives_takeovers
    ]
    store_suite takeovers_are_forgotten: TakeoversAreForgotten [
        takeovers_are_counted
    ]
    store_suite doubt_is_invented: DoubtIsInvented [
        answers_follow_the_batch
        completed_key_is_a_duplicate
        corrected_payload_takes_over_what_never_started
        expired_claim_is_taken_over
        expired_claim_that_nobody_took_completes
        live_claim_is_in_progress_for_others
        other_payload_is_a_mismatch
        outcome_of_64_kib_is_replayed
        prune_removes_only_what_has_expired
        random_histories_agree_with_the_model
        record_survives_a_crash
        released_key_is_new
        renewed_claim_outlives_its_first_lease
        same_owner_claims_again_with_a_higher_token
        second_claim_in_a_batch_is_in_progress
        stale_token_is_fenced
        starts_are_counted
        token_is_fenced_once_it_is_spent
        tokens_rise_across_a_crash
        in_doubt_only_after_a_start
        doubt_outlives_takeovers
    ]
    store_suite tokens_fall: TokensFall [
        corrected_payload_takes_over_what_never_started
        expired_claim_is_taken_over
        one_live_owner_per_key
        random_histories_agree_with_the_model
        released_key_is_new
        same_owner_claims_again_with_a_higher_token
        second_claim_in_a_batch_is_in_progress
        tokens_rise_across_a_crash
    ]
    store_suite answers_are_reversed: AnswersAreReversed [
        opposite_orders_do_not_block_each_other
        answers_follow_the_batch
        large_batches_are_taken_whole
        one_live_owner_per_key
        random_histories_agree_with_the_model
        second_claim_in_a_batch_is_in_progress
    ]
    store_suite locks_in_batch_order: LocksInBatchOrder [
        opposite_orders_do_not_block_each_other
    ]
    store_suite prune_ignores_limit: PruneIgnoresLimit [
        prune_removes_only_what_has_expired
    ]
    store_suite prune_does_nothing: PruneDoesNothing [
        prune_removes_only_what_has_expired
    ]
    store_suite crash_loses_records: CrashLosesRecords [
        record_survives_a_crash
        tokens_rise_across_a_crash
    ]
    store_suite outcomes_are_cut: OutcomesAreCut [
        outcome_of_64_kib_is_replayed
    ]
    store_suite complete_does_nothing: CompleteDoesNothing [
        opposite_orders_do_not_block_each_other
        answers_follow_the_batch
        completed_key_is_a_duplicate
        expired_claim_that_nobody_took_completes
        large_batches_are_taken_whole
        other_payload_is_a_mismatch
        outcome_of_64_kib_is_replayed
        prune_removes_only_what_has_expired
        random_histories_agree_with_the_model
        record_survives_a_crash
        token_is_fenced_once_it_is_spent
    ]
    transactional_store_suite effects_escape: EffectsEscape [
        savepoint_of_several_messages_is_recorded_whole
        look_up_counts_for_no_longer_than_a_record
        looked_up_message_takes_effect_once
        record_of_a_claim_fences_look_ups
        record_of_a_look_up_fences_claims
        dropped_transaction_leaves_nothing
        effect_and_record_commit_together
        last_savepoint_completes_with_the_commit
        savepoint_completes_once
        refused_commit_leaves_nothing
        refused_commit_spares_the_others
        stale_token_is_fenced
        takeover_and_commit_exclude_each_other
        rollback_takes_back_only_its_savepoint
        unfinished_savepoint_is_not_committed
    ]
    transactional_store_suite undo_does_nothing: UndoDoesNothing [
        rollback_takes_back_only_its_savepoint
    ]
    transactional_store_suite transaction_ignores_token: TransactionIgnoresToken [
        savepoint_of_several_messages_is_recorded_whole
        last_savepoint_completes_with_the_commit
        stale_token_is_fenced
    ]
    transactional_store_suite batch_is_recorded_in_part: BatchIsRecordedInPart [
        savepoint_of_several_messages_is_recorded_whole
    ]
    transactional_store_suite refusal_is_unknown: RefusalIsUnknown [
        refused_commit_leaves_nothing
    ]
    transactional_store_suite refusal_is_hidden: RefusalIsHidden [
        refused_commit_leaves_nothing
        refused_commit_spares_the_others
    ]
    transactional_store_suite look_up_misses_records: LookUpMissesRecords [
        look_up_tells_what_is_there
        racing_look_ups_take_effect_once
    ]
    transactional_store_suite look_up_misses_claims: LookUpMissesClaims [
        look_up_tells_what_is_there
    ]
    transactional_store_suite look_up_ignores_payloads: LookUpIgnoresPayloads [
        look_up_tells_what_is_there
    ]
    transactional_store_suite look_up_lasts: LookUpLasts [
        look_up_counts_for_no_longer_than_a_record
    ]
    transactional_store_suite record_is_replaced: RecordIsReplaced [
        looked_up_message_takes_effect_once
        record_of_a_claim_fences_look_ups
    ]
    transactional_store_suite crash_loses_records_and_effects: CrashLosesRecords [
        effect_and_record_survive_a_crash
    ]
}
