//! Connections and credentials, over sockets.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Extensions, HeaderMap};
use onlyonce_core::ErrorKind;
use onlyonce_core::driver::{Disposition, SettleResult, Settlement, Source as _};
use onlyonce_pubsub::google_cloud_auth::credentials::{
    CacheableResource, Credentials, CredentialsProvider, EntityTag,
};
use onlyonce_pubsub::google_cloud_auth::errors::CredentialsError;
use onlyonce_pubsub::v1::{AcknowledgeRequest, GetSubscriptionRequest, PullRequest};
use tokio::time::timeout;
use tonic::Code;

use super::script::*;
use super::*;

async fn config_of(script: &Script) -> Config {
    let mut config = config();
    config.endpoint = Some(script.listen().await);
    config
}

async fn source_by(script: &Script) -> PubSubSource {
    PubSubSource::new(config_of(script).await).unwrap()
}

/// Failed acks are told in the headers, with a line for each id.
#[tokio::test]
async fn answers_to_acks_may_have_megabytes_of_headers() {
    for bytes in [8 << 10, 256 << 10, 3_000_000] {
        let others = (0..bytes / 1_000).map(|n| (format!("{n:0960}"), TRANSIENT.to_owned()));
        let ids = others.chain([("a".to_owned(), INVALID.to_owned())]);
        let answer = refused(Code::FailedPrecondition, "Some acks failed.").naming(ids);
        let script = Script::of([
            told(),
            pull().gets(messages(&["a", "b"])),
            acknowledge(&["a", "b"]).gets(answer),
        ]);
        let source = source_by(&script).await;
        let held = receive(&source, 2).await;
        let ack = |delivery: &Delivery| Settlement::new(delivery.receipt.clone(), Disposition::Ack);
        let acks: Vec<_> = held.iter().map(ack).collect();
        let answers = source.settle(&acks).await;
        let as_told = [SettleResult::LeaseLost, SettleResult::Applied];
        assert_eq!(
            format!("{answers:?}"),
            format!("{as_told:?}"),
            "{bytes} bytes"
        );
    }
}

#[tokio::test]
async fn requests_say_who_sends_them_and_about_what() {
    let script = Script::of([told(), pull().gets(messages(&["m"]))]);
    let source = source_by(&script).await;
    assert_eq!(receive(&source, 1).await.len(), 1);
    let sent = script.sent::<PullRequest>().remove(0);
    let agent = sent.header("user-agent").unwrap();
    assert!(agent.starts_with("onlyonce-pubsub/"), "{agent}");
    let about = sent.header("x-goog-request-params").unwrap();
    assert_eq!(
        about,
        "subscription=projects%2Fproject%2Fsubscriptions%2Forders"
    );
    assert_eq!(sent.header("authorization"), None, "to an emulator");
    assert!(
        sent.header("grpc-timeout").is_some(),
        "the service knows how long we wait"
    );
}

#[tokio::test]
async fn a_connection_that_goes_away_is_replaced() {
    let script = Script::of([
        told(),
        pull().gets(messages(&["a"])),
        pull().gets(messages(&["b"]).after(Duration::from_millis(300))),
        pull().gets(messages(&["c"])),
    ]);
    let source = source_by(&script).await;
    assert_eq!(bodies(&receive(&source, 1).await), ["a"]);
    let under_way = async {
        while script.sent::<PullRequest>().len() < 2 {
            quiet().await;
        }
        script.go_away();
    };
    let (second, ()) = tokio::join!(receive(&source, 1), under_way);
    assert_eq!(bodies(&second), ["b"], "what is under way is answered");
    assert_eq!(bodies(&receive(&source, 1).await), ["c"]);
    let pulls = script.sent::<PullRequest>();
    assert_eq!(pulls[1].connection, 0);
    assert_ne!(pulls[2].connection, 0);
}

#[tokio::test]
async fn a_connection_that_breaks_loses_no_message() {
    let script = Script::of([
        told(),
        pull().gets(messages(&["a"])),
        pull().gets(broken()),
        pull().gets(messages(&["b"])),
        acknowledge(&["a"]).gets(broken()),
        acknowledge(&["a"]).gets(done()),
    ]);
    let source = source_by(&script).await;
    let held = receive(&source, 1).await;
    let error = source.receive(limit(1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connection, "{error}");
    assert!(error.is_retryable());
    assert_eq!(bodies(&receive(&source, 1).await), ["b"]);
    let ack = [Settlement::new(held[0].receipt.clone(), Disposition::Ack)];
    let first = source.settle(&ack).await;
    assert!(matches!(&first[..], [SettleResult::Unknown(error)] if error.is_retryable()));
    assert!(source.settle(&ack).await[0].is_applied());
}

/// A connection that was closed while nobody used it costs the next request nothing.
#[tokio::test]
async fn a_connection_that_was_closed_meanwhile_is_replaced_unnoticed() {
    let script = Script::of([told(), told(), told()]);
    let source = source_by(&script).await;
    for _ in 0..3 {
        source.queue_info().await.unwrap();
        script.drop_connections();
        quiet().await;
    }
    let asked = script.sent::<GetSubscriptionRequest>();
    assert_eq!(asked.len(), 3);
}

/// Its tokens are `token-1`, `token-2` and so on.
#[derive(Debug)]
struct Tokens(Arc<AtomicUsize>);

impl CredentialsProvider for Tokens {
    async fn headers(
        &self,
        _: Extensions,
    ) -> Result<CacheableResource<HeaderMap>, CredentialsError> {
        let number = self.0.fetch_add(1, Ordering::Relaxed) + 1;
        let mut headers = HeaderMap::new();
        let bearer = format!("Bearer token-{number}").parse().unwrap();
        headers.insert("authorization", bearer);
        Ok(CacheableResource::New {
            entity_tag: EntityTag::new(),
            data: headers,
        })
    }

    async fn universe_domain(&self) -> Option<String> {
        None
    }
}

#[tokio::test]
async fn each_request_has_the_token_of_its_time() {
    let script = Script::of([
        told(),
        pull().gets(messages(&["a"])),
        acknowledge(&["a"]).gets(done()),
    ]);
    let mut config = config_of(&script).await;
    config.quota_project = Some("billed".to_owned());
    let tokens = Credentials::from(Tokens(Arc::default()));
    let config = config.with_credentials(tokens);
    assert!(format!("{config:?}").contains("credentials: given"));
    let source = PubSubSource::new(config).unwrap();
    let held = receive(&source, 1).await;
    let ack = [Settlement::new(held[0].receipt.clone(), Disposition::Ack)];
    assert!(source.settle(&ack).await[0].is_applied());
    let read = script.sent::<GetSubscriptionRequest>().remove(0);
    assert_eq!(read.header("authorization"), Some("Bearer token-1"));
    assert_eq!(read.header("x-goog-user-project"), Some("billed"));
    let acked = script.sent::<AcknowledgeRequest>().remove(0);
    assert_eq!(acked.header("authorization"), Some("Bearer token-3"));
}

/// A token that ends is refused; the next one may be good. One that never was is a mistake.
#[tokio::test]
async fn credentials_that_were_good_are_tried_again() {
    let refusal = || refused(Code::Unauthenticated, "expired");
    let script = Script::of([
        told(),
        pull().gets(refusal()),
        pull().gets(messages(&["a"])),
    ]);
    let config = config_of(&script).await;
    let tokens = Credentials::from(Tokens(Arc::default()));
    let source = PubSubSource::new(config.with_credentials(tokens)).unwrap();
    let error = source.receive(limit(1)).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert_eq!(error.kind(), ErrorKind::Permission);
    assert!(!error.to_string().contains("token-"), "{error}");
    assert_eq!(receive(&source, 1).await.len(), 1);

    let script = Script::of([get_subscription().gets(refusal())]);
    let error = source_by(&script).await.queue_info().await.unwrap_err();
    assert!(!error.is_retryable(), "{error}");
    assert!(
        error.to_string().contains("GOOGLE_APPLICATION_CREDENTIALS"),
        "{error}"
    );
}

#[tokio::test]
async fn nobody_at_the_endpoint_is_a_connection_error() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let mut config = config();
    config.endpoint = Some(endpoint);
    let source = PubSubSource::new(config).unwrap();
    let asked = timeout(seconds(9), source.queue_info()).await.unwrap();
    let error = asked.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connection, "{error}");
    assert!(error.is_retryable());
}
