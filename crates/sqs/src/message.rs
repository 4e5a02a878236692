//! Messages as SQS carries them (text, ten attributes, 1 MiB), as [`SqsSource`](crate::SqsSource) and
//! [`SqsSink`](crate::SqsSink) read and write them: for those who use the same queues through [`aws_sdk_sqs`] itself.
//! <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html>

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use aws_sdk_sqs::types::{
    self as sqs, MessageAttributeValue, MessageSystemAttributeName as System,
    MessageSystemAttributeNameForSends, MessageSystemAttributeValue, SendMessageBatchRequestEntry,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use onlyonce_core::attributes::{
    DEAD_LETTER_ATTEMPTS, DEAD_LETTER_CONSUMER, DEAD_LETTER_QUEUE, DEAD_LETTER_REASON,
};
use onlyonce_core::driver::Fingerprint;
use onlyonce_core::{Attributes, Error, ErrorKind, Message};
use sha2::{Digest as _, Sha256};

use crate::error::impossible;
use crate::foreign;

/// Bytes of a message, and of all messages of one request.
pub(crate) const MAX_BYTES: usize = 1 << 20;
const MAX_ATTRIBUTES: usize = 10;
const MAX_NAME: usize = 256;
/// Bytes of a trace that nobody doubts to be one.
const MAX_TRACE: usize = 256;
/// Characters of a group id and of a deduplication id.
const MAX_ID: usize = 128;

/// How the body is written, where it is not the payload itself.
const BODY: &str = "onlyonce-body";
const BODY_BASE64: &str = "base64";
const BODY_EMPTY: &str = "empty";
/// The dedup id, where SQS has no place for it.
const DEDUP_ID: &str = "onlyonce-dedup-id";
/// The group, where SQS cannot carry it as its id, or would take it for a tenant.
const GROUP: &str = "onlyonce-group";
/// All other attributes of a dead letter as a JSON object, where SQS cannot carry them as they are.
const ATTRIBUTES: &str = "onlyonce-attributes";
/// A standard queue's group id: a tenant of a
/// [fair queue](https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-fair-queues.html), and no
/// order.
pub(crate) const FAIR_GROUP: &str = "sqs-message-group-id";
/// [X-Ray's trace](https://docs.aws.amazon.com/xray/latest/devguide/xray-services-sqs.html), which is neither one of the
/// ten attributes nor part of the size.
const TRACE: &str = "AWSTraceHeader";
/// Before the group, and a dead letter's dedup id, of a message that has none: FIFO queues insist on both.
const NONE: &str = "onlyonce.none.";
/// What a packed dead letter still says in attributes of its own.
const UNPACKED: [&str; 7] = [
    DEAD_LETTER_REASON,
    DEAD_LETTER_QUEUE,
    DEAD_LETTER_CONSUMER,
    DEAD_LETTER_ATTEMPTS,
    BODY,
    DEDUP_ID,
    GROUP,
];
/// What a dead letter goes without where there is no room, in this order: the message itself comes first.
const DISPENSABLE: [&str; 5] = [
    DEAD_LETTER_CONSUMER,
    DEAD_LETTER_ATTEMPTS,
    DEAD_LETTER_QUEUE,
    DEAD_LETTER_REASON,
    DEDUP_ID,
];

/// What a received message says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Received {
    /// The message.
    pub message: Message,
    /// How often it was delivered, this delivery included, if SQS was asked for `ApproximateReceiveCount`.
    pub attempt: Option<u32>,
    /// Why it cannot be what was published; the body is then as SQS has it.
    pub malformed: Option<String>,
}

/// Reads what was received, with all attributes asked for, from a FIFO queue or a standard one. Never fails, whatever was sent.
pub fn read(received: &sqs::Message, fifo: bool) -> Received {
    let system = |name: System| {
        let all = received.attributes()?;
        all.get(&name).map(String::as_str)
    };
    let mut malformed = None;
    let mut attributes = read_attributes(received);
    let text = received.body().unwrap_or_default();
    let form = attributes.remove(BODY);
    let body = read_body(text, form.as_deref(), &attributes).unwrap_or_else(|reason| {
        malformed = Some(reason);
        Bytes::copy_from_slice(text.as_bytes())
    });
    if let Some(packed) = attributes.remove(ATTRIBUTES) {
        match serde_json::from_str::<HashMap<String, String>>(&packed) {
            Ok(packed) => packed.into_iter().for_each(|(name, value)| {
                attributes.insert(name, value);
            }),
            Err(_) => {
                malformed = Some(format!(
                    "its attribute `{ATTRIBUTES}` is no object of texts"
                ));
            }
        }
    }
    let carried = attributes.remove(DEDUP_ID);
    // SQS itself puts the message's id in its place in a dead-letter queue.
    let made_by_producer = |id: &&str| {
        !id.starts_with(NONE) && !is_digest_of(id, text) && received.message_id() != Some(id)
    };
    let dedup_id = carried.or_else(|| {
        let id = system(System::MessageDeduplicationId).filter(made_by_producer);
        id.map(str::to_owned)
    });
    let carried = attributes.remove(GROUP);
    let id = system(System::MessageGroupId).filter(|group| !group.starts_with(NONE));
    let mut message = Message::new(body);
    message.group = match (carried, id) {
        (Some(group), _) => Some(group),
        (None, Some(id)) if fifo => Some(id.to_owned()),
        (None, Some(id)) => {
            attributes.insert(FAIR_GROUP, id);
            None
        }
        (None, None) => None,
    };
    if let Some(trace) = system(System::AwsTraceHeader) {
        attributes.insert(TRACE, trace);
    }
    message.attributes = attributes;
    message.dedup_id = dedup_id;
    message.broker_id = received.message_id().map(str::to_owned);
    message.sender = system(System::SenderId).map(str::to_owned);
    message.published_at = system(System::SentTimestamp)
        .and_then(|millis| millis.parse().ok())
        .and_then(|millis| SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(millis)));
    Received {
        message,
        attempt: system(System::ApproximateReceiveCount).and_then(|count| count.parse().ok()),
        malformed,
    }
}

/// What a sink sends of a message to a FIFO queue or a standard one, as an entry of this id.
///
/// # Errors
/// SQS would refuse it: its kind is [`ErrorKind::Message`], and it says what is too long, too much or not allowed.
pub fn write(
    message: &Message,
    fifo: bool,
    id: impl Into<String>,
) -> Result<SendMessageBatchRequestEntry, Error> {
    Outgoing::of(message, fifo)?.entry(id.into())
}

/// Content-based deduplication makes the id of the body; where SNS does it, of what was published to the topic. That is the content's digest and not the producer's word that
/// two messages are one: payments of one amount between the same accounts would be taken for duplicates, for as long as
/// records are kept and not for five minutes.
fn is_digest_of(id: &str, body: &str) -> bool {
    let hex = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    let made_of = |text: &str| digest_of(text) == id;
    hex && (made_of(body) || foreign::notified(body).is_some_and(|inner| made_of(&inner)))
}

fn digest_of(body: &str) -> String {
    let digest = Sha256::digest(body);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Numbers are text already; bytes that are not UTF-8 become `hex:…`.
fn read_attributes(received: &sqs::Message) -> Attributes {
    let all = received.message_attributes().into_iter().flatten();
    let text = |value: &MessageAttributeValue| match (value.string_value(), value.binary_value()) {
        (Some(text), _) => text.to_owned(),
        (None, Some(bytes)) => Attributes::text_of(bytes.as_ref()),
        (None, None) => String::new(),
    };
    all.map(|(name, value)| (name.clone(), text(value)))
        .collect()
}

fn read_body(text: &str, form: Option<&str>, attributes: &Attributes) -> Result<Bytes, String> {
    match form {
        None => match foreign::offloaded_by(text, attributes) {
            Some(who) => Err(format!(
                "its payload is in S3, put there by {who}, which onlyonce does not read; \
                 send the payload itself, or a reference that the handler follows"
            )),
            None => Ok(Bytes::copy_from_slice(text.as_bytes())),
        },
        Some(BODY_EMPTY) => Ok(Bytes::new()),
        Some(BODY_BASE64) => match BASE64.decode(text) {
            Ok(bytes) => Ok(bytes.into()),
            Err(error) => Err(format!("its body is not base64: {error}")),
        },
        Some(_) => Err(format!(
            "its attribute `{BODY}` is neither base64 nor empty"
        )),
    }
}

/// A message as an entry of a request, and its size as SQS counts it.
#[derive(Debug)]
pub(crate) struct Outgoing {
    body: String,
    attributes: Vec<(String, String)>,
    group: Option<String>,
    dedup_id: Option<String>,
    trace: Option<String>,
}

impl Outgoing {
    /// # Errors
    /// SQS would refuse it.
    pub(crate) fn of(message: &Message, fifo: bool) -> Result<Self, Error> {
        let refuse = |why: String| Error::new(ErrorKind::Message, why).on_message(message);
        let mut outgoing = Self::carry(message, fifo).map_err(refuse)?;
        if is_dead_letter(message) {
            outgoing.make_fit();
        }
        outgoing.check().map_err(refuse)?;
        Ok(outgoing)
    }

    fn carry(message: &Message, fifo: bool) -> Result<Self, String> {
        let mut attributes: Vec<(String, String)> = Vec::new();
        let mut add = |name: &str, value: &str| attributes.push((name.into(), value.into()));
        let (mut fair_group, mut trace) = (None, None);
        for (name, value) in message.attributes.iter() {
            match name {
                // Of a message from elsewhere, which somebody wants to trick us with.
                BODY | DEDUP_ID | GROUP | ATTRIBUTES if is_dead_letter(message) => {
                    add(&format!("was-{name}"), value);
                }
                BODY | DEDUP_ID | GROUP | ATTRIBUTES => {
                    return Err(format!("the attribute `{name}` is onlyonce's own"));
                }
                FAIR_GROUP => fair_group = Some(value),
                TRACE if is_trace(value) => trace = Some(value.to_owned()),
                _ => add(name, value),
            }
        }
        let body = match std::str::from_utf8(&message.body) {
            Ok("") => {
                add(BODY, BODY_EMPTY);
                "-".to_owned()
            }
            Ok(text) if text.chars().all(is_allowed) => text.to_owned(),
            _ => {
                add(BODY, BODY_BASE64);
                BASE64.encode(&message.body)
            }
        };
        let given = message.dedup_id.as_deref().filter(|id| !id.is_empty());
        let dedup_id = if fifo {
            wire_dedup_id(message, given)
        } else {
            None
        };
        if let Some(id) = given
            && dedup_id.as_deref() != given
        {
            add(DEDUP_ID, id);
        }
        let group = match (message.group.as_deref(), fair_group) {
            (Some(group), _) => {
                if !fifo || !is_id(group) {
                    add(GROUP, group);
                }
                Some(as_id(group))
            }
            (None, Some(tenant)) => Some(as_id(tenant)),
            (None, None) if fifo => {
                let alone = dedup_id.clone().unwrap_or_else(|| body.clone());
                Some(format!("{NONE}{}", short(&alone)))
            }
            (None, None) => None,
        };
        Ok(Self {
            body,
            attributes,
            group,
            dedup_id,
            trace,
        })
    }

    /// There is nobody to whom a dead letter could be returned: what SQS cannot carry as it is goes as JSON, and the
    /// reason is cut if that is what it takes.
    fn make_fit(&mut self) {
        if let Some(reason) = self.reason() {
            *reason = reason.replace(|c| !is_allowed(c), " ");
        }
        let fits = |(name, value): &(String, String)| check_attribute(name, value).is_ok();
        if self.attributes.len() > MAX_ATTRIBUTES || !self.attributes.iter().all(fits) {
            let (kept, packed): (Vec<_>, Vec<_>) = std::mem::take(&mut self.attributes)
                .into_iter()
                .partition(|item| UNPACKED.contains(&&*item.0) && fits(item));
            let packed: HashMap<_, _> = packed.into_iter().collect();
            let packed = serde_json::to_string(&packed).unwrap_or_default();
            self.attributes = kept;
            self.attributes.push((ATTRIBUTES.into(), ascii(&packed)));
        }
        self.make_room();
    }

    fn make_room(&mut self) {
        // Of the reason a character is kept at least, and none is longer than this.
        const LEAST: usize = 4;
        for name in DISPENSABLE {
            let spare = self.reason().map_or(0, |r| r.len().saturating_sub(LEAST));
            if self.size() - spare > MAX_BYTES {
                self.attributes.retain(|(n, _)| n != name);
            }
        }
        let excess = self.size().saturating_sub(MAX_BYTES);
        if let Some(reason) = self.reason() {
            let room = reason.len().saturating_sub(excess);
            let end = (0..=room).rev().find(|at| reason.is_char_boundary(*at));
            reason.truncate(end.unwrap_or_default());
        }
    }

    fn reason(&mut self) -> Option<&mut String> {
        let mut attributes = self.attributes.iter_mut();
        let (_, reason) = attributes.find(|(name, _)| name == DEAD_LETTER_REASON)?;
        Some(reason)
    }

    fn check(&self) -> Result<(), String> {
        if self.attributes.len() > MAX_ATTRIBUTES {
            return Err(format!(
                "SQS takes {MAX_ATTRIBUTES} attributes, and this message needs {}: {}",
                self.attributes.len(),
                self.attributes
                    .iter()
                    .map(|(name, _)| name.as_str())
                    .collect::<Vec<_>>()
                    .join(", ")
            ));
        }
        for (name, value) in &self.attributes {
            check_attribute(name, value)?;
        }
        let size = self.size();
        if size > MAX_BYTES {
            let binary = self
                .attributes
                .iter()
                .any(|(n, v)| n == BODY && v == BODY_BASE64);
            return Err(format!(
                "SQS takes messages of {MAX_BYTES} bytes, and this one has {size}{}",
                if binary {
                    ", since bytes that are not text grow by a third"
                } else {
                    ""
                }
            ));
        }
        Ok(())
    }

    /// Body and attributes with their types, as SQS counts.
    pub(crate) fn size(&self) -> usize {
        let attribute =
            |(name, value): &(String, String)| name.len() + "String".len() + value.len();
        self.body.len() + self.attributes.iter().map(attribute).sum::<usize>()
    }

    pub(crate) fn group(&self) -> Option<&str> {
        self.group.as_deref()
    }

    pub(crate) fn entry(&self, id: String) -> Result<SendMessageBatchRequestEntry, Error> {
        let mut entry = SendMessageBatchRequestEntry::builder()
            .id(id)
            .message_body(&self.body)
            .set_message_group_id(self.group.clone())
            .set_message_deduplication_id(self.dedup_id.clone());
        for (name, value) in &self.attributes {
            let value = MessageAttributeValue::builder()
                .data_type("String")
                .string_value(value)
                .build()
                .map_err(impossible)?;
            entry = entry.message_attributes(name, value);
        }
        if let Some(trace) = &self.trace {
            let value = MessageSystemAttributeValue::builder()
                .data_type("String")
                .string_value(trace)
                .build()
                .map_err(impossible)?;
            let name = MessageSystemAttributeNameForSends::AwsTraceHeader;
            entry = entry.message_system_attributes(name, value);
        }
        entry.build().map_err(impossible)
    }
}

/// SQS refuses what does not look like one: `Root=1-5759e988-bd862e3fe1be46a994272793;Parent=…;Sampled=1`.
/// <https://docs.aws.amazon.com/xray/latest/devguide/xray-concepts.html#xray-concepts-tracingheader>
fn is_trace(text: &str) -> bool {
    let hex = |part: &str, len| part.len() == len && part.bytes().all(|b| b.is_ascii_hexdigit());
    let is_root = |field: &str| {
        let id = field
            .strip_prefix("Root=1-")
            .and_then(|id| id.split_once('-'));
        id.is_some_and(|(time, id)| hex(time, 8) && hex(id, 24))
    };
    text.len() <= MAX_TRACE
        && text.bytes().all(|b| b.is_ascii_graphic())
        && text.split(';').any(is_root)
}

/// A redrive is one, too.
fn is_dead_letter(message: &Message) -> bool {
    message.attributes.get(DEAD_LETTER_REASON).is_some()
}

/// What SQS is to deduplicate by. A dead letter and a redrive are new: sent under the id that SQS has seen within five
/// minutes they would be dropped as duplicates, and lost. As SQS does itself with its dead letters, they go under the id
/// of the message that they were.
fn wire_dedup_id(message: &Message, given: Option<&str>) -> Option<String> {
    if !is_dead_letter(message) {
        return given.map(as_id);
    }
    let once = || format!("{:032x}", fastrand::u128(..));
    let former = message.broker_id.clone().unwrap_or_else(once);
    Some(match given {
        Some(_) => as_id(&former),
        None => format!("{NONE}{}", short(&former)),
    })
}

fn as_id(text: &str) -> String {
    if is_id(text) {
        text.to_owned()
    } else {
        short(text)
    }
}

/// Letters, digits and punctuation, up to 128: what deduplication and group ids are made of. Not what would be read as none.
/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html>
fn is_id(text: &str) -> bool {
    let graphic = text.bytes().all(|b| b.is_ascii_graphic());
    (1..=MAX_ID).contains(&text.len()) && graphic && !text.starts_with(NONE)
}

fn short(text: &str) -> String {
    format!("{:?}", Fingerprint::of(text.as_bytes()))
}

/// <https://www.w3.org/TR/REC-xml/#charsets>, as SQS takes them.
fn is_allowed(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{FFFD}' | '\u{10000}'..)
}

fn check_attribute(name: &str, value: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let lower = name.to_ascii_lowercase();
    let reserved = lower.starts_with("aws.") || lower.starts_with("amazon.");
    let dots = name.starts_with('.') || name.ends_with('.') || name.contains("..");
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) || reserved || dots {
        return Err(format!(
            "SQS takes no attribute of the name `{}`: letters, digits, `_`, `-` and single dots within, up to {MAX_NAME}, not AWS. or Amazon. at the beginning",
            name.escape_debug()
        ));
    }
    if value.is_empty() {
        return Err(format!(
            "SQS takes no empty attributes, and `{name}` is empty"
        ));
    }
    match value.chars().find(|c| !is_allowed(*c)) {
        Some(c) => Err(format!(
            "SQS takes no character {c:?}, and the attribute `{name}` has one"
        )),
        None => Ok(()),
    }
}

/// JSON without the few characters that JSON allows and SQS does not.
fn ascii(json: &str) -> String {
    json.replace('\u{FFFE}', "\\ufffe")
        .replace('\u{FFFF}', "\\uffff")
}

#[cfg(test)]
mod tests;
