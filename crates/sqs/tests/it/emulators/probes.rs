//! What an emulator does, asked by AWS's own client.

use std::fmt::Debug;
use std::time::Duration;

use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::Credentials;
use aws_sdk_sqs::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_sqs::types::{
    BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry,
    DeleteMessageBatchRequestEntry, MessageAttributeValue, MessageSystemAttributeName as System,
    MessageSystemAttributeNameForSends, MessageSystemAttributeValue, SendMessageBatchRequestEntry,
};
use onlyonce_sqs::aws_sdk_sqs;
use tokio::time::sleep;

use crate::common::{Emulator, Kind, Queue};

const ACCEPTED: &str = "accepted";
const SHORT: i32 = 1;
const LONG: i32 = 30;

struct Received {
    body: String,
    handle: String,
}

/// A queue with some messages, each in the group of its first letter.
struct Probe(Queue);

impl Probe {
    async fn on(emulator: Emulator, bodies: &[&str]) -> Self {
        let probe = Self(Queue::create(emulator, Kind::Fifo, 30).await);
        for body in bodies {
            let sent = probe
                .send()
                .message_body(*body)
                .message_group_id(&body[..1]);
            sent.message_deduplication_id(*body).send().await.unwrap();
        }
        probe
    }

    fn send(&self) -> aws_sdk_sqs::operation::send_message::builders::SendMessageFluentBuilder {
        self.0.client.send_message().queue_url(&self.0.url)
    }

    /// What can be had at once.
    async fn receive(&self, most: i32, visibility: i32) -> Vec<Received> {
        self.receive_as(None, most, visibility).await
    }

    async fn receive_as(&self, attempt: Option<&str>, most: i32, visibility: i32) -> Vec<Received> {
        let request = self.0.client.receive_message().queue_url(&self.0.url);
        let request = request
            .max_number_of_messages(most)
            .visibility_timeout(visibility)
            .set_receive_request_attempt_id(attempt.map(str::to_owned));
        let messages = request.send().await.unwrap().messages.unwrap_or_default();
        let received = messages.into_iter().map(|message| Received {
            body: message.body.unwrap(),
            handle: message.receipt_handle.unwrap(),
        });
        received.collect()
    }

    /// The only message, and its handle.
    async fn take(&self, visibility: i32) -> String {
        let mut received = self.receive(1, visibility).await;
        received.remove(0).handle
    }

    async fn delete(&self, handle: &str) -> String {
        let request = self.0.client.delete_message().queue_url(&self.0.url);
        word(&request.receipt_handle(handle).send().await)
    }

    async fn batch_delete(&self, handle: &str) -> String {
        let entry = DeleteMessageBatchRequestEntry::builder();
        let entry = entry.id("0").receipt_handle(handle).build().unwrap();
        let request = self.0.client.delete_message_batch().queue_url(&self.0.url);
        word_of_entry(request.entries(entry).send().await.unwrap().failed())
    }

    async fn change(&self, handle: &str, visibility: i32) -> String {
        let request = self.0.client.change_message_visibility();
        let request = request.queue_url(&self.0.url).receipt_handle(handle);
        word(&request.visibility_timeout(visibility).send().await)
    }

    async fn batch_change(&self, handle: &str, visibility: i32) -> String {
        let entry = ChangeMessageVisibilityBatchRequestEntry::builder();
        let entry = entry.id("0").receipt_handle(handle);
        let entry = entry.visibility_timeout(visibility).build().unwrap();
        let request = self.0.client.change_message_visibility_batch();
        let request = request.queue_url(&self.0.url).entries(entry);
        word_of_entry(request.send().await.unwrap().failed())
    }

    /// How the emulator takes a message with this attribute.
    async fn send_attribute(&self, name: &str, value: &str) -> String {
        let sent = self.send().message_body("x").message_group_id("g");
        let sent = sent.message_deduplication_id("d");
        let sent = sent.message_attributes(name, text(value));
        word(&sent.send().await)
    }
}

fn text(value: &str) -> MessageAttributeValue {
    let text = MessageAttributeValue::builder().data_type("String");
    text.string_value(value).build().unwrap()
}

fn bare(code: &str) -> &str {
    let code = code.strip_prefix("AWS.SimpleQueueService.").unwrap_or(code);
    code.strip_suffix("Exception").unwrap_or(code)
}

fn word<T, E: ProvideErrorMetadata, R: Debug>(answer: &Result<T, SdkError<E, R>>) -> String {
    match answer {
        Ok(_) => ACCEPTED.to_owned(),
        Err(error) => bare(error.code().unwrap()).to_owned(),
    }
}

fn word_of_entry(failed: &[BatchResultErrorEntry]) -> String {
    match failed {
        [] => ACCEPTED.to_owned(),
        [entry] if entry.sender_fault() => {
            format!("{}, by the sender's fault", bare(entry.code()))
        }
        [entry] => bare(entry.code()).to_owned(),
        _ => unreachable!("one entry was sent"),
    }
}

fn shown(received: &[Received]) -> String {
    let bodies: Vec<&str> = received.iter().map(|message| &*message.body).collect();
    match bodies[..] {
        [] => "nothing".to_owned(),
        _ => bodies.join(", "),
    }
}

/// Longer than a short lease, and LocalStack's look at the clock each second.
async fn short_leases_end() {
    sleep(Duration::from_millis(2_500)).await;
}

pub(crate) async fn delete_after_expiry(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &["A"]).await;
    let handle = probe.take(SHORT).await;
    short_leases_end().await;
    probe.delete(&handle).await
}

pub(crate) async fn batch_delete_after_expiry(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &["A"]).await;
    let handle = probe.take(SHORT).await;
    short_leases_end().await;
    probe.batch_delete(&handle).await
}

pub(crate) async fn extension_after_expiry(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &["A"]).await;
    let handle = probe.take(SHORT).await;
    short_leases_end().await;
    let word = probe.change(&handle, LONG).await;
    with_effect(&probe, word).await
}

pub(crate) async fn batch_extension_after_expiry(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &["A"]).await;
    let handle = probe.take(SHORT).await;
    short_leases_end().await;
    let word = probe.batch_change(&handle, LONG).await;
    with_effect(&probe, word).await
}

async fn with_effect(probe: &Probe, word: String) -> String {
    let leased = probe.receive(1, LONG).await.is_empty();
    match (&*word, leased) {
        (ACCEPTED, true) => "accepted, and leased again".to_owned(),
        (ACCEPTED, false) => "accepted, without effect".to_owned(),
        _ => word,
    }
}

/// A message that was received again: the old handle, while the new lease lasts.
async fn received_again(emulator: Emulator) -> (Probe, String) {
    let probe = Probe::on(emulator, &["A"]).await;
    let stale = probe.take(SHORT).await;
    short_leases_end().await;
    probe.take(LONG).await;
    (probe, stale)
}

pub(crate) async fn stale_delete_after_redelivery(emulator: Emulator) -> String {
    let (probe, stale) = received_again(emulator).await;
    probe.delete(&stale).await
}

pub(crate) async fn stale_batch_delete_after_redelivery(emulator: Emulator) -> String {
    let (probe, stale) = received_again(emulator).await;
    probe.batch_delete(&stale).await
}

pub(crate) async fn stale_give_back_after_redelivery(emulator: Emulator) -> String {
    let (probe, stale) = received_again(emulator).await;
    let word = probe.change(&stale, 0).await;
    with_harm(&probe, word).await
}

pub(crate) async fn stale_batch_give_back_after_redelivery(emulator: Emulator) -> String {
    let (probe, stale) = received_again(emulator).await;
    let word = probe.batch_change(&stale, 0).await;
    with_harm(&probe, word).await
}

async fn with_harm(probe: &Probe, word: String) -> String {
    match probe.receive(1, LONG).await[..] {
        [] => word,
        _ => format!("{word}, and the other's lease ended"),
    }
}

pub(crate) async fn second_delete(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &["A"]).await;
    let handle = probe.take(LONG).await;
    assert_eq!(probe.delete(&handle).await, ACCEPTED);
    probe.delete(&handle).await
}

pub(crate) async fn visibility_change_after_delete(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &["A"]).await;
    let handle = probe.take(LONG).await;
    assert_eq!(probe.delete(&handle).await, ACCEPTED);
    probe.change(&handle, LONG).await
}

pub(crate) async fn attempt_repeated(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &["A"]).await;
    let first = probe.receive_as(Some("attempt"), 1, LONG).await;
    let again = probe.receive_as(Some("attempt"), 1, LONG).await;
    match &again[..] {
        [message] if message.handle == first[0].handle => {
            "the same messages by the same handles".to_owned()
        }
        _ => shown(&again),
    }
}

/// Of A0, A1 and A2 the first two are received, and one of them is given back.
async fn given_back_alone(emulator: Emulator, which: usize) -> String {
    let probe = Probe::on(emulator, &["A0", "A1", "A2"]).await;
    let received = probe.receive(2, LONG).await;
    assert_eq!(shown(&received), "A0, A1");
    assert_eq!(probe.change(&received[which].handle, 0).await, ACCEPTED);
    shown(&probe.receive(10, LONG).await)
}

pub(crate) async fn tail_given_back_alone(emulator: Emulator) -> String {
    given_back_alone(emulator, 1).await
}

pub(crate) async fn head_given_back_alone(emulator: Emulator) -> String {
    given_back_alone(emulator, 0).await
}

pub(crate) async fn expiry_beside_another_groups_lease(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &["A", "B"]).await;
    assert_eq!(shown(&probe.receive(1, LONG).await), "A");
    assert_eq!(shown(&probe.receive(1, SHORT).await), "B");
    short_leases_end().await;
    shown(&probe.receive(10, LONG).await)
}

pub(crate) async fn groups_of_one_receive(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &["A0", "B0", "A1", "B1"]).await;
    shown(&probe.receive(2, LONG).await)
}

pub(crate) async fn wait_of_21_seconds(emulator: Emulator) -> String {
    let Probe(queue) = Probe::on(emulator, &["A"]).await;
    let request = queue.client.receive_message().queue_url(&queue.url);
    word(&request.wait_time_seconds(21).send().await)
}

pub(crate) async fn lease_beyond_12_hours(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &["A"]).await;
    let handle = probe.take(LONG).await;
    sleep(Duration::from_millis(1_100)).await;
    probe.change(&handle, 12 * 3_600).await
}

pub(crate) async fn wrong_signature(emulator: Emulator) -> String {
    let Probe(queue) = Probe::on(emulator, &[]).await;
    let credentials = Credentials::new("test", "wrong", None, None, "probe");
    let config = queue.client.config().to_builder();
    let client = Client::from_conf(config.credentials_provider(credentials).build());
    let request = client.receive_message().queue_url(&queue.url);
    word(&request.send().await)
}

pub(crate) async fn sender_fault_of_a_refused_entry(emulator: Emulator) -> String {
    let Probe(queue) = Probe::on(emulator, &[]).await;
    let entry = SendMessageBatchRequestEntry::builder();
    let entry = entry.id("0").message_body("\u{1}").message_group_id("g");
    let entry = entry.message_deduplication_id("d").build().unwrap();
    let request = queue.client.send_message_batch().queue_url(&queue.url);
    word_of_entry(request.entries(entry).send().await.unwrap().failed())
}

pub(crate) async fn eleven_attributes(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &[]).await;
    let sent = probe.send().message_body("x").message_group_id("g");
    let sent = sent.message_deduplication_id("d");
    let sent = (0..11).fold(sent, |sent, n| {
        sent.message_attributes(format!("a{n}"), text("v"))
    });
    word(&sent.send().await)
}

pub(crate) async fn empty_attribute(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &[]).await;
    probe.send_attribute("name", "").await
}

pub(crate) async fn control_character_in_an_attribute(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &[]).await;
    probe.send_attribute("name", "\u{1}").await
}

pub(crate) async fn attribute_name_with_a_blank(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &[]).await;
    probe.send_attribute("a name", "v").await
}

pub(crate) async fn attributes_beyond_1_mib(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &[]).await;
    probe.send_attribute("name", &"x".repeat(1 << 20)).await
}

pub(crate) async fn group_of_129_characters(emulator: Emulator) -> String {
    let probe = Probe::on(emulator, &[]).await;
    let sent = probe
        .send()
        .message_body("x")
        .message_group_id("g".repeat(129));
    word(&sent.message_deduplication_id("d").send().await)
}

pub(crate) async fn dedup_id_on_a_standard_queue(emulator: Emulator) -> String {
    let probe = Probe(Queue::create(emulator, Kind::Standard, 30).await);
    let sent = probe.send().message_body("x").message_deduplication_id("d");
    word(&sent.send().await)
}

pub(crate) async fn trace_of_a_batch_entry(emulator: Emulator) -> String {
    const TRACE: &str =
        "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1";
    let Probe(queue) = Probe::on(emulator, &[]).await;
    let trace = MessageSystemAttributeValue::builder().data_type("String");
    let trace = trace.string_value(TRACE).build().unwrap();
    let entry = SendMessageBatchRequestEntry::builder()
        .id("0")
        .message_body("x")
        .message_group_id("g")
        .message_deduplication_id("d")
        .message_system_attributes(MessageSystemAttributeNameForSends::AwsTraceHeader, trace);
    let request = queue.client.send_message_batch().queue_url(&queue.url);
    let sent = request.entries(entry.build().unwrap()).send().await;
    assert_eq!(sent.unwrap().failed(), []);
    let request = queue.client.receive_message().queue_url(&queue.url);
    let received = request.message_system_attribute_names(System::All).send();
    let messages = received.await.unwrap().messages.unwrap();
    let trace = messages[0]
        .attributes()
        .unwrap()
        .get(&System::AwsTraceHeader);
    let delivered = trace.is_some_and(|trace| trace == TRACE);
    if delivered { "delivered" } else { "dropped" }.to_owned()
}
