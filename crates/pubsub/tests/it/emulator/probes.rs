//! What the emulator does, asked by the stubs alone.

use std::collections::HashMap;
use std::time::Duration;

use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::*;
use tokio::time::sleep;
use tonic_types::StatusExt as _;

use crate::common::*;

const ACCEPTED: &str = "accepted";

struct Received {
    name: String,
    id: String,
    attempt: i32,
}

/// A subscription with some messages, on ordering keys each on that of its first letter.
struct Probe(Queue);

impl Probe {
    async fn on(like: Subscription, names: &[&str]) -> Self {
        let ordered = like.enable_message_ordering;
        let probe = Self(Queue::create(like).await);
        for name in names {
            let key = if ordered { &name[..1] } else { "" };
            probe.0.publish(vec![message(key, name)]).await.unwrap();
        }
        probe
    }

    /// What can be had at once.
    async fn pull(&self, most: i32) -> Vec<Received> {
        let received = self.0.pull(most).await.unwrap().into_iter();
        received.map(Received::from).collect()
    }

    /// What can be had at once, as a word.
    async fn next(&self) -> String {
        shown(&self.pull(10).await)
    }

    async fn ack(&self, received: &[&Received]) -> String {
        word(self.0.acknowledge(&ids(received)).await, received)
    }

    async fn lease(&self, received: &[&Received], seconds: i32) -> String {
        let answer = self.0.modify_deadline(&ids(received), seconds).await;
        word(answer, received)
    }

    async fn give_back(&self, received: &[&Received]) -> String {
        self.lease(received, 0).await
    }

    /// What becomes of a message like this.
    async fn send(message: PubsubMessage) -> String {
        let probe = Self::on(plain(), &[]).await;
        word(probe.0.publish(vec![message]).await, &[])
    }

    async fn send_attribute(name: &str, value: &str) -> String {
        Self::send_attributes([(name.to_owned(), value.to_owned())].into()).await
    }

    async fn send_attributes(attributes: HashMap<String, String>) -> String {
        let attributed = PubsubMessage {
            attributes,
            ..message("", "x")
        };
        Self::send(attributed).await
    }
}

impl From<ReceivedMessage> for Received {
    fn from(received: ReceivedMessage) -> Self {
        let message = received.message.unwrap();
        Self {
            name: String::from_utf8(message.data.to_vec()).unwrap(),
            id: received.ack_id,
            attempt: received.delivery_attempt,
        }
    }
}

fn ids<'a>(received: &[&'a Received]) -> Vec<&'a str> {
    received.iter().map(|received| &*received.id).collect()
}

/// An id that the emulator never gave.
fn made_up() -> Received {
    Received {
        name: "made up".to_owned(),
        id: "no-such-id".to_owned(),
        attempt: 0,
    }
}

/// What the details say of each id, or else the code.
fn word<T>(answer: Answer<T>, received: &[&Received]) -> String {
    let Err(status) = answer else {
        return ACCEPTED.to_owned();
    };
    let Some(info) = status.get_details_error_info() else {
        return format!("{:?}", status.code());
    };
    let words = received.iter().filter_map(|received| {
        let what = info.metadata.get(&received.id)?;
        Some(format!("{} {what}", received.name))
    });
    words.collect::<Vec<_>>().join(", ")
}

fn shown(received: &[Received]) -> String {
    let names: Vec<&str> = received.iter().map(|received| &*received.name).collect();
    match names[..] {
        [] => "nothing".to_owned(),
        _ => names.join(", "),
    }
}

fn short(like: Subscription) -> Subscription {
    Subscription {
        ack_deadline_seconds: 1,
        ..like
    }
}

/// Longer than a short lease.
async fn short_leases_end() {
    sleep(Duration::from_millis(2_000)).await;
}

pub(crate) async fn ack_after_the_deadline() -> String {
    let probe = Probe::on(short(exactly_once()), &["A"]).await;
    let held = probe.pull(1).await;
    short_leases_end().await;
    probe.ack(&[&held[0]]).await
}

pub(crate) async fn extension_after_the_deadline() -> String {
    let probe = Probe::on(short(exactly_once()), &["A"]).await;
    let held = probe.pull(1).await;
    short_leases_end().await;
    let word = probe.lease(&[&held[0]], 30).await;
    match probe.pull(1).await[..] {
        [] => format!("{word}, and leased again"),
        _ => word,
    }
}

pub(crate) async fn give_back_after_the_deadline() -> String {
    let probe = Probe::on(short(exactly_once()), &["A"]).await;
    let held = probe.pull(1).await;
    short_leases_end().await;
    probe.give_back(&[&held[0]]).await
}

/// The second of three is made up; what is left after the acks is given back.
pub(crate) async fn acks_beside_a_made_up_id() -> String {
    let probe = Probe::on(exactly_once(), &["A", "B"]).await;
    let held = probe.pull(10).await;
    let word = probe.ack(&[&held[0], &made_up(), &held[1]]).await;
    for held in &held {
        probe.give_back(&[held]).await;
    }
    format!("{word}; then comes {}", probe.next().await)
}

pub(crate) async fn give_backs_beside_a_made_up_id() -> String {
    let probe = Probe::on(exactly_once(), &["A", "B"]).await;
    let held = probe.pull(10).await;
    let word = probe.give_back(&[&held[0], &made_up(), &held[1]]).await;
    format!("{word}; then comes {}", probe.next().await)
}

pub(crate) async fn ack_of_a_made_up_id_on_ordering_keys() -> String {
    let probe = Probe::on(ordered(), &[]).await;
    probe.ack(&[&made_up()]).await
}

pub(crate) async fn acks_of_700_kb() -> String {
    let probe = Probe::on(plain(), &[]).await;
    let ids: Vec<String> = (0..7_000)
        .map(|n| format!("{}:{n:0>40}", probe.0.subscription))
        .collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    assert!(ids.concat().len() > 600_000);
    word(probe.0.acknowledge(&ids).await, &[])
}

pub(crate) async fn acks_out_of_order_in_one_request() -> String {
    let probe = Probe::on(exactly_once_and_ordered(), &["A0", "A1"]).await;
    let held = probe.pull(10).await;
    probe.ack(&[&held[1], &held[0]]).await
}

pub(crate) async fn acks_behind_a_head_given_back() -> String {
    let probe = Probe::on(ordered(), &["A0", "A1", "A2"]).await;
    let held = probe.pull(10).await;
    assert_eq!(probe.give_back(&[&held[0]]).await, ACCEPTED);
    let word = probe.ack(&[&held[1], &held[2]]).await;
    format!("{word}; then comes {}", probe.next().await)
}

pub(crate) async fn give_back_behind_the_head() -> String {
    let probe = Probe::on(ordered(), &["A0", "A1", "A2"]).await;
    let held = probe.pull(10).await;
    assert_eq!(probe.give_back(&[&held[1]]).await, ACCEPTED);
    assert_eq!(probe.ack(&[&held[0], &held[2]]).await, ACCEPTED);
    probe.next().await
}

pub(crate) async fn give_backs_last_first() -> String {
    let probe = Probe::on(ordered(), &["A0", "A1", "A2"]).await;
    let held = probe.pull(10).await;
    let last_first: Vec<&Received> = held.iter().rev().collect();
    assert_eq!(probe.give_back(&last_first).await, ACCEPTED);
    probe.next().await
}

pub(crate) async fn head_given_back_with_a_retry_policy() -> String {
    let like = Subscription {
        retry_policy: retries_between(1, 1),
        ack_deadline_seconds: 3,
        ..ordered()
    };
    let probe = Probe::on(like, &["A0", "A1", "A2"]).await;
    let held = probe.pull(10).await;
    assert_eq!(probe.give_back(&[&held[0]]).await, ACCEPTED);
    sleep(Duration::from_secs(5)).await;
    probe.next().await
}

pub(crate) async fn lease_of_601_seconds() -> String {
    let probe = Probe::on(plain(), &["A"]).await;
    let held = probe.pull(1).await;
    probe.lease(&[&held[0]], 601).await
}

pub(crate) async fn deadline_of_9_seconds() -> String {
    let like = Subscription {
        ack_deadline_seconds: 9,
        ..plain()
    };
    word(Queue::try_create(like).await, &[])
}

/// On an ordering key, after the last attempt.
pub(crate) async fn dead_letters_on_ordering_keys() -> String {
    let like = Subscription {
        dead_letter_policy: dead_letters_after(5),
        ..ordered()
    };
    let probe = Probe::on(like, &["A"]).await;
    for _ in 0..5 {
        let held = probe.pull(1).await;
        assert_eq!(probe.give_back(&[&held[0]]).await, ACCEPTED);
    }
    let word = word(probe.0.pull(1).await, &[]);
    let letters = probe.0.dead_letters().await.into_iter();
    let letters: Vec<Received> = letters.map(Received::from).collect();
    format!("{word}; dead letters: {}", shown(&letters))
}

pub(crate) async fn attempts_with_a_retry_policy() -> String {
    let like = Subscription {
        retry_policy: retries_between(0, 10),
        ..plain()
    };
    let probe = Probe::on(like, &["A"]).await;
    probe.pull(1).await[0].attempt.to_string()
}

async fn pull_of(like: Subscription) -> String {
    let probe = Probe::on(like, &["A"]).await;
    word(probe.0.pull(1).await, &[])
}

pub(crate) async fn pull_of_a_push_subscription() -> String {
    let push = PushConfig {
        push_endpoint: "http://127.0.0.1:1/".to_owned(),
        ..PushConfig::default()
    };
    let push_config = Some(push);
    pull_of(Subscription {
        push_config,
        ..plain()
    })
    .await
}

pub(crate) async fn pull_of_an_export_subscription() -> String {
    let table = BigQueryConfig {
        table: "project.dataset.table".to_owned(),
        ..BigQueryConfig::default()
    };
    let bigquery_config = Some(table);
    pull_of(Subscription {
        bigquery_config,
        ..plain()
    })
    .await
}

pub(crate) async fn detaching() -> String {
    let probe = Probe::on(plain(), &[]).await;
    let request = DetachSubscriptionRequest {
        subscription: probe.0.subscription.clone(),
    };
    word(probe.0.publisher().detach_subscription(request).await, &[])
}

pub(crate) async fn seek_on_ordering_keys() -> String {
    let like = Subscription {
        retain_acked_messages: true,
        ..ordered()
    };
    let probe = Probe::on(like, &["A0", "A1"]).await;
    let held = probe.pull(10).await;
    assert_eq!(probe.ack(&[&held[0], &held[1]]).await, ACCEPTED);
    let long_ago = prost_types::Timestamp {
        seconds: 1_577_836_800,
        nanos: 0,
    };
    let request = SeekRequest {
        subscription: probe.0.subscription.clone(),
        target: Some(seek_request::Target::Time(long_ago)),
    };
    let word = word(probe.0.subscriber().seek(request).await, &[]);
    format!("{word}; then comes {}", probe.next().await)
}

pub(crate) async fn attribute_key_of_257_bytes() -> String {
    Probe::send_attribute(&"k".repeat(257), "v").await
}

pub(crate) async fn attribute_value_of_1025_bytes() -> String {
    Probe::send_attribute("k", &"v".repeat(1_025)).await
}

pub(crate) async fn attribute_of_google() -> String {
    Probe::send_attribute("googly", "v").await
}

pub(crate) async fn a_hundred_and_one_attributes() -> String {
    let attributes = (0..101).map(|n| (n.to_string(), "v".to_owned()));
    Probe::send_attributes(attributes.collect()).await
}

pub(crate) async fn ordering_key_of_1025_bytes() -> String {
    Probe::send(message(&"k".repeat(1_025), "x")).await
}

pub(crate) async fn message_beyond_10_mb() -> String {
    Probe::send(message("", &"x".repeat(10_000_001))).await
}

pub(crate) async fn two_ordering_keys_in_one_request() -> String {
    let probe = Probe::on(ordered(), &[]).await;
    let messages = vec![message("a", "A"), message("b", "B")];
    word(probe.0.publish(messages).await, &[])
}

pub(super) async fn give_back_before_what_was_not_delivered() -> String {
    let probe = Probe::on(exactly_once_and_ordered(), &["A0", "A1", "A2"]).await;
    let held = probe.pull(2).await;
    probe.give_back(&[&held[0], &held[1]]).await;
    probe.next().await
}

pub(super) async fn ack_without_a_key_out_of_order() -> String {
    let probe = Probe::on(exactly_once_and_ordered(), &[]).await;
    let both = vec![message("", "A"), message("", "B")];
    probe.0.publish(both).await.unwrap();
    let held = probe.pull(2).await;
    probe.ack(&[&held[1]]).await
}
