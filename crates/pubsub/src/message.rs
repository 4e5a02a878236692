//! Messages as Pub/Sub carries them (10 MB, 100 attributes), as [`PubSubSource`](crate::PubSubSource) and
//! [`PubSubSink`](crate::PubSubSink) read and write them: for those who use the same topics through another client.
//! <https://cloud.google.com/pubsub/quotas#resource_limits>

use std::collections::HashMap;
use std::time::SystemTime;

use bytes::Bytes;
use google_cloud_pubsub::model;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::PubsubMessage;
use onlyonce_core::attributes::{
    DEAD_LETTER_ATTEMPTS, DEAD_LETTER_CONSUMER, DEAD_LETTER_QUEUE, DEAD_LETTER_REASON,
};
use onlyonce_core::{Error, ErrorKind, Message};

/// Bytes of a message.
pub(crate) const MAX_BYTES: usize = 10_000_000;
const MAX_ATTRIBUTES: usize = 100;
/// Bytes of an attribute's name.
const MAX_NAME: usize = 256;
/// Bytes of an attribute's value, and of an ordering key.
const MAX_VALUE: usize = 1_024;

/// Pub/Sub has no place for a dedup id.
const DEDUP_ID: &str = "onlyonce-dedup-id";
/// Says of a message without attributes that its payload is empty: Pub/Sub takes no message of nothing.
const BODY: &str = "onlyonce-body";
const BODY_EMPTY: &str = "empty";
/// Names that begin with this are Google's own, and no publisher may use them.
const RESERVED: &str = "goog";
/// Before a reserved name, of an attribute that is carried on.
const CARRIED: &str = "onlyonce-carried-";
/// What a dead letter goes without where there is no room, in this order: the message itself comes first.
const DISPENSABLE: [&str; 4] = [
    DEAD_LETTER_CONSUMER,
    DEAD_LETTER_ATTEMPTS,
    DEAD_LETTER_QUEUE,
    DEAD_LETTER_REASON,
];

/// What Pub/Sub says of a message that it has [forwarded](https://cloud.google.com/pubsub/docs/dead-letter-topics#how_dead_letter_topics_work)
/// to a dead-letter topic by itself.
mod forwarded {
    pub(super) const COUNT: &str = "CloudPubSubDeadLetterSourceDeliveryCount";
    pub(super) const PROJECT: &str = "CloudPubSubDeadLetterSourceSubscriptionProject";
    pub(super) const SUBSCRIPTION: &str = "CloudPubSubDeadLetterSourceSubscription";
    pub(super) const WHY: &str = "CloudPubSubDeadLetterSourceDeliveryErrorMessage";
}

/// Reads what was received. Never fails, whatever was sent.
#[must_use]
pub fn read(received: PubsubMessage) -> Message {
    let mut message = Message::new(received.data);
    for (name, value) in received.attributes {
        let carried = name.strip_prefix(CARRIED);
        let carried = carried.filter(|name| name.starts_with(RESERVED));
        let name = carried.unwrap_or(&name);
        message.attributes.insert(name, value);
    }
    message.attributes.remove(BODY);
    message.dedup_id = message.attributes.remove(DEDUP_ID);
    message.group = Some(received.ordering_key).filter(|key| !key.is_empty());
    explain(&mut message);
    message.broker_id = Some(received.message_id).filter(|id| !id.is_empty());
    let published = received.publish_time;
    message.published_at = published.and_then(|time| SystemTime::try_from(time).ok());
    message
}

/// Says of what Pub/Sub itself has forwarded to a dead-letter topic the same as of our own dead letters.
fn explain(message: &mut Message) {
    let attributes = &mut message.attributes;
    let Some(count) = attributes.get(forwarded::COUNT).map(str::to_owned) else {
        return;
    };
    let text = |name| attributes.get(name).unwrap_or_default();
    let mut reason = format!("Pub/Sub gave up after {count} deliveries");
    if !text(forwarded::WHY).is_empty() {
        reason = format!("{reason}: {}", text(forwarded::WHY));
    }
    let (project, name) = (text(forwarded::PROJECT), text(forwarded::SUBSCRIPTION));
    let queue = match project {
        "" => name.to_owned(),
        _ => format!("projects/{project}/subscriptions/{name}"),
    };
    for (name, value) in [
        (DEAD_LETTER_REASON, reason),
        (DEAD_LETTER_QUEUE, queue),
        (DEAD_LETTER_ATTEMPTS, count),
    ] {
        if attributes.get(name).is_none() {
            attributes.insert(name, value);
        }
    }
}

/// What a sink publishes of a message.
///
/// # Errors
/// Pub/Sub would refuse it: its kind is [`ErrorKind::Message`], and it says what is too long, too much or not allowed.
pub fn write(message: &Message) -> Result<PubsubMessage, Error> {
    let refused = |text: String| Error::new(ErrorKind::Message, text).on_message(message);
    if let Some((name, _)) = message.attributes.iter().find(|(name, _)| is_own(name)) {
        let text = format!("the attribute `{name}` is onlyonce's own: give it another name");
        return Err(refused(text));
    }
    let written = PubsubMessage {
        data: message.body.clone(),
        attributes: attributes_of(message),
        ordering_key: message.group.clone().unwrap_or_default(),
        ..PubsubMessage::default()
    };
    let written = made_to_fit(written);
    check(&written).map_err(refused)?;
    Ok(written)
}

/// It would be read as something else.
fn is_own(name: &str) -> bool {
    let carried = name.strip_prefix(CARRIED);
    let carried = carried.is_some_and(|name| name.starts_with(RESERVED));
    carried || name == DEDUP_ID || name == BODY
}

fn attributes_of(message: &Message) -> HashMap<String, String> {
    let mut attributes = HashMap::new();
    for (name, value) in message.attributes.iter() {
        if name.starts_with(RESERVED) {
            attributes.insert(format!("{CARRIED}{name}"), value.to_owned());
        } else {
            attributes.insert(name.to_owned(), value.to_owned());
        }
    }
    if let Some(reason) = attributes.get_mut(DEAD_LETTER_REASON) {
        reason.truncate(reason.floor_char_boundary(MAX_VALUE));
    }
    if let Some(id) = &message.dedup_id {
        attributes.insert(DEDUP_ID.to_owned(), id.clone());
    }
    if message.body.is_empty() && attributes.is_empty() {
        attributes.insert(BODY.to_owned(), BODY_EMPTY.to_owned());
    }
    attributes
}

/// A dead letter has more attributes than the message that it was.
fn made_to_fit(mut letter: PubsubMessage) -> PubsubMessage {
    for name in DISPENSABLE {
        if letter.attributes.len() <= MAX_ATTRIBUTES && size(&letter) <= MAX_BYTES {
            break;
        }
        if letter.attributes.contains_key(DEAD_LETTER_REASON) {
            letter.attributes.remove(name);
        }
    }
    letter
}

pub(crate) fn size(message: &PubsubMessage) -> usize {
    let attributes: usize = message
        .attributes
        .iter()
        .map(|(k, v)| k.len() + v.len())
        .sum();
    message.data.len() + attributes + message.ordering_key.len()
}

fn check(message: &PubsubMessage) -> Result<(), String> {
    let count = message.attributes.len();
    if count > MAX_ATTRIBUTES {
        return Err(format!(
            "Pub/Sub takes {MAX_ATTRIBUTES} attributes, and it has {count}"
        ));
    }
    let bytes = size(message);
    if bytes > MAX_BYTES {
        return Err(format!(
            "Pub/Sub takes messages of {MAX_BYTES} bytes, and it has {bytes}"
        ));
    }
    if message.ordering_key.len() > MAX_VALUE {
        return Err(format!(
            "Pub/Sub takes ordering keys of {MAX_VALUE} bytes, and its group has {}",
            message.ordering_key.len()
        ));
    }
    for (name, value) in &message.attributes {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(format!(
                "Pub/Sub takes names of attributes of 1 to {MAX_NAME} bytes, and one has {}",
                name.len()
            ));
        }
        if value.len() > MAX_VALUE {
            return Err(format!(
                "Pub/Sub takes values of attributes of {MAX_VALUE} bytes, and `{}` has {}",
                name.escape_debug(),
                value.len()
            ));
        }
    }
    Ok(())
}

/// The same for Google's publisher.
pub(crate) fn of_publisher(message: PubsubMessage) -> model::Message {
    let data: Bytes = message.data;
    model::Message::new()
        .set_data(data)
        .set_attributes(message.attributes)
        .set_ordering_key(message.ordering_key)
}

#[cfg(test)]
mod tests;
