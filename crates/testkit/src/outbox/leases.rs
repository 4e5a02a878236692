//! Who may publish to a destination.

use onlyonce_core::driver::{Fetch, OutboxDisposition};

use super::OutboxHarness;
use super::tools::*;
use crate::store::tools::{A, B, FENCED, LONG, expire};

/// A second relay waits for the end of the first one's lease, and then takes over.
pub async fn second_relay_waits_for_the_end_of_the_lease(harness: &impl OutboxHarness) {
    let (first, second) = (harness.outbox().await, harness.outbox().await);
    publish_all(harness, &["a1"]).await;
    let lease = harness.lease();
    fetch_with(&*first, Fetch::new(A, 10, lease)).await;
    let left = busy(&*second, B).await;
    assert!(left <= lease, "{left:?} of {lease:?}");
    // It is renewed by whoever has it.
    fetch_with(&*first, Fetch::new(A, 10, lease)).await;
    expire(harness).await;
    assert_eq!(bodies(&fetch(&*second, B).await), ["a1"]);
    assert!(busy(&*first, A).await > lease);
}

/// A relay that has asked again keeps the lease.
pub async fn fetch_renews_the_lease(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    fetch_with(&*outbox, Fetch::new(A, 10, harness.lease())).await;
    fetch(&*outbox, A).await;
    expire(harness).await;
    busy(&*outbox, B).await;
    fetch(&*outbox, A).await;
}

/// A lease that is given up is free at once; another's is not touched.
pub async fn released_destination_is_free(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    fetch(&*outbox, A).await;
    outbox.release(B, OUT).await.expect("it answers");
    busy(&*outbox, B).await;
    outbox.release(A, OUT).await.expect("it answers");
    fetch(&*outbox, B).await;
    outbox.release(A, OUT).await.expect("it answers");
    busy(&*outbox, A).await;
}

/// What a relay has sent is out, even if another has taken over; what has failed is not its business any more.
pub async fn relay_that_was_taken_over_settles_only_what_it_sent(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    let ids = publish_all(harness, &["a1", "a2", "b1", "c1", "d1"]).await;
    fetch_with(&*outbox, Fetch::new(A, 10, harness.lease())).await;
    expire(harness).await;
    fetch(&*outbox, B).await;
    settle(&*outbox, B, ids[2], failed(LONG)).await;
    settle(&*outbox, B, ids[3], set_aside()).await;
    let sent = |at: usize| (ids[at], OutboxDisposition::Sent);
    let batch = [
        (ids[0], failed(LONG)),
        (ids[1], set_aside()),
        sent(2),
        sent(3),
        sent(4),
        // It is out, so there is nothing to say about it.
        (ids[4], failed(LONG)),
    ];
    let verdicts = settle_all(&*outbox, A, &batch).await;
    assert_eq!(verdicts, [FENCED, FENCED, Ok(()), Ok(()), Ok(()), Ok(())]);
    let fetched = fetch(&*outbox, B).await;
    assert_eq!(bodies(&fetched), ["a1", "a2"]);
    assert!(fetched.iter().all(|outgoing| outgoing.attempts == 0));
    assert!(
        outbox
            .set_aside(OUT, 9)
            .await
            .expect("it answers")
            .is_empty()
    );
}

/// A lease that has ended, and was not taken over, is held.
pub async fn expired_lease_that_nobody_took_settles(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    let ids = publish_all(harness, &["a1", "b1"]).await;
    fetch_with(&*outbox, Fetch::new(A, 10, harness.lease())).await;
    expire(harness).await;
    settle(&*outbox, A, ids[0], failed(LONG)).await;
    assert_eq!(bodies(&fetch(&*outbox, A).await), ["b1"]);
}
