//! SQS's errors, as the core's: what happened, and whether another try can help.
//! <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/CommonErrors.html>

use std::error::Error as StdError;
use std::fmt::Write as _;

use aws_sdk_sqs::config::http::HttpResponse;
use aws_sdk_sqs::error::{BuildError, ProvideErrorMetadata, SdkError};
use aws_sdk_sqs::types::BatchResultErrorEntry;
use onlyonce_core::{Error, ErrorKind};

/// The error of a request that failed as a whole.
pub(crate) fn of_request<E>(what: &str, error: &SdkError<E, HttpResponse>) -> Error
where
    E: ProvideErrorMetadata + StdError + 'static,
{
    match error {
        SdkError::ServiceError(answer) => {
            let meta = answer.err().meta();
            let status = answer.raw().status().as_u16();
            match meta.code() {
                Some(code) => of_code(what, code, meta.message().unwrap_or_default(), status < 500),
                None => unreadable(what, status),
            }
        }
        SdkError::ResponseError(answer) => unreadable(what, answer.raw().status().as_u16()),
        SdkError::TimeoutError(_) => Error::new(ErrorKind::Timeout, what).caused_by(chain(error)),
        SdkError::DispatchFailure(_) if lacks_credentials(error) => Error::new(
            ErrorKind::Permission,
            format!("{what}: no AWS credentials; set AWS_PROFILE or AWS_ACCESS_KEY_ID, or give the machine a role"),
        )
        .caused_by(chain(error)),
        SdkError::DispatchFailure(_) => {
            Error::new(ErrorKind::Connection, what).caused_by(chain(error))
        }
        _ => Error::new(ErrorKind::Other, what).caused_by(chain(error)),
    }
}

/// Something between us and SQS answered in its place, or the answer was cut.
fn unreadable(what: &str, status: u16) -> Error {
    let text = format!("{what}: the answer, of HTTP status {status}, is not SQS's");
    Error::new(ErrorKind::Connection, text)
}

/// The error of one entry of a batch.
pub(crate) fn of_entry(what: &str, entry: &BatchResultErrorEntry) -> Error {
    let message = entry.message().unwrap_or_default();
    of_code(what, entry.code(), message, entry.sender_fault())
}

/// An entry of a batch lacks what the SDK insists on.
pub(crate) fn impossible(error: BuildError) -> Error {
    Error::new(ErrorKind::Other, "an entry of a batch could not be made").caused_by(error)
}

/// The answer to a batch did not mention the entry.
pub(crate) fn of_silence(what: &str) -> Error {
    let text = format!("{what}: SQS's answer does not mention it");
    Error::new(ErrorKind::Connection, text)
}

/// An expired handle of a FIFO queue is an `InvalidParameterValue`, one that was followed by another delivery a
/// `ReceiptHandleIsInvalid`, and a message that is visible again is not in flight:
/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_DeleteMessage.html>,
/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ChangeMessageVisibility.html>
pub(crate) fn is_lease_lost(entry: &BatchResultErrorEntry) -> bool {
    let message = entry.message().unwrap_or_default();
    match bare(entry.code()) {
        "ReceiptHandleIsInvalid" | "MessageNotInflight" | "InvalidIdFormat" => true,
        "InvalidParameterValue" => {
            message.contains("expired") || message.contains("not available for visibility timeout")
        }
        _ => false,
    }
}

/// Whether it was the credentials that AWS did not take, or that could not be found.
pub(crate) fn refuses_credentials<E>(error: &SdkError<E, HttpResponse>) -> bool
where
    E: ProvideErrorMetadata + StdError + 'static,
{
    match error {
        SdkError::ServiceError(answer) => {
            let meta = answer.err().meta();
            let text = meta.message().unwrap_or_default();
            match bare(meta.code().unwrap_or_default()) {
                "ExpiredToken"
                | "InvalidClientTokenId"
                | "UnrecognizedClient"
                | "InvalidAccessKeyId" => true,
                // Of a file that was read while it was written, the halves do not fit.
                code => code.contains("Signature") && !blames_clock(text),
            }
        }
        SdkError::DispatchFailure(_) => lacks_credentials(error),
        _ => false,
    }
}

fn blames_clock(message: &str) -> bool {
    ["Signature expired", "Signature not yet current"]
        .iter()
        .any(|text| message.starts_with(text))
}

/// The code without what the query protocol puts before it, and JSON behind.
fn bare(code: &str) -> &str {
    let code = code.strip_prefix("AWS.SimpleQueueService.").unwrap_or(code);
    code.strip_suffix("Exception").unwrap_or(code)
}

fn of_code(what: &str, code: &str, message: &str, sender_fault: bool) -> Error {
    let code = bare(code);
    // SignatureDoesNotMatch, InvalidSignature …: their text holds the signed request, session token included.
    if code.contains("Signature") {
        // A clock is set again by itself, where a machine was suspended.
        let text = format!("{what}: {code} (wrong secret key, or a clock that is off)");
        return Error::new(ErrorKind::Permission, text).retryable(blames_clock(message));
    }
    let (kind, retryable, hint) = meaning(code, sender_fault);
    let mut text = format!("{what}: {code}");
    for part in [message, hint] {
        if !part.is_empty() {
            let _ = write!(text, "; {part}");
        }
    }
    Error::new(kind, text).retryable(retryable)
}

/// What kind of error it is, whether another try can help, and what to do.
fn meaning(code: &str, sender_fault: bool) -> (ErrorKind, bool, &'static str) {
    match code {
        "QueueDoesNotExist" | "NonExistentQueue" => (
            ErrorKind::NotFound,
            false,
            "check its name, region and account",
        ),
        "OverLimit" => (
            ErrorKind::Throttled,
            true,
            "too many messages are received and not deleted: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html",
        ),
        "RequestThrottled"
        | "Throttling"
        | "TooManyRequests"
        | "RequestLimitExceeded"
        | "SlowDown" => (ErrorKind::Throttled, true, ""),
        _ if code.to_ascii_lowercase().starts_with("kms") => match code.contains("Throttl") {
            true => (ErrorKind::Throttled, true, "the queue's KMS key"),
            false => (
                ErrorKind::Permission,
                false,
                "the queue's KMS key cannot be used: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-key-management.html",
            ),
        },
        // The credentials that follow may be good.
        "ExpiredToken" | "RequestExpired" => (
            ErrorKind::Permission,
            true,
            "are the credentials fresh, and the clock right?",
        ),
        "AccessDenied"
        | "InvalidSecurity"
        | "InvalidAddress"
        | "InvalidClientTokenId"
        | "InvalidAccessKeyId"
        | "UnrecognizedClient"
        | "MissingAuthenticationToken"
        | "OptInRequired"
        | "NotAuthorized" => (ErrorKind::Permission, false, ""),
        "InvalidMessageContents"
        | "BatchRequestTooLong"
        | "MessageTooLong"
        | "InvalidParameterValue"
        | "InvalidParameterCombination"
        | "MissingParameter"
        | "MissingRequiredParameter"
        | "InvalidAttributeValue" => (ErrorKind::Message, false, ""),
        "UnsupportedOperation" => (ErrorKind::Config, false, ""),
        "QueueDeletedRecently" | "PurgeQueueInProgress" => (ErrorKind::Other, true, ""),
        "RequestTimeout" | "RequestAborted" => (ErrorKind::Connection, true, ""),
        _ if sender_fault => (ErrorKind::Other, false, ""),
        _ => (ErrorKind::Connection, true, ""),
    }
}

/// Nobody in the chain has credentials; anything else that went wrong in asking for them may pass.
fn lacks_credentials(error: &(dyn StdError + 'static)) -> bool {
    use aws_credential_types::provider::error::CredentialsError;
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<CredentialsError>() {
            return matches!(error, CredentialsError::CredentialsNotLoaded(_));
        }
        cause = error.source();
    }
    false
}

/// The causes as text. The SDK's error itself would show the whole answer, bodies of messages included.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
