use arbitrary::{Result, Unstructured};
use onlyonce::attributes::{DEAD_LETTER_ATTEMPTS, DEAD_LETTER_QUEUE, DEAD_LETTER_REASON};
use onlyonce::pubsub::message;
use onlyonce::pubsub::v1::PubsubMessage;
use onlyonce::{ErrorKind, Message};

use crate::input;

/// What this crate writes itself.
const OWN: [&str; 3] = [
    "onlyonce-body",
    "onlyonce-carried-goog",
    "onlyonce-dedup-id",
];
/// A name that no publisher may use is carried under a longer one.
const LONGEST_RESERVED: usize = 200;

/// A message as another client may have sent it: it is read, and as a dead letter it can be sent again and is the same.
pub fn pubsub_received(data: &[u8]) {
    let Ok(received) = received(&mut Unstructured::new(data)) else {
        return;
    };
    let mut letter = message::read(received);
    letter.attributes.insert(DEAD_LETTER_REASON, "no good");
    let written = message::write(&letter).expect("a dead letter can be sent");
    assert_lawful(&written);
    assert_same(message::read(written), letter);
}

/// Any message: what is sent comes back the same, or is refused for a reason that Pub/Sub has.
pub fn pubsub_messages(data: &[u8]) {
    let Ok(message) = input::message(&mut Unstructured::new(data)) else {
        return;
    };
    match message::write(&message) {
        Ok(written) => {
            assert_lawful(&written);
            assert_same(message::read(written), message);
        }
        Err(error) => {
            let kind = (error.kind(), error.is_retryable());
            assert_eq!(kind, (ErrorKind::Message, false), "{error}");
            let mut names = message.attributes.iter();
            let odd = |(name, value): (&str, &str)| {
                let own = OWN.contains(&name) || name.starts_with(OWN[1]);
                own || name.is_empty() || name.len() > LONGEST_RESERVED || value.len() > 1_024
            };
            let ids = [message.group.as_deref(), message.dedup_id.as_deref()];
            let long = ids.iter().flatten().any(|id| id.len() > 1_024);
            assert!(names.any(odd) || long, "{error}");
        }
    }
}

/// <https://cloud.google.com/pubsub/quotas#resource_limits>
fn assert_lawful(message: &PubsubMessage) {
    assert!(message.attributes.len() <= 100);
    assert!(!message.data.is_empty() || !message.attributes.is_empty());
    assert!(message.ordering_key.len() <= 1_024);
    for (name, value) in &message.attributes {
        let named = (1..=256).contains(&name.len()) && !name.starts_with("goog");
        assert!(named && value.len() <= 1_024, "{name}: {value}");
    }
}

fn assert_same(back: Message, mut message: Message) {
    // Of what Pub/Sub has forwarded its own words are read as ours.
    for name in [DEAD_LETTER_REASON, DEAD_LETTER_QUEUE, DEAD_LETTER_ATTEMPTS] {
        if let (None, Some(told)) = (message.attributes.get(name), back.attributes.get(name)) {
            message.attributes.insert(name, told);
        }
    }
    let reason = message
        .attributes
        .get(DEAD_LETTER_REASON)
        .unwrap_or_default();
    let cut = reason[..reason.floor_char_boundary(1_024)].to_owned();
    if cut.len() < reason.len() {
        message.attributes.insert(DEAD_LETTER_REASON, cut);
    }
    message.group = message.group.filter(|group| !group.is_empty());
    let said = |message: Message| {
        let Message {
            body,
            attributes,
            group,
            dedup_id,
            ..
        } = message;
        (body, attributes, group, dedup_id)
    };
    assert_eq!(said(back), said(message));
}

fn received(input: &mut Unstructured<'_>) -> Result<PubsubMessage> {
    let mut received = PubsubMessage {
        data: input.arbitrary::<Vec<u8>>()?.into(),
        message_id: input.arbitrary()?,
        ordering_key: short(input.arbitrary()?, 1_024),
        ..PubsubMessage::default()
    };
    if input.arbitrary()? {
        let time =
            std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(input.arbitrary()?));
        received.publish_time = time.map(Into::into);
    }
    for _ in 0..input.int_in_range(0..=12)? {
        let name = short(input::name(input)?, LONGEST_RESERVED);
        // What the service delivers has names.
        let name = if name.is_empty() {
            "name".to_owned()
        } else {
            name
        };
        received
            .attributes
            .insert(name, short(input.arbitrary()?, 1_024));
    }
    Ok(received)
}

/// As the service takes it.
fn short(mut text: String, most: usize) -> String {
    text.truncate(text.floor_char_boundary(most));
    text
}
