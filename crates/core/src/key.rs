use std::fmt;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::Message;

/// The attribute that carries a dedup key where the broker has no place of its own for one.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// 128 bits of SHA-256 over scope and dedup key: what stores keep, whatever the key's length.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyDigest(pub [u8; 16]);

/// 128 bits of SHA-256 over the payload: tells a duplicate from another message that uses the same key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 16]);

fn digest(parts: &[&[u8]]) -> [u8; 16] {
    let mut hash = Sha256::new();
    for part in parts {
        // The length first, so that ("a", "bc") and ("ab", "c") differ.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let full = hash.finalize();
    let mut short = [0; 16];
    short.copy_from_slice(&full[..16]);
    short
}

impl KeyDigest {
    /// The digest of `key` within `scope`.
    #[must_use]
    pub fn new(scope: &Scope, key: &DedupKey) -> Self {
        Self(digest(&[
            scope.consumer.as_bytes(),
            scope.queue.as_bytes(),
            key.as_str().as_bytes(),
        ]))
    }
}

impl Fingerprint {
    /// The fingerprint of a payload.
    #[must_use]
    pub fn of(body: &[u8]) -> Self {
        Self(digest(&[body]))
    }
}

fn hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(f, &self.0)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(f, &self.0)
    }
}

/// Within what a dedup key is unique: two consumers of one queue, or one consumer of two queues, do not share keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The consumer's name.
    pub consumer: String,
    /// The queue's [identity](crate::QueueInfo::identity).
    pub queue: String,
}

/// What identifies a message through redeliveries and producer's retries; stable, so it can be handed to a downstream
/// service as its idempotency key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DedupKey(Arc<str>);

impl DedupKey {
    /// A key of this text.
    pub fn new(key: impl Into<Arc<str>>) -> Self {
        Self(key.into())
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DedupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

type Chooser = Arc<dyn Fn(&Message) -> Option<String> + Send + Sync>;

/// How a message's [`DedupKey`] is chosen. A message for which no rule gives a key is dead-lettered: never run under a
/// made-up key, which would make every redelivery new.
#[derive(Clone)]
pub struct KeyPolicy {
    rules: Vec<Rule>,
}

#[derive(Clone)]
enum Rule {
    DedupId,
    Attribute(String),
    Content,
    Custom(Chooser),
}

impl Default for KeyPolicy {
    /// The attribute [`IDEMPOTENCY_KEY`], else the producer's id ([`Message::dedup_id`]).
    ///
    /// In this order, because the attribute is there for nothing else and stays what it is, while some brokers replace
    /// the id: SQS does when it moves a message to a dead-letter queue.
    ///
    /// The content is *not* a key by default: two payments of one amount between the same two accounts can be two
    /// payments. Add it with [`or_content`](Self::or_content) where equal payloads mean the same thing.
    fn default() -> Self {
        Self::attribute(IDEMPOTENCY_KEY).or_dedup_id()
    }
}

impl KeyPolicy {
    /// [`Message::dedup_id`] and nothing else.
    #[must_use]
    pub fn dedup_id() -> Self {
        Self {
            rules: vec![Rule::DedupId],
        }
    }

    /// One attribute and nothing else.
    pub fn attribute(name: impl Into<String>) -> Self {
        Self {
            rules: vec![Rule::Attribute(name.into())],
        }
    }

    /// What `choose` makes of the message: a field of its payload, say. Where producers do not trust each other it can
    /// demand that a key is its sender's own, by [`Message::sender`].
    ///
    /// If it panics, the message is dead-lettered with that reason.
    pub fn custom(choose: impl Fn(&Message) -> Option<String> + Send + Sync + 'static) -> Self {
        Self {
            rules: vec![Rule::Custom(Arc::new(choose))],
        }
    }

    /// Where there is none so far, [`Message::dedup_id`].
    #[must_use]
    pub fn or_dedup_id(mut self) -> Self {
        self.rules.push(Rule::DedupId);
        self
    }

    /// Where there is none so far, this attribute.
    #[must_use]
    pub fn or_attribute(mut self, name: impl Into<String>) -> Self {
        self.rules.push(Rule::Attribute(name.into()));
        self
    }

    /// Where there is none so far, a digest of the payload: equal payloads are one message.
    #[must_use]
    pub fn or_content(mut self) -> Self {
        self.rules.push(Rule::Content);
        self
    }

    /// The key of `message`, if it has one. An empty key is none.
    pub fn choose(&self, message: &Message) -> Option<DedupKey> {
        self.rules
            .iter()
            .filter_map(|rule| rule.choose(message))
            .find(|key| !key.is_empty())
            .map(DedupKey::new)
    }
}

impl Rule {
    fn choose(&self, message: &Message) -> Option<String> {
        match self {
            Self::DedupId => message.dedup_id.clone(),
            Self::Attribute(name) => message.attributes.get(name).map(str::to_owned),
            Self::Content => Some(format!("{:?}", Fingerprint::of(&message.body))),
            Self::Custom(choose) => choose(message),
        }
    }
}

impl fmt::Debug for KeyPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.rules.iter().map(|rule| match rule {
            Rule::DedupId => "dedup_id".to_owned(),
            Rule::Attribute(name) => format!("attribute {name}"),
            Rule::Content => "content".to_owned(),
            Rule::Custom(_) => "custom".to_owned(),
        });
        f.debug_list().entries(names).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_tried_in_order_and_empty_keys_are_none() {
        let policy = KeyPolicy::default();
        let plain = Message::new("x");
        assert_eq!(policy.choose(&plain), None);
        let attributed = plain.clone().with_attribute(IDEMPOTENCY_KEY, "a");
        assert_eq!(policy.choose(&attributed), Some(DedupKey::new("a")));
        let both = attributed.clone().with_dedup_id("d");
        assert_eq!(policy.choose(&both), Some(DedupKey::new("a")));
        let empty = plain
            .clone()
            .with_attribute(IDEMPOTENCY_KEY, "")
            .with_dedup_id("d");
        assert_eq!(policy.choose(&empty), Some(DedupKey::new("d")));
        assert!(policy.or_content().choose(&plain).is_some());
    }

    #[test]
    fn digests_separate_scope_from_key() {
        let scope = |consumer: &str, queue: &str| Scope {
            consumer: consumer.into(),
            queue: queue.into(),
        };
        let key = |scope: &Scope, key: &str| KeyDigest::new(scope, &DedupKey::new(key));
        assert_ne!(key(&scope("a", "bc"), "k"), key(&scope("ab", "c"), "k"));
        assert_ne!(key(&scope("a", "b"), "ck"), key(&scope("a", "bc"), "k"));
        assert_eq!(key(&scope("a", "b"), "k"), key(&scope("a", "b"), "k"));
    }
}
