//! What is in the outbox, and when.

use std::time::Duration;

use onlyonce_core::Message;
use onlyonce_core::driver::{
    Fetch, Outbox, OutboxDisposition, Store, Transaction, TransactionalStore,
};
use tokio::time::Instant;

use super::OutboxHarness;
use super::tools::*;
use crate::store::tools::{A, B, FENCED, LONG, completion, take};

/// Nothing leaves before the commit, and everything after it, in the order in which it was written.
pub async fn committed_messages_are_fetched_in_order(harness: &impl OutboxHarness) {
    let (store, outbox) = (harness.transactional().await, harness.outbox().await);
    let held = take(&store, A, "k", LONG).await;
    let mut tx = begin(harness, &store).await;
    let mut ids = Vec::new();
    for body in ["a1", "b1", "a2"] {
        ids.push(publish_in(&mut tx, grouped(body)).await);
    }
    complete(&mut tx, held).await;
    tx.commit().await.expect("it commits");
    ids.extend(publish_all(harness, &["b2", "a3"]).await);
    let fetched = fetch(&*outbox, A).await;
    assert_eq!(bodies(&fetched), ["a1", "b1", "a2", "b2", "a3"]);
    let named: Vec<_> = fetched.iter().map(|outgoing| outgoing.id).collect();
    assert_eq!(named, ids, "under the ids that they were given");
    assert!(fetched.iter().all(|outgoing| outgoing.attempts == 0));
}

async fn begin<H: OutboxHarness>(_: &H, store: &H::Store) -> Tx<H> {
    store.begin().await.expect("it begins")
}

/// What was rolled back, in whatever way, never leaves.
pub async fn rolled_back_message_never_leaves(harness: &impl OutboxHarness) {
    let (store, outbox) = (harness.transactional().await, harness.outbox().await);
    let mut dropped = begin(harness, &store).await;
    publish_in(&mut dropped, message("dropped")).await;
    drop(dropped);
    let mut rolled_back = begin(harness, &store).await;
    publish_in(&mut rolled_back, message("rolled back")).await;
    rolled_back.rollback().await.expect("it rolls back");
    rolled_back.commit().await.expect("it commits nothing");
    let mut unfinished = begin(harness, &store).await;
    publish_in(&mut unfinished, message("unfinished")).await;
    unfinished.commit().await.expect("it commits nothing");
    harness.publish(OUT, message("kept")).await;
    assert_eq!(bodies(&fetch(&*outbox, A).await), ["kept"]);
}

/// A savepoint takes its messages along, whether it is rolled back or fenced, and leaves those of its neighbours.
pub async fn rolled_back_savepoint_takes_its_messages_along(harness: &impl OutboxHarness) {
    let (store, outbox) = (harness.transactional().await, harness.outbox().await);
    let (one, three) = (
        take(&store, A, "k1", LONG).await,
        take(&store, A, "k3", LONG).await,
    );
    let stale = take(&store, A, "k4", LONG).await;
    let taken_over = take(&store, A, "k4", LONG).await;
    let mut tx = begin(harness, &store).await;
    publish_in(&mut tx, message("one")).await;
    complete(&mut tx, one).await;
    publish_in(&mut tx, message("two")).await;
    tx.rollback().await.expect("it rolls back");
    publish_in(&mut tx, message("three")).await;
    complete(&mut tx, three).await;
    publish_in(&mut tx, message("four")).await;
    let verdict = tx.complete(&[completion(stale)]).await;
    assert_eq!(verdict.expect("the store can be reached"), FENCED);
    publish_in(&mut tx, message("unfinished")).await;
    tx.commit().await.expect("it commits");
    assert_eq!(bodies(&fetch(&*outbox, A).await), ["one", "three"]);
    assert_eq!(
        store.release(&[taken_over]).await.expect("it answers"),
        [Ok(())]
    );
}

/// The last savepoint can end with the commit.
pub async fn message_leaves_with_the_last_savepoint(harness: &impl OutboxHarness) {
    let (store, outbox) = (harness.transactional().await, harness.outbox().await);
    let held = take(&store, A, "k", LONG).await;
    let mut tx = begin(harness, &store).await;
    publish_in(&mut tx, message("kept")).await;
    let done = tx.complete_and_commit(&[completion(held)]).await;
    assert_eq!(done.expect("it commits"), Ok(()));
    let mut again = begin(harness, &store).await;
    publish_in(&mut again, message("fenced")).await;
    let done = again.complete_and_commit(&[completion(held)]).await;
    assert_eq!(done.expect("the store can be reached"), FENCED);
    assert_eq!(bodies(&fetch(&*outbox, A).await), ["kept"]);
}

/// A message whose transaction was begun before another's and commits after it, when the other's has been sent already.
/// A store with one transaction at a time has no such thing.
pub async fn late_commit_is_not_skipped(harness: &impl OutboxHarness) {
    let (store, outbox) = (harness.transactional().await, harness.outbox().await);
    let info = store.store_info().await.expect("it answers");
    if info.transactions == Some(1) {
        return;
    }
    let (first, second) = (
        take(&store, A, "k1", LONG).await,
        take(&store, A, "k2", LONG).await,
    );
    let (mut late, mut early) = (begin(harness, &store).await, begin(harness, &store).await);
    publish_in(&mut late, grouped("g1")).await;
    publish_in(&mut early, grouped("g2")).await;
    complete(&mut early, second).await;
    early.commit().await.expect("it commits");
    let fetched = fetch(&*outbox, A).await;
    assert_eq!(bodies(&fetched), ["g2"], "it waits for nobody");
    settle(&*outbox, A, fetched[0].id, OutboxDisposition::Sent).await;
    complete(&mut late, first).await;
    late.commit().await.expect("it commits");
    assert_eq!(bodies(&fetch(&*outbox, A).await), ["g1"]);
}

/// Everything of a message that is kept comes back, byte for byte.
pub async fn message_survives_the_outbox(harness: &impl OutboxHarness) {
    let (store, outbox) = (harness.transactional().await, harness.outbox().await);
    let body: Vec<u8> = (0..=255).collect();
    let odd = "quo\"te \u{1f980} \\ new\nline";
    let full = Message::new(body)
        .with_dedup_id(odd)
        .with_group(odd)
        .with_attribute(odd, odd)
        .with_attribute("type", "Paid")
        .with_attribute("empty", "");
    let large: Vec<u8> = (0..harness.large_body()).map(|n| (n % 251) as u8).collect();
    let all = [full, Message::default(), Message::new(large)];
    let held = take(&store, A, "k", LONG).await;
    let mut tx = begin(harness, &store).await;
    for message in &all {
        publish_in(&mut tx, message.clone()).await;
    }
    complete(&mut tx, held).await;
    tx.commit().await.expect("it commits");
    for message in &all {
        harness.publish(OUT, message.clone()).await;
    }
    let fetched = fetch(&*outbox, A).await;
    assert_eq!(fetched.len(), 2 * all.len());
    for (outgoing, written) in fetched.iter().zip(all.iter().cycle()) {
        assert!(outgoing.message == *written, "{}", written.size());
    }
}

/// What was committed is there after a crash, under its id.
pub async fn message_survives_a_crash(harness: &impl OutboxHarness) {
    let store = harness.transactional().await;
    let held = take(&store, A, "k", LONG).await;
    let mut tx = begin(harness, &store).await;
    let id = publish_in(&mut tx, message("kept")).await;
    complete(&mut tx, held).await;
    tx.commit().await.expect("it commits");
    drop(store);
    harness.crash().await;
    let fetched = fetch(&*harness.outbox().await, B).await;
    assert_eq!(bodies(&fetched), ["kept"]);
    assert_eq!(fetched[0].id, id);
}

/// A relay that waits is told of a commit: of one that happens meanwhile, and of one that has happened since it looked.
pub async fn wait_ends_with_a_commit(harness: &impl OutboxHarness) {
    let (store, outbox) = (harness.transactional().await, harness.outbox().await);
    for (name, meanwhile, count) in [("k1", true, 1), ("k2", false, 2)] {
        let held = take(&store, A, name, LONG).await;
        let (_, _, mark) = fetch_with(&*outbox, Fetch::new(A, 10, LONG)).await;
        let commit = async {
            let mut tx = begin(harness, &store).await;
            publish_in(&mut tx, message("x")).await;
            complete(&mut tx, held).await;
            tx.commit().await.expect("it commits");
        };
        if meanwhile {
            let late = async {
                tokio::time::sleep(Duration::from_millis(300)).await;
                commit.await;
            };
            tokio::join!(wait_for(&*outbox, mark, count), late);
        } else {
            commit.await;
            wait_for(&*outbox, mark, count).await;
        }
    }
}

/// Waits as a relay does, which may be woken in vain, until so many may be fetched.
async fn wait_for(outbox: &dyn Outbox, mut mark: u64, count: usize) {
    const LONGEST: Duration = Duration::from_secs(60);
    let began = Instant::now();
    loop {
        outbox.wait(OUT, mark, LONGEST).await.expect("it waits");
        assert!(began.elapsed() < LONGEST / 2, "it was not told");
        let (fetched, _, seen) = fetch_with(outbox, Fetch::new(A, 10, LONG)).await;
        if fetched.len() == count {
            return;
        }
        mark = seen;
    }
}

/// It also ends without one.
pub async fn wait_ends_by_itself(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    let (_, _, mark) = fetch_with(&*outbox, Fetch::new(A, 10, LONG)).await;
    let waits = outbox.wait(OUT, mark, Duration::from_millis(100));
    let waited = tokio::time::timeout(Duration::from_secs(30), waits).await;
    waited.expect("it ends").expect("it waits");
}
