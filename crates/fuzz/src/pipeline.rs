use std::collections::BTreeMap;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use onlyonce::attributes::{DEAD_LETTER_ATTEMPTS, DEAD_LETTER_QUEUE, DEAD_LETTER_REASON};
use onlyonce::driver::{ReceiveLimits, Sink, Source};
use onlyonce::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce::{Attributes, Context, DedupKey, Failure, Json, Message, Pipeline};
use serde::Deserialize;

use crate::input;

/// Messages of any form through a pipeline whose handler asks for a certain one: each takes effect, is a duplicate, or
/// is in the dead-letter queue with a reason that every broker takes.
pub fn pipeline(data: &[u8]) {
    let Ok(messages) = messages(&mut Unstructured::new(data)) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(run(messages));
}

fn messages(input: &mut Unstructured<'_>) -> Result<Vec<Message>> {
    let many = input.int_in_range(1..=6)?;
    (0..many)
        .map(|_| {
            let mut message = input::message(input)?;
            if input.ratio(1, 4)? {
                message.body = order(input)?.into();
            }
            Ok(message)
        })
        .collect()
}

/// Nearly what the handler asks for.
fn order(input: &mut Unstructured<'_>) -> Result<String> {
    let id: i64 = input.arbitrary()?;
    let note: &str = input.arbitrary()?;
    Ok(format!("{{\"id\":{id},\"notes\":{{\"n\":\"{note}\"}}}}"))
}

#[derive(Deserialize)]
struct Order {
    id: u32,
    #[serde(default)]
    notes: BTreeMap<String, String>,
}

async fn take(
    Json(order): Json<Order>,
    text: String,
    attributes: Attributes,
    key: DedupKey,
    context: Context,
    tx: &mut MemoryTx,
) -> std::result::Result<(), Failure> {
    assert_eq!(Some(&key), context.key.as_ref());
    if order.notes.contains_key("n") && attributes.is_empty() {
        return Err(Failure::dead_letter(text));
    }
    tx.push(order.id.to_string());
    Ok(())
}

async fn run(messages: Vec<Message>) {
    let (queue, dead) = (MemoryQueue::new("orders"), MemoryQueue::new("dead"));
    let mut many = 0;
    for result in Sink::publish(&queue, &messages).await {
        many += u64::from(result.is_ok());
    }
    let store = MemoryStore::new();
    let report = Pipeline::transactional(queue.clone(), store.clone())
        .dead_letter(dead.clone())
        .stop_when_idle(Duration::from_secs(1))
        .run(take)
        .await
        .expect("nothing is wrong with queue and store");
    assert_eq!(
        report.applied + report.duplicates + report.dead_lettered,
        many,
        "{report:?}"
    );
    assert_eq!(store.effects().len() as u64, report.applied);
    assert_eq!((queue.depth(), queue.in_flight()), (0, 0));
    assert_eq!(dead.depth() as u64, report.dead_lettered);
    let limit = ReceiveLimits::new(100, Duration::ZERO);
    for letter in dead.receive(limit).await.expect("the queue is open") {
        let attribute = |name| letter.message.attributes.get(name).expect("it is there");
        let reason = attribute(DEAD_LETTER_REASON);
        assert!(reason.chars().count() <= 1_000 && !reason.contains(char::is_control));
        assert_eq!(attribute(DEAD_LETTER_QUEUE), "orders");
        assert_eq!(attribute(DEAD_LETTER_ATTEMPTS), "1");
        let same = |sent: &&Message| sent.body == letter.message.body;
        assert!(
            messages.iter().any(|sent| same(&sent)),
            "the payload is kept"
        );
    }
}
