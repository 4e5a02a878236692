use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::SystemTime;

use bytes::Bytes;

use crate::driver::Printable;

/// Before the digits of an attribute's bytes that are not UTF-8.
const HEX: &str = "hex:";

/// Text attributes of a message, sorted by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(BTreeMap<String, String>);

impl Attributes {
    /// Bytes as the text of an attribute: as they are, or `hex:…` if they are not UTF-8.
    #[must_use]
    pub fn text_of(bytes: &[u8]) -> String {
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                let digits = bytes.iter().map(|byte| format!("{byte:02x}"));
                format!("{HEX}{}", digits.collect::<String>())
            }
        }
    }

    /// The bytes of which [`text_of`](Self::text_of) makes this text: those that `hex:…` stands for, or else its own.
    /// Owned if they are not UTF-8.
    #[must_use]
    pub fn bytes_of(text: &str) -> Cow<'_, [u8]> {
        match text.strip_prefix(HEX).and_then(unhex) {
            // Bytes that are UTF-8 would have stayed as they are: somebody wrote this text.
            Some(bytes) if std::str::from_utf8(&bytes).is_err() => Cow::Owned(bytes),
            _ => Cow::Borrowed(text.as_bytes()),
        }
    }

    /// The value of `name`, if it is there.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Sets `name` to `value` and returns what was there before.
    pub fn insert(&mut self, name: impl Into<String>, value: impl Into<String>) -> Option<String> {
        self.0.insert(name.into(), value.into())
    }

    /// Takes `name` out.
    pub fn remove(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    /// All attributes, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The bytes of pairs of lower-case digits.
fn unhex(digits: &str) -> Option<Vec<u8>> {
    let digit = |byte: &u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    let byte = |[high, low]: &[u8; 2]| Some(digit(high)? << 4 | digit(low)?);
    pairs
        .iter()
        .map(byte)
        .collect::<Option<_>>()
        .filter(|_| rest.is_empty())
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Attributes {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        Self(
            pairs
                .into_iter()
                .map(|(k, v)| (k.into(), v.into()))
                .collect(),
        )
    }
}

/// A message as every broker can carry it: what a [`Source`](crate::driver::Source) delivers and a
/// [`Sink`](crate::driver::Sink) publishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Message {
    /// The payload.
    pub body: Bytes,
    /// Text attributes.
    pub attributes: Attributes,
    /// The id that the *producer* chose and repeats when it retries: a RabbitMQ `message_id`, an SQS
    /// `MessageDeduplicationId`, a Service Bus `MessageId`. Never an id that the broker makes up per publish.
    pub dedup_id: Option<String>,
    /// Messages of one group take effect one after another: SQS message group, Pub/Sub ordering key,
    /// Service Bus session. `None`: in no order with any other.
    pub group: Option<String>,
    /// The id that the *broker* gave, for logs and errors, and by which the pipeline knows what comes again: no other message
    /// of the queue ever has it, not even after this one is gone. A sink ignores it.
    pub broker_id: Option<String>,
    /// Who sent it, where the *broker* vouches for that: SQS's `SenderId`, RabbitMQ's validated user id. A sink ignores it,
    /// so a dead letter's is whoever put it there.
    pub sender: Option<String>,
    /// When it was published, by the broker's or the producer's clock.
    pub published_at: Option<SystemTime>,
}

impl Message {
    /// A message with this payload and nothing else.
    pub fn new(body: impl Into<Bytes>) -> Self {
        Self {
            body: body.into(),
            ..Self::default()
        }
    }

    /// Sets [`dedup_id`](Self::dedup_id).
    #[must_use]
    pub fn with_dedup_id(mut self, id: impl Into<String>) -> Self {
        self.dedup_id = Some(id.into());
        self
    }

    /// Sets [`group`](Self::group).
    #[must_use]
    pub fn with_group(mut self, group: impl Into<String>) -> Self {
        self.group = Some(group.into());
        self
    }

    /// Adds one attribute.
    #[must_use]
    pub fn with_attribute(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.attributes.insert(name, value);
        self
    }

    /// Bytes of payload, attributes and ids: what bounds on bytes count.
    pub fn size(&self) -> usize {
        let text = |s: &Option<String>| s.as_ref().map_or(0, String::len);
        let attributes: usize = self.attributes.iter().map(|(k, v)| k.len() + v.len()).sum();
        self.body.len() + attributes + text(&self.dedup_id) + text(&self.group)
    }

    /// What people call this message: its dedup id, else the broker's id.
    pub fn label(&self) -> Printable<&str> {
        let id = self.dedup_id.as_deref().or(self.broker_id.as_deref());
        Printable(id.unwrap_or("(no id)"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_from_their_text() {
        for bytes in [&[0xff, 0x00, 0x1a][..], &[0x80], b"plain", b""] {
            let text = Attributes::text_of(bytes);
            assert_eq!(&*Attributes::bytes_of(&text), bytes, "{text}");
        }
    }

    #[test]
    fn a_text_that_only_looks_like_bytes_stays_a_text() {
        // Readable bytes, an odd digit, upper case, no digits at all.
        for text in [
            "hex:6869",
            "hex:fff",
            "hex:FF",
            "hex:",
            "hex:zz",
            "hex:f\u{fc}",
            "ff",
        ] {
            assert_eq!(&*Attributes::bytes_of(text), text.as_bytes(), "{text}");
        }
        for text in ["hex:ff", "hex:6869", "hex:FF"] {
            assert_eq!(Attributes::text_of(&Attributes::bytes_of(text)), text);
        }
    }
}
