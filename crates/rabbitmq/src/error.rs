use std::time::Duration;

use lapin::ErrorKind as Amqp;
use onlyonce_core::{Error, ErrorKind};

/// Why a conversation with the broker ended. Turned into the core's [`Error`] once, where it is known what was going on.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    Lapin(lapin::Error),
    /// No answer within this time.
    Silence(Duration),
    /// The broker reads nothing from connections that publish, and nothing was sent.
    Blocked,
    /// The broker cancelled the consumer: the queue was deleted, or its node went away.
    Cancelled,
    /// The queue cannot be used as the URL says, or at all.
    Unusable(String),
    /// A message was given back that has to come before others: closing gives all back in order.
    Returned,
    /// A message was not settled within the acknowledgement time-out.
    Overdue(Duration),
    /// The sink was closed.
    Closed,
    /// A certificate cannot be read.
    Certificate(Error),
}

impl From<lapin::Error> for Fault {
    fn from(error: lapin::Error) -> Self {
        Self::Lapin(error)
    }
}

impl Fault {
    /// The error of failing to do `what` with `queue`.
    pub(crate) fn error(&self, what: &str, queue: &str) -> Error {
        match self {
            Self::Lapin(error) => of_lapin(what, error).caused_by(error.clone()),
            Self::Silence(time) => Error::new(
                ErrorKind::Timeout,
                format!("{what}: the broker did not answer within {time:?}"),
            ),
            Self::Blocked => Error::new(
                ErrorKind::Throttled,
                format!("{what}: the broker blocks publishers: memory or disk alarm"),
            ),
            Self::Cancelled => Error::new(
                ErrorKind::Connection,
                format!("{what}: the broker cancelled the consumer, as it does when the queue is deleted"),
            ),
            Self::Unusable(why) => Error::config(format!("{what}: {why}")),
            Self::Returned => Error::new(
                ErrorKind::Connection,
                format!("{what}: a message of a group was given back, and all that is held goes back with it, in order"),
            ),
            Self::Overdue(time) => Error::new(
                ErrorKind::Timeout,
                format!("{what}: a message was not settled within {time:?}, and all that is held goes back to the queue; if a handler takes that long, raise the broker's consumer_timeout and the URL's, else lower prefetch"),
            ),
            Self::Certificate(error) => error.clone(),
            Self::Closed => Error::new(ErrorKind::Closed, format!("{what}: it was closed")),
        }
        .on_queue(queue)
    }

    /// The text of a channel's or connection's exception, and its number.
    pub(crate) fn exception(&self) -> Option<(u16, &str)> {
        match self {
            Self::Lapin(error) => exception(error),
            _ => None,
        }
    }
}

fn exception(error: &lapin::Error) -> Option<(u16, &str)> {
    match error.kind() {
        Amqp::ProtocolError(error) => Some((error.get_id(), error.get_message().as_str())),
        _ => None,
    }
}

fn of_lapin(what: &str, error: &lapin::Error) -> Error {
    if let Some((code, text)) = exception(error) {
        return of_exception(what, code, text);
    }
    match error.kind() {
        Amqp::SerialisationError(_) => Error::new(ErrorKind::Message, what),
        Amqp::AuthProviderError(_) => Error::new(ErrorKind::Permission, what),
        Amqp::IOError(_)
        | Amqp::ParsingError(_)
        | Amqp::RuntimeShutdownError(_)
        | Amqp::MissingHeartbeatError
        | Amqp::InvalidChannel(_)
        | Amqp::InvalidChannelState(..)
        | Amqp::InvalidConnectionState(_) => Error::new(ErrorKind::Connection, what),
        _ => Error::new(ErrorKind::Other, what),
    }
}

/// <https://www.rabbitmq.com/amqp-0-9-1-reference#constants>
fn of_exception(what: &str, code: u16, text: &str) -> Error {
    let (kind, retryable) = match code {
        // A queue whose node is down is said to be "down or inaccessible": it will be back.
        404 if text.contains("inaccessible") || text.contains("timeout") => {
            (ErrorKind::NotFound, true)
        }
        404 => (ErrorKind::NotFound, false),
        // Somebody else's exclusive consumer or queue, for as long as it lasts.
        403 if text.contains("exclusive") => (ErrorKind::Other, true),
        405 => (ErrorKind::Other, true),
        403 => (ErrorKind::Permission, false),
        530 if text.contains("limit") => (ErrorKind::Throttled, true),
        530 if text.contains("not found") => (ErrorKind::NotFound, false),
        530 => (ErrorKind::Permission, false),
        406 => (ErrorKind::Other, false),
        540 => (ErrorKind::Config, false),
        _ => (ErrorKind::Connection, true),
    };
    Error::new(kind, what).retryable(retryable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::protocol::AMQPError;

    fn fault(code: u16, text: &str) -> Fault {
        let error = AMQPError::from_id(code, text.into()).unwrap();
        Fault::Lapin(Amqp::ProtocolError(error).into())
    }

    #[test]
    fn errors_say_what_happened_and_whether_to_try_again() {
        for (code, text, kind, retryable) in [
            (
                404,
                "NOT_FOUND - no queue 'q' in vhost '/'",
                ErrorKind::NotFound,
                false,
            ),
            (
                404,
                "NOT_FOUND - home node 'x' of durable queue 'q' is down or inaccessible",
                ErrorKind::NotFound,
                true,
            ),
            (
                403,
                "ACCESS_REFUSED - login refused",
                ErrorKind::Permission,
                false,
            ),
            (
                530,
                "NOT_ALLOWED - vhost v not found",
                ErrorKind::NotFound,
                false,
            ),
            (
                530,
                "NOT_ALLOWED - connection limit (1) is reached",
                ErrorKind::Throttled,
                true,
            ),
            (405, "RESOURCE_LOCKED", ErrorKind::Other, true),
            (320, "CONNECTION_FORCED", ErrorKind::Connection, true),
            (540, "NOT_IMPLEMENTED", ErrorKind::Config, false),
        ] {
            let error = fault(code, text).error("cannot consume", "orders");
            assert_eq!(
                (error.kind(), error.is_retryable()),
                (kind, retryable),
                "{text}"
            );
            let shown = error.to_string();
            assert!(shown.contains("orders") && shown.contains(text), "{shown}");
        }
        for (fault, retryable) in [
            (Fault::Silence(Duration::from_secs(1)), true),
            (Fault::Cancelled, true),
            (Fault::Returned, true),
            (Fault::Blocked, true),
            (Fault::Closed, false),
            (Fault::Unusable("a stream".into()), false),
        ] {
            assert_eq!(fault.error("", "").is_retryable(), retryable, "{fault:?}");
        }
    }
}
