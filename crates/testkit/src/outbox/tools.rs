use std::time::Duration;

use onlyonce_core::Message;
use onlyonce_core::driver::{
    Fetch, FetchResult, HeldClaim, Outbox, OutboxDisposition, OutboxSettlement, OutboxTransaction,
    Outgoing, OutgoingId, Owner, Transaction, TransactionalStore, Verdicts,
};

use super::OutboxHarness;
use crate::store::tools::{LONG, completion};

/// The destination of all checks that need one.
pub(super) const OUT: &str = "out";

pub(super) type Tx<H> =
    <<H as crate::transactional_store::TransactionalStoreHarness>::Store as TransactionalStore>::Tx;

pub(super) fn message(body: &str) -> Message {
    Message::new(body.to_owned())
}

/// The text up to the first digit is the group.
pub(super) fn grouped(body: &str) -> Message {
    let group = body.trim_end_matches(|c: char| c.is_ascii_digit());
    message(body).with_group(group)
}

pub(super) async fn publish_all(harness: &impl OutboxHarness, bodies: &[&str]) -> Vec<OutgoingId> {
    let mut ids = Vec::new();
    for body in bodies {
        ids.push(harness.publish(OUT, grouped(body)).await);
    }
    ids
}

pub(super) async fn publish_in<T: OutboxTransaction>(tx: &mut T, message: Message) -> OutgoingId {
    let published = tx.publish(OUT, message).await;
    published.expect("it writes")
}

/// Ends a savepoint.
pub(super) async fn complete(tx: &mut impl Transaction, held: HeldClaim) {
    let verdict = tx.complete(&[completion(held)]).await;
    assert_eq!(verdict.expect("the store can be reached"), Ok(()));
}

pub(super) fn bodies(messages: &[Outgoing]) -> Vec<String> {
    let body = |outgoing: &Outgoing| String::from_utf8_lossy(&outgoing.message.body).into_owned();
    messages.iter().map(body).collect()
}

/// All that may be published now, by a relay that must be given the lease.
pub(super) async fn fetch(outbox: &dyn Outbox, relay: Owner) -> Vec<Outgoing> {
    fetch_with(outbox, Fetch::new(relay, 1000, LONG)).await.0
}

pub(super) async fn fetch_with(
    outbox: &dyn Outbox,
    fetch: Fetch,
) -> (Vec<Outgoing>, Option<Duration>, u64) {
    match outbox.fetch(OUT, fetch).await.expect("it answers") {
        FetchResult::Fetched {
            messages,
            ready_in,
            mark,
        } => (messages, ready_in, mark),
        FetchResult::Busy { retry_in } => {
            panic!("nobody has the lease, yet it ends in {retry_in:?}")
        }
    }
}

/// How long another relay's lease lasts.
pub(super) async fn busy(outbox: &dyn Outbox, relay: Owner) -> Duration {
    let fetch = Fetch::new(relay, 1000, LONG);
    match outbox.fetch(OUT, fetch).await.expect("it answers") {
        FetchResult::Busy { retry_in } => retry_in,
        other => panic!("another relay has the lease, yet it is {other:?}"),
    }
}

pub(super) fn failed(retry_in: Duration) -> OutboxDisposition {
    OutboxDisposition::Failed {
        reason: "the queue refused it".into(),
        retry_in,
    }
}

pub(super) fn set_aside() -> OutboxDisposition {
    OutboxDisposition::SetAside {
        reason: "too \u{201e}large\u{201c}".into(),
    }
}

pub(super) async fn settle_all(
    outbox: &dyn Outbox,
    relay: Owner,
    batch: &[(OutgoingId, OutboxDisposition)],
) -> Verdicts {
    let batch: Vec<_> = batch
        .iter()
        .map(|(id, disposition)| OutboxSettlement::new(*id, disposition.clone()))
        .collect();
    let verdicts = outbox.settle(relay, OUT, &batch).await;
    let verdicts = verdicts.expect("it answers");
    assert_eq!(verdicts.len(), batch.len(), "one verdict per entry");
    verdicts
}

/// Settles one message, as the relay that may.
pub(super) async fn settle(
    outbox: &dyn Outbox,
    relay: Owner,
    id: OutgoingId,
    disposition: OutboxDisposition,
) {
    let verdicts = settle_all(outbox, relay, &[(id, disposition)]).await;
    assert_eq!(verdicts, [Ok(())]);
}
