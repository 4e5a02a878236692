use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use crate::Message;
use crate::attributes::IDEMPOTENCY_KEY;
use crate::driver::Fingerprint;

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
    fn choose<'m>(&self, message: &'m Message) -> Option<Cow<'m, str>> {
        match self {
            Self::DedupId => message.dedup_id.as_deref().map(Cow::from),
            Self::Attribute(name) => message.attributes.get(name).map(Cow::from),
            Self::Content => Some(format!("{:?}", Fingerprint::of(&message.body)).into()),
            Self::Custom(choose) => choose(message).map(Cow::from),
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
}
