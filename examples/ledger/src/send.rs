//! Publishes traffic to any queue.

use std::time::Duration;

use onlyonce::driver::Sink;
use onlyonce::{Error, Message};
use serde::Serialize;

use crate::options::Send;
use crate::traffic::{Item, Traffic};

const BATCH: usize = 500;
const PAUSE: Duration = Duration::from_millis(200);

/// What was sent, and confirmed.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Sent {
    pub messages: u64,
    pub transfers: u64,
    pub duplicates: u64,
    pub poison: u64,
}

pub async fn run(options: &Send) -> Result<Sent, Error> {
    let traffic = Traffic {
        seed: options.seed,
        transfers: options.count,
        duplicates: options.duplicates,
        poison: options.poison,
        groups: options.groups,
    };
    feed(&options.sink, traffic).await
}

/// Sends everything to the queue of this URL.
pub async fn feed(url: &str, traffic: Traffic) -> Result<Sent, Error> {
    let sink = onlyonce::sink(url).await?;
    let mut sent = Sent::default();
    for items in traffic.items().chunks(BATCH) {
        let messages = items.iter().map(|item| traffic.message(*item)).collect();
        publish(&*sink, messages).await?;
        for item in items {
            sent.messages += 1;
            match item {
                Item::Transfer(_) => sent.transfers += 1,
                Item::Duplicate(_) => sent.duplicates += 1,
                Item::Poison(_) => sent.poison += 1,
            }
        }
    }
    sink.close().await?;
    Ok(sent)
}

/// Publishes until each is confirmed; what was published without our knowing is one more duplicate.
async fn publish(sink: &dyn Sink, mut messages: Vec<Message>) -> Result<(), Error> {
    loop {
        let results = sink.publish(&messages).await;
        let mut again = Vec::new();
        for (message, result) in messages.into_iter().zip(results) {
            match result {
                Ok(()) => {}
                Err(error) if error.is_retryable() => again.push(message),
                Err(error) => return Err(error),
            }
        }
        if again.is_empty() {
            return Ok(());
        }
        messages = again;
        tokio::time::sleep(PAUSE).await;
    }
}
