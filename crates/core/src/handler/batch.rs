//! Handlers that are called for many messages at once.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Failure, FromMessage, MadeOf, Outcome, Parts, Rejection};

/// What a handler says of one message.
pub(crate) type Answer = Result<Outcome, Failure>;

/// What it has said of each message of a batch so far.
type Answers = Arc<Mutex<Vec<Option<Answer>>>>;

/// Many messages in one call: for an effect that is one statement, or one request, for all of them.
///
/// ```
/// use onlyonce_core::{Batch, DedupKey, Failure, Json};
///
/// #[derive(serde::Deserialize)]
/// struct Payment {
///     account: u32,
///     cents: i64,
/// }
///
/// async fn pay(payments: Batch<(Json<Payment>, DedupKey)>) -> Result<(), Failure> {
///     let mut rows = Vec::new();
///     for payment in &payments {
///         let (Json(Payment { account, cents }), key) = &**payment;
///         match cents {
///             0.. => rows.push((account, cents, key)),
///             _ => payment.fail(Failure::dead_letter("a negative amount")),
///         }
///     }
///     // … one request for all rows.
///     Ok(())
/// }
/// ```
///
/// Each message keeps its dedup record, its outcome and its order within its group:
///
/// - A message that the handler [fails](Item::fail) has had no effect, which is the handler's promise; the others have.
/// - If the call fails as a whole, or panics, it is made again for each half of its messages, until the guilty one is alone. Only
///   that is an attempt, and only of that one.
/// - Messages that cannot be made into a `T` are rejected one by one, and are not in the batch.
/// - In `transactional` mode everything that a call did is rolled back before it is made again, and all records are written with
///   the effect. In the other modes what a failed call did stays: a part of its messages is run again, under their keys. There a
///   batch has no two messages of one group.
///
/// [`Builder::batch`](crate::Builder::batch) says how many there are at most. A message that has failed before, or has often been
/// cut off, is alone; so is every message in `at_most_once` mode, and where doubt is
/// [quarantined](crate::InDoubt::Quarantine).
///
/// Other parameters of such a handler are a [`State`](super::State) or the transaction: what belongs to one message is asked for
/// in `T`, as in the example.
pub struct Batch<T>(Vec<Item<T>>);

/// One message of a [`Batch`].
pub struct Item<T> {
    value: T,
    place: usize,
    answers: Answers,
}

impl<T> Item<T> {
    /// This message is not done: what becomes of it, `failure` says. None of the effects of this call must be of it.
    pub fn fail(&self, failure: impl Into<Failure>) {
        self.answer(Err(failure.into()));
    }

    /// Leaves this with its dedup record, as a handler of one message does by returning it.
    pub fn leave(&self, outcome: Outcome) {
        self.answer(Ok(outcome));
    }

    /// How it was [failed](Self::fail), as text.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        match lock(&self.answers).get(self.place) {
            Some(Some(Err(failure))) => Some(failure.to_string()),
            _ => None,
        }
    }

    fn answer(&self, answer: Answer) {
        if let Some(place) = lock(&self.answers).get_mut(self.place) {
            *place = Some(answer);
        }
    }
}

/// For a unit test of a handler.
impl<T> FromIterator<T> for Batch<T> {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        let answers: Answers = Arc::default();
        let items: Vec<_> = values
            .into_iter()
            .enumerate()
            .map(|(place, value)| Item {
                value,
                place,
                answers: answers.clone(),
            })
            .collect();
        lock(&answers).resize_with(items.len(), || None);
        Self(items)
    }
}

impl<T> Deref for Item<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: fmt::Debug> fmt::Debug for Item<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value.fmt(f)
    }
}

impl<T> Deref for Batch<T> {
    type Target = [Item<T>];

    fn deref(&self) -> &[Item<T>] {
        &self.0
    }
}

impl<T: fmt::Debug> fmt::Debug for Batch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.0).finish()
    }
}

impl<T> IntoIterator for Batch<T> {
    type Item = Item<T>;
    type IntoIter = std::vec::IntoIter<Item<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a, T> IntoIterator for &'a Batch<T> {
    type Item = &'a Item<T>;
    type IntoIter = std::slice::Iter<'a, Item<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<T: FromMessage> FromMessage for Batch<T> {
    /// Of the messages that can be made into a `T`; rejected if there is none.
    fn from_message(parts: &Parts) -> Result<Self, Rejection> {
        let together = parts.together.as_ref();
        let answers = together.map_or_else(Arc::default, Together::answers);
        let mut items = Vec::new();
        let mut rejected = None;
        for (place, one) in parts.messages().iter().enumerate() {
            match T::from_message(one) {
                Ok(value) => items.push(Item {
                    value,
                    place,
                    answers: answers.clone(),
                }),
                Err(rejection) => {
                    if let Some(place) = lock(&answers).get_mut(place) {
                        *place = Some(Err(rejection.clone().into()));
                    }
                    rejected = Some(rejection);
                }
            }
        }
        match rejected {
            Some(rejection) if items.is_empty() => Err(rejection),
            _ => Ok(Self(items)),
        }
    }

    fn missing(parts: &Parts) -> Option<&'static str> {
        T::missing(parts)
    }

    fn made_of() -> MadeOf {
        MadeOf::Batch
    }
}

/// The messages of one call, and what the handler says of each.
#[derive(Clone, Debug)]
pub(crate) struct Together {
    messages: Arc<[Parts]>,
    answers: Answers,
}

impl Together {
    pub(crate) fn new(messages: Arc<[Parts]>) -> Self {
        let answers = messages.iter().map(|_| None).collect();
        Self {
            messages,
            answers: Arc::new(Mutex::new(answers)),
        }
    }

    pub(super) fn messages(&self) -> &[Parts] {
        &self.messages
    }

    fn answers(&self) -> Answers {
        self.answers.clone()
    }

    /// What was said so far; nothing is left of it.
    pub(crate) fn take_answers(&self) -> Vec<Option<Answer>> {
        std::mem::take(&mut lock(&self.answers))
    }
}

fn lock(answers: &Mutex<Vec<Option<Answer>>>) -> MutexGuard<'_, Vec<Option<Answer>>> {
    answers.lock().unwrap_or_else(PoisonError::into_inner)
}
