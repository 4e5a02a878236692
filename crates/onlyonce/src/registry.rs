//! Which URL scheme is which kind.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use onlyonce_core::Error;
use onlyonce_core::driver::{Params, Sink, Source, Store};
use onlyonce_core::memory::{MemoryQueue, MemoryStore};
use url::Url;

/// The queue that `url` names, to take messages from.
///
/// Nothing is sent before the first call on it. Credentials stand in the URL or in the environment, as the broker's own
/// tools have them.
///
/// # Errors
/// [`Config`](crate::ErrorKind::Config): the URL does not parse, names an unknown scheme or parameter, or its kind needs
/// a cargo feature; the text says what to write instead. What opening a local file can say.
pub async fn source(url: &str) -> Result<Arc<dyn Source>, Error> {
    let url = parse(url)?;
    match url.scheme() {
        #[cfg(feature = "rabbitmq")]
        "amqp" | "amqps" => Ok(Arc::new(crate::rabbitmq::RabbitSource::new(
            url.as_str().parse()?,
        )?)),
        #[cfg(feature = "sqs")]
        "sqs" | "arn" | "https" | "http" => {
            let config = url.as_str().parse()?;
            Ok(Arc::new(crate::sqs::SqsSource::new(config)?))
        }
        _ => Ok(embedded(&url).await?),
    }
}

/// The queue that `url` names, to publish to.
///
/// # Errors
/// As [`source`].
pub async fn sink(url: &str) -> Result<Arc<dyn Sink>, Error> {
    let url = parse(url)?;
    match url.scheme() {
        #[cfg(feature = "rabbitmq")]
        "amqp" | "amqps" => Ok(Arc::new(crate::rabbitmq::RabbitSink::new(
            url.as_str().parse()?,
        )?)),
        #[cfg(feature = "sqs")]
        "sqs" | "arn" | "https" | "http" => {
            let config = url.as_str().parse()?;
            Ok(Arc::new(crate::sqs::SqsSink::new(config)?))
        }
        _ => Ok(embedded(&url).await?),
    }
}

/// A queue that is a source and a sink at once.
trait Queue: Source + Sink {}

impl<Q: Source + Sink> Queue for Q {}

/// The queues that need no broker.
async fn embedded(url: &Url) -> Result<Arc<dyn Queue>, Error> {
    match url.scheme() {
        "memory" => Ok(Arc::new(memory_queue(url)?)),
        #[cfg(feature = "sqlite")]
        "sqlite" => {
            let config = crate::sqlite::Config::try_from(url)?;
            Ok(Arc::new(crate::sqlite::SqliteQueue::open(&config).await?))
        }
        other => Err(unknown(other, "queue")),
    }
}

/// The store that `url` names. For [`transactional`](crate::Pipeline::transactional) mode open the store by its type,
/// whose transaction the handler asks for.
///
/// # Errors
/// As [`source`].
pub async fn store(url: &str) -> Result<Arc<dyn Store>, Error> {
    let url = parse(url)?;
    match url.scheme() {
        "memory" => Ok(Arc::new(memory_store(&url)?)),
        #[cfg(feature = "sqlite")]
        "sqlite" => Ok(Arc::new(
            crate::sqlite::SqliteStore::open(&crate::sqlite::Config::try_from(&url)?).await?,
        )),
        other => Err(unknown(other, "store")),
    }
}

fn parse(url: &str) -> Result<Url, Error> {
    // The text is not repeated: it may hold a password.
    Url::parse(url).map_err(|error| {
        Error::config("not a URL; write one like `memory:orders` or `sqlite:app.db?queue=orders`")
            .caused_by(error)
    })
}

/// Schemes and the features they need; `None`: always there.
const SCHEMES: [(&str, &str, Option<&str>); 8] = [
    ("queue", "memory", None),
    ("queue", "sqlite", Some("sqlite")),
    ("queue", "amqp", Some("rabbitmq")),
    ("queue", "sqs", Some("sqs")),
    ("queue", "arn", Some("sqs")),
    ("queue", "http", Some("sqs")),
    ("store", "memory", None),
    ("store", "sqlite", Some("sqlite")),
];

fn unknown(scheme: &str, what: &str) -> Error {
    let bare = scheme.trim_end_matches('s');
    let known = SCHEMES.iter().filter(|(kind, ..)| *kind == what);
    let same = |s: &str| s == scheme || s == bare;
    if let Some((.., Some(feature))) = known.clone().find(|(_, s, _)| same(s)) {
        return Error::config(format!(
            "`{scheme}:` needs the cargo feature `{feature}`: cargo add onlyonce --features {feature}"
        ));
    }
    let known: Vec<_> = known.map(|(_, scheme, _)| format!("{scheme}:")).collect();
    Error::config(format!(
        "no {what} has the scheme `{scheme}:`; there are {}",
        known.join(", ")
    ))
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
