use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{
    Fenced, Fetch, FetchResult, Outbox, OutboxDisposition, OutboxSettlement, Outgoing, OutgoingId,
    Owner, SetAside, Store, Verdicts,
};
use onlyonce_core::memory::{MemoryOutbox, MemoryStore, MemoryTx};
use onlyonce_core::{Error, Message};
use onlyonce_testkit::outbox::OutboxHarness;
use onlyonce_testkit::outbox_suite;
use onlyonce_testkit::store::StoreHarness;
use onlyonce_testkit::transactional_store::TransactionalStoreHarness;

use super::{Gaps, noticed_by, plant};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bug {
    /// What is numbered lower than what was sent of its group is not looked for any more.
    HighWaterMark,
    /// What was sent is kept.
    SentStays,
    /// A failure delays nothing.
    FailureDelaysNothing,
    /// Failures are not counted.
    FailuresAreForgotten,
    /// What was set aside never holds its group up.
    GroupNeverWaits,
    /// What was set aside always holds its group up.
    GroupAlwaysWaits,
    /// Every relay is taken for the same.
    RelaysAreIgnored,
    /// A lease of zero is taken.
    LeaseEndsAtOnce,
    /// A relay that was taken over may say that a message failed.
    FailureNeedsNoLease,
    /// A relay that was taken over may not say that a message was sent.
    SentNeedsLease,
    /// A lease is not given up.
    ReleaseDoesNothing,
    /// Nobody who waits is told of a commit.
    WaitIsDeaf,
    /// More is returned than was asked for.
    LimitsAreIgnored,
    /// All destinations are one.
    DestinationsAreIgnored,
    /// Messages lose their group.
    GroupsAreLost,
    /// Reasons are not kept.
    ReasonsAreLost,
    /// What was set aside stays so.
    RequeueDoesNothing,
}

#[derive(Clone)]
struct Buggy {
    outbox: MemoryOutbox,
    bug: Bug,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Who fetched last.
    holder: Option<Owner>,
    fetched: HashMap<OutgoingId, Message>,
    /// The highest number that was sent of each group.
    sent: HashMap<String, u32>,
}

fn number(message: &Message) -> u32 {
    let text = String::from_utf8_lossy(&message.body).into_owned();
    let digits = text.trim_start_matches(|c: char| !c.is_ascii_digit());
    digits.parse().unwrap_or(u32::MAX)
}

impl Buggy {
    fn is(&self, bug: Bug) -> bool {
        self.bug == bug
    }

    fn destination<'a>(&self, destination: &'a str) -> &'a str {
        match self.is(Bug::DestinationsAreIgnored) {
            true => "out",
            false => destination,
        }
    }

    fn relay(&self, relay: Owner) -> Owner {
        match self.is(Bug::RelaysAreIgnored) {
            true => Owner(1),
            false => relay,
        }
    }

    fn fetched(&self, mut messages: Vec<Outgoing>) -> Vec<Outgoing> {
        let mut state = self.state.lock().unwrap();
        for outgoing in &mut messages {
            let (id, message) = (outgoing.id, outgoing.message.clone());
            state.fetched.insert(id, message);
            if self.is(Bug::FailuresAreForgotten) {
                outgoing.attempts = 0;
            }
            if self.is(Bug::GroupsAreLost) {
                outgoing.message.group = None;
            }
        }
        if self.is(Bug::HighWaterMark) {
            messages.retain(|outgoing| {
                let group = outgoing.message.group.as_ref();
                let sent = group.and_then(|group| state.sent.get(group));
                sent.is_none_or(|sent| *sent < number(&outgoing.message))
            });
        }
        messages
    }

    fn settled(&self, relay: Owner, settlement: &OutboxSettlement) -> Option<Settled> {
        let mut state = self.state.lock().unwrap();
        let mut settlement = settlement.clone();
        let is_sent = settlement.disposition == OutboxDisposition::Sent;
        if is_sent
            && let Some(message) = state.fetched.get(&settlement.id)
            && let Some(group) = message.group.clone()
        {
            let number = number(message);
            let sent = state.sent.entry(group).or_default();
            *sent = number.max(*sent);
        }
        let holder = state.holder.unwrap_or(relay);
        match &mut settlement.disposition {
            OutboxDisposition::Sent if self.is(Bug::SentStays) => return None,
            OutboxDisposition::Sent if self.is(Bug::SentNeedsLease) && holder != relay => {
                return Some((relay, Err(Fenced)));
            }
            OutboxDisposition::Failed { retry_in, .. } if self.is(Bug::FailureDelaysNothing) => {
                *retry_in = Duration::ZERO;
            }
            OutboxDisposition::Failed { .. } if self.is(Bug::FailureNeedsNoLease) => {
                return Some((holder, Ok(settlement)));
            }
            _ => {}
        }
        Some((relay, Ok(settlement)))
    }
}

/// What the real outbox is told, by whom; or what it is not told.
type Settled = (Owner, Result<OutboxSettlement, Fenced>);

#[async_trait]
impl Outbox for Buggy {
    fn name(&self) -> &str {
        "buggy"
    }

    async fn fetch(&self, destination: &str, fetch: Fetch) -> Result<FetchResult, Error> {
        let mut fetch = fetch;
        fetch.relay = self.relay(fetch.relay);
        match self.bug {
            Bug::GroupNeverWaits => fetch.waits_for_set_aside = false,
            Bug::GroupAlwaysWaits => fetch.waits_for_set_aside = true,
            Bug::LeaseEndsAtOnce => fetch.lease = Duration::ZERO,
            Bug::LimitsAreIgnored => (fetch.messages, fetch.bytes) = (usize::MAX, usize::MAX),
            _ => {}
        }
        let destination = self.destination(destination);
        let mut result = self.outbox.fetch(destination, fetch).await?;
        if let FetchResult::Fetched { messages, .. } = &mut result {
            self.state.lock().unwrap().holder = Some(fetch.relay);
            *messages = self.fetched(std::mem::take(messages));
        }
        Ok(result)
    }

    async fn settle(
        &self,
        relay: Owner,
        destination: &str,
        batch: &[OutboxSettlement],
    ) -> Result<Verdicts, Error> {
        let destination = self.destination(destination);
        let mut verdicts = Vec::new();
        for settlement in batch {
            verdicts.push(match self.settled(self.relay(relay), settlement) {
                None => Ok(()),
                Some((_, Err(fenced))) => Err(fenced),
                Some((relay, Ok(settlement))) => {
                    let one = [settlement];
                    self.outbox.settle(relay, destination, &one).await?[0]
                }
            });
        }
        Ok(verdicts)
    }

    async fn wait(&self, destination: &str, mark: u64, longest: Duration) -> Result<(), Error> {
        if self.is(Bug::WaitIsDeaf) {
            tokio::time::sleep(longest).await;
            return Ok(());
        }
        let destination = self.destination(destination);
        self.outbox.wait(destination, mark, longest).await
    }

    async fn release(&self, relay: Owner, destination: &str) -> Result<(), Error> {
        if self.is(Bug::ReleaseDoesNothing) {
            return Ok(());
        }
        let destination = self.destination(destination);
        self.outbox.release(self.relay(relay), destination).await
    }

    async fn set_aside(&self, destination: &str, limit: usize) -> Result<Vec<SetAside>, Error> {
        let destination = self.destination(destination);
        let mut found = self.outbox.set_aside(destination, limit).await?;
        if self.is(Bug::ReasonsAreLost) {
            found.iter_mut().for_each(|one| one.reason.clear());
        }
        Ok(found)
    }

    async fn requeue(&self, destination: &str, ids: &[OutgoingId]) -> Result<usize, Error> {
        if self.is(Bug::RequeueDoesNothing) {
            return Ok(0);
        }
        let destination = self.destination(destination);
        self.outbox.requeue(destination, ids).await
    }
}

struct Planted {
    store: MemoryStore,
    outbox: Buggy,
    noticed_by: Gaps,
}

impl Planted {
    fn new(bug: Bug, noticed_by: Gaps) -> Self {
        let store = MemoryStore::new();
        let outbox = Buggy {
            outbox: store.outbox(),
            bug,
            state: Arc::default(),
        };
        Self {
            store,
            outbox,
            noticed_by,
        }
    }
}

#[async_trait]
impl StoreHarness for Planted {
    async fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.store.clone())
    }
}

#[async_trait]
impl TransactionalStoreHarness for Planted {
    type Store = MemoryStore;

    async fn transactional(&self) -> MemoryStore {
        self.store.clone()
    }

    async fn write(&self, tx: &mut MemoryTx, effect: &str) {
        tx.push(effect.to_owned());
    }

    async fn break_constraint(&self, _: &mut MemoryTx) {}

    async fn effects(&self) -> Vec<String> {
        Vec::new()
    }
}

#[async_trait]
impl OutboxHarness for Planted {
    async fn outbox(&self) -> Arc<dyn Outbox> {
        Arc::new(self.outbox.clone())
    }

    async fn publish(&self, destination: &str, message: Message) -> OutgoingId {
        let destination = self.outbox.destination(destination);
        self.outbox.outbox.publish(destination, message)
    }

    fn outbox_gaps(&self) -> Gaps {
        self.noticed_by
    }
}

plant! { outbox_suite;
    high_water_mark: HighWaterMark [late_commit_is_not_skipped random_histories_agree_with_the_model]
    sent_stays: SentStays [
        late_commit_is_not_skipped sent_message_is_removed random_histories_agree_with_the_model
        relay_that_was_taken_over_settles_only_what_it_sent]
    failure_delays_nothing: FailureDelaysNothing [
        destinations_are_apart blocked_messages_hide_nothing message_without_a_group_waits_for_nobody
        failed_message_delays_its_group_alone requeued_message_has_its_place_again
        expired_lease_that_nobody_took_settles random_histories_agree_with_the_model]
    failures_are_forgotten: FailuresAreForgotten [
        failed_message_delays_its_group_alone random_histories_agree_with_the_model]
    group_never_waits: GroupNeverWaits [
        set_aside_message_is_kept_with_its_reason random_histories_agree_with_the_model]
    group_always_waits: GroupAlwaysWaits [
        set_aside_message_is_kept_with_its_reason random_histories_agree_with_the_model]
    relays_are_ignored: RelaysAreIgnored [
        second_relay_waits_for_the_end_of_the_lease fetch_renews_the_lease released_destination_is_free
        relay_that_was_taken_over_settles_only_what_it_sent]
    lease_ends_at_once: LeaseEndsAtOnce [
        second_relay_waits_for_the_end_of_the_lease fetch_renews_the_lease released_destination_is_free]
    failure_needs_no_lease: FailureNeedsNoLease [relay_that_was_taken_over_settles_only_what_it_sent]
    sent_needs_lease: SentNeedsLease [relay_that_was_taken_over_settles_only_what_it_sent]
    release_does_nothing: ReleaseDoesNothing [released_destination_is_free]
    wait_is_deaf: WaitIsDeaf [wait_ends_with_a_commit]
    limits_are_ignored: LimitsAreIgnored [fetch_respects_its_limits]
    destinations_are_ignored: DestinationsAreIgnored [
        destinations_are_apart set_aside_message_is_kept_with_its_reason
        requeued_message_has_its_place_again]
    groups_are_lost: GroupsAreLost [
        message_survives_the_outbox message_without_a_group_waits_for_nobody]
    reasons_are_lost: ReasonsAreLost [set_aside_message_is_kept_with_its_reason]
    requeue_does_nothing: RequeueDoesNothing [
        requeued_message_has_its_place_again random_histories_agree_with_the_model]
}
