use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::batch::Together;
use super::content::{decoded, guess, without_bom};
use crate::driver::Receipt;
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
///
/// A unit test of a handler makes one with [`Context::new`] and sets what it needs.
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

impl Context {
    /// A first attempt, without a key, at a message of this queue and consumer.
    pub fn new(queue: impl Into<Arc<str>>, consumer: impl Into<Arc<str>>) -> Self {
        Self {
            queue: queue.into(),
            consumer: consumer.into(),
            key: None,
            attempt: 1,
        }
    }

    /// Sets [`key`](Self::key).
    #[must_use]
    pub fn with_key(mut self, key: DedupKey) -> Self {
        self.key = Some(key);
        self
    }

    /// Sets [`attempt`](Self::attempt).
    #[must_use]
    pub fn with_attempt(mut self, attempt: u32) -> Self {
        self.attempt = attempt;
        self
    }
}

/// Everything that parameters are made of. A unit test of an extractor makes them itself:
///
/// ```
/// use onlyonce_core::handler::{FromMessage, Parts};
/// use onlyonce_core::{Json, Message, State};
///
/// let parts = Parts::new(Message::new("[1, 2]")).with_state("a client");
/// assert_eq!(Json::<Vec<u32>>::from_message(&parts)?.0, [1, 2]);
/// assert_eq!(State::<&str>::from_message(&parts)?.0, "a client");
/// # Ok::<(), onlyonce_core::handler::Rejection>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Parts {
    /// The message.
    pub message: Arc<Message>,
    /// What the pipeline knows of it.
    pub context: Context,
    /// The broker's own view of it, by the adapter.
    pub native: Option<Receipt>,
    pub(crate) states: States,
    /// The messages of which these are the first, for a handler of batches.
    pub(crate) together: Option<Together>,
}

impl Parts {
    /// A message of the queue `test` on its first attempt, without state.
    #[must_use]
    pub fn new(message: Message) -> Self {
        Self {
            message: Arc::new(message),
            context: Context::new("test", "test"),
            native: None,
            states: States::default(),
            together: None,
        }
    }

    /// What the handler is called for: these alone, or for a handler that takes a [`Batch`](super::Batch) those of each of its
    /// messages.
    #[must_use]
    pub fn messages(&self) -> &[Self] {
        match &self.together {
            Some(together) => together.messages(),
            None => std::slice::from_ref(self),
        }
    }

    /// Sets [`context`](Self::context).
    #[must_use]
    pub fn with_context(mut self, context: Context) -> Self {
        self.context = context;
        self
    }

    /// Sets [`native`](Self::native).
    #[must_use]
    pub fn with_native(mut self, receipt: Receipt) -> Self {
        self.native = Some(receipt);
        self
    }

    /// Adds what [`State<T>`](State) finds.
    #[must_use]
    pub fn with_state<T: Clone + Send + Sync + 'static>(mut self, value: T) -> Self {
        self.states.insert(value);
        self
    }
}

/// The values given with [`Builder::state`](crate::Builder::state), by type.
#[derive(Clone, Default)]
pub(crate) struct States(Arc<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>);

impl States {
    pub(crate) fn insert<T: Send + Sync + 'static>(&mut self, value: T) {
        Arc::make_mut(&mut self.0).insert(TypeId::of::<T>(), Arc::new(value));
    }

    fn get<T: Send + Sync + 'static>(&self) -> Option<&T> {
        self.0.get(&TypeId::of::<T>())?.downcast_ref()
    }
}

impl fmt::Debug for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "States({})", self.0.len())
    }
}

/// What a handler's parameter is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MadeOf {
    /// One message, or what is known of it.
    Message,
    /// Many: the handler takes a [`Batch`](super::Batch).
    Batch,
    /// No message: it is the same for all of them.
    Pipeline,
}

/// A handler's parameter.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be a handler's parameter",
    note = "parameters are `Json<T>`, `String`, `Bytes`, `Attributes`, `Arc<Message>`, `Context`, `DedupKey`, `State<T>` with the type given to `Builder::state`, or a type of yours that implements `FromMessage`"
)]
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

    /// What it is made of; asked once, when the pipeline starts.
    #[must_use]
    fn made_of() -> MadeOf {
        MadeOf::Message
    }
}

macro_rules! tuples {
    ($($part:ident),*) => {
        /// Several of one message, for the items of a [`Batch`](super::Batch).
        impl<$($part: FromMessage),*> FromMessage for ($($part,)*) {
            fn from_message(parts: &Parts) -> Result<Self, Rejection> {
                Ok(($($part::from_message(parts)?,)*))
            }

            fn missing(parts: &Parts) -> Option<&'static str> {
                None$(.or_else(|| $part::missing(parts)))*
            }
        }
    };
}

tuples!(A, B);
tuples!(A, B, C);
tuples!(A, B, C, D);

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

/// The broker's own view of the message: a type of the adapter's, such as its receipt's with what no other broker has. A handler
/// that asks for it works with this broker alone; on another one its messages are rejected.
///
/// ```
/// use onlyonce_core::handler::Native;
/// use onlyonce_core::memory::MemoryReceipt;
///
/// async fn handle(body: String, delivery: Native<MemoryReceipt>) {
///     println!("{body} is delivery {} of consumer {}", delivery.tag, delivery.consumer);
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Native<T>(pub Arc<T>);

impl<T> Deref for Native<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Send + Sync + 'static> FromMessage for Native<T> {
    fn from_message(parts: &Parts) -> Result<Self, Rejection> {
        let receipt = parts.native.as_ref();
        receipt.and_then(Receipt::shared).map(Self).ok_or_else(|| {
            let wanted = std::any::type_name::<T>();
            Rejection(format!(
                "the message is not of the broker whose view is {wanted}"
            ))
        })
    }
}

/// A value given with [`Builder::state`](crate::Builder::state): a connection pool, a client, settings. Each run gets a clone;
/// what is expensive to clone is given as an `Arc`.
///
/// The pipeline does not start if the handler asks for a type that was not given.
#[derive(Clone, Copy, Debug, Default)]
pub struct State<T>(pub T);

impl<T> Deref for State<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for State<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: Clone + Send + Sync + 'static> FromMessage for State<T> {
    fn from_message(parts: &Parts) -> Result<Self, Rejection> {
        parts
            .states
            .get::<T>()
            .cloned()
            .map(State)
            .ok_or_else(|| Rejection(format!("no state of type {}", std::any::type_name::<T>())))
    }

    fn missing(parts: &Parts) -> Option<&'static str> {
        match parts.states.get::<T>() {
            Some(_) => None,
            None => Some(std::any::type_name::<T>()),
        }
    }

    fn made_of() -> MadeOf {
        MadeOf::Pipeline
    }
}
