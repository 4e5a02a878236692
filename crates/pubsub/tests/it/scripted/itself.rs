//! The script itself, asked by a plain client.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::publisher_client::PublisherClient;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::subscriber_client::SubscriberClient;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::*;
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::script::*;

type Answered<T> = Result<T, Status>;

#[derive(Clone)]
struct Client(Channel);

impl Client {
    async fn to(url: String) -> Self {
        Self(Endpoint::from_shared(url).unwrap().connect_lazy())
    }

    async fn pull(&self) -> Answered<Vec<String>> {
        let request = PullRequest {
            subscription: SUBSCRIPTION.to_owned(),
            max_messages: 10,
            ..PullRequest::default()
        };
        let answer = SubscriberClient::new(self.0.clone()).pull(request).await?;
        let received = answer.into_inner().received_messages.into_iter();
        Ok(received.map(|received| received.ack_id).collect())
    }

    async fn acknowledge(&self, ids: &[&str]) -> Answered<()> {
        let request = AcknowledgeRequest {
            subscription: SUBSCRIPTION.to_owned(),
            ack_ids: ids.iter().map(|&id| id.to_owned()).collect(),
        };
        let mut client = SubscriberClient::new(self.0.clone());
        client.acknowledge(request).await?;
        Ok(())
    }

    async fn modify_deadline(&self, id: &str, seconds: i32) -> Answered<()> {
        let request = ModifyAckDeadlineRequest {
            subscription: SUBSCRIPTION.to_owned(),
            ack_ids: vec![id.to_owned()],
            ack_deadline_seconds: seconds,
        };
        let mut client = SubscriberClient::new(self.0.clone());
        client.modify_ack_deadline(request).await?;
        Ok(())
    }
}

/// What the end of this script says, as it does not panic yet.
fn end(script: Script) -> Option<String> {
    let end = catch_unwind(AssertUnwindSafe(|| drop(script)));
    end.err().map(|panic| *panic.downcast().unwrap())
}

#[tokio::test(start_paused = true)]
async fn what_is_sent_is_recorded() {
    let script = Script::of([acknowledge(&["a", "b"]).gets(done().after(seconds(3)))]);
    let mut client = SubscriberClient::new(script.channel());
    quiet().await;
    let mut request = tonic::Request::new(AcknowledgeRequest {
        subscription: SUBSCRIPTION.to_owned(),
        ack_ids: vec!["a".to_owned(), "b".to_owned()],
    });
    let bearer = "Bearer token".parse().unwrap();
    request.metadata_mut().insert("authorization", bearer);
    request.set_timeout(seconds(10));
    client.acknowledge(request).await.unwrap();
    let sent = script.sent::<AcknowledgeRequest>().remove(0);
    assert_eq!(sent.message.subscription, SUBSCRIPTION);
    assert_eq!(sent.message.ack_ids, ["a", "b"]);
    assert_eq!(sent.header("authorization"), Some("Bearer token"));
    assert_eq!(sent.header("grpc-timeout"), Some("10000000u"));
    assert!(sent.header("user-agent").unwrap().starts_with("tonic/"));
    assert_eq!(sent.header("x-goog-user-project"), None);
    assert_eq!(sent.at, Duration::from_millis(1));
    assert_eq!(sent.answered, Some(Duration::from_millis(3_001)));
    assert!(!sent.given_up);
}

#[tokio::test(start_paused = true)]
async fn every_method_has_its_answers() {
    let subscription = Subscription {
        name: SUBSCRIPTION.to_owned(),
        ..Subscription::default()
    };
    let script = Script::of([
        pull().gets(messages(&["a", "b"])),
        pull().gets(nothing()),
        modify_deadline(&["a"], 0).gets(done()),
        publish().gets(published(&["1"])),
        get_subscription().gets(ok(subscription)),
        get_topic().gets(ok(Topic::default())),
        list_subscriptions().gets(ok(ListTopicSubscriptionsResponse::default())),
    ]);
    let client = Client(script.channel());
    assert_eq!(client.pull().await.unwrap(), ["a", "b"]);
    assert!(client.pull().await.unwrap().is_empty());
    client.modify_deadline("a", 0).await.unwrap();
    let mut publisher = PublisherClient::new(script.channel());
    let request = PublishRequest {
        topic: TOPIC.to_owned(),
        ..PublishRequest::default()
    };
    let published = publisher.publish(request).await.unwrap();
    assert_eq!(published.into_inner().message_ids, ["1"]);
    let topic = GetTopicRequest::default();
    publisher.get_topic(topic).await.unwrap();
    let topic = ListTopicSubscriptionsRequest::default();
    publisher.list_topic_subscriptions(topic).await.unwrap();
    let mut subscriber = SubscriberClient::new(script.channel());
    let subscription = GetSubscriptionRequest::default();
    let subscription = subscriber.get_subscription(subscription).await.unwrap();
    assert_eq!(subscription.into_inner().name, SUBSCRIPTION);
}

#[tokio::test(start_paused = true)]
async fn a_rule_answers_what_the_steps_do_not() {
    let script = Script::of([acknowledge(&["a"]).gets(refused(Code::Unavailable, ""))]);
    let script = script.then(|sent: &AcknowledgeRequest| match &*sent.ack_ids[0] {
        "a" => done(),
        _ => refused(Code::NotFound, "no such id"),
    });
    let client = Client(script.channel());
    let mut codes = vec![];
    for id in ["a", "a", "b"] {
        let answer = client.acknowledge(&[id]).await;
        codes.push(answer.map_or_else(|status| status.code(), |()| Code::Ok));
    }
    assert_eq!(codes, [Code::Unavailable, Code::Ok, Code::NotFound]);
}

#[tokio::test(start_paused = true)]
async fn every_answer_of_a_service_far_away_takes_its_time() {
    let script = Script::of([pull().gets(nothing().after(seconds(2)))]).far_away(seconds(1));
    let begun = Instant::now();
    Client(script.channel()).pull().await.unwrap();
    assert_eq!(begun.elapsed(), seconds(3));
}

#[tokio::test(start_paused = true)]
async fn a_pull_without_a_step_waits_until_it_is_given_up() {
    let script = Script::of([]);
    let client = Client(script.channel());
    assert!(timeout(seconds(600), client.pull()).await.is_err());
    quiet().await;
    let sent = script.sent::<PullRequest>().remove(0);
    assert!(sent.given_up && sent.answered.is_none());
    assert_eq!(script.under_way::<PullRequest>(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_error_says_what_became_of_each_ack_id() {
    let answer = refused(
        Code::InvalidArgument,
        "Some acknowledgement ids in the request were invalid.",
    );
    let answer = answer.naming([("a", INVALID), ("b", UNORDERED), ("c", TRANSIENT)]);
    let script = Script::of([acknowledge(&["a", "b", "c"]).gets(answer.retry_after(seconds(5)))]);
    let client = Client(script.channel());
    let status = client.acknowledge(&["a", "b", "c"]).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.reason, "EXACTLY_ONCE_ACKID_FAILURE");
    assert_eq!(info.metadata["a"], INVALID);
    assert_eq!(info.metadata["b"], UNORDERED);
    assert_eq!(info.metadata["c"], TRANSIENT);
    let retry = status.get_details_retry_info().unwrap();
    assert_eq!(retry.retry_delay, Some(seconds(5)));
}

/// The service sends as much as 4 MiB of trailers.
#[tokio::test(start_paused = true)]
async fn four_mib_of_details_arrive_where_they_may() {
    let ids = (0..15_000).map(|n| (format!("{n:0>160}"), INVALID.to_owned()));
    let answer = refused(Code::InvalidArgument, "").naming(ids);
    let script = Script::of([]).then(move |_: &AcknowledgeRequest| answer.clone());
    let endpoint = Endpoint::from_static("http://script");
    let client = Client(script.channel_as(&endpoint.clone().http2_max_header_list_size(4 << 20)));
    let status = client.acknowledge(&["a"]).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.metadata.len(), 15_000);
    // Hyper takes 16 KiB, unless it is told otherwise.
    let client = Client(script.channel_as(&endpoint));
    let status = client.acknowledge(&["a"]).await.unwrap_err();
    assert!(status.get_details_error_info().is_none(), "{status}");
}

#[tokio::test(start_paused = true)]
async fn what_the_script_does_not_expect_fails_the_test() {
    let script = Script::of([acknowledge(&["a"]).gets(done())]);
    let status = Client(script.channel()).acknowledge(&["b"]).await;
    assert_eq!(status.unwrap_err().code(), Code::Unimplemented);
    let said = end(script).unwrap();
    assert!(said.contains("ack_ids: [\\\"b\\\"]"), "{said}");

    let script = Script::of([]);
    let answer = Client(script.channel()).modify_deadline("a", 10).await;
    answer.unwrap_err();
    let said = end(script).unwrap();
    assert!(said.contains("ack_deadline_seconds: 10"), "{said}");

    let script = Script::of([]);
    let mut client = SubscriberClient::new(script.channel());
    let request = DeleteSubscriptionRequest::default();
    client.delete_subscription(request).await.unwrap_err();
    let said = end(script).unwrap();
    assert!(said.contains("Subscriber/DeleteSubscription"), "{said}");
}

#[tokio::test(start_paused = true)]
async fn a_step_that_nobody_takes_fails_the_test() {
    let said = end(Script::of([pull().gets(nothing())])).unwrap();
    assert!(said.contains("never sent"), "{said}");
    assert_eq!(end(Script::of([])), None);
}

#[tokio::test(start_paused = true)]
async fn a_connection_breaks_within_a_request() {
    let broken = broken().after(seconds(2));
    let script = Script::of([pull().gets(broken), pull().gets(messages(&["a"]))]);
    let client = Client(script.channel());
    let begun = Instant::now();
    client.pull().await.unwrap_err();
    assert_eq!(begun.elapsed(), seconds(2));
    assert_eq!(client.pull().await.unwrap(), ["a"]);
    let sent = script.sent::<PullRequest>();
    assert_eq!((sent[0].connection, sent[1].connection), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn after_a_goaway_requests_under_way_are_answered_and_others_connect_anew() {
    let goes_away = messages(&["a"]).going_away();
    let script = Script::of([
        pull().gets(messages(&["b"]).after(seconds(5))),
        pull().gets(goes_away),
        pull().gets(messages(&["c"])),
    ]);
    let client = Client(script.channel());
    let slow = tokio::spawn({
        let client = client.clone();
        async move { client.pull().await }
    });
    quiet().await;
    assert_eq!(client.pull().await.unwrap(), ["a"]);
    quiet().await;
    assert_eq!(pulled_at_last(&client).await, ["c"]);
    assert_eq!(slow.await.unwrap().unwrap(), ["b"]);
    let sent = script.sent::<PullRequest>();
    let connections: Vec<usize> = sent.iter().map(|sent| sent.connection).collect();
    assert_eq!(connections, [0, 0, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_frozen_service_answers_once_it_has_thawed() {
    let script = Script::of([pull().gets(nothing()), pull().gets(messages(&["a"]))]);
    let client = Client(script.channel());
    client.pull().await.unwrap();
    script.freeze();
    let pull = client.pull();
    tokio::pin!(pull);
    assert!(timeout(seconds(3_600), &mut pull).await.is_err());
    assert_eq!(script.sent::<PullRequest>().len(), 1);
    script.thaw();
    assert_eq!(pull.await.unwrap(), ["a"]);
}

#[tokio::test]
async fn it_can_be_reached_on_a_port() {
    let steps = [nothing(), messages(&["a"]), messages(&["b"])];
    let script = Script::of(steps.map(|answer| pull().gets(answer)));
    let client = Client::to(script.listen().await).await;
    client.pull().await.unwrap();
    script.freeze();
    let short = Duration::from_millis(100);
    assert!(timeout(short, client.pull()).await.is_err());
    script.drop_connections();
    script.thaw();
    assert_eq!(pulled_at_last(&client).await, ["a"]);
    script.go_away();
    tokio::time::sleep(short).await;
    assert_eq!(pulled_at_last(&client).await, ["b"]);
    let sent = script.sent::<PullRequest>();
    let connections: Vec<usize> = sent.iter().map(|sent| sent.connection).collect();
    assert_eq!(connections, [0, 1, 2]);
}

/// While a connection is going away, hyper cancels the first request for it that comes, unsent.
async fn pulled_at_last(client: &Client) -> Vec<String> {
    for _ in 0..10 {
        if let Ok(names) = client.pull().await {
            return names;
        }
    }
    panic!("it does not connect again");
}
