use onlyonce_core::{BoxError, Error, ErrorKind};
use sqlx::error::DatabaseError;

/// The codes with which our own functions answer: see `functions.sql`.
pub(crate) const FENCED: &str = "OO001";
pub(crate) const TOKENS_LOST: &str = "OO002";
pub(crate) const NOT_THE_TRANSACTION: &str = "OO003";

/// The code of the server's answer, if it is one: <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
pub(crate) fn code(error: &sqlx::Error) -> Option<String> {
    let answer = error.as_database_error()?;
    Some(answer.code()?.into_owned())
}

pub(crate) fn is(error: &sqlx::Error, expected: &str) -> bool {
    code(error).is_some_and(|code| code == expected)
}

/// Whether another transaction was in its way: a serialization failure, a deadlock, a lock time-out.
pub(crate) fn is_conflict(error: &sqlx::Error) -> bool {
    let code = code(error);
    code.is_some_and(|code| matches!(&*code, "40001" | "40P01" | "55P03"))
}

/// An error of a call on the tables of the store, where it is unknown what happened unless it could not have.
pub(crate) fn of_call(doing: &str, error: sqlx::Error) -> Error {
    let (kind, retryable, hint) = classify(&error);
    let what = match hint {
        "" => format!("PostgreSQL could not {doing}"),
        hint => format!("PostgreSQL could not {doing}: {hint}"),
    };
    Error::new(kind, what)
        .retryable(retryable)
        .caused_by(cause(error))
}

/// An error of the end of a handler's transaction. What the server refused has not happened.
pub(crate) fn of_end(doing: &str, error: sqlx::Error) -> Error {
    let Some(code) = code(&error) else {
        return of_call(doing, error);
    };
    let (what, kind) = match &*code {
        NOT_THE_TRANSACTION => (
            "the handler ended the transaction by its own SQL (COMMIT or ROLLBACK): what it had written until then may be \
             committed without a record, and runs again; let the pipeline end the transaction",
            ErrorKind::Refused,
        ),
        "25P02" => (
            "a statement of the handler's failed, and the handler went on as if it had not: the transaction cannot be \
             committed",
            ErrorKind::Refused,
        ),
        _ if is_of_server(&code) || is_conflict(&error) => return of_call(doing, error),
        _ => ("PostgreSQL refused the transaction", ErrorKind::Refused),
    };
    Error::new(kind, what).caused_by(cause(error))
}

/// Whether it is about the server, not about what was asked of it: connections, resources, an operator, a fault.
fn is_of_server(code: &str) -> bool {
    matches!(code.get(..2), Some("08" | "53" | "57" | "58" | "XX"))
        || matches!(code, "25006" | "25P03")
}

/// What kind of error it is, whether trying again can help, and what to do.
fn classify(error: &sqlx::Error) -> (ErrorKind, bool, &'static str) {
    let Some(code) = code(error) else {
        return match error {
            sqlx::Error::Configuration(_) => (ErrorKind::Config, false, ""),
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => {
                (ErrorKind::Store, false, "")
            }
            _ => (ErrorKind::Connection, true, ""),
        };
    };
    match &*code {
        _ if is_conflict(error) => (
            ErrorKind::Conflict,
            true,
            "another transaction was in its way",
        ),
        "25006" => (
            ErrorKind::Connection,
            true,
            "the server is a standby, or read-only",
        ),
        "57014" => (ErrorKind::Timeout, true, ""),
        "42501" => (ErrorKind::Permission, false, ""),
        "3D000" | "3F000" | "42P01" | "42883" => (ErrorKind::NotFound, false, ""),
        code => match code.get(..2) {
            Some("28") => (ErrorKind::Permission, false, ""),
            Some("08" | "57") => (ErrorKind::Connection, true, ""),
            Some("53") if code == "53300" => (
                ErrorKind::Connection,
                true,
                "it has no connection left; see `connections`",
            ),
            Some("53" | "58" | "XX") => (ErrorKind::Store, true, ""),
            _ => (ErrorKind::Store, false, ""),
        },
    }
}

/// The error with what the server says besides its message.
fn cause(error: sqlx::Error) -> BoxError {
    match error {
        sqlx::Error::Database(answer) => Box::new(Answer(answer)),
        other => Box::new(other),
    }
}

/// The server's answer, with its code.
#[derive(Debug)]
struct Answer(Box<dyn DatabaseError>);

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.message())?;
        match self.0.code() {
            Some(code) => write!(f, " (SQLSTATE {code})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Answer {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(self.0.as_error())
    }
}
