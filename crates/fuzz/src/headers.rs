use arbitrary::{Result, Unstructured};
use bytes::Bytes;
use onlyonce::attributes::DEAD_LETTER_REASON;
use onlyonce::rabbitmq::headers::{self, Counts};
use onlyonce::rabbitmq::lapin::BasicProperties;
use onlyonce::rabbitmq::lapin::types::{FieldTable, ShortString, parsing::parse_field_table};
use onlyonce::{ErrorKind, Message};

use crate::input;

/// More would allow tables so deep that the client's parser overflows the stack of a test.
const MOST: usize = 1_024;
const GROUP: &str = "x-group";
const COUNTS: [&str; 3] = ["x-onlyonce-attempt", "x-delivery-count", "x-acquired-count"];

/// Properties and a header table as another client may send them: whatever they are, the message can be published
/// again (as a dead letter), and then is the same.
pub fn rabbitmq_headers(data: &[u8]) {
    let (Some((&head, rest)), true) = (data.split_first(), data.len() <= MOST) else {
        return;
    };
    let (head, table) = rest.split_at(rest.len().min(head.into()));
    let mut input = Unstructured::new(head);
    let Ok(mut properties) = properties(&mut input) else {
        return;
    };
    if let Some(headers) = parse(table) {
        properties = properties.with_headers(headers);
    }
    let redelivered = input.arbitrary().unwrap_or(false);
    for group in [None, Some(GROUP)] {
        let body = Bytes::copy_from_slice(head);
        let (mut message, malformed) = headers::read(&properties, body.clone(), group);
        assert_eq!(message.body, body);
        let known = |why: String| why.contains(GROUP) || why.contains("nested more than");
        assert!(malformed.is_none_or(known));
        let (attempt, _) = headers::attempt(&properties, "orders", redelivered, Counts::None);
        assert!(attempt > u32::from(redelivered));
        for counts in [Counts::Deliveries, Counts::Acquisitions] {
            assert!(headers::attempt(&properties, "orders", true, counts).0 > 0);
        }
        message.attributes.insert(DEAD_LETTER_REASON, "no good");
        let written = headers::write(&message, group).expect("what was read can be written");
        let (again, malformed) = headers::read(&written, body, group);
        assert_eq!(malformed, None);
        assert_eq!(anonymous(again), anonymous(message));
    }
}

/// Without the user that published it: whoever publishes it again is another one, and cannot claim to be the first.
pub(crate) fn anonymous(mut message: Message) -> Message {
    for name in ["amqp-user-id", "header-amqp-user-id"] {
        message.attributes.remove(name);
    }
    message.sender = None;
    message
}

fn properties(input: &mut Unstructured<'_>) -> Result<BasicProperties> {
    type Set = fn(BasicProperties, ShortString) -> BasicProperties;
    const TEXTS: [Set; 6] = [
        BasicProperties::with_message_id,
        BasicProperties::with_content_type,
        BasicProperties::with_correlation_id,
        BasicProperties::with_type,
        BasicProperties::with_expiration,
        BasicProperties::with_user_id,
    ];
    let mut properties = BasicProperties::default();
    for set in TEXTS {
        if let Some(text) = input.arbitrary::<Option<&str>>()?
            && let Ok(text) = ShortString::try_new(text)
        {
            properties = set(properties, text);
        }
    }
    if let Some(priority) = input.arbitrary()? {
        properties = properties.with_priority(priority);
    }
    if let Some(timestamp) = input.arbitrary()? {
        properties = properties.with_timestamp(timestamp);
    }
    Ok(properties)
}

/// The table of these bytes, without the length that stands before it.
fn parse(table: &[u8]) -> Option<FieldTable> {
    let length = u32::try_from(table.len()).ok()?;
    let bytes = [&length.to_be_bytes(), table].concat();
    let (_, table) = parse_field_table(&bytes[..]).ok()?;
    Some(table)
}

/// Any message: what is published comes back the same, or is refused for a reason that AMQP has.
pub fn rabbitmq_messages(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let (Ok(message), Ok(grouped)) = (input::message(&mut input), input.arbitrary::<bool>()) else {
        return;
    };
    let group = grouped.then_some(GROUP);
    match headers::write(&message, group) {
        Ok(properties) => {
            let (read, malformed) = headers::read(&properties, message.body.clone(), group);
            assert_eq!(malformed, None);
            // What a dead letter cannot carry as it is goes under another name.
            if is_dead(&message) {
                assert_eq!(read.dedup_id, message.dedup_id);
            } else {
                assert_eq!(plain(read, group), plain(message, group));
            }
        }
        Err(error) => {
            assert!(!is_dead(&message), "a dead letter was refused: {error}");
            assert_eq!(
                (error.kind(), error.is_retryable()),
                (ErrorKind::Message, false)
            );
            let mut texts = message.attributes.iter();
            let long = |text: &str| text.len() > 255;
            let refused = texts.any(|(name, value)| {
                let property =
                    name.starts_with("amqp-") && (long(value) || name == "amqp-priority");
                long(name) || property || ["CC", "BCC", "onlyonce-dedup-id"].contains(&name)
            });
            assert!(
                refused || message.dedup_id.as_deref().is_some_and(long),
                "{error}"
            );
        }
    }
}

fn is_dead(message: &Message) -> bool {
    message.attributes.get(DEAD_LETTER_REASON).is_some()
}

/// Without what AMQP has no place for: the group where no header carries it, and the broker's own counts. An attribute of
/// the group header's name is the group, where there is no other; a priority is a number, however it was written.
fn plain(message: Message, group: Option<&str>) -> Message {
    let mut message = anonymous(message);
    match group {
        Some(header) => {
            let attribute = message.attributes.remove(header);
            message.group = message.group.or(attribute);
        }
        None => message.group = None,
    }
    let priority = message.attributes.get("amqp-priority");
    if let Some(number) = priority.and_then(|text| text.parse::<u8>().ok()) {
        let number = number.to_string();
        message.attributes.insert("amqp-priority", number);
    }
    for count in COUNTS {
        message.attributes.remove(count);
    }
    message
}
