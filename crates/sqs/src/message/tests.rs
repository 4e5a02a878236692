//! Through SQS and back: what is sent keeps SQS's rules, and what is read is what was published.

use aws_sdk_sqs::primitives::Blob;

use super::*;

const BOTH: [bool; 2] = [false, true];

fn text(text: &str) -> MessageAttributeValue {
    attribute("String", text)
}

fn attribute(kind: &str, text: &str) -> MessageAttributeValue {
    let value = MessageAttributeValue::builder().data_type(kind);
    value.string_value(text).build().unwrap()
}

fn binary(bytes: &[u8]) -> MessageAttributeValue {
    let value = MessageAttributeValue::builder().data_type("Binary");
    value.binary_value(Blob::new(bytes)).build().unwrap()
}

/// A message as SQS delivers it.
fn delivered(body: &str, attributes: &[(&str, MessageAttributeValue)]) -> sqs::Message {
    let message = sqs::Message::builder().message_id("m-1").body(body);
    let attributes = attributes.iter().cloned();
    attributes
        .fold(message, |m, (name, value)| {
            m.message_attributes(name, value)
        })
        .build()
}

/// What SQS documents of an entry:
/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessageBatchRequestEntry.html>
fn assert_lawful(entry: &SendMessageBatchRequestEntry, fifo: bool) {
    let allowed = |text: &str| {
        let plain =
            |c: u32| matches!(c, 0x9 | 0xA | 0xD | 0x20..=0xD7FF | 0xE000..=0xFFFD | 0x1_0000..);
        text.chars().all(|c| plain(u32::from(c)))
    };
    let body = entry.message_body();
    assert!(!body.is_empty() && allowed(body), "{body:?}");
    let empty = HashMap::new();
    let attributes = entry.message_attributes().unwrap_or(&empty);
    assert!(attributes.len() <= 10, "{:?}", attributes.keys());
    let mut size = body.len();
    for (name, value) in attributes {
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        assert!(
            (1..=256).contains(&name.len()) && name.chars().all(word),
            "{name:?}"
        );
        assert!(
            !name.starts_with('.') && !name.ends_with('.') && !name.contains(".."),
            "{name:?}"
        );
        let lower = name.to_lowercase();
        assert!(
            !lower.starts_with("aws.") && !lower.starts_with("amazon."),
            "{name:?}"
        );
        let value = value.string_value().unwrap();
        assert!(!value.is_empty() && allowed(value), "{name}: {value:?}");
        size += name.len() + "String".len() + value.len();
    }
    assert!(size <= 1_048_576, "{size} bytes");
    let id = |id: &str| (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    assert!(
        entry.message_group_id().is_none_or(id),
        "{:?}",
        entry.message_group_id()
    );
    assert!(entry.message_deduplication_id().is_none_or(id));
    match fifo {
        true => assert!(entry.message_group_id().is_some()),
        // The queue's type does not have them.
        false => assert_eq!(entry.message_deduplication_id(), None),
    }
}

fn trace_of(entry: &SendMessageBatchRequestEntry) -> Option<String> {
    let system = entry.message_system_attributes()?;
    let trace = system.get(&MessageSystemAttributeNameForSends::AwsTraceHeader)?;
    trace.string_value().map(str::to_owned)
}

/// What a receiver reads of a message that is sent, over a queue with content-based deduplication if it is a FIFO queue.
fn through(message: &Message, fifo: bool) -> Received {
    let entry = Outgoing::of(message, fifo)
        .unwrap()
        .entry("0".into())
        .unwrap();
    assert_lawful(&entry, fifo);
    let body = entry.message_body();
    let by_content = || digest_of(body);
    let dedup_id = entry.message_deduplication_id().map(str::to_owned);
    let dedup_id = fifo.then(|| dedup_id.unwrap_or_else(by_content));
    let received = sqs::Message::builder()
        .message_id("another")
        .body(body)
        .set_message_attributes(entry.message_attributes().cloned());
    let system = [
        (System::MessageDeduplicationId, dedup_id),
        (
            System::MessageGroupId,
            entry.message_group_id().map(str::to_owned),
        ),
        (System::AwsTraceHeader, trace_of(&entry)),
    ];
    let present = system
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)));
    let received = present.fold(received, |m, (name, value)| m.attributes(name, value));
    read(&received.build(), fifo)
}

/// Reads back as it was published, on both kinds of queue.
fn assert_survives(message: &Message) {
    for fifo in BOTH {
        let back = through(message, fifo);
        assert_eq!(back.malformed, None);
        assert_same(&back.message, message);
    }
}

fn assert_same(back: &Message, message: &Message) {
    assert_eq!(back.body, message.body);
    assert_eq!(back.attributes, message.attributes);
    assert_eq!(back.group, message.group);
    assert_eq!(back.dedup_id, message.dedup_id);
}

/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-configure-dead-letter-queue-redrive.html>
#[test]
fn the_id_that_sqs_gives_a_dead_letter_is_nobodys_word() {
    for (id, expected) in [("m-1", None), ("m-2", Some("m-2"))] {
        let mut dead = delivered("x", &[]);
        dead.attributes = Some([(System::MessageDeduplicationId, id.to_owned())].into());
        assert_eq!(read(&dead, true).message.dedup_id.as_deref(), expected);
    }
}

#[test]
fn a_trace_goes_on_as_sqs_carries_traces() {
    let trace = "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1";
    let mut message = Message::new("x").with_attribute(TRACE, trace);
    for at in 0..10 {
        message = message.with_attribute(format!("a{at}"), "1");
    }
    assert_survives(&message);
    let entry = |message: &Message| {
        let outgoing = Outgoing::of(message, false).unwrap();
        outgoing.entry("0".into()).unwrap()
    };
    assert_eq!(trace_of(&entry(&message)).as_deref(), Some(trace));
    // What SQS would refuse as a trace is an attribute like any other.
    for other in [
        "",
        "x",
        "Root=1-5759e988-bd86",
        "Root=1-5759e988-bd862e3fe1be46a994272793; é",
    ] {
        let other = Message::new("x").with_attribute(TRACE, format!("{other}."));
        assert_eq!(trace_of(&entry(&other)), None);
        assert_survives(&other);
    }
}

fn refusal(message: &Message, fifo: bool) -> String {
    Outgoing::of(message, fifo).unwrap_err().to_string()
}

fn letter(message: Message, reason: &str) -> Message {
    message
        .with_attribute(DEAD_LETTER_REASON, reason)
        .with_attribute(DEAD_LETTER_QUEUE, "orders.fifo")
}

#[test]
fn every_body_survives() {
    for body in [
        &b"hello"[..],
        b"",
        b"-",
        b" ",
        b" \t\r\n ",
        "\u{7f}\u{85}\u{d7ff}\u{e000}\u{fffd}\u{10000}\u{10ffff}".as_bytes(),
        "\u{fffe}".as_bytes(),
        "\u{ffff}".as_bytes(),
        b"\0",
        b"a\x0bb",
        b"\xff\xfe\x00",
        b"<&>\"'",
        b"{\"json\": [1]}",
    ] {
        assert_survives(&Message::new(body));
    }
}

#[test]
fn every_id_and_group_survives() {
    let longest = "x".repeat(128);
    let too_long = "x".repeat(129);
    let ours = format!("{NONE}x");
    for id in [
        "a", "!~", "a b", "ä", "日本", "a\nb", &longest, &too_long, &ours,
    ] {
        let message = Message::new("x");
        assert_survives(&message.clone().with_dedup_id(id));
        assert_survives(&message.clone().with_group(id));
        assert_survives(
            &message
                .with_dedup_id(id)
                .with_group(id)
                .with_attribute("k", "v"),
        );
    }
}

/// Two ids that are cut must not become one: the second message would be dropped.
#[test]
fn ids_that_are_carried_otherwise_stay_different() {
    let id = |end: char| format!("{}{end}", "x".repeat(200));
    let wire = |end| {
        let message = Message::new("x").with_dedup_id(id(end)).with_group(id(end));
        let outgoing = Outgoing::of(&message, true).unwrap();
        (outgoing.dedup_id.unwrap(), outgoing.group.unwrap())
    };
    let (first, again, other) = (wire('a'), wire('a'), wire('b'));
    assert_eq!(first, again);
    assert_ne!(first.0, other.0);
    assert_ne!(first.1, other.1);
}

/// A FIFO queue insists on a group, and messages without one must not wait for each other.
#[test]
fn messages_without_a_group_are_alone() {
    let group = |message: Message| Outgoing::of(&message, true).unwrap().group.unwrap();
    let first = group(Message::new("a").with_dedup_id("1"));
    assert_eq!(first, group(Message::new("a").with_dedup_id("1")));
    assert_ne!(first, group(Message::new("a").with_dedup_id("2")));
    assert_ne!(group(Message::new("a")), group(Message::new("b")));
}

/// Content-based deduplication is not the producer's word that two messages are one.
#[test]
fn a_digest_of_the_body_is_no_id() {
    let with_id = |id: &str| {
        let message = sqs::Message::builder().body("hello");
        let message = message.attributes(System::MessageDeduplicationId, id);
        read(&message.build(), true).message.dedup_id
    };
    let digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
    assert_eq!(with_id(digest), None);
    let other = digest.replace('2', "3");
    assert_eq!(with_id(&other), Some(other));
    assert_eq!(with_id("order-17").as_deref(), Some("order-17"));
}

/// No attribute of a message can say it.
#[test]
fn the_sender_is_whom_sqs_names() {
    let by = |sender: Option<&str>| {
        let message = sqs::Message::builder().body("x");
        let message = message.message_attributes("SenderId", text("AIDAMALLORY"));
        let message = match sender {
            Some(sender) => message.attributes(System::SenderId, sender),
            None => message,
        };
        read(&message.build(), false).message.sender
    };
    assert_eq!(
        by(Some("AROAALICE:worker")).as_deref(),
        Some("AROAALICE:worker")
    );
    assert_eq!(by(None), None);
}

/// As SNS wraps what was published to a topic.
fn notification(message: &str, at: &str) -> String {
    serde_json::json!({
        "Type": "Notification",
        "MessageId": at,
        "SequenceNumber": "10000000000000003000",
        "TopicArn": "arn:aws:sns:eu-central-1:123456789012:orders.fifo",
        "Message": message,
        "Timestamp": at,
        "UnsubscribeURL": "https://sns.eu-central-1.amazonaws.com/",
    })
    .to_string()
}

/// A FIFO topic makes its id of what was published, and its notifications of equal payloads differ: they would be
/// conflicts.
#[test]
fn a_topics_digest_of_what_was_published_is_no_id() {
    let dedup_id = |body: &str, id: &str| {
        let message = sqs::Message::builder().body(body);
        let message = message.attributes(System::MessageDeduplicationId, id);
        read(&message.build(), true).message.dedup_id
    };
    let digest = digest_of("hello");
    for at in ["2026-01-01T10:00:00.000Z", "2026-01-01T11:00:00.000Z"] {
        assert_eq!(dedup_id(&notification("hello", at), &digest), None);
    }
    let chosen = digest_of("order-17");
    let kept = [
        (notification("hello", "now"), "order-17"),
        (notification("hello", "now"), &chosen),
        // It only looks like one.
        (
            notification("hello", "now").replace("Notification", "Other"),
            &digest,
        ),
        (
            notification("hello", "now").replace("TopicArn", "Topic"),
            &digest,
        ),
        (r#"{"Message":"hello"}"#.into(), &digest),
    ];
    for (body, id) in kept {
        assert_eq!(dedup_id(&body, id).as_deref(), Some(id), "{body}");
    }
}

/// On a standard queue a group id is a tenant's, and orders nothing.
#[test]
fn tenants_of_fair_queues_survive() {
    let message = Message::new("x").with_attribute(FAIR_GROUP, "tenant-7");
    let back = through(&message, false).message;
    assert_same(&back, &message);
    let sent = Outgoing::of(&message, false).unwrap();
    assert_eq!(sent.group.as_deref(), Some("tenant-7"));
}

#[test]
fn attributes_of_every_type_are_read() {
    let message = delivered(
        "x",
        &[
            ("text", text("ä")),
            ("custom", attribute("String.uuid", "5fea7756")),
            ("number", attribute("Number.float", "1.5")),
            ("utf8", binary("ä".as_bytes())),
            ("bytes", binary(b"\xff\x00")),
            ("none", binary(b"")),
        ],
    );
    let read = read(&message, false).message.attributes;
    let expected = [
        ("text", "ä"),
        ("custom", "5fea7756"),
        ("number", "1.5"),
        ("utf8", "ä"),
        ("bytes", "hex:ff00"),
        ("none", ""),
    ];
    assert_eq!(read, expected.into_iter().collect());
}

/// As the extended clients of AWS for Java and Python write them.
#[test]
fn payloads_in_s3_are_malformed() {
    let pointer = r#"{"s3BucketName":"bucket","s3Key":"key"}"#;
    for class in [
        "software.amazon.payloadoffloading.PayloadS3Pointer",
        "com.amazon.sqs.javamessaging.MessageS3Pointer",
    ] {
        for body in [
            format!(r#"["{class}",{pointer}]"#),
            format!("[ \"{class}\", {pointer}]"),
        ] {
            let size = attribute("Number", "300000");
            let received = read(&delivered(&body, &[("ExtendedPayloadSize", size)]), true);
            let reason = received.malformed.unwrap();
            assert!(
                reason.contains("S3") && reason.contains("extended client"),
                "{reason}"
            );
            assert_eq!(received.message.body, body);
        }
    }
    for body in [r#"["com.example.Pointer",{}]"#, pointer, "[", ""] {
        assert_eq!(read(&delivered(body, &[]), true).malformed, None, "{body}");
    }
}

#[test]
fn references_of_other_clients_are_malformed_and_named() {
    let reason = |body: &str, attributes: &[(&str, MessageAttributeValue)]| {
        read(&delivered(body, attributes), false).malformed
    };
    let npm = r#"{"S3Payload":{"Id":"1","Bucket":"b","Key":"1.json","Location":"https://b"}}"#;
    let wrapped = r#"{"Headers":{"NServiceBus.MessageId":"1"},"Body":null,"S3BodyKey":"prefix/1"}"#;
    let pointer = r#"["software.amazon.payloadoffloading.PayloadS3Pointer",{}]"#;
    let native = [
        ("S3BodyKey", text("prefix/1")),
        ("MessageTypeFullName", text("Sales.Order")),
    ];
    let replaced = [("S3MessageBodyKey", text("(bucket)key"))];
    for (body, attributes, who) in [
        (npm.to_owned(), &[][..], "sns-sqs-big-payload"),
        (notification(npm, "now"), &[], "sns-sqs-big-payload"),
        (notification(pointer, "now"), &[], "the SQS extended client"),
        (wrapped.to_owned(), &[], "NServiceBus"),
        ("-".to_owned(), &native, "NServiceBus"),
        ("x".to_owned(), &replaced, "sqs-extended-client"),
    ] {
        let reason = reason(&body, attributes).unwrap_or_default();
        assert!(
            reason.contains("S3") && reason.contains(who),
            "{body}: {reason}"
        );
    }
}

#[test]
fn payloads_that_only_resemble_a_reference_are_payloads() {
    for body in [
        r#"{"S3Payload":"text"}"#,
        r#"{"S3Payload":{"Key":""}}"#,
        r#"{"S3Payload":{"Key":"k"},"order":1}"#,
        r#"{"S3BodyKey":"k"}"#,
        r#"{"Headers":{},"Body":"x","S3BodyKey":""}"#,
        r#"{"a":["S3Payload"]"#,
    ] {
        assert_eq!(read(&delivered(body, &[]), false).malformed, None, "{body}");
    }
    let key = [("S3BodyKey", text("k"))];
    assert_eq!(read(&delivered("x", &key), false).malformed, None);
}

#[test]
fn what_nobody_wrote_like_this_is_malformed() {
    for (name, value, hint) in [
        (BODY, "gzip", "neither base64 nor empty"),
        (BODY, BODY_BASE64, "not base64"),
        (ATTRIBUTES, "[1]", "no object of texts"),
        (ATTRIBUTES, r#"{"a":1}"#, "no object of texts"),
    ] {
        let received = read(&delivered("%%%", &[(name, text(value))]), true);
        let reason = received.malformed.unwrap();
        assert!(reason.contains(hint), "{reason}");
        assert_eq!(received.message.body, "%%%");
        // It can be dead-lettered all the same.
        let back = through(&letter(received.message, &reason), true);
        assert_eq!(back.malformed, None);
        assert_eq!(back.message.body, "%%%");
    }
}

/// There is nobody to whom a dead letter could be returned.
#[test]
fn every_dead_letter_survives() {
    let message = || Message::new("x").with_dedup_id("d").with_group("g");
    let many = (0..12).fold(message(), |m, n| m.with_attribute(format!("a{n}"), "v"));
    let ours = (0..12).fold(message(), |m, n| {
        m.with_attribute(format!("onlyonce-a{n}"), "v")
    });
    for message in [
        message(),
        many,
        ours,
        message().with_attribute("empty", ""),
        message().with_attribute("", "no name"),
        message().with_attribute("odd name/ä", "v"),
        message()
            .with_attribute("aws.x", "v")
            .with_attribute("n".repeat(300), "v"),
        message().with_attribute("control", "\0\u{1}\u{b}\u{1f}\u{fffe}\u{ffff}\"\\"),
        message().with_dedup_id("\u{1}").with_group("\u{2}"),
        Message::new(vec![0xff; 3]),
        Message::new(""),
    ] {
        assert_survives(&letter(message.clone(), "poison"));
        assert_survives(&letter(message, ""));
    }
}

#[test]
fn a_reason_goes_without_what_sqs_does_not_take() {
    let reason = "caused by:\n\u{1b}[31mä\0\u{ffff}";
    for fifo in BOTH {
        let back = through(&letter(Message::new("x"), reason), fifo).message;
        let reason = back.attributes.get(DEAD_LETTER_REASON);
        assert_eq!(reason, Some("caused by:\n [31mä  "));
    }
}

/// The message comes before what is said about it.
#[test]
fn a_dead_letter_of_any_size_is_made_to_fit() {
    let letter = |body: usize| {
        letter(Message::new("x".repeat(body)), &"ä".repeat(500))
            .with_attribute(DEAD_LETTER_CONSUMER, "billing")
            .with_attribute(DEAD_LETTER_ATTEMPTS, "3")
            .with_group("g")
            .with_dedup_id("d")
    };
    let former = |mut message: Message| {
        message.broker_id = Some("5fea7756-0ea4-451a-a703-a558b933e274".into());
        message
    };
    for (left, reason, dedup_id) in [
        (2_000, 1_000..=1_000, true),
        (500, 300..=400, true),
        (100, 4..=100, true),
        (40, 0..=0, true),
        (0, 0..=0, false),
    ] {
        let message = former(letter(MAX_BYTES - left));
        let back = through(&message, true).message;
        assert_eq!(back.body, message.body);
        assert_eq!(back.group, message.group);
        let kept = back.attributes.get(DEAD_LETTER_REASON).unwrap_or_default();
        assert!(reason.contains(&kept.len()), "{left} left: {}", kept.len());
        assert!(kept.chars().all(|c| c == 'ä'), "{kept}");
        assert_eq!(back.dedup_id == message.dedup_id, dedup_id, "{left} left");
    }
    assert!(refusal(&Message::new("x".repeat(MAX_BYTES + 1)), true).contains("1048577"));
}

/// Within five minutes it may be dead-lettered, redriven and dead-lettered again: each is new. But the same letter, sent
/// again after a lost answer, is not.
/// Somebody who sends such names by way of another broker can neither keep a letter from its queue nor pass for us.
#[test]
fn a_dead_letter_with_names_of_ours_is_taken_and_they_mean_nothing() {
    let mut message = letter(Message::new("poison").with_dedup_id("its own"), "why");
    for name in [BODY, DEDUP_ID, GROUP, ATTRIBUTES] {
        message.attributes.insert(name, "forged");
    }
    for fifo in BOTH {
        let Received {
            message: back,
            malformed,
            ..
        } = through(&message, fifo);
        assert_eq!(malformed, None);
        assert_eq!(back.body, "poison");
        assert_eq!(back.dedup_id.as_deref(), Some("its own"));
        assert_eq!(back.group, None);
        assert_eq!(back.attributes.get("was-onlyonce-body"), Some("forged"));
    }
}

#[test]
fn a_dead_letter_has_another_id_on_the_wire() {
    let mut message = letter(Message::new("x").with_dedup_id("d"), "poison");
    let wire = |message: &Message| Outgoing::of(message, true).unwrap().dedup_id.unwrap();
    message.broker_id = Some("m-1".into());
    assert_eq!(wire(&message), "m-1");
    assert_eq!(wire(&message), wire(&message));
    message.broker_id = Some("m-2".into());
    assert_eq!(wire(&message), "m-2");
    message.broker_id = None;
    assert_ne!(wire(&message), wire(&message));
    // A message that has no id gets none by this.
    message.dedup_id = None;
    assert_survives(&message);
    message.broker_id = Some("m-1".into());
    assert_survives(&message);
    assert_eq!(wire(&message), wire(&message));
}

/// Bytes, characters and names of which some are not for SQS.
struct Odd(fastrand::Rng);

impl Odd {
    fn text(&mut self, most: usize) -> String {
        let odd = [
            '\0', '\u{1}', '\t', '\n', ' ', '"', '\\', '.', 'ä', '\u{fffe}', '\u{ffff}', '😀',
        ];
        let count = self.0.usize(..=most);
        let oddity = if self.0.u8(..4) == 0 { 2 } else { 200 };
        let mut char = || match self.0.u8(..oddity) {
            0 => odd[self.0.usize(..odd.len())],
            _ => self.0.alphanumeric(),
        };
        (0..count).map(|_| char()).collect()
    }

    fn name(&mut self) -> String {
        match self.0.u8(..32) {
            0 => self.text(20),
            1 => format!("aws.{}", self.text(3)),
            2 => format!("onlyonce-{}", self.text(3)),
            3 => "n".repeat(self.0.usize(250..260)),
            _ => format!("name-{}", self.0.u16(..)),
        }
    }

    fn id(&mut self) -> Option<String> {
        let id = match self.0.u8(..4) {
            0 => None,
            1 => Some("i".repeat(self.0.usize(120..140))),
            _ => Some(self.text(20)),
        };
        // An empty one is none.
        id.filter(|id| !id.is_empty())
    }

    fn message(&mut self) -> Message {
        let size = self.0.usize(..300);
        let body = match self.0.bool() {
            true => self.text(size).into_bytes(),
            false => std::iter::repeat_with(|| self.0.u8(..))
                .take(size)
                .collect(),
        };
        let mut message = Message::new(body);
        message.dedup_id = self.id();
        message.group = self.id();
        for _ in 0..self.0.usize(..14) {
            let value = self.text(20);
            message.attributes.insert(self.name(), value);
        }
        message
    }
}

/// Whatever is published is refused before it is sent, or survives; and a dead letter is never refused.
#[test]
fn random_messages_survive_or_are_refused() {
    let mut sent = 0;
    for seed in 0..2_000 {
        let mut odd = Odd(fastrand::Rng::with_seed(seed));
        let message = odd.message();
        for fifo in BOTH {
            if Outgoing::of(&message, fifo).is_ok() {
                assert_same(&through(&message, fifo).message, &message);
                sent += 1;
            }
            let letter = letter(message.clone(), "poison");
            assert_same(&through(&letter, fifo).message, &letter);
        }
    }
    assert!(sent > 500, "only {sent} were sent");
}
