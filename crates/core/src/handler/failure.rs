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
/// Any error turns into one with `?` and is retried under the pipeline's [`RetryPolicy`](crate::RetryPolicy): a standard error,
/// a boxed one, one of `anyhow`, a text.
///
/// ```
/// use onlyonce_core::Failure;
///
/// async fn charge(body: String) -> Result<(), Failure> {
///     let cents: i64 = body.trim().parse()?;
///     if cents < 0 {
///         return Err(Failure::dead_letter("a negative amount"));
///     }
///     let account = lookup(cents).ok_or("no such account yet")?;
///     println!("{account}");
///     Ok(())
/// }
/// # fn lookup(_: i64) -> Option<String> { None }
/// ```
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

impl<E: Into<BoxError>> From<E> for Failure {
    fn from(error: E) -> Self {
        // A layer hands our own error back boxed or not; what the handler decided must survive it.
        match error.into().downcast::<HandlerError>() {
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

/// The error with its causes, each once: many errors tell their cause themselves.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.error.to_string();
        f.write_str(&shown)?;
        let mut cause = self.error.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !shown.contains(&text) {
                write!(f, ": {text}")?;
                shown = text;
            }
            cause = error.source();
        }
        Ok(())
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
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not what a handler may return",
    note = "a handler returns `()`, an `Outcome`, or a `Result` of either whose error turns into a `Failure`: any error, a boxed one, a text"
)]
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
