use std::fmt;
use std::time::Duration;

use bytes::Bytes;

use crate::BoxError;

use super::Rejection;

/// What a handler that succeeded leaves with the dedup record, to be handed to
/// [`on_duplicate`](crate::Builder::on_duplicate) when the message comes again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome(pub Option<Bytes>);

impl Outcome {
    /// An outcome to record; keep it small (a reference, a status), it is stored for as long as the record.
    pub fn new(bytes: impl Into<Bytes>) -> Self {
        Self(Some(bytes.into()))
    }
}

impl From<()> for Outcome {
    fn from((): ()) -> Self {
        Self(None)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnFailure {
    Retry,
    RetryAfter(Duration),
    DeadLetter,
    /// The message cannot be read; never try again.
    Reject,
}

/// Why a handler failed, and what is to become of the message.
///
/// Any error turns into one with `?` and is retried under the pipeline's [`RetryPolicy`](crate::RetryPolicy).
#[derive(Debug)]
pub struct Failure {
    pub(crate) then: OnFailure,
    pub(crate) error: BoxError,
}

impl Failure {
    /// Try again under the retry policy.
    pub fn retry(error: impl Into<BoxError>) -> Self {
        Self {
            then: OnFailure::Retry,
            error: error.into(),
        }
    }

    /// Try again after `delay`, within the retry policy's number of attempts.
    pub fn retry_after(delay: Duration, error: impl Into<BoxError>) -> Self {
        Self {
            then: OnFailure::RetryAfter(delay),
            error: error.into(),
        }
    }

    /// Never try again: dead-letter it with this reason.
    pub fn dead_letter(reason: impl Into<BoxError>) -> Self {
        Self {
            then: OnFailure::DeadLetter,
            error: reason.into(),
        }
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        // A layer hands our own error back boxed or not; what the handler decided must survive it.
        let error: BoxError = Box::new(error);
        match error.downcast::<HandlerError>() {
            Ok(ours) => ours.0,
            Err(other) => Self::retry(other),
        }
    }
}

impl From<Rejection> for Failure {
    fn from(rejection: Rejection) -> Self {
        Self {
            then: OnFailure::Reject,
            error: rejection.0.into(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

/// A [`Failure`] as the error of a `tower` service.
#[derive(Debug)]
pub struct HandlerError(pub Failure);

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for HandlerError {}

/// What a handler may return: `()`, an [`Outcome`], or a `Result` of either with any error.
pub trait IntoOutcome {
    /// Turns it into the one form.
    ///
    /// # Errors
    /// The handler failed.
    fn into_outcome(self) -> Result<Outcome, Failure>;
}

impl IntoOutcome for () {
    fn into_outcome(self) -> Result<Outcome, Failure> {
        Ok(Outcome::default())
    }
}

impl IntoOutcome for Outcome {
    fn into_outcome(self) -> Result<Outcome, Failure> {
        Ok(self)
    }
}

impl<T: Into<Outcome>, E: Into<Failure>> IntoOutcome for Result<T, E> {
    fn into_outcome(self) -> Result<Outcome, Failure> {
        self.map(Into::into).map_err(Into::into)
    }
}
