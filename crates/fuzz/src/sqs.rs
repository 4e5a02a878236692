use std::collections::HashMap;

use arbitrary::{Result, Unstructured};
use onlyonce::attributes::DEAD_LETTER_REASON;
use onlyonce::sqs::aws_sdk_sqs::primitives::Blob;
use onlyonce::sqs::aws_sdk_sqs::types::{
    Message as Delivered, MessageAttributeValue, MessageSystemAttributeName as System,
    SendMessageBatchRequestEntry as Entry,
};
use onlyonce::sqs::message::{self, Received};
use onlyonce::{ErrorKind, Message};

use crate::input;

const BOTH: [bool; 2] = [false, true];
/// What this crate writes itself; of a message from elsewhere it is kept under another name, or is what it says.
const OWN: [&str; 4] = [
    "onlyonce-attributes",
    "onlyonce-body",
    "onlyonce-dedup-id",
    "onlyonce-group",
];
const TENANT: &str = "sqs-message-group-id";

/// A message as another client may have sent it: it is read, and as a dead letter it can be sent again and is the same.
pub fn sqs_received(data: &[u8]) {
    let Ok(delivered) = delivered(&mut Unstructured::new(data)) else {
        return;
    };
    for fifo in BOTH {
        let Received {
            message: mut letter,
            malformed,
            ..
        } = message::read(&delivered, fifo);
        letter.attributes.insert(DEAD_LETTER_REASON, "no good");
        let entry = message::write(&letter, fifo, "0").expect("a dead letter can be sent");
        assert_lawful(&entry);
        if malformed.is_none() && letter.attributes.iter().all(|(name, _)| is_plain(name)) {
            assert_same(through(&entry, fifo), letter);
        }
    }
}

/// Any message: what is sent comes back the same, or is refused for a reason that SQS has.
pub fn sqs_messages(data: &[u8]) {
    let Ok(message) = input::message(&mut Unstructured::new(data)) else {
        return;
    };
    for fifo in BOTH {
        match message::write(&message, fifo, "0") {
            Ok(entry) => {
                assert_lawful(&entry);
                if message.attributes.iter().all(|(name, _)| is_plain(name)) {
                    assert_same(through(&entry, fifo), message.clone());
                }
            }
            Err(error) => {
                let kind = (error.kind(), error.is_retryable());
                assert_eq!(kind, (ErrorKind::Message, false), "{error}");
                assert!(
                    message.attributes.get(DEAD_LETTER_REASON).is_none(),
                    "{error}"
                );
                let refused = message.attributes.iter().any(|(name, value)| {
                    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
                    let word = !name.is_empty() && name.chars().all(plain);
                    let own = OWN.contains(&name) || name.starts_with("AWS.");
                    let dots = name.starts_with('.') || name.ends_with('.') || name.contains("..");
                    !word || own || dots || value.is_empty() || !value.chars().all(is_allowed)
                });
                let group = message.group.as_deref();
                let carried = [group, message.dedup_id.as_deref()];
                let odd = carried
                    .iter()
                    .flatten()
                    .any(|id| !id.chars().all(is_allowed));
                assert!(refused || odd || group == Some(""), "{error}");
            }
        }
    }
}

/// Not one that means something else on the other kind of queue.
fn is_plain(name: &str) -> bool {
    !OWN.contains(&name) && name != TENANT
}

fn is_allowed(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{FFFD}' | '\u{10000}'..)
}

/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessageBatchRequestEntry.html>
fn assert_lawful(entry: &Entry) {
    let text = |text: &str| !text.is_empty() && text.chars().all(is_allowed);
    assert!(text(entry.message_body()), "{entry:?}");
    let attributes = entry.message_attributes().into_iter().flatten();
    assert!(attributes.clone().count() <= 10, "{entry:?}");
    for (name, value) in attributes {
        assert!(
            !name.is_empty() && text(value.string_value().unwrap_or_default()),
            "{entry:?}"
        );
    }
    let ids = [entry.message_group_id(), entry.message_deduplication_id()];
    for id in ids.into_iter().flatten() {
        let short = (1..=128).contains(&id.len());
        assert!(
            short && id.bytes().all(|b| b.is_ascii_graphic()),
            "{entry:?}"
        );
    }
}

/// The entry as SQS delivers it.
fn through(entry: &Entry, fifo: bool) -> Received {
    let mut system = HashMap::new();
    let mut add = |name, value: Option<&str>| value.map(|v| system.insert(name, v.to_owned()));
    add(System::MessageGroupId, entry.message_group_id());
    add(
        System::MessageDeduplicationId,
        entry.message_deduplication_id(),
    );
    let traces = entry.message_system_attributes().into_iter().flatten();
    for (_, trace) in traces {
        add(System::AwsTraceHeader, trace.string_value());
    }
    let delivered = Delivered::builder()
        .message_id("another")
        .body(entry.message_body())
        .set_attributes(Some(system))
        .set_message_attributes(entry.message_attributes().cloned());
    message::read(&delivered.build(), fifo)
}

fn assert_same(back: Received, message: Message) {
    if back
        .malformed
        .as_deref()
        .is_some_and(|why| why.contains("S3"))
    {
        return;
    }
    assert_eq!(back.malformed, None);
    let said = |mut message: Message| {
        // Of the reason what SQS has no characters for is blank.
        if let Some(reason) = message.attributes.remove(DEAD_LETTER_REASON) {
            let reason = reason.replace(|c| !is_allowed(c), " ");
            message.attributes.insert(DEAD_LETTER_REASON, reason);
        }
        let dedup_id = message.dedup_id.filter(|id| !id.is_empty());
        (message.body, message.attributes, message.group, dedup_id)
    };
    assert_eq!(said(back.message), said(message));
}

fn delivered(input: &mut Unstructured<'_>) -> Result<Delivered> {
    let mut delivered = Delivered::builder()
        .set_message_id(input.arbitrary()?)
        .set_body(input.arbitrary()?);
    for name in [
        System::ApproximateReceiveCount,
        System::AwsTraceHeader,
        System::MessageDeduplicationId,
        System::MessageGroupId,
        System::SentTimestamp,
    ] {
        if let Some(value) = input.arbitrary::<Option<String>>()? {
            delivered = delivered.attributes(name, value);
        }
    }
    for _ in 0..input.int_in_range(0..=12)? {
        let value = MessageAttributeValue::builder();
        let value = match input.arbitrary()? {
            true => value
                .data_type("String")
                .set_string_value(input.arbitrary()?),
            false => value
                .data_type("Binary")
                .binary_value(Blob::new(input.arbitrary::<Vec<u8>>()?)),
        };
        if let Ok(value) = value.build() {
            delivered = delivered.message_attributes(input::name(input)?, value);
        }
    }
    Ok(delivered.build())
}
