//! Order within a group, and no other.

use std::collections::BTreeMap;

use onlyonce_core::driver::{Disposition, Ordering};
use tokio::time::sleep;

use super::SourceHarness;
use super::tools::*;

/// Whatever is published in a group is delivered in that order, however groups are mixed.
pub async fn groups_are_delivered_in_order(harness: &dyn SourceHarness) {
    const EACH: usize = 8;
    let source = harness.source().await;
    let mut lanes = [grouped("a", EACH), grouped("b", EACH), grouped("c", EACH)];
    // One message of each group after another, in batches that do not fall on those boundaries.
    let mixed: Vec<_> = (0..EACH)
        .flat_map(|n| lanes.iter().map(move |lane| lane[n].clone()))
        .collect();
    for batch in mixed.chunks(7) {
        publish(harness, batch).await;
    }
    let got = drain(harness, &*source, mixed.len()).await;
    if able(&*source).await.ordering == Ordering::None {
        let sent = bodies(&mixed);
        return assert_eq!(sorted(got), sorted(sent), "all, in any order");
    }
    let mut by_group: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for body in &got {
        by_group.entry(&body[..1]).or_default().push(body.clone());
    }
    for (lane, (group, got)) in lanes.iter_mut().zip(by_group) {
        assert_eq!(got, bodies(&*lane), "group {group}");
    }
}

/// While a head is leased its group waits, for every consumer; where the source does not promise that, it goes on.
pub async fn group_waits_while_its_head_is_leased(harness: &dyn SourceHarness) {
    let both = [&harness.source().await, &harness.source().await];
    let ordering = able(&**both[0]).await.ordering;
    if ordering == Ordering::None {
        return;
    }
    publish(harness, &grouped("a", 3)).await;
    let (first, second, head) = whoever_receives(harness, both, 1).await;
    assert_eq!(bodies_of(&head), ["a1"]);
    if ordering == Ordering::Delivery {
        assert_eq!(
            bodies_of(&collect(harness, &**first, 2).await),
            ["a2", "a3"]
        );
        return;
    }
    nothing(harness, &**first).await;
    nothing(harness, &**second).await;
    applied(&**first, &head, &Disposition::Ack).await;
    assert_eq!(drain(harness, &**second, 2).await, ["a2", "a3"]);
}

/// A head that is given back with all that follows it comes back before them.
pub async fn failed_head_comes_back_first(harness: &dyn SourceHarness) {
    let source = harness.source().await;
    if able(&*source).await.ordering == Ordering::None {
        return;
    }
    let sent = grouped("a", 5);
    publish(harness, &sent).await;
    for _ in 0..3 {
        // As many as the source gives at once, from one to all.
        let receive = source.receive(limit(4, harness.patience()));
        let held = receive.await.expect("it is open");
        assert_eq!(bodies_of(&held), bodies(&sent[..held.len()]));
        applied(&*source, &held, &NACK).await;
    }
    // The order in which they are given back is of no account.
    let receive = source.receive(limit(4, harness.patience()));
    let mut held = receive.await.expect("it is open");
    held.reverse();
    applied(&*source, &held, &NACK).await;
    assert_eq!(drain(harness, &*source, 5).await, bodies(&sent));
}

/// A head that is delayed, or just slow, holds up its own group and nothing else.
pub async fn blocked_group_stalls_no_other(harness: &dyn SourceHarness) {
    let source = harness.source().await;
    let capabilities = able(&*source).await;
    if capabilities.ordering != Ordering::Group {
        return;
    }
    let blocked = grouped("a", 20);
    publish(harness, &blocked).await;
    let head = [collect_one(harness, &*source).await];
    assert_eq!(bodies_of(&head), ["a1"]);
    let delay = harness.lease();
    if capabilities.delayed_nack {
        applied(&*source, &head, &Disposition::Nack { delay }).await;
    }
    publish(harness, &grouped("b", 3)).await;
    publish(harness, &numbered("free", 2)).await;
    let others = drain(harness, &*source, 5).await;
    assert_eq!(sorted(others), ["b1", "b2", "b3", "free1", "free2"]);
    if capabilities.delayed_nack {
        sleep(delay).await;
    } else {
        applied(&*source, &head, &NACK).await;
    }
    assert_eq!(drain(harness, &*source, 20).await, bodies(&blocked));
}
