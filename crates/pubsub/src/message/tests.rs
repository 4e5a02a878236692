use std::time::{Duration, UNIX_EPOCH};

use onlyonce_core::attributes::IDEMPOTENCY_KEY;

use super::*;

/// What comes out when this was published.
fn through(message: &Message) -> Message {
    read(write(message).unwrap())
}

fn refused(message: &Message) -> String {
    let error = write(message).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Message);
    error.to_string()
}

fn letter(message: Message) -> Message {
    message
        .with_attribute(DEAD_LETTER_REASON, "cannot be applied")
        .with_attribute(DEAD_LETTER_QUEUE, "orders")
        .with_attribute(DEAD_LETTER_CONSUMER, "shipping")
        .with_attribute(DEAD_LETTER_ATTEMPTS, "5")
}

fn with_attributes(count: usize) -> Message {
    let attributes = (0..count).map(|n| (format!("name-{n}"), "value"));
    let mut message = Message::new("x");
    message.attributes = attributes.collect();
    message
}

#[test]
fn what_was_published_comes_out() {
    let sent = Message::new(vec![0, 255, 10])
        .with_dedup_id("id-1")
        .with_group("group-1")
        .with_attribute(IDEMPOTENCY_KEY, "other")
        .with_attribute("ünï", "漢字 🦀");
    assert_eq!(through(&sent), sent);
    let empty = Message::new("");
    assert_eq!(through(&empty), empty, "without anything");
    let other = Message::new("").with_attribute(format!("{CARRIED}x"), "y");
    assert_eq!(through(&other), other);
}

#[test]
fn what_the_service_says_of_a_message_is_read() {
    let received = PubsubMessage {
        message_id: "17".into(),
        publish_time: Some(
            UNIX_EPOCH
                .checked_add(Duration::from_millis(1_500))
                .unwrap()
                .into(),
        ),
        ..PubsubMessage::default()
    };
    let got = read(received);
    assert_eq!(got.broker_id.as_deref(), Some("17"));
    assert_eq!(
        got.published_at,
        Some(UNIX_EPOCH + Duration::from_millis(1_500))
    );
    assert_eq!(read(PubsubMessage::default()).broker_id, None);
}

#[test]
fn attributes_that_no_publisher_may_set_are_carried() {
    let sent = Message::new("{}").with_attribute("googclient_schemaencoding", "JSON");
    let names: Vec<_> = write(&sent).unwrap().attributes.into_keys().collect();
    assert!(
        names.iter().all(|name| !name.starts_with("goog")),
        "{names:?}"
    );
    assert_eq!(through(&sent), sent);
}

#[test]
fn limits_are_told_before_anything_is_sent() {
    let long = |n: usize| "x".repeat(n);
    for (message, expected) in [
        (Message::new("").with_attribute(BODY, "x"), "onlyonce's own"),
        (
            Message::new("").with_attribute(DEDUP_ID, "x"),
            "onlyonce's own",
        ),
        (
            Message::new("").with_attribute(format!("{CARRIED}goog"), "x"),
            "onlyonce's own",
        ),
        (with_attributes(101), "100 attributes, and it has 101"),
        (
            Message::new("").with_attribute(long(257), "v"),
            "1 to 256 bytes",
        ),
        (Message::new("").with_attribute("", "v"), "1 to 256 bytes"),
        (
            Message::new("").with_attribute("a", long(1_025)),
            "`a` has 1025",
        ),
        (Message::new("").with_dedup_id(long(1_025)), "1025"),
        (
            Message::new("").with_group(long(1_025)),
            "ordering keys of 1024",
        ),
        (Message::new(vec![0; MAX_BYTES + 1]), "10000001"),
    ] {
        let error = refused(&message);
        assert!(error.contains(expected), "{error}");
    }
    for message in [
        with_attributes(100),
        Message::new("").with_attribute(long(256), long(1_024)),
        Message::new("").with_group(long(1_024)),
        Message::new(vec![0; MAX_BYTES]),
    ] {
        write(&message).unwrap();
    }
}

#[test]
fn a_dead_letter_fits_where_its_message_did() {
    let full = letter(with_attributes(100));
    let got = through(&full);
    assert_eq!(got.attributes.iter().count(), 100);
    assert_eq!(got.attributes.get("name-99"), Some("value"));

    let some = through(&letter(with_attributes(97)));
    assert_eq!(
        some.attributes.get(DEAD_LETTER_REASON),
        Some("cannot be applied")
    );
    assert_eq!(some.attributes.get(DEAD_LETTER_CONSUMER), None);

    let large = through(&letter(Message::new(vec![0; MAX_BYTES])));
    assert_eq!(large.body.len(), MAX_BYTES);

    let long = Message::new("x").with_attribute(DEAD_LETTER_REASON, "é".repeat(1_000));
    let reason = through(&long).attributes.remove(DEAD_LETTER_REASON);
    assert_eq!(reason.unwrap().len(), MAX_VALUE);
}

#[test]
fn what_the_service_forwarded_has_its_reason() {
    let mut message = PubsubMessage::default();
    for (name, value) in [
        (forwarded::COUNT, "7"),
        (forwarded::PROJECT, "shop"),
        (forwarded::SUBSCRIPTION, "orders"),
    ] {
        message.attributes.insert(name.into(), value.into());
    }
    let got = read(message.clone()).attributes;
    let reason = "Pub/Sub gave up after 7 deliveries";
    assert_eq!(got.get(DEAD_LETTER_REASON), Some(reason));
    assert_eq!(
        got.get(DEAD_LETTER_QUEUE),
        Some("projects/shop/subscriptions/orders")
    );
    assert_eq!(got.get(DEAD_LETTER_ATTEMPTS), Some("7"));

    let why = (forwarded::WHY.to_owned(), "no space".to_owned());
    message.attributes.extend([why]);
    let got = read(message.clone()).attributes;
    assert_eq!(
        got.get(DEAD_LETTER_REASON),
        Some(&*format!("{reason}: no space"))
    );

    let ours = (DEAD_LETTER_REASON.to_owned(), "ours".to_owned());
    message.attributes.extend([ours]);
    let got = read(message).attributes;
    assert_eq!(
        got.get(DEAD_LETTER_REASON),
        Some("ours"),
        "the first reason stays"
    );
}
