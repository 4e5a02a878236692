use arbitrary::{Result, Unstructured};
use onlyonce::driver::{Fingerprint, KeyDigest, Scope};
use onlyonce::{DedupKey, KeyPolicy};

use crate::input;

/// Dedup keys of any message: never empty, the same each time, and two digests are equal only for equal keys.
pub fn keys(data: &[u8]) {
    let mut input = Unstructured::new(data);
    // Without enough bytes there is nothing to look at.
    let _ = choose(&mut input);
    let _ = compare(&mut input);
}

fn choose(input: &mut Unstructured<'_>) -> Result<()> {
    let message = input::message(input)?;
    let attribute = input::name(input)?;
    let policies = [
        KeyPolicy::default(),
        KeyPolicy::attribute(attribute),
        KeyPolicy::default().or_content(),
    ];
    for policy in &policies {
        let key = policy.choose(&message);
        assert!(key.as_ref().is_none_or(|key| !key.as_str().is_empty()));
        assert_eq!(key, policy.choose(&message.clone()));
    }
    assert!(policies[2].choose(&message).is_some());
    Ok(())
}

fn compare(input: &mut Unstructured<'_>) -> Result<()> {
    let one: [&str; 3] = input.arbitrary()?;
    let other: [&str; 3] = input.arbitrary()?;
    assert_eq!(digest(one) == digest(other), one == other);
    let (a, b): (&[u8], &[u8]) = input.arbitrary()?;
    assert_eq!(Fingerprint::of(a) == Fingerprint::of(b), a == b);
    Ok(())
}

fn digest([consumer, queue, key]: [&str; 3]) -> KeyDigest {
    let scope = Scope::new(consumer, queue);
    KeyDigest::new(&scope, &DedupKey::new(key))
}
