use std::sync::Arc;

use onlyonce_core::{Error, ErrorKind};
use rusqlite::ErrorCode;

/// What went wrong on the database thread. It can be cloned, because one failed commit fails many callers.
#[derive(Clone, Debug)]
pub(crate) struct DbError {
    kind: ErrorKind,
    retryable: bool,
    what: String,
    cause: Option<Arc<rusqlite::Error>>,
    /// It is the doing of another command that shared the transaction; nothing of this one happened.
    of_another: bool,
}

impl DbError {
    pub(crate) fn new(kind: ErrorKind, retryable: bool, what: impl Into<String>) -> Self {
        Self {
            kind,
            retryable,
            what: what.into(),
            cause: None,
            of_another: false,
        }
    }

    /// Nothing of it happened, because of `what` it did.
    pub(crate) fn refused(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Refused, false, what)
    }

    pub(crate) fn closed() -> Self {
        Self::new(ErrorKind::Closed, false, "the database was closed")
    }

    /// Whether `error` says that another process holds the file.
    pub(crate) fn from_busy(error: &rusqlite::Error) -> bool {
        classify(error).0 == ErrorKind::Timeout
    }

    /// As those see it who only shared the transaction: they may try again, whatever it was.
    pub(crate) fn of_another(mut self) -> Self {
        self.kind = ErrorKind::Store;
        self.retryable = true;
        self.of_another = true;
        self.while_("rolled back together with another command that failed")
    }

    /// Whether nothing happened, and may be tried again apart from those whose doing it is.
    pub(crate) fn may_be_redone(&self) -> bool {
        self.of_another || self.kind == ErrorKind::Refused
    }

    /// Adds the error that shows what happened.
    pub(crate) fn caused_by(mut self, error: rusqlite::Error) -> Self {
        self.cause = Some(Arc::new(error));
        self
    }

    /// Puts what was being done in front.
    pub(crate) fn while_(mut self, doing: &str) -> Self {
        self.what = format!("{doing}: {}", self.what);
        self
    }
}

impl From<rusqlite::Error> for DbError {
    fn from(error: rusqlite::Error) -> Self {
        let (kind, retryable) = classify(&error);
        Self {
            kind,
            retryable,
            what: "SQLite could not do it".into(),
            cause: Some(Arc::new(error)),
            of_another: false,
        }
    }
}

impl From<DbError> for Error {
    fn from(failure: DbError) -> Self {
        let error = Self::new(failure.kind, failure.what).retryable(failure.retryable);
        match failure.cause {
            Some(cause) => error.caused_by(cause),
            None => error,
        }
    }
}

/// An error of the user's own SQL; the [`rusqlite::Error`] is its source.
pub(crate) fn user(error: rusqlite::Error) -> Error {
    let (kind, retryable) = classify(&error);
    let what = match error.sqlite_error_code() {
        Some(ErrorCode::AuthorizationForStatementDenied) => {
            "others share the transaction and the connection, so a closure may not begin or end transactions, create \
             temporary objects, set pragmas that outlive it, or write to tables named onlyonce_…"
        }
        _ => "the statement failed",
    };
    Error::new(kind, what).retryable(retryable).caused_by(error)
}

/// What kind of error it is, and whether trying again can help: <https://www.sqlite.org/rescode.html>.
fn classify(error: &rusqlite::Error) -> (ErrorKind, bool) {
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => (ErrorKind::Timeout, true),
        Some(
            ErrorCode::DiskFull
            | ErrorCode::SystemIoFailure
            | ErrorCode::OutOfMemory
            | ErrorCode::OperationInterrupted
            | ErrorCode::OperationAborted,
        ) => (ErrorKind::Store, true),
        Some(ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => (ErrorKind::Permission, false),
        Some(ErrorCode::CannotOpen) => (ErrorKind::NotFound, false),
        Some(ErrorCode::TooBig) => (ErrorKind::Message, false),
        _ => (ErrorKind::Store, false),
    }
}
