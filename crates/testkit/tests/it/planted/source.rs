use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{
    Capabilities, Delivery, Disposition, ExtendResult, QueueInfo, Receipt, ReceiveLimits,
    SettleResult, Settlement, Sink, SinkInfo, Source,
};
use onlyonce_core::memory::{MemoryQueue, MemoryReceipt};
use onlyonce_core::{Error, ErrorKind, Message};
use onlyonce_testkit::source::{DeadLettered, SourceHarness};
use onlyonce_testkit::source_suite;
use tokio::time::Instant;

use super::{Gaps, noticed_by, plant};

const LEASE: Duration = Duration::from_secs(2);
const LONG: Duration = Duration::from_secs(3600);
/// The attribute of a message that the sink refuses.
const REFUSED: &str = "refused";
const NACK: Disposition = Disposition::Nack {
    delay: Duration::ZERO,
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bug {
    /// No bug: everything that a broker may lack is missing, and it says so.
    FewCapabilities,
    /// Claims to lack what it can do.
    ModestCapabilities,
    /// An ack settles everything below it, as AMQP's `multiple` does.
    AckSettlesLower,
    /// An ack is taken and forgotten.
    AckDoesNothing,
    /// Receipts name the message, not the delivery.
    ReceiptOutlivesLease,
    /// One bad receipt makes the whole batch fail.
    BadReceiptFailsBatch,
    /// What is given back goes behind everything that waits, as a new message.
    NackGoesToTheBack,
    /// A delay is accepted and ignored.
    DelayIsIgnored,
    /// A dead letter is deleted.
    DeadLetterIsDeleted,
    /// A message gets the id of one that is gone, as rows of a database do.
    BrokerIdIsGivenAgain,
    /// The queue's identity is its bare name.
    NameIsIdentity,
    /// The reason is lost on the way to the dead-letter queue.
    ReasonIsLost,
    /// Extending answers without doing anything.
    ExtendDoesNothing,
    /// It says that a lease was extended for longer than it was.
    ExtensionIsOverstated,
    /// The lease is counted longer than it is.
    LeaseIsOverstated,
    /// Groups are a mere label.
    GroupsAreIgnored,
    /// Closing leaves everything to its lease.
    CloseKeepsAll,
    /// A delivery is acked as it is fetched.
    AckOnReceive,
    /// A delivery that was fetched for a dropped call is gone.
    CancelLosesMessages,
    /// Limits are ignored.
    LimitIsIgnored,
    /// An empty queue answers at once.
    ReceiveSpins,
    /// Waits are not interrupted by messages.
    ReceiveSleeps,
    /// Attributes are cut to ASCII.
    AsciiAttributes,
    /// The dedup id is not carried over.
    DedupIdIsLost,
    /// Bodies are cut off, or made up where there is none.
    BodiesAreChanged,
    /// A receipt that is spent breaks the consumer, as AMQP closes the channel.
    StaleReceiptCloses,
    /// A batch is published from its end.
    PublishReverses,
    /// Everything is published twice.
    PublishRepeats,
    /// One message that is refused makes the whole batch fail.
    RefusalFailsBatch,
    /// The queue's lease is guessed.
    QueueInfoGuesses,
    /// As `FewCapabilities`, and receipts name the message, not the delivery.
    ReceiptOutlivesConnection,
}

/// What all consumers of one queue know.
#[derive(Default)]
struct Shared {
    /// The newest receipt of each message.
    newest: Mutex<HashMap<String, Receipt>>,
    /// The message of each receipt.
    messages: Mutex<HashMap<Receipt, Message>>,
}

struct Buggy {
    /// The consumer, until its connection breaks.
    queue: Mutex<Arc<MemoryQueue>>,
    bug: Bug,
    shared: Arc<Shared>,
}

fn refused() -> SettleResult {
    SettleResult::Unknown(Error::new(ErrorKind::Other, "not supported"))
}

fn label(message: &Message) -> String {
    message.label().to_string()
}

impl Buggy {
    fn queue(&self) -> Arc<MemoryQueue> {
        Arc::clone(&self.queue.lock().expect("no panic"))
    }

    /// Gives back what is held, as a broker does when the connection is gone, and connects anew.
    async fn reconnect(&self) {
        let new = Arc::new(MemoryQueue::clone(&self.queue()));
        let old = std::mem::replace(&mut *self.queue.lock().expect("no panic"), new);
        Source::close(&*old).await.expect("it closes");
    }

    /// Has no capability at all.
    fn is_limited(&self) -> bool {
        matches!(
            self.bug,
            Bug::FewCapabilities | Bug::ReceiptOutlivesConnection
        )
    }

    fn remember(&self, delivery: &Delivery) {
        let message = Message::clone(&delivery.message);
        let receipt = delivery.receipt.clone();
        let mut newest = self.shared.newest.lock().expect("no panic");
        newest.insert(label(&message), receipt.clone());
        let mut messages = self.shared.messages.lock().expect("no panic");
        messages.insert(receipt, message);
    }

    fn message(&self, receipt: &Receipt) -> Option<Message> {
        self.shared
            .messages
            .lock()
            .expect("no panic")
            .get(receipt)
            .cloned()
    }

    async fn one(&self, receipt: &Receipt, disposition: Disposition) -> SettleResult {
        let receipt = receipt.clone();
        let settlement = Settlement::new(receipt, disposition);
        self.queue().settle(&[settlement]).await.remove(0)
    }

    fn newest(&self, receipt: &Receipt) -> Receipt {
        let newest = self.shared.newest.lock().expect("no panic");
        let message = self.message(receipt);
        let newest = message.and_then(|message| newest.get(&label(&message)).cloned());
        newest.unwrap_or_else(|| receipt.clone())
    }

    async fn settle_lower(&self, receipt: &Receipt) {
        let Some(&MemoryReceipt { consumer, tag }) = receipt.get() else {
            return;
        };
        for tag in 1..tag {
            let lower = Receipt::new(MemoryReceipt { consumer, tag });
            self.one(&lower, Disposition::Ack).await;
        }
    }

    async fn settle_one(
        &self,
        Settlement {
            receipt,
            disposition,
            ..
        }: &Settlement,
    ) -> SettleResult {
        let plain = *disposition == Disposition::Ack || *disposition == NACK;
        match (self.bug, disposition) {
            _ if self.is_limited() && !plain => return refused(),
            (Bug::AckDoesNothing, Disposition::Ack) => return SettleResult::Applied,
            (Bug::AckSettlesLower, Disposition::Ack) => self.settle_lower(receipt).await,
            (Bug::ReceiptOutlivesLease | Bug::ReceiptOutlivesConnection, _) => {
                return self.one(&self.newest(receipt), disposition.clone()).await;
            }
            (Bug::NackGoesToTheBack, Disposition::Nack { .. }) => {
                if let Some(message) = self.message(receipt) {
                    self.queue().publish(&[message]).await;
                }
                return self.one(receipt, Disposition::Ack).await;
            }
            (Bug::DelayIsIgnored, Disposition::Nack { .. }) => {
                return self.one(receipt, NACK).await;
            }
            (Bug::DeadLetterIsDeleted, Disposition::DeadLetter { .. }) => {
                return self.one(receipt, Disposition::Ack).await;
            }
            (Bug::ReasonIsLost, Disposition::DeadLetter { .. }) => {
                let reason = "rejected".to_owned();
                return self.one(receipt, Disposition::DeadLetter { reason }).await;
            }
            (Bug::AckOnReceive, _) => return SettleResult::Applied,
            _ => {}
        }
        let answer = self.one(receipt, disposition.clone()).await;
        if self.bug == Bug::StaleReceiptCloses && !answer.is_applied() {
            self.reconnect().await;
        }
        answer
    }

    fn rows(&self) -> usize {
        self.queue().depth()
    }

    fn deliver(&self, mut delivery: Delivery) -> Delivery {
        self.remember(&delivery);
        let message = Arc::make_mut(&mut delivery.message);
        match self.bug {
            Bug::GroupsAreIgnored => message.group = message.attributes.remove("group"),
            Bug::DedupIdIsLost => message.dedup_id = None,
            Bug::BrokerIdIsGivenAgain => message.broker_id = Some(self.rows().to_string()),
            Bug::BodiesAreChanged if message.body.is_empty() => message.body = "null".into(),
            Bug::BodiesAreChanged => message.body.truncate(1 << 16),
            Bug::AsciiAttributes => {
                let ascii = |text: &str| text.replace(|c: char| !c.is_ascii(), "?");
                let attributes = message.attributes.iter();
                message.attributes = attributes.map(|(k, v)| (k.to_owned(), ascii(v))).collect();
            }
            Bug::LeaseIsOverstated => {
                delivery.lease.until = delivery.lease.until.map(|until| until + LEASE / 2);
            }
            _ if self.is_limited() => {
                delivery.lease.until = None;
                delivery.attempt = None;
            }
            _ => {}
        }
        delivery
    }
}

#[async_trait]
impl Source for Buggy {
    fn name(&self) -> &str {
        "orders"
    }

    async fn receive(&self, mut limits: ReceiveLimits) -> Result<Vec<Delivery>, Error> {
        match self.bug {
            Bug::LimitIsIgnored => (limits.messages, limits.bytes) = (1000, usize::MAX),
            Bug::ReceiveSpins => limits.wait = Duration::ZERO,
            Bug::ReceiveSleeps => {
                let wait = std::mem::take(&mut limits.wait);
                let got = self.queue().receive(limits).await?;
                if !got.is_empty() {
                    return Ok(got.into_iter().map(|d| self.deliver(d)).collect());
                }
                tokio::time::sleep(wait).await;
                // Too late for the caller, who has stopped waiting.
                return Ok(Vec::new());
            }
            _ => {}
        }
        let got = self.queue().receive(limits).await?;
        let receipts: Vec<Receipt> = got.iter().map(|d| d.receipt.clone()).collect();
        match self.bug {
            _ if self.is_limited() => drop(self.queue().extend(&receipts, LONG).await),
            Bug::AckOnReceive => {
                for receipt in &receipts {
                    self.one(receipt, Disposition::Ack).await;
                }
            }
            Bug::CancelLosesMessages if !got.is_empty() => {
                self.queue().extend(&receipts, LONG).await;
                tokio::task::yield_now().await;
                self.queue().extend(&receipts, LEASE).await;
            }
            _ => {}
        }
        Ok(got.into_iter().map(|d| self.deliver(d)).collect())
    }

    async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        if self.bug == Bug::BadReceiptFailsBatch
            && batch.iter().any(|s| self.message(&s.receipt).is_none())
        {
            return batch.iter().map(|_| SettleResult::LeaseLost).collect();
        }
        let mut answers = Vec::new();
        for settlement in batch {
            answers.push(self.settle_one(settlement).await);
        }
        answers
    }

    async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        let asked = Instant::now() + lease;
        match self.bug {
            _ if self.is_limited() => {
                let refused = batch.iter().map(|_| refused().extended(asked));
                refused.collect()
            }
            Bug::ExtendDoesNothing => {
                let extended = batch.iter().map(|_| ExtendResult::Extended(asked));
                extended.collect()
            }
            Bug::ExtensionIsOverstated => {
                let granted = self.queue().extend(batch, lease / 2).await.into_iter();
                let overstated = granted.map(|answer| match answer {
                    ExtendResult::Extended(until) => ExtendResult::Extended(until + lease / 2),
                    other => other,
                });
                overstated.collect()
            }
            _ => self.queue().extend(batch, lease).await,
        }
    }

    async fn queue_info(&self) -> Result<QueueInfo, Error> {
        let mut info = self.queue().queue_info().await?;
        if self.is_limited() || self.bug == Bug::ModestCapabilities {
            info.capabilities = Capabilities::default();
        }
        if self.bug == Bug::QueueInfoGuesses {
            info.lease = Some(Duration::from_secs(30));
        }
        if self.bug == Bug::NameIsIdentity {
            info.identity = Some("orders".into());
        }
        Ok(info)
    }

    async fn close(&self) -> Result<(), Error> {
        if self.bug == Bug::CloseKeepsAll {
            return Ok(());
        }
        Source::close(&*self.queue()).await
    }
}

#[async_trait]
impl Sink for Buggy {
    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        Ok(SinkInfo::default())
    }
    fn name(&self) -> &str {
        "orders"
    }

    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        let refuses = |message: &Message| message.attributes.get(REFUSED).is_some();
        let all = self.bug == Bug::RefusalFailsBatch && batch.iter().any(refuses);
        let mut results = Vec::new();
        for message in batch {
            results.push(if all || refuses(message) {
                Err(Error::new(ErrorKind::Message, "refused"))
            } else {
                Ok(())
            });
        }
        let taken = batch.iter().filter(|message| !all && !refuses(message));
        let mut taken: Vec<Message> = taken.cloned().collect();
        match self.bug {
            Bug::GroupsAreIgnored => {
                for message in &mut taken {
                    if let Some(group) = message.group.take() {
                        message.attributes.insert("group", group);
                    }
                }
            }
            Bug::PublishReverses => taken.reverse(),
            Bug::PublishRepeats => taken.extend_from_within(..),
            _ => {}
        }
        self.queue().publish(&taken).await;
        results
    }

    async fn close(&self) -> Result<(), Error> {
        Sink::close(&*self.queue()).await
    }
}

struct Planted {
    queue: MemoryQueue,
    bug: Bug,
    noticed_by: Gaps,
    shared: Arc<Shared>,
    /// What was opened, so that its connection can be broken.
    opened: Mutex<Vec<Arc<Buggy>>>,
}

impl Planted {
    fn new(bug: Bug, noticed_by: Gaps) -> Self {
        Self {
            queue: MemoryQueue::new("orders").with_lease(LEASE),
            bug,
            noticed_by,
            shared: Arc::default(),
            opened: Mutex::default(),
        }
    }

    fn open(&self) -> Arc<Buggy> {
        let opened = Arc::new(Buggy {
            queue: Mutex::new(Arc::new(self.queue.clone())),
            bug: self.bug,
            shared: Arc::clone(&self.shared),
        });
        let mut all = self.opened.lock().expect("no panic");
        all.push(Arc::clone(&opened));
        opened
    }
}

#[async_trait]
impl SourceHarness for Planted {
    async fn source(&self) -> Arc<dyn Source> {
        self.open()
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        self.open()
    }

    async fn namesake(&self) -> (Arc<dyn Source>, Arc<dyn Sink>) {
        let other = Self::new(self.bug, self.noticed_by).open();
        (other.clone(), other)
    }

    fn made_up(&self, receipt: &Receipt) -> Vec<Receipt> {
        let MemoryReceipt { consumer, tag } = *receipt.get().expect("it is of a queue in memory");
        let other = |consumer, tag| Receipt::new(MemoryReceipt { consumer, tag });
        vec![
            other(consumer, tag + 1_000_000),
            other(consumer + 1_000_000, tag),
        ]
    }

    fn lease(&self) -> Duration {
        LEASE
    }

    fn refused_message(&self) -> Option<Message> {
        Some(Message::new("no").with_attribute(REFUSED, "yes"))
    }

    async fn break_connection(&self) -> bool {
        let all = self.opened.lock().expect("no panic").clone();
        for opened in all {
            opened.reconnect().await;
        }
        true
    }

    async fn dead_letters(&self) -> Vec<DeadLettered> {
        let dead = self.queue.dead_letters().into_iter();
        dead.map(|dead| DeadLettered {
            body: dead.message.body.clone(),
            reason: dead.reason,
        })
        .collect()
    }

    fn gaps(&self) -> Gaps {
        self.noticed_by
    }
}

plant! {
    source_suite;
    few_capabilities: FewCapabilities []
    modest_capabilities: ModestCapabilities [
        dead_letter_keeps_its_reason
        delayed_nack_waits
        expired_lease_redelivers
        extend_keeps_the_lease
        message_survives_the_queue
        nack_redelivers
    ]
    ack_settles_lower: AckSettlesLower [
        acks_settle_nothing_but_themselves
        bad_receipt_affects_only_itself
        random_histories_lose_nothing
    ]
    ack_does_nothing: AckDoesNothing [
        ack_removes
        acks_settle_nothing_but_themselves
        bad_receipt_affects_only_itself
        blocked_group_stalls_no_other
        broken_connection_gives_back
        close_gives_back
        group_waits_while_its_head_is_leased
        late_settlement_disturbs_nobody
        random_histories_lose_nothing
    ]
    receipt_outlives_lease: ReceiptOutlivesLease [
        late_settlement_disturbs_nobody
        random_histories_lose_nothing
    ]
    bad_receipt_fails_batch: BadReceiptFailsBatch [
        bad_receipt_affects_only_itself
    ]
    nack_goes_to_the_back: NackGoesToTheBack [
        blocked_group_stalls_no_other
        delayed_nack_waits
        failed_head_comes_back_first
        late_settlement_disturbs_nobody
        nack_redelivers
        random_histories_lose_nothing
    ]
    delay_is_ignored: DelayIsIgnored [
        blocked_group_stalls_no_other
        delayed_nack_waits
    ]
    dead_letter_is_deleted: DeadLetterIsDeleted [
        dead_letter_keeps_its_reason
    ]
    broker_id_is_given_again: BrokerIdIsGivenAgain [
        broker_id_is_given_once
    ]
    name_is_identity: NameIsIdentity [
        namesake_is_another_queue
    ]
    reason_is_lost: ReasonIsLost [
        dead_letter_keeps_its_reason
    ]
    extend_does_nothing: ExtendDoesNothing [
        bad_receipt_affects_only_itself
        extend_keeps_the_lease
        late_settlement_disturbs_nobody
    ]
    extension_is_overstated: ExtensionIsOverstated [
        extend_keeps_the_lease
    ]
    lease_is_overstated: LeaseIsOverstated [
        expired_lease_redelivers
    ]
    groups_are_ignored: GroupsAreIgnored [
        blocked_group_stalls_no_other
        group_waits_while_its_head_is_leased
        random_histories_lose_nothing
    ]
    close_keeps_all: CloseKeepsAll [
        close_gives_back
    ]
    ack_on_receive: AckOnReceive [
        acks_settle_nothing_but_themselves
        bad_receipt_affects_only_itself
        blocked_group_stalls_no_other
        close_gives_back
        dead_letter_keeps_its_reason
        delayed_nack_waits
        expired_lease_redelivers
        extend_keeps_the_lease
        failed_head_comes_back_first
        group_waits_while_its_head_is_leased
        late_settlement_disturbs_nobody
        nack_redelivers
        random_histories_lose_nothing
    ]
    cancel_loses_messages: CancelLosesMessages [
        dropped_receive_loses_nothing
    ]
    limit_is_ignored: LimitIsIgnored [
        blocked_group_stalls_no_other
        group_waits_while_its_head_is_leased
        receive_respects_its_limit
    ]
    receive_spins: ReceiveSpins [
        empty_receive_returns_after_its_wait
        receive_wakes_when_a_message_comes
    ]
    receive_sleeps: ReceiveSleeps [
        delayed_nack_waits
        expired_lease_redelivers
        extend_keeps_the_lease
        late_settlement_disturbs_nobody
        receive_wakes_when_a_message_comes
    ]
    ascii_attributes: AsciiAttributes [
        message_survives_the_queue
    ]
    dedup_id_is_lost: DedupIdIsLost [
        message_survives_the_queue
    ]
    bodies_are_changed: BodiesAreChanged [
        empty_body_survives_the_queue
        large_body_survives_the_queue
    ]
    stale_receipt_closes: StaleReceiptCloses [
        bad_receipt_affects_only_itself
        second_ack_is_harmless
    ]
    publish_reverses: PublishReverses [
        blocked_group_stalls_no_other
        close_gives_back
        failed_head_comes_back_first
        group_waits_while_its_head_is_leased
        groups_are_delivered_in_order
        random_histories_lose_nothing
    ]
    publish_repeats: PublishRepeats [
        ack_removes
        acks_settle_nothing_but_themselves
        bad_receipt_affects_only_itself
        blocked_group_stalls_no_other
        broken_connection_gives_back
        close_gives_back
        concurrent_receivers_share
        dead_letter_keeps_its_reason
        delayed_nack_waits
        expired_lease_redelivers
        extend_keeps_the_lease
        groups_are_delivered_in_order
        late_settlement_disturbs_nobody
        random_histories_lose_nothing
        refused_message_affects_only_itself
        second_ack_is_harmless
    ]
    refusal_fails_batch: RefusalFailsBatch [
        refused_message_affects_only_itself
    ]
    queue_info_guesses: QueueInfoGuesses [
        queue_info_tells_the_lease
    ]
    receipt_outlives_connection: ReceiptOutlivesConnection [
        broken_connection_gives_back
    ]
}
