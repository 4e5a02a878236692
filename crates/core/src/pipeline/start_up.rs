//! What is looked at before anything is received.

use tokio::time::sleep;

use crate::Error;
use crate::driver::QueueInfo;

use super::backoff::Backoff;
use super::checks::Found;
use super::setup::Setup;

/// Looks at the queue, at its dead-letter queue and at the store.
pub(crate) async fn look<Tx>(setup: &Setup<Tx>) -> Result<Found, Error> {
    let source = &setup.source;
    let queue = answered(source.name(), || source.queue_info()).await?;
    let sink = match &setup.sink {
        Some(sink) => Some(answered(sink.name(), || sink.sink_info()).await?),
        None => None,
    };
    let store = match &setup.store {
        Some(store) => Some(answered(source.name(), || store.store_info()).await?),
        None => None,
    };
    Ok(Found { queue, sink, store })
}

/// Asks until there is an answer, however long it takes until the broker is there.
pub(crate) async fn answered<T, F>(queue: &str, ask: impl Fn() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let mut backoff = Backoff::new();
    loop {
        let error = match ask().await {
            Err(error) if error.is_retryable() => error,
            other => return other,
        };
        let delay = backoff.next();
        tracing::warn!(queue, %error, ?delay, "cannot start yet; trying again");
        sleep(delay).await;
    }
}

/// Within what the dedup keys are unique, beside the consumer.
pub(crate) fn identity<Tx>(setup: &Setup<Tx>, info: &QueueInfo) -> Result<String, Error> {
    let given = setup.options.identity.clone();
    match given.or_else(|| info.identity.clone()) {
        Some(identity) if !identity.is_empty() => Ok(identity),
        _ if setup.store.is_none() => Ok(String::new()),
        _ => Err(Error::config(
            "the source does not tell the queue's identity, without which the dedup keys of two queues could not be told apart: give it to the builder with identity(…)",
        )
        .on_queue(setup.source.name())),
    }
}

/// Says in the log what was found. What could not be read could not be checked either.
pub(crate) fn show<Tx>(setup: &Setup<Tx>, identity: &str, found: &Found) {
    let queue = setup.source.name();
    let info = &found.queue;
    tracing::info!(queue, identity, capabilities = ?info.capabilities, settings = ?info.settings, "the queue");
    show_unknown(queue, &info.unknown);
    if let (Some(sink), Some(info)) = (&setup.sink, &found.sink) {
        show_unknown(sink.name(), &info.unknown);
    }
    if let Some(info) = &found.store {
        tracing::info!(queue, store = info.name, durability = ?info.durability, transactions = ?info.transactions, settings = ?info.settings, "the store");
        show_unknown(&info.name, &info.unknown);
    }
}

fn show_unknown(of: &str, unknown: &[String]) {
    for unknown in unknown {
        tracing::warn!(of, unknown, "a setting that was not checked");
    }
}
