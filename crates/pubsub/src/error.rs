//! Pub/Sub's errors, as the core's: what happened, and whether another try can help.
//! <https://cloud.google.com/pubsub/docs/reference/error-codes>

use std::collections::HashMap;
use std::time::Duration;

use onlyonce_core::{Error, ErrorKind};
use tonic::{Code, Status};
use tonic_types::{ErrorDetail, StatusExt as _};

/// A failed ack or extension on an exactly-once subscription says by this what became of each id:
/// <https://cloud.google.com/pubsub/docs/exactly-once-delivery#errors>
const ACK_IDS: &str = "EXACTLY_ONCE_ACKID_FAILURE";

/// The error of a request that failed as a whole.
pub(crate) fn of_status(what: &str, status: &Status) -> Error {
    let (kind, retryable, hint) = meaning(status.code());
    let mut text = format!("{what}: {:?}", status.code());
    for part in [status.message(), hint] {
        if !part.is_empty() {
            text.push_str("; ");
            text.push_str(part);
        }
    }
    Error::new(kind, text).retryable(retryable)
}

/// What kind of error it is, whether another try can help, and what to do.
fn meaning(code: Code) -> (ErrorKind, bool, &'static str) {
    match code {
        Code::NotFound => (ErrorKind::NotFound, false, "check the project and the name"),
        Code::PermissionDenied => (
            ErrorKind::Permission,
            false,
            "has it the roles that https://cloud.google.com/pubsub/docs/access-control names?",
        ),
        Code::Unauthenticated => (
            ErrorKind::Permission,
            false,
            "set GOOGLE_APPLICATION_CREDENTIALS, run `gcloud auth application-default login`, or give the machine a service account; and is the clock right?",
        ),
        Code::ResourceExhausted => (
            ErrorKind::Throttled,
            true,
            "see https://cloud.google.com/pubsub/quotas",
        ),
        Code::DeadlineExceeded | Code::Cancelled => (ErrorKind::Timeout, true, ""),
        Code::Unavailable | Code::Aborted | Code::Internal | Code::Unknown | Code::DataLoss => {
            (ErrorKind::Connection, true, "")
        }
        Code::InvalidArgument | Code::OutOfRange => (ErrorKind::Message, false, ""),
        Code::FailedPrecondition | Code::Unimplemented | Code::AlreadyExists | Code::Ok => {
            (ErrorKind::Config, false, "")
        }
    }
}

/// How long the service asks to wait.
pub(crate) fn retry_delay(status: &Status) -> Option<Duration> {
    let told = status.get_details_retry_info()?.retry_delay;
    told.filter(|delay| status.code() == Code::ResourceExhausted && !delay.is_zero())
}

/// What became of the ids of one ack or extension.
pub(crate) enum Outcomes {
    /// All was done but these, each with why.
    Done(HashMap<String, String>),
    /// Whether any was done is not known.
    Unknown(Error),
}

/// What became of one id.
pub(crate) enum Outcome {
    Done,
    LeaseLost,
    Unknown(Error),
}

impl Outcomes {
    pub(crate) fn of(what: &str, answer: Result<(), Status>) -> Self {
        let Err(status) = answer else {
            return Self::Done(HashMap::new());
        };
        let mut failed = HashMap::new();
        for detail in status.get_error_details_vec() {
            if let ErrorDetail::ErrorInfo(info) = detail
                && info.reason == ACK_IDS
            {
                failed.extend(info.metadata);
            }
        }
        match failed.is_empty() {
            true => Self::Unknown(of_status(what, &status)),
            false => Self::Done(failed),
        }
    }

    pub(crate) fn of_id(&self, what: &str, id: &str) -> Outcome {
        match self {
            Self::Unknown(error) => Outcome::Unknown(error.clone()),
            Self::Done(failed) => match failed.get(id) {
                None => Outcome::Done,
                Some(why) if why.starts_with("PERMANENT_") => Outcome::LeaseLost,
                Some(why) => {
                    let error = Error::new(ErrorKind::Connection, format!("{what}: {why}"));
                    Outcome::Unknown(error)
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    fn failed(reason: &str, ids: &[(&str, &str)]) -> Status {
        let ids = ids.iter().map(|(id, why)| ((*id).into(), (*why).into()));
        let details = ErrorDetails::with_error_info(
            reason,
            "pubsub.googleapis.com",
            ids.collect::<HashMap<String, String>>(),
        );
        Status::with_error_details(Code::FailedPrecondition, "some ids failed", details)
    }

    #[test]
    fn each_id_has_its_own_outcome() {
        let status = failed(
            ACK_IDS,
            &[
                ("lost", "PERMANENT_FAILURE_INVALID_ACK_ID"),
                ("again", "TRANSIENT_FAILURE_SERVICE_UNAVAILABLE"),
            ],
        );
        let outcomes = Outcomes::of("cannot ack", Err(status));
        assert!(matches!(outcomes.of_id("", "other"), Outcome::Done));
        assert!(matches!(outcomes.of_id("", "lost"), Outcome::LeaseLost));
        let Outcome::Unknown(error) = outcomes.of_id("cannot ack", "again") else {
            panic!("it may be tried again");
        };
        assert!(error.is_retryable(), "{error}");
    }

    #[test]
    fn without_a_word_on_ids_nothing_is_known_of_any() {
        for status in [
            failed("SOMETHING_ELSE", &[("lost", "PERMANENT_FAILURE")]),
            Status::unavailable("going away"),
        ] {
            let outcomes = Outcomes::of("cannot ack", Err(status));
            assert!(matches!(outcomes.of_id("", "lost"), Outcome::Unknown(_)));
        }
    }

    #[test]
    fn codes_tell_whether_to_try_again() {
        for (code, kind, again) in [
            (Code::Unavailable, ErrorKind::Connection, true),
            (Code::ResourceExhausted, ErrorKind::Throttled, true),
            (Code::DeadlineExceeded, ErrorKind::Timeout, true),
            (Code::NotFound, ErrorKind::NotFound, false),
            (Code::PermissionDenied, ErrorKind::Permission, false),
            (Code::InvalidArgument, ErrorKind::Message, false),
            (Code::FailedPrecondition, ErrorKind::Config, false),
        ] {
            let error = of_status("cannot pull", &Status::new(code, "why"));
            assert_eq!(
                (error.kind(), error.is_retryable()),
                (kind, again),
                "{error}"
            );
        }
    }
}
