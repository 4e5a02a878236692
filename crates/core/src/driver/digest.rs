use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::DedupKey;

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
#[non_exhaustive]
pub struct Scope {
    /// The consumer's name.
    pub consumer: String,
    /// The queue's [identity](crate::driver::QueueInfo::identity).
    pub queue: String,
}

impl Scope {
    /// The scope of this consumer of this queue.
    #[must_use]
    pub fn new(consumer: impl Into<String>, queue: impl Into<String>) -> Self {
        Self {
            consumer: consumer.into(),
            queue: queue.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_separate_scope_from_key() {
        let scope = |consumer: &str, queue: &str| Scope::new(consumer, queue);
        let key = |scope: &Scope, key: &str| KeyDigest::new(scope, &DedupKey::new(key));
        assert_ne!(key(&scope("a", "bc"), "k"), key(&scope("ab", "c"), "k"));
        assert_ne!(key(&scope("a", "b"), "ck"), key(&scope("a", "bc"), "k"));
        assert_eq!(key(&scope("a", "b"), "k"), key(&scope("a", "b"), "k"));
    }
}
