//! What becomes of a message.

use std::collections::BTreeMap;
use std::time::Duration;

use onlyonce_core::driver::{Fetch, Outbox, OutboxDisposition, Outgoing, OutgoingId};

use super::OutboxHarness;
use super::tools::*;
use crate::store::tools::{A, LONG};

/// What was sent is gone for good, and may be said to be so again.
pub async fn sent_message_is_removed(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    let ids = publish_all(harness, &["a1", "a2", "b1"]).await;
    fetch(&*outbox, A).await;
    for _ in 0..2 {
        settle(&*outbox, A, ids[0], OutboxDisposition::Sent).await;
        assert_eq!(bodies(&fetch(&*outbox, A).await), ["a2", "b1"]);
    }
    // As if one after another.
    let sent = |at: usize| (ids[at], OutboxDisposition::Sent);
    let batch = [sent(2), (ids[2], failed(LONG)), sent(1)];
    assert_eq!(settle_all(&*outbox, A, &batch).await, [Ok(()); 3]);
    assert!(fetch(&*outbox, A).await.is_empty());
}

/// A failure is counted, and delays the message and what stands behind it in its group, and nobody else.
pub async fn failed_message_delays_its_group_alone(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    let ids = publish_all(harness, &["a1", "a2", "a3", "b1"]).await;
    fetch(&*outbox, A).await;
    settle(&*outbox, A, ids[1], failed(harness.lease())).await;
    let (fetched, ready_in, _) = fetch_with(&*outbox, Fetch::new(A, 10, LONG)).await;
    assert_eq!(bodies(&fetched), ["a1", "b1"], "what stands before it goes");
    assert!(ready_in.is_none_or(|ready| ready <= harness.lease()));
    harness.expire(harness.lease() + MARGIN).await;
    let fetched = fetch(&*outbox, A).await;
    assert_eq!(bodies(&fetched), ["a1", "a2", "a3", "b1"], "in its place");
    let attempts: Vec<_> = fetched.iter().map(|outgoing| outgoing.attempts).collect();
    assert_eq!(attempts, [0, 1, 0, 0]);
    settle(&*outbox, A, ids[1], failed(Duration::ZERO)).await;
    assert_eq!(fetch(&*outbox, A).await[1].attempts, 2);
}

/// Stores that keep times in whole milliseconds round.
const MARGIN: Duration = Duration::from_millis(20);

/// What is set aside stays, is shown with its reason, and holds its group up only for a relay that says so.
pub async fn set_aside_message_is_kept_with_its_reason(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    let ids = publish_all(harness, &["a1", "a2", "a3", "b1"]).await;
    fetch(&*outbox, A).await;
    settle(&*outbox, A, ids[1], failed(Duration::ZERO)).await;
    settle(&*outbox, A, ids[1], set_aside()).await;
    settle(&*outbox, A, ids[3], set_aside()).await;
    let waiting = Fetch::new(A, 10, LONG).waiting_for_set_aside(true);
    for _ in 0..2 {
        assert_eq!(bodies(&fetch(&*outbox, A).await), ["a1", "a3"]);
        let fetched = fetch_with(&*outbox, waiting).await.0;
        assert_eq!(bodies(&fetched), ["a1"]);
        harness.expire(harness.lease()).await;
    }
    let kept = outbox.set_aside(OUT, 10).await.expect("it answers");
    let shown: Vec<Outgoing> = kept.iter().map(|one| one.outgoing.clone()).collect();
    assert_eq!(bodies(&shown), ["a2", "b1"]);
    assert_eq!((shown[0].id, shown[0].attempts), (ids[1], 2));
    for one in kept {
        let OutboxDisposition::SetAside { reason } = set_aside() else {
            unreachable!("it is made so");
        };
        assert_eq!(one.reason, reason);
    }
    let first = outbox.set_aside(OUT, 1).await.expect("it answers");
    assert_eq!(first.len(), 1);
    assert!(
        outbox
            .set_aside("other", 9)
            .await
            .expect("it answers")
            .is_empty()
    );
}

/// What is requeued has its place and all its attempts again. Nothing else is.
pub async fn requeued_message_has_its_place_again(harness: &impl OutboxHarness) {
    let outbox = harness.outbox().await;
    let ids = publish_all(harness, &["a1", "a2", "a3"]).await;
    fetch(&*outbox, A).await;
    settle(&*outbox, A, ids[1], set_aside()).await;
    settle(&*outbox, A, ids[2], failed(LONG)).await;
    let requeue = |ids: Vec<OutgoingId>| {
        let outbox = &outbox;
        async move { outbox.requeue(OUT, &ids).await.expect("it answers") }
    };
    let elsewhere = outbox.requeue("other", &ids).await;
    assert_eq!(elsewhere.expect("it answers"), 0);
    assert_eq!(requeue(ids.clone()).await, 1, "only what was set aside");
    assert_eq!(requeue(ids.clone()).await, 0);
    let fetched = fetch(&*outbox, A).await;
    assert_eq!(bodies(&fetched), ["a1", "a2"]);
    assert_eq!(fetched[1].attempts, 0);
    assert!(
        outbox
            .set_aside(OUT, 9)
            .await
            .expect("it answers")
            .is_empty()
    );
}

/// One message, as the model sees it.
#[derive(Debug)]
struct Modelled {
    id: OutgoingId,
    group: Option<String>,
    attempts: u32,
    state: State,
}

#[derive(Debug, PartialEq)]
enum State {
    Ready,
    Delayed,
    SetAside,
}

/// What may be fetched, by the model.
fn expected(model: &[Modelled], waits: bool) -> Vec<(OutgoingId, u32)> {
    let mut blocked: BTreeMap<&str, ()> = BTreeMap::new();
    let mut ready = Vec::new();
    for one in model {
        let group = one.group.as_deref();
        let is_blocked = group.is_some_and(|group| blocked.contains_key(group));
        if one.state == State::Ready && !is_blocked {
            ready.push((one.id, one.attempts));
        }
        if (one.state == State::Delayed || (one.state == State::SetAside && waits))
            && let Some(group) = group
        {
            blocked.insert(group, ());
        }
    }
    ready
}

/// Random histories: whatever is published and settled in whatever order, a fetch returns what it should.
pub async fn random_histories_agree_with_the_model(harness: &impl OutboxHarness) {
    crate::random::histories(async |seed| {
        let outbox = harness.outbox().await;
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut model: Vec<Modelled> = Vec::new();
        fetch(&*outbox, A).await;
        for step in 0..40 {
            play(harness, &*outbox, &mut rng, &mut model, step).await;
            let waits = rng.bool();
            let ask = Fetch::new(A, 1000, LONG).waiting_for_set_aside(waits);
            let fetched = fetch_with(&*outbox, ask).await.0;
            let found: Vec<_> = fetched.iter().map(|one| (one.id, one.attempts)).collect();
            assert_eq!(found, expected(&model, waits), "step {step}: {model:?}");
        }
        // The next history begins with an empty outbox.
        let rest = model.iter().map(|one| (one.id, OutboxDisposition::Sent));
        let rest: Vec<_> = rest.collect();
        settle_all(&*outbox, A, &rest).await;
    })
    .await;
}

/// One step, on the outbox and on the model.
async fn play(
    harness: &impl OutboxHarness,
    outbox: &dyn Outbox,
    rng: &mut fastrand::Rng,
    model: &mut Vec<Modelled>,
    step: usize,
) {
    if model.is_empty() || rng.u32(..3) == 0 {
        let group = Some(format!("g{}", rng.u32(..3))).filter(|_| rng.u32(..5) > 0);
        let mut written = message(&step.to_string());
        written.group.clone_from(&group);
        let id = harness.publish(OUT, written).await;
        let (attempts, state) = (0, State::Ready);
        return model.push(Modelled {
            id,
            group,
            attempts,
            state,
        });
    }
    let at = rng.usize(..model.len());
    let one = &mut model[at];
    match rng.u32(..5) {
        0 | 1 => {
            settle(outbox, A, one.id, OutboxDisposition::Sent).await;
            model.remove(at);
        }
        2 => {
            let now = rng.bool();
            let retry_in = if now { Duration::ZERO } else { LONG };
            settle(outbox, A, one.id, failed(retry_in)).await;
            one.attempts += 1;
            one.state = if now { State::Ready } else { State::Delayed };
        }
        3 => {
            settle(outbox, A, one.id, set_aside()).await;
            one.attempts += 1;
            one.state = State::SetAside;
        }
        _ => {
            let requeued = outbox.requeue(OUT, &[one.id]).await.expect("it answers");
            assert_eq!(requeued == 1, one.state == State::SetAside, "{one:?}");
            if requeued == 1 {
                (one.attempts, one.state) = (0, State::Ready);
            }
        }
    }
}
