use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::content::{decoded, guess, without_bom};
use crate::{Attributes, DedupKey, Message};

/// Why a handler's parameter could not be made of a message. Such a message can never be handled: it is dead-lettered
/// with this reason, without a retry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection(pub String);

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the pipeline knows of the message that is being handled.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Context {
    /// The queue it came from.
    pub queue: Arc<str>,
    /// The consumer's name.
    pub consumer: Arc<str>,
    /// Its dedup key; hand it to a downstream service as the idempotency key.
    pub key: Option<DedupKey>,
    /// Which attempt this is, from 1: the runs as far as this worker knows them. A delivery that it knows nothing of
    /// (another worker's, or its own before it was started) counts as one, whether it ran or not, where the broker counts
    /// deliveries.
    pub attempt: u32,
}

/// Everything that parameters are made of.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The message.
    pub message: Arc<Message>,
    /// What the pipeline knows of it.
    pub context: Context,
    pub(crate) states: States,
}

/// The values given with [`Builder::state`](crate::Builder::state), by type.
#[derive(Clone, Default)]
pub(crate) struct States(Arc<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>);

impl States {
    pub(crate) fn insert<T: Send + Sync + 'static>(&mut self, value: T) {
        Arc::make_mut(&mut self.0).insert(TypeId::of::<T>(), Arc::new(value));
    }

    fn get<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        self.0.get(&TypeId::of::<T>())?.clone().downcast().ok()
    }
}

impl fmt::Debug for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "States({})", self.0.len())
    }
}

/// A handler's parameter.
pub trait FromMessage: Sized {
    /// Makes it.
    ///
    /// # Errors
    /// The message is not of the form that the handler asks for.
    fn from_message(parts: &Parts) -> Result<Self, Rejection>;

    /// The type of state it needs and does not find in `parts`; asked once, when the pipeline starts.
    #[must_use]
    fn missing(_parts: &Parts) -> Option<&'static str> {
        None
    }
}

/// The payload, decoded from JSON.
///
/// A payload that the attribute `content-encoding`, or RabbitMQ's property of that name, declares as `gzip`, `deflate` or
/// `zstd` is decompressed first, to 16 MiB at most; a byte-order mark of UTF-8 is ignored. What remains is rejected, with
/// what it looks like. The dedup key's fingerprint is of the payload as it was sent.
#[derive(Clone, Debug)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned> FromMessage for Json<T> {
    fn from_message(parts: &Parts) -> Result<Self, Rejection> {
        let body = decoded(&parts.message)?;
        serde_json::from_slice(without_bom(&body))
            .map(Json)
            .map_err(|error| not_the("JSON asked for", &body, &error))
    }
}

fn not_the(form: &str, body: &[u8], error: &dyn fmt::Display) -> Rejection {
    let guess = guess(body).map(|what| format!("; {what}"));
    let guess = guess.unwrap_or_default();
    Rejection(format!("the payload is not the {form}: {error}{guess}"))
}

/// The payload as it was sent.
impl FromMessage for Bytes {
    fn from_message(parts: &Parts) -> Result<Self, Rejection> {
        Ok(parts.message.body.clone())
    }
}

/// The payload as text, decompressed as for [`Json`].
impl FromMessage for String {
    fn from_message(parts: &Parts) -> Result<Self, Rejection> {
        let body = decoded(&parts.message)?;
        std::str::from_utf8(&body)
            .map(str::to_owned)
            .map_err(|error| not_the("UTF-8 asked for", &body, &error))
    }
}

impl FromMessage for Attributes {
    fn from_message(parts: &Parts) -> Result<Self, Rejection> {
        Ok(parts.message.attributes.clone())
    }
}

impl FromMessage for Arc<Message> {
    fn from_message(parts: &Parts) -> Result<Self, Rejection> {
        Ok(parts.message.clone())
    }
}

impl FromMessage for Context {
    fn from_message(parts: &Parts) -> Result<Self, Rejection> {
        Ok(parts.context.clone())
    }
}

impl FromMessage for DedupKey {
    fn from_message(parts: &Parts) -> Result<Self, Rejection> {
        parts
            .context
            .key
            .clone()
            .ok_or_else(|| Rejection("the message has no dedup key".into()))
    }
}

/// A value given with [`Builder::state`](crate::Builder::state): a connection pool, a client, settings.
#[derive(Clone, Debug)]
pub struct State<T>(pub Arc<T>);

impl<T: Send + Sync + 'static> FromMessage for State<T> {
    fn from_message(parts: &Parts) -> Result<Self, Rejection> {
        parts
            .states
            .get()
            .map(State)
            .ok_or_else(|| Rejection(format!("no state of type {}", std::any::type_name::<T>())))
    }

    fn missing(parts: &Parts) -> Option<&'static str> {
        match parts.states.get::<T>() {
            Some(_) => None,
            None => Some(std::any::type_name::<T>()),
        }
    }
}
