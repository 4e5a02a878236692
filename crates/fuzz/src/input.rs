use std::time::{Duration, UNIX_EPOCH};

use arbitrary::{Result, Unstructured};
use onlyonce::Message;

/// A message of any form.
pub(crate) fn message(input: &mut Unstructured<'_>) -> Result<Message> {
    let mut message = Message::new(input.arbitrary::<Vec<u8>>()?);
    message.dedup_id = input.arbitrary()?;
    message.group = input.arbitrary()?;
    if input.arbitrary()? {
        let age = Duration::from_secs(input.arbitrary()?);
        message.published_at = UNIX_EPOCH.checked_add(age);
    }
    for _ in 0..input.int_in_range(0..=4)? {
        let name = name(input)?;
        message
            .attributes
            .insert(name, input.arbitrary::<String>()?);
    }
    Ok(message)
}

/// A name of an attribute or a header, often one that means something to somebody.
pub(crate) fn name(input: &mut Unstructured<'_>) -> Result<String> {
    const KNOWN: [&str; 26] = [
        "",
        "AWSTraceHeader",
        "BCC",
        "CC",
        "CloudPubSubDeadLetterSourceDeliveryCount",
        "CloudPubSubDeadLetterSourceSubscription",
        "amqp-cc",
        "amqp-content-type",
        "amqp-correlation-id",
        "amqp-exchange",
        "amqp-priority",
        "amqp-type",
        "googclient_schemaencoding",
        "header-amqp-type",
        "idempotency-key",
        "onlyonce-attempts",
        "onlyonce-attributes",
        "onlyonce-body",
        "onlyonce-carried-goog",
        "onlyonce-dedup-id",
        "onlyonce-group",
        "onlyonce-reason",
        "sqs-message-group-id",
        "x-death",
        "x-group",
        "x-onlyonce-attempt",
    ];
    if input.arbitrary()? {
        return Ok((*input.choose(&KNOWN)?).to_owned());
    }
    input.arbitrary()
}
