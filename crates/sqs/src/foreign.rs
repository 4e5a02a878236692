//! What others put into bodies: references to payloads in S3, and SNS's notifications.

use onlyonce_core::Attributes;
use serde_json::Value;

/// Who put the payload into S3, if the message only says where it is there.
pub(crate) fn offloaded_by(body: &str, attributes: &Attributes) -> Option<&'static str> {
    by_attribute(attributes)
        .or_else(|| by_body(body))
        .or_else(|| by_body(&notified(body)?))
}

/// <https://github.com/dvla/sqs-extended-client>,
/// <https://docs.particular.net/transports/sqs/native-integration>
fn by_attribute(attributes: &Attributes) -> Option<&'static str> {
    let value = |name| attributes.get(name).unwrap_or_default();
    if value("S3MessageBodyKey").starts_with('(') {
        return Some("the npm package sqs-extended-client");
    }
    let both = !value("S3BodyKey").is_empty() && !value("MessageTypeFullName").is_empty();
    both.then_some("NServiceBus")
}

fn by_body(body: &str) -> Option<&'static str> {
    if is_pointer(body) {
        return Some("the SQS extended client");
    }
    // Few bodies have to be parsed.
    if !body.contains("\"S3Payload\"") && !body.contains("\"S3BodyKey\"") {
        return None;
    }
    let fields: Value = serde_json::from_str(body).ok()?;
    let fields = fields.as_object()?;
    // https://github.com/aspecto-io/sns-sqs-big-payload
    if fields.len() == 1 && is_text(fields.get("S3Payload").and_then(|at| at.get("Key"))) {
        return Some("an npm package like sns-sqs-big-payload");
    }
    // https://docs.particular.net/transports/sqs/
    let wrapped = fields.get("Headers").is_some_and(Value::is_object);
    (wrapped && is_text(fields.get("S3BodyKey"))).then_some("NServiceBus")
}

/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-managing-large-messages.html>
fn is_pointer(text: &str) -> bool {
    let rest = text.trim_start().strip_prefix('[').unwrap_or_default();
    [
        "\"software.amazon.payloadoffloading.PayloadS3Pointer\"",
        "\"com.amazon.sqs.javamessaging.MessageS3Pointer\"",
    ]
    .iter()
    .any(|class| rest.trim_start().starts_with(class))
}

fn is_text(value: Option<&Value>) -> bool {
    let text = value.and_then(Value::as_str);
    text.is_some_and(|text| !text.is_empty())
}

/// What was published to a topic, if this is SNS's notification of it.
/// <https://docs.aws.amazon.com/sns/latest/dg/sns-message-and-json-formats.html>
pub(crate) fn notified(body: &str) -> Option<String> {
    if !body.contains("\"TopicArn\"") {
        return None;
    }
    let mut fields: Value = serde_json::from_str(body).ok()?;
    let is_notification = fields.get("Type")? == "Notification" && is_text(fields.get("TopicArn"));
    match fields.get_mut("Message")?.take() {
        Value::String(message) if is_notification => Some(message),
        _ => None,
    }
}
