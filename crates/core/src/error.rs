use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use crate::Message;
use crate::driver::Printable;

/// A boxed error of somebody else's.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// What kind of thing went wrong; decides what the caller does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A URL, option or combination of options that cannot work.
    Config,
    /// The start-up checks found settings under which a message could be lost or take effect twice.
    Unsafe,
    /// The broker or store cannot be reached, or the connection broke.
    Connection,
    /// Credentials are missing or are not allowed to do this.
    Permission,
    /// The queue, table or account does not exist.
    NotFound,
    /// The service asked us to slow down.
    Throttled,
    /// No answer in time: it may or may not have happened.
    Timeout,
    /// The store refused it (a constraint, a limit): nothing of it happened. The same again is refused again, unless the
    /// error is retryable.
    Refused,
    /// Another transaction was in its way (a deadlock, a serialization failure, a lock time-out): nothing of it happened, and the same
    /// again may succeed.
    Conflict,
    /// The message itself cannot be taken: its form, its size, its characters.
    Message,
    /// The broker took the message but has no queue for it.
    Unroutable,
    /// The source, sink or store was closed.
    Closed,
    /// The store could not do it (disk full, corrupt file): it may or may not have happened.
    Store,
    /// Anything else.
    Other,
}

/// What happened, to which queue and message, and whether trying again can help.
///
/// `Display` gives one line, whatever a message or a broker has put into it, of bounded length; only the settings that the
/// start-up checks refuse have a line each. It ends with the [cause](Self::cause), so [`source`](StdError::source) gives what
/// caused that: whoever prints the chain of sources prints nothing twice. No secret appears in either.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    retryable: bool,
    what: String,
    list: Vec<String>,
    queue: Option<String>,
    message: Option<String>,
    cause: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind`, with a sentence that says what happened and, where it helps, what to do.
    /// Connection, throttling and time-out errors and conflicts are retryable unless told otherwise.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self {
            kind,
            retryable: matches!(
                kind,
                ErrorKind::Connection
                    | ErrorKind::Throttled
                    | ErrorKind::Timeout
                    | ErrorKind::Conflict
            ),
            what: what.into(),
            list: Vec::new(),
            queue: None,
            message: None,
            cause: None,
        }
    }

    /// A [`Config`](ErrorKind::Config) error.
    pub fn config(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config, what)
    }

    /// Says whether trying again can help.
    #[must_use]
    pub fn retryable(mut self, retryable: bool) -> Self {
        self.retryable = retryable;
        self
    }

    /// Names the queue.
    #[must_use]
    pub fn on_queue(mut self, queue: impl Into<String>) -> Self {
        self.queue = Some(queue.into());
        self
    }

    /// Names the message.
    #[must_use]
    pub fn on_message(mut self, message: &Message) -> Self {
        self.message = Some(message.label().to_string());
        self
    }

    /// Adds items, each to be shown on a line of its own.
    #[must_use]
    pub(crate) fn with_list(mut self, items: Vec<String>) -> Self {
        self.list = items;
        self
    }

    /// Adds the error that caused this one.
    #[must_use]
    pub fn caused_by(mut self, cause: impl Into<BoxError>) -> Self {
        self.cause = Some(cause.into().into());
        self
    }

    /// What kind of error it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The error that caused this one, which [`Display`](fmt::Display) shows too.
    #[must_use]
    pub fn cause(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.retryable
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Printable(&self.what).fmt(f)?;
        for item in &self.list {
            write!(f, "\n  - {}", Printable(item))?;
        }
        if let Some(queue) = &self.queue {
            write!(f, " [queue {}]", Printable(queue))?;
        }
        if let Some(message) = &self.message {
            write!(f, " [message {message}]")?;
        }
        if let Some(cause) = &self.cause {
            write!(f, ": {}", Printable(cause))?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause()?.source()
    }
}
