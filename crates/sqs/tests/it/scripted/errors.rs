//! What SQS's errors become: kind, whether another try can help, and a text that says what to do.
//! <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/CommonErrors.html>

use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::future;
use aws_sdk_sqs::config::ProvideCredentials;
use onlyonce_core::driver::{Disposition, SettleResult, Settlement, Source as _};
use onlyonce_core::{Error, ErrorKind};
use onlyonce_sqs::{SqsSource, aws_sdk_sqs};
use serde_json::json;

use super::script::*;

const QUEUE: &str = "orders?visibility_timeout=30s";
const FIFO: &str = "orders.fifo?visibility_timeout=30s";

async fn error_of(source: &SqsSource) -> Error {
    source.receive(limit(1, seconds(1))).await.unwrap_err()
}

/// The error that a receive returns when this is the answer to it.
async fn error_after(answer: Answer) -> Error {
    let script = Script::of([receive().gets(answer)]);
    error_of(&script.source(QUEUE)).await
}

/// Status, code and text as SQS sends them, and what the error must say beside them.
type Row = (u16, &'static str, &'static str, &'static str);

const THROTTLED: &[Row] = &[
    (400, "RequestThrottled", "", ""),
    (400, "ThrottlingException", "Rate exceeded", ""),
    (403, "OverLimit", "", "received and not deleted"),
    (400, "KmsThrottled", "", "KMS key"),
];
const REFUSED: &[Row] = &[
    (400, "AccessDeniedException", "x may not sqs:receive", ""),
    (400, "InvalidSecurity", "", ""),
    (403, "InvalidClientTokenId", "The token is invalid.", ""),
    (400, "UnrecognizedClientException", "", ""),
    (403, "MissingAuthenticationToken", "", ""),
    (403, "OptInRequired", "", ""),
    (400, "KmsDisabled", "key is disabled", "KMS key"),
    (400, "KmsAccessDenied", "", "sqs-key-management"),
    (400, "KmsNotFound", "", "KMS key"),
    (400, "KmsInvalidState", "", "KMS key"),
    (400, "KmsInvalidKeyUsage", "", "KMS key"),
    (400, "KmsOptInRequired", "", "KMS key"),
];
/// Fresh credentials may come, or the clock be set.
const OUTDATED: &[Row] = &[
    (403, "ExpiredTokenException", "It is expired", "fresh"),
    (400, "RequestExpired", "", "clock"),
];
const PASSING: &[Row] = &[
    (408, "RequestTimeoutException", "read timed out", ""),
    (400, "RequestAbortedException", "", ""),
    (500, "InternalFailure", "", ""),
    (503, "ServiceUnavailable", "", ""),
];
const UNSUPPORTED: &[Row] = &[(400, "UnsupportedOperation", "", "")];
const STRANGE: &[Row] = &[(400, "ValidationError", "1 error detected", "")];

#[tokio::test(start_paused = true)]
async fn every_error_says_what_to_do() {
    for (rows, kind, retryable) in [
        (THROTTLED, ErrorKind::Throttled, true),
        (REFUSED, ErrorKind::Permission, false),
        (OUTDATED, ErrorKind::Permission, true),
        (PASSING, ErrorKind::Connection, true),
        (UNSUPPORTED, ErrorKind::Config, false),
        (STRANGE, ErrorKind::Other, false),
    ] {
        for (status, code, text, hint) in rows {
            let error = error_after(refused(*status, code, text)).await;
            assert_eq!(error.kind(), kind, "{error}");
            assert_eq!(error.is_retryable(), retryable, "{error}");
            let code = code.trim_end_matches("Exception");
            for part in ["cannot receive", code, text, hint, "[queue orders]"] {
                assert!(error.to_string().contains(part), "no `{part}` in: {error}");
            }
        }
    }
}

/// SQS gives KMS's errors these codes, beside those of its documentation.
#[tokio::test(start_paused = true)]
async fn codes_of_the_old_protocol_mean_the_same() {
    for (code, query_code, kind) in [
        (
            "QueueDoesNotExist",
            "AWS.SimpleQueueService.NonExistentQueue",
            ErrorKind::NotFound,
        ),
        (
            "KmsDisabled",
            "KMS.DisabledException",
            ErrorKind::Permission,
        ),
        (
            "KmsThrottled",
            "KMS.ThrottlingException",
            ErrorKind::Throttled,
        ),
        (
            "UnsupportedOperation",
            "AWS.SimpleQueueService.UnsupportedOperation",
            ErrorKind::Config,
        ),
    ] {
        let new = error_after(refused(400, code, "text")).await;
        let old = error_after(refused(400, code, "text").query_code(query_code)).await;
        for error in [new, old] {
            assert_eq!(error.kind(), kind, "{error}");
            assert_eq!(
                error.is_retryable(),
                kind == ErrorKind::Throttled,
                "{error}"
            );
            assert!(error.to_string().contains("text"), "{error}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_is_not_there_is_not_found() {
    let answer = refused(
        400,
        "QueueDoesNotExist",
        "The specified queue does not exist.",
    );
    let answer = answer.query_code("AWS.SimpleQueueService.NonExistentQueue");
    let script = Script::of([request(
        "GetQueueUrl",
        json!({ "QueueName": "orders", "QueueOwnerAWSAccountId": "1" }),
    )
    .gets(answer)]);
    let config = "sqs://orders?region=eu-central-1&account=1&visibility_timeout=30s";
    let source = SqsSource::with_client(config.parse().unwrap(), script.client()).unwrap();
    let error = error_of(&source).await;
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(!error.is_retryable());
    let shown = error.to_string();
    assert!(shown.contains("name, region and account"), "{shown}");
    assert!(shown.contains("[queue orders]"), "{shown}");
}

/// SQS explains a wrong signature by the signed request, in which there is the session token.
#[tokio::test(start_paused = true)]
async fn a_wrong_signature_shows_no_secret() {
    let text = "The request signature we calculated does not match the signature you provided. \
        The Canonical String for this request should have been 'POST\n/\n\n\
        host:sqs.eu-central-1.amazonaws.com\nx-amz-security-token:s3cr3t\n'";
    for code in [
        "SignatureDoesNotMatch",
        "InvalidSignatureException",
        "IncompleteSignature",
        "IncompleteSignatureException",
    ] {
        let answer = refused(403, code, text);
        for answer in [answer.clone(), answer.query_code(code)] {
            let error = error_after(answer).await;
            assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
            assert!(!error.is_retryable(), "{error}");
            let shown = format!("{error}\n{error:?}");
            assert!(!shown.contains("s3cr3t"), "{shown}");
            let code = code.trim_end_matches("Exception");
            for part in [code, "secret key", "clock", "orders"] {
                assert!(shown.contains(part), "no `{part}` in: {shown}");
            }
        }
    }
}

/// As after a machine was suspended, until its clock is set.
#[tokio::test(start_paused = true)]
async fn a_clock_that_is_off_may_be_set() {
    for text in [
        "Signature expired: 20261121T120000Z is now earlier than 20261121T123000Z",
        "Signature not yet current: 20261121T130000Z is still later than 20261121T123000Z",
    ] {
        let error = error_after(refused(403, "InvalidSignatureException", text)).await;
        assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
        assert!(error.is_retryable(), "{error}");
        assert!(error.to_string().contains("clock"), "{error}");
    }
}

/// Credentials that cannot be had.
#[derive(Clone, Copy, Debug)]
enum Lacking {
    NoneConfigured,
    ProviderDown,
}

impl ProvideCredentials for Lacking {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::ready(Err(match self {
            Self::NoneConfigured => CredentialsError::not_loaded("no providers in chain"),
            Self::ProviderDown => CredentialsError::provider_error("metadata service: 503"),
        }))
    }
}

#[tokio::test(start_paused = true)]
async fn without_credentials_nothing_is_sent() {
    for (lacking, kind, retryable, hint) in [
        (
            Lacking::NoneConfigured,
            ErrorKind::Permission,
            false,
            "AWS_PROFILE",
        ),
        (
            Lacking::ProviderDown,
            ErrorKind::Connection,
            true,
            "metadata service: 503",
        ),
    ] {
        let script = Script::of([]);
        let client = script.client_with(lacking);
        let source = SqsSource::with_client(config(QUEUE), client).unwrap();
        let error = error_of(&source).await;
        assert_eq!(
            (error.kind(), error.is_retryable()),
            (kind, retryable),
            "{error}"
        );
        assert!(error.to_string().contains(hint), "{error}");
        assert!(error.to_string().contains("[queue orders]"), "{error}");
        assert!(script.sent("ReceiveMessage").is_empty());
    }
}

/// Whatever SQS answers, nobody reads other people's messages in the logs.
#[tokio::test(start_paused = true)]
async fn an_unreadable_answer_is_not_repeated() {
    let cut = r#"{"Messages":[{"Body":"s3cr3t","ReceiptHandle":"a""#;
    for answer in [raw(200, cut), raw(400, cut), page(403)] {
        let error = error_after(answer).await;
        assert_eq!(error.kind(), ErrorKind::Connection, "{error}");
        assert!(error.is_retryable(), "{error}");
        let shown = format!("{error}\n{error:?}");
        assert!(!shown.contains("s3cr3t"), "{shown}");
        assert!(shown.contains("not SQS's"), "{shown}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_fails_as_a_whole_is_unknown_for_each_and_can_be_tried_again() {
    for (answer, kind) in [
        (never(), ErrorKind::Timeout),
        (broken(), ErrorKind::Connection),
        (cut(), ErrorKind::Connection),
        (page(502), ErrorKind::Connection),
        (refused(500, "InternalFailure", ""), ErrorKind::Connection),
        (refused(400, "RequestThrottled", ""), ErrorKind::Throttled),
    ] {
        let (_script, source, held) = holding(
            FIFO,
            &["a", "b"],
            [
                delete(&["a", "b"]).gets(answer),
                delete(&["a", "b"]).gets(done(2)),
            ],
        )
        .await;
        let acks: Vec<Settlement> = held
            .iter()
            .map(|delivery| Settlement::new(delivery.receipt.clone(), Disposition::Ack))
            .collect();
        let answers = source.settle(&acks).await;
        for (answer, name) in answers.iter().zip(["a", "b"]) {
            let SettleResult::Unknown(error) = answer else {
                panic!("{answer:?}");
            };
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.is_retryable(), "{error}");
            let label = format!("[message dedup-{name}]");
            assert!(error.to_string().contains(&label), "{error}");
        }
        let answers = source.settle(&acks).await;
        assert!(answers.iter().all(SettleResult::is_applied), "{answers:?}");
    }
}
