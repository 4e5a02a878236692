//! Which URL scheme is which kind.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use onlyonce_core::Error;
use onlyonce_core::driver::{Params, Sink, Source, Store};
use onlyonce_core::memory::{MemoryQueue, MemoryStore};
use url::Url;

/// A kind of queue or store: an entry of [`KINDS`].
struct Kind {
    /// How its URLs begin.
    schemes: &'static [&'static str],
    source: Option<Opener<dyn Source>>,
    sink: Option<Opener<dyn Sink>>,
    store: Option<Opener<dyn Store>>,
}

/// What opens a URL, or the cargo feature that has it.
type Opener<T> = Result<fn(Url) -> Opening<T>, &'static str>;

type Opening<T> = Pin<Box<dyn Future<Output = Result<Arc<T>, Error>> + Send>>;

/// The opener of a kind that is there with a cargo feature only.
macro_rules! with {
    ($feature:literal, $open:expr) => {{
        #[cfg(feature = $feature)]
        {
            Some(Ok($open))
        }
        #[cfg(not(feature = $feature))]
        {
            Some(Err($feature))
        }
    }};
}

/// All kinds. To add one, write an entry here; its cargo feature stands in `Cargo.toml`, its crate's name in `lib.rs`.
static KINDS: [Kind; 6] = [
    Kind {
        schemes: &["memory"],
        source: Some(Ok(|url| {
            Box::pin(async move { Ok(Arc::new(memory_queue(&url)?) as Arc<dyn Source>) })
        })),
        sink: Some(Ok(|url| {
            Box::pin(async move { Ok(Arc::new(memory_queue(&url)?) as Arc<dyn Sink>) })
        })),
        store: Some(Ok(|url| {
            Box::pin(async move { Ok(Arc::new(memory_store(&url)?) as Arc<dyn Store>) })
        })),
    },
    Kind {
        schemes: &["sqlite"],
        source: with!("sqlite", |url| Box::pin(async move {
            let config = crate::sqlite::Config::try_from(&url)?;
            let queue = crate::sqlite::SqliteQueue::open(config).await?;
            Ok(Arc::new(queue) as Arc<dyn Source>)
        })),
        sink: with!("sqlite", |url| Box::pin(async move {
            let config = crate::sqlite::Config::try_from(&url)?;
            let queue = crate::sqlite::SqliteQueue::open(config).await?;
            Ok(Arc::new(queue) as Arc<dyn Sink>)
        })),
        store: with!("sqlite", |url| Box::pin(async move {
            let config = crate::sqlite::Config::try_from(&url)?;
            let store = crate::sqlite::SqliteStore::open(config).await?;
            Ok(Arc::new(store) as Arc<dyn Store>)
        })),
    },
    Kind {
        schemes: &["postgres", "postgresql"],
        source: None,
        sink: None,
        store: with!("postgres", |url| Box::pin(async move {
            let config = crate::postgres::Config::try_from(&url)?;
            let store = crate::postgres::PgStore::open(config).await?;
            Ok(Arc::new(store) as Arc<dyn Store>)
        })),
    },
    Kind {
        schemes: &["amqp", "amqps"],
        source: with!("rabbitmq", |url| Box::pin(async move {
            let config = crate::rabbitmq::Config::try_from(&url)?;
            let source = crate::rabbitmq::RabbitSource::new(config)?;
            Ok(Arc::new(source) as Arc<dyn Source>)
        })),
        sink: with!("rabbitmq", |url| Box::pin(async move {
            let config = crate::rabbitmq::Config::try_from(&url)?;
            let sink = crate::rabbitmq::RabbitSink::new(config)?;
            Ok(Arc::new(sink) as Arc<dyn Sink>)
        })),
        store: None,
    },
    Kind {
        schemes: &["pubsub"],
        source: with!("pubsub", |url| Box::pin(async move {
            let config = crate::pubsub::Config::try_from(&url)?;
            let source = crate::pubsub::PubSubSource::new(config)?;
            Ok(Arc::new(source) as Arc<dyn Source>)
        })),
        sink: with!("pubsub", |url| Box::pin(async move {
            let config = crate::pubsub::Config::try_from(&url)?;
            let sink = crate::pubsub::PubSubSink::new(config)?;
            Ok(Arc::new(sink) as Arc<dyn Sink>)
        })),
        store: None,
    },
    Kind {
        schemes: &["sqs", "arn", "https", "http"],
        source: with!("sqs", |url| Box::pin(async move {
            let config = crate::sqs::Config::try_from(&url)?;
            let source = crate::sqs::SqsSource::new(config)?;
            Ok(Arc::new(source) as Arc<dyn Source>)
        })),
        sink: with!("sqs", |url| Box::pin(async move {
            let config = crate::sqs::Config::try_from(&url)?;
            let sink = crate::sqs::SqsSink::new(config)?;
            Ok(Arc::new(sink) as Arc<dyn Sink>)
        })),
        store: None,
    },
];

/// The queue that `url` names, to take messages from.
///
/// Nothing is sent before the first call on it. Credentials stand in the URL or in the environment, as the broker's own
/// tools have them.
///
/// # Errors
/// [`Config`](crate::ErrorKind::Config): the URL does not parse, names an unknown scheme or parameter, or its kind needs
/// a cargo feature; the text says what to write instead. What opening a local file can say.
pub async fn source(url: &str) -> Result<Arc<dyn Source>, Error> {
    open(url, "queue", |kind| kind.source).await
}

/// The queue that `url` names, to publish to.
///
/// # Errors
/// As [`source`].
pub async fn sink(url: &str) -> Result<Arc<dyn Sink>, Error> {
    open(url, "queue", |kind| kind.sink).await
}

/// The store that `url` names. For [`transactional`](crate::Pipeline::transactional) mode open the store by its type,
/// whose transaction the handler asks for.
///
/// # Errors
/// As [`source`].
pub async fn store(url: &str) -> Result<Arc<dyn Store>, Error> {
    open(url, "store", |kind| kind.store).await
}

/// Opens `url` as `what`, by the opener of the kind that has its scheme.
async fn open<T: ?Sized>(
    url: &str,
    what: &str,
    opener: fn(&Kind) -> Option<Opener<T>>,
) -> Result<Arc<T>, Error> {
    let url = parse(url)?;
    let scheme = url.scheme();
    let found = KINDS.iter().find(|kind| kind.schemes.contains(&scheme));
    match found.and_then(opener) {
        Some(Ok(open)) => open(url).await,
        Some(Err(feature)) => Err(Error::config(format!(
            "`{scheme}:` needs the cargo feature `{feature}`: cargo add onlyonce --features {feature}"
        ))),
        None => Err(unknown(scheme, what, opener)),
    }
}

fn unknown<T: ?Sized>(scheme: &str, what: &str, opener: fn(&Kind) -> Option<Opener<T>>) -> Error {
    let known = KINDS.iter().filter(|kind| opener(kind).is_some());
    let schemes: Vec<_> = known
        .flat_map(|kind| kind.schemes)
        .map(|scheme| format!("{scheme}:"))
        .collect();
    Error::config(format!(
        "no {what} has the scheme `{scheme}:`; there are {}",
        schemes.join(", ")
    ))
}

fn parse(url: &str) -> Result<Url, Error> {
    // As Google writes the names of subscriptions and topics.
    let of_google = url.starts_with("projects/");
    let url = format!("{}{url}", if of_google { "pubsub:" } else { "" });
    // The text is not repeated: it may hold a password.
    Url::parse(&url).map_err(|error| {
        Error::config("not a URL; write one like `memory:orders` or `sqlite:app.db?queue=orders`")
            .caused_by(error)
    })
}

static QUEUES: LazyLock<Mutex<HashMap<String, MemoryQueue>>> = LazyLock::new(Mutex::default);
static STORES: LazyLock<Mutex<HashMap<String, MemoryStore>>> = LazyLock::new(Mutex::default);

/// The name after `memory:`; a queue or store of one name is the same within the process.
fn memory_name(url: &Url) -> Result<String, Error> {
    Params::of(url)?.finish()?;
    match url.path() {
        _ if url.has_host() => Err(Error::config(
            "a name in memory has no host; write `memory:NAME`",
        )),
        "" => Err(Error::config("a name is missing; write `memory:NAME`")),
        name => Ok(name.to_owned()),
    }
}

fn memory_queue(url: &Url) -> Result<MemoryQueue, Error> {
    let name = memory_name(url)?;
    let mut queues = QUEUES.lock().unwrap_or_else(PoisonError::into_inner);
    let queue = queues
        .entry(name)
        .or_insert_with_key(|name| MemoryQueue::new(name.as_str()));
    Ok(queue.clone())
}

fn memory_store(url: &Url) -> Result<MemoryStore, Error> {
    let name = memory_name(url)?;
    let mut stores = STORES.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(stores.entry(name).or_default().clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scheme_stands_in_one_entry() {
        let mut schemes: Vec<_> = KINDS.iter().flat_map(|kind| kind.schemes).collect();
        let all = schemes.len();
        schemes.sort_unstable();
        schemes.dedup();
        assert_eq!(schemes.len(), all);
    }
}
