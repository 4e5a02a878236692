//! AMQP's properties and header table to and from a message, as [`RabbitSource`](crate::RabbitSource) and
//! [`RabbitSink`](crate::RabbitSink) read and write them: for those who use the same queues through [`lapin`] itself.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::protocol::basic::{gen_properties, parse_properties};
use lapin::types::{AMQPValue, FieldArray, FieldTable, LongString, ShortString};
use onlyonce_core::attributes::{
    DEAD_LETTER_ATTEMPTS, DEAD_LETTER_CONSUMER, DEAD_LETTER_QUEUE, DEAD_LETTER_REASON,
};
use onlyonce_core::{Attributes, Error, ErrorKind, Message};
use serde_json::{Map, Value};

use crate::filter::{MAX_DEPTH, RAW, UNREADABLE};

/// How often a message had been delivered before it was queued to come back later.
pub(crate) const ATTEMPT: &str = "x-onlyonce-attempt";
/// How often a quorum queue took the message back, by what it counts towards the delivery limit.
const DELIVERY_COUNT: &str = "x-delivery-count";
/// How often a quorum queue of RabbitMQ 4.3 or later delivered the message.
const ACQUIRED_COUNT: &str = "x-acquired-count";
const DEATHS: &str = "x-death";
/// Headers by which a broker routes to further queues: never attributes of that name, lest a copy goes there as well.
const ROUTING: [(&str, &str); 2] = [("CC", "amqp-cc"), ("BCC", "amqp-bcc")];
const PRIORITY: &str = "amqp-priority";
/// How the headers begin that could not be read: `hex:…`.
const UNREADABLE_HEADERS: &str = "amqp-unreadable-headers";
const EXCHANGE: &str = "amqp-exchange";
const ROUTING_KEY: &str = "amqp-routing-key";
/// The user that published the message, which the broker has checked. Read only.
pub(crate) const USER_ID: &str = "amqp-user-id";
/// A delayed copy is published by the consumer's user: the user of its original.
const FIRST_USER: &str = "x-onlyonce-user-id";
/// The dedup id of a dead letter from another broker, where it is longer than a `message_id` may be.
const DEDUP_ID: &str = "onlyonce-dedup-id";
/// Says of a dead letter which attributes it had to go without.
const LEFT_OUT: &str = "onlyonce-left-out";
/// Bytes of that text.
const MAX_LEFT_OUT: usize = 1_000;
/// Bytes of AMQP's short strings: properties and names of headers.
const MAX_SHORT: usize = 255;

type Get = fn(&BasicProperties) -> &Option<ShortString>;
type Set = fn(BasicProperties, ShortString) -> BasicProperties;

/// The text properties that are attributes, so that a copy of the message (a dead letter, say) keeps them. Not among
/// them: `expiration`, or the copy would vanish, and `user_id`, which the broker compares with the copier's own and which
/// is therefore only read.
const PROPERTIES: [(&str, Get, Set); 6] = [
    (
        "amqp-content-type",
        BasicProperties::content_type,
        BasicProperties::with_content_type,
    ),
    (
        "amqp-content-encoding",
        BasicProperties::content_encoding,
        BasicProperties::with_content_encoding,
    ),
    (
        "amqp-correlation-id",
        BasicProperties::correlation_id,
        BasicProperties::with_correlation_id,
    ),
    (
        "amqp-reply-to",
        BasicProperties::reply_to,
        BasicProperties::with_reply_to,
    ),
    (
        "amqp-type",
        BasicProperties::kind,
        BasicProperties::with_type,
    ),
    (
        "amqp-app-id",
        BasicProperties::app_id,
        BasicProperties::with_app_id,
    ),
];

/// Reads a message; the text says why it could not be read whole, as in [`Delivery::malformed`].
///
/// [`Delivery::malformed`]: onlyonce_core::driver::Delivery::malformed
pub fn read(
    properties: &BasicProperties,
    body: Bytes,
    group_header: Option<&str>,
) -> (Message, Option<String>) {
    let mut message = Message::new(body);
    let mut malformed = None;
    message.dedup_id = properties.message_id().as_ref().map(ToString::to_string);
    message.published_at = properties
        .timestamp()
        .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
    for (header, value) in properties.headers().iter().flat_map(|h| h.inner()) {
        let header = header.as_str();
        if [ATTEMPT, FIRST_USER, DELIVERY_COUNT, ACQUIRED_COUNT].contains(&header) {
            continue;
        }
        if header == DEDUP_ID
            && message.dedup_id.is_none()
            && matches!(value, AMQPValue::LongString(_))
        {
            message.dedup_id = text(value);
            continue;
        }
        if group_header == Some(header) {
            match value {
                AMQPValue::FieldTable(_) | AMQPValue::FieldArray(_) => {
                    malformed = Some(format!(
                        "the header {header} names the group but is a table or an array"
                    ));
                }
                value => message.group = text(value),
            }
            continue;
        }
        match text(value) {
            Some(text) => drop(message.attributes.insert(attribute(header), text)),
            None => {
                malformed = Some(format!(
                    "the header {header} is nested more than {MAX_DEPTH} deep"
                ))
            }
        }
    }
    if let Some(why) = unreadable(&mut message) {
        malformed = Some(why);
    }
    for (name, get, _) in PROPERTIES {
        if let Some(value) = get(properties) {
            message.attributes.insert(name, value.as_str());
        }
    }
    if let Some(priority) = properties.priority() {
        message.attributes.insert(PRIORITY, priority.to_string());
    }
    if let Some(user) = properties.user_id() {
        message.attributes.insert(USER_ID, user.as_str());
        message.sender = Some(user.to_string());
    }
    (message, malformed)
}

/// Why the filter in front of the client could not let it have all of the message, if that is so.
fn unreadable(message: &mut Message) -> Option<String> {
    let why = message.attributes.remove(UNREADABLE)?;
    if let Some(raw) = message.attributes.remove(RAW) {
        message.attributes.insert(UNREADABLE_HEADERS, raw);
    }
    Some(format!("the message could not be read whole: {why}"))
}

/// Gives a delayed copy back the user of its original. The header that tells it is believed if `own`, who consumes and
/// so makes the copies, published it; if not, nobody knows the user.
pub(crate) fn read_first_user(
    message: &mut Message,
    properties: &BasicProperties,
    own: Option<&str>,
) {
    if let Some(first) = header(properties, FIRST_USER) {
        message.attributes.remove(USER_ID);
        message.sender = None;
        let user = properties.user_id().as_ref().map(ShortString::as_str);
        if user.is_some()
            && user == own
            && let Some(first) = text(first)
        {
            message.sender = Some(first.clone());
            message.attributes.insert(USER_ID, first);
        }
    }
}

/// The attribute of this header. One that is called as the attribute of a property is not it: its text need not be what
/// the property takes. Nor is one called as the dedup id's header the dedup id, where there is another.
fn attribute(header: &str) -> Cow<'_, str> {
    if let Some((_, name)) = ROUTING.iter().find(|(name, _)| *name == header) {
        return Cow::Borrowed(*name);
    }
    match [PRIORITY, DEDUP_ID, USER_ID].contains(&header) || is_property(header) {
        true => Cow::Owned(format!("header-{header}")),
        false => Cow::Borrowed(header),
    }
}

fn is_property(name: &str) -> bool {
    PROPERTIES.iter().any(|(property, ..)| *property == name)
}

/// Where the message was published to, for those who consume what several routing keys lead to. With the default
/// exchange it says nothing new.
pub(crate) fn read_origin(message: &mut Message, exchange: &str, routing_key: &str) {
    if !exchange.is_empty() {
        message.attributes.insert(EXCHANGE, exchange);
        message.attributes.insert(ROUTING_KEY, routing_key);
    }
}

/// Which headers with counts are the broker's. It writes them into what a quorum queue delivers again, over what they were;
/// everywhere else they are what a producer, a shovel or another queue wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counts {
    /// None: a first delivery, or a classic queue.
    None,
    /// `x-delivery-count`: a quorum queue before RabbitMQ 4.3, delivering again.
    Deliveries,
    /// `x-delivery-count` and `x-acquired-count`: one from RabbitMQ 4.3 on.
    Acquisitions,
}

/// Which delivery of the message this is, from 1, and whether that is known from a count. Otherwise it is the least that
/// is possible.
#[must_use]
pub fn attempt(
    properties: &BasicProperties,
    queue: &str,
    redelivered: bool,
    counts: Counts,
) -> (u32, bool) {
    let counted = match counts {
        Counts::None => 0,
        _ if is_from_elsewhere(properties, counts) => 0,
        Counts::Deliveries => number(properties, DELIVERY_COUNT),
        Counts::Acquisitions => number(properties, ACQUIRED_COUNT),
    };
    let before = number(properties, ATTEMPT).saturating_add(deaths(properties, queue));
    let again = counts == Counts::None && redelivered;
    let least = before.saturating_add(counted.max(i64::from(again)));
    let attempt = u32::try_from(least.saturating_add(1)).unwrap_or(u32::MAX);
    (attempt, before > 0 || counts != Counts::None)
}

/// How often the broker took the message back, by what it counts towards the queue's delivery limit.
pub(crate) fn returned(properties: &BasicProperties, counts: Counts) -> u32 {
    let returned = match counts {
        Counts::None => 0,
        Counts::Deliveries | Counts::Acquisitions => number(properties, DELIVERY_COUNT),
    };
    u32::try_from(returned).unwrap_or(u32::MAX)
}

/// Whether the counts can be those of another queue, which gave up on the message. RabbitMQ calls its first delivery here
/// delivered again, with the other queue's counts, and counts anew from then on (measured with 4.0.5 and 4.3.6). From 4.3 on the
/// two counts are the same at first, and differ later; before, nothing tells the one from the other.
fn is_from_elsewhere(properties: &BasicProperties, counts: Counts) -> bool {
    let reason = header(properties, "x-last-death-reason").and_then(text);
    let at_first = match counts {
        Counts::Acquisitions => {
            number(properties, ACQUIRED_COUNT) == number(properties, DELIVERY_COUNT)
        }
        Counts::Deliveries | Counts::None => true,
    };
    at_first && reason.as_deref() == Some("delivery_limit")
}

fn number(properties: &BasicProperties, name: &str) -> i64 {
    header(properties, name).and_then(integer).unwrap_or(0)
}

/// How often this queue delivered the message and had it rejected, see <https://www.rabbitmq.com/docs/dlx#effects>.
fn deaths(properties: &BasicProperties, queue: &str) -> i64 {
    let Some(AMQPValue::FieldArray(deaths)) = header(properties, DEATHS) else {
        return 0;
    };
    let is = |table: &FieldTable, key: &str, value: &str| {
        let found = table.inner().get(key).and_then(text);
        found.is_some_and(|found| found == value)
    };
    deaths
        .as_slice()
        .iter()
        .filter_map(|death| match death {
            AMQPValue::FieldTable(table)
                if is(table, "queue", queue) && is(table, "reason", "rejected") =>
            {
                table.inner().get("count").and_then(integer)
            }
            _ => None,
        })
        .fold(0, i64::saturating_add)
}

fn header<'a>(properties: &'a BasicProperties, name: &str) -> Option<&'a AMQPValue> {
    properties.headers().as_ref()?.inner().get(name)
}

fn integer(value: &AMQPValue) -> Option<i64> {
    let number = match *value {
        AMQPValue::ShortShortInt(n) => n.into(),
        AMQPValue::ShortShortUInt(n) => n.into(),
        AMQPValue::ShortInt(n) => n.into(),
        AMQPValue::ShortUInt(n) => n.into(),
        AMQPValue::LongInt(n) => n.into(),
        AMQPValue::LongUInt(n) => n.into(),
        AMQPValue::LongLongInt(n) => n,
        _ => return None,
    };
    // Nobody has to believe a producer's negative count.
    Some(number.max(0))
}

/// `None` if it is nested too deep.
fn text(value: &AMQPValue) -> Option<String> {
    let mut text = match json(value, MAX_DEPTH)? {
        Value::String(text) => text,
        Value::Null => String::new(),
        other => other.to_string(),
    };
    text.shrink_to_fit();
    Some(text)
}

/// `None` if it is nested deeper than `depth`.
fn json(value: &AMQPValue, depth: usize) -> Option<Value> {
    Some(match value {
        AMQPValue::Boolean(value) => (*value).into(),
        AMQPValue::ShortShortInt(n) => (*n).into(),
        AMQPValue::ShortShortUInt(n) => (*n).into(),
        AMQPValue::ShortInt(n) => (*n).into(),
        AMQPValue::ShortUInt(n) => (*n).into(),
        AMQPValue::LongInt(n) => (*n).into(),
        AMQPValue::LongUInt(n) => (*n).into(),
        AMQPValue::LongLongInt(n) => (*n).into(),
        AMQPValue::Timestamp(seconds) => (*seconds).into(),
        AMQPValue::Float(n) => float((*n).into(), n).into(),
        AMQPValue::Double(n) => float(*n, n).into(),
        AMQPValue::DecimalValue(n) => format!("{}e-{}", n.value, n.scale).into(),
        AMQPValue::ShortString(text) => text.as_str().into(),
        AMQPValue::LongString(text) => Attributes::text_of(text.as_bytes()).into(),
        AMQPValue::ByteArray(array) => Attributes::text_of(array.as_slice()).into(),
        AMQPValue::FieldArray(array) => {
            let depth = depth.checked_sub(1)?;
            let values = array.as_slice().iter().map(|value| json(value, depth));
            values.collect::<Option<Vec<_>>>()?.into()
        }
        AMQPValue::FieldTable(table) => {
            let depth = depth.checked_sub(1)?;
            let pairs = table.inner().iter();
            let pairs = pairs.map(|(k, v)| Some((k.to_string(), json(v, depth)?)));
            pairs.collect::<Option<Map<_, _>>>()?.into()
        }
        AMQPValue::Void => Value::Null,
    })
}

/// Not all of up to 300 digits.
fn float<T: fmt::Display + fmt::LowerExp>(value: f64, shown: &T) -> String {
    match value.abs() {
        0.0 | 1e-5..1e16 => shown.to_string(),
        _ => format!("{shown:e}"),
    }
}

/// The properties under which `message` is published. Those of a dead letter may still be larger than a frame; the sink
/// then leaves out its largest attributes.
///
/// # Errors
/// An id, a property or an attribute's name is longer than AMQP allows, or would be read as something else. Not with a
/// dead letter: it goes under other names, or without what AMQP has no place for, and says so in `onlyonce-left-out`.
pub fn write(message: &Message, group_header: Option<&str>) -> Result<BasicProperties, Error> {
    let dead = message.attributes.get(DEAD_LETTER_REASON).is_some();
    let mut properties = BasicProperties::default().with_delivery_mode(2);
    let mut headers = Headers::new();
    let mut left_out = Vec::new();
    match &message.dedup_id {
        Some(id) if dead && id.len() > MAX_SHORT => {
            headers.insert(DEDUP_ID.into(), AMQPValue::LongString(id.as_str().into()));
        }
        Some(id) => properties = properties.with_message_id(short(message, "the dedup id", id)?),
        None => {}
    }
    let age = message
        .published_at
        .map(|at| at.duration_since(SystemTime::UNIX_EPOCH));
    if let Some(Ok(age)) = age {
        properties = properties.with_timestamp(age.as_secs());
    }
    for (name, text) in message.attributes.iter() {
        let name = match refusal(name, text) {
            // The broker would refuse a message under the user of another.
            None if name == USER_ID => attribute(name),
            None => Cow::Borrowed(name),
            Some(_) if dead => attribute(name),
            Some(why) => return Err(refuse(message, why)),
        };
        if let Some((_, _, set)) = PROPERTIES.iter().find(|(known, ..)| *known == name) {
            properties = set(properties, short(message, &name, text)?);
        } else if name == PRIORITY {
            properties = properties.with_priority(text.parse().unwrap_or_default());
        } else if let Ok(name) = ShortString::try_new(&*name) {
            headers.insert(name, value(text));
        } else {
            left_out.push(name.into_owned());
        }
    }
    if let (Some(header), Some(group)) = (group_header, &message.group) {
        let header = short(message, "the name of the group header", header)?;
        headers.insert(header, value(group));
    }
    note(&mut headers, left_out);
    if !headers.is_empty() {
        properties = properties.with_headers(headers.into());
    }
    Ok(properties)
}

type Headers = BTreeMap<ShortString, AMQPValue>;

/// Why AMQP cannot carry this attribute, if it cannot.
fn refusal(name: &str, text: &str) -> Option<String> {
    let too_long = |what: &str, bytes| format!("{what} has {bytes} bytes; AMQP takes {MAX_SHORT}");
    if is_property(name) && text.len() > MAX_SHORT {
        Some(too_long(name, text.len()))
    } else if name == PRIORITY && text.parse::<u8>().is_err() {
        Some(format!("{name} is `{text}`, not a number up to 255"))
    } else if name == DEDUP_ID {
        Some(format!("the attribute {name} is onlyonce's own"))
    } else if ROUTING.iter().any(|(routing, _)| *routing == name) {
        Some(format!(
            "RabbitMQ would read the attribute {name} as further routing keys"
        ))
    } else if name.len() > MAX_SHORT {
        Some(too_long("the name of an attribute", name.len()))
    } else {
        None
    }
}

/// Bytes are written as bytes: their text takes twice the room.
fn value(text: &str) -> AMQPValue {
    match Attributes::bytes_of(text) {
        Cow::Owned(bytes) => AMQPValue::ByteArray(bytes.into()),
        Cow::Borrowed(bytes) => AMQPValue::LongString(bytes.into()),
    }
}

fn short(message: &Message, what: &str, text: &str) -> Result<ShortString, Error> {
    ShortString::try_new(text).map_err(|_| {
        refuse(
            message,
            format!("{what} has {} bytes; AMQP takes {MAX_SHORT}", text.len()),
        )
    })
}

fn refuse(message: &Message, why: String) -> Error {
    Error::new(ErrorKind::Message, why).on_message(message)
}

/// What a dead letter was published without, if anything.
pub(crate) fn left_out(properties: &BasicProperties) -> Option<String> {
    header(properties, LEFT_OUT).and_then(text)
}

/// Makes the properties of a dead letter fit into `most` bytes: leaves out the largest headers and names them in
/// another, but not what the pipeline says of it, and its group and its id last. Does nothing to other messages.
pub(crate) fn fit(
    properties: BasicProperties,
    most: usize,
    group_header: Option<&str>,
) -> BasicProperties {
    let size = size(&properties);
    if size <= most || header(&properties, DEAD_LETTER_REASON).is_none() {
        return properties;
    }
    const OWN: [&str; 4] = [
        DEAD_LETTER_REASON,
        DEAD_LETTER_QUEUE,
        DEAD_LETTER_CONSUMER,
        DEAD_LETTER_ATTEMPTS,
    ];
    let headers = properties.headers().clone().unwrap_or_default();
    let mut dispensable: Vec<_> = headers
        .inner()
        .iter()
        .filter(|(name, _)| !OWN.contains(&name.as_str()))
        .map(|(name, value)| {
            let last = name.as_str() == DEDUP_ID || group_header == Some(name.as_str());
            (last, Reverse(pair_size(name, value)), name)
        })
        .collect();
    dispensable.sort_unstable();
    let room_for_note = LEFT_OUT.len() + 6 + MAX_LEFT_OUT;
    let mut excess = (size + room_for_note).saturating_sub(most);
    let mut kept = headers.inner().clone();
    let mut left_out = Vec::new();
    for (_, Reverse(size), name) in dispensable {
        if excess == 0 {
            break;
        }
        excess = excess.saturating_sub(size);
        kept.remove(name);
        left_out.push(name.to_string());
    }
    note(&mut kept, left_out);
    properties.with_headers(kept.into())
}

/// Adds `names` to the header that tells what a dead letter goes without, as far as there is room.
fn note(headers: &mut Headers, names: Vec<String>) {
    if names.is_empty() {
        return;
    }
    let before = headers.get(LEFT_OUT).and_then(text);
    let all: Vec<String> = before.into_iter().chain(names).collect();
    let mut text = all.join(", ");
    if text.len() > MAX_LEFT_OUT {
        const MORE: &str = " …";
        text.truncate(text.floor_char_boundary(MAX_LEFT_OUT - MORE.len()));
        text.push_str(MORE);
    }
    headers.insert(LEFT_OUT.into(), AMQPValue::LongString(text.into()));
}

/// The properties of a copy that comes back as delivery number `attempt` + 1.
///
/// Without the counts of this queue, since they are in the new header; without `x-death`, by which an older RabbitMQ
/// would take the copy's way back for an endless loop and drop it (<https://www.rabbitmq.com/docs/dlx#routing>); and
/// without `expiration`, which would end the delay. The user becomes `own`, as the broker demands.
pub(crate) fn copy(
    properties: &BasicProperties,
    attempt: u32,
    own: Option<&str>,
) -> BasicProperties {
    let mut headers = FieldTable::default();
    for (name, value) in properties.headers().iter().flat_map(|h| h.inner()) {
        let death = [DEATHS, "x-first-death-", "x-last-death-"];
        let dropped = [DELIVERY_COUNT, ACQUIRED_COUNT].contains(&name.as_str())
            || death.iter().any(|prefix| name.as_str().starts_with(prefix));
        if !dropped {
            headers.insert(name.clone(), value.clone());
        }
    }
    headers.insert(ATTEMPT.into(), AMQPValue::LongUInt(attempt));
    if let Some(user) = properties.user_id()
        && header(properties, FIRST_USER).is_none()
    {
        let user = AMQPValue::LongString(user.as_str().into());
        headers.insert(FIRST_USER.into(), user);
    }
    let mut copy = BasicProperties::default()
        .with_delivery_mode(2)
        .with_headers(headers);
    for (_, get, set) in PROPERTIES {
        if let Some(value) = get(properties) {
            copy = set(copy, value.clone());
        }
    }
    let own = own.and_then(|own| ShortString::try_new(own).ok());
    if let (Some(_), Some(own)) = (properties.user_id(), own) {
        copy = copy.with_user_id(own);
    }
    if let Some(id) = properties.message_id() {
        copy = copy.with_message_id(id.clone());
    }
    if let Some(priority) = properties.priority() {
        copy = copy.with_priority(*priority);
    }
    if let Some(timestamp) = properties.timestamp() {
        copy = copy.with_timestamp(*timestamp);
    }
    copy
}

/// Properties to be kept for later: as on the wire, since as values they take many times as much memory.
#[derive(Clone, Debug)]
pub(crate) enum Packed {
    Wire(Bytes),
    /// Those that cannot be written, which no message brings.
    Values(Box<BasicProperties>),
}

impl Packed {
    pub(crate) fn of(properties: BasicProperties) -> Self {
        let written = gen_properties(&properties)(Vec::new().into());
        match written.map(|context| context.into_inner()) {
            Ok((bytes, _)) => Self::Wire(bytes.into_boxed_slice().into()),
            Err(_) => Self::Values(properties.into()),
        }
    }

    pub(crate) fn unpack(&self) -> Result<BasicProperties, Error> {
        match self {
            Self::Wire(bytes) => parse_properties(&bytes[..])
                .map(|(_, properties)| properties)
                .map_err(|_| Error::new(ErrorKind::Message, "its properties cannot be read again")),
            Self::Values(properties) => Ok((**properties).clone()),
        }
    }
}

/// How many bytes the properties take on the wire, at most.
pub(crate) fn size(properties: &BasicProperties) -> usize {
    let texts = PROPERTIES.iter().map(|(_, get, _)| get);
    let texts = texts.chain([
        &(BasicProperties::message_id as Get),
        &(BasicProperties::user_id as Get),
    ]);
    let texts: usize = texts
        .filter_map(|get| get(properties).as_ref())
        .map(|t| t.as_str().len() + 1)
        .sum();
    64 + texts + properties.headers().as_ref().map_or(0, table_size)
}

fn table_size(table: &FieldTable) -> usize {
    let pairs = table.inner().iter();
    4 + pairs
        .map(|(name, value)| pair_size(name, value))
        .sum::<usize>()
}

fn pair_size(name: &ShortString, value: &AMQPValue) -> usize {
    name.as_str().len() + 1 + value_size(value)
}

fn value_size(value: &AMQPValue) -> usize {
    1 + match value {
        AMQPValue::LongString(text) => 4 + LongString::len(text),
        AMQPValue::ShortString(text) => 4 + text.as_str().len(),
        AMQPValue::ByteArray(array) => 4 + array.len(),
        AMQPValue::FieldArray(array) => {
            4 + FieldArray::as_slice(array)
                .iter()
                .map(value_size)
                .sum::<usize>()
        }
        AMQPValue::FieldTable(table) => table_size(table),
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::types::{ByteArray, DecimalValue};

    fn table(pairs: impl IntoIterator<Item = (&'static str, AMQPValue)>) -> FieldTable {
        let mut table = FieldTable::default();
        for (name, value) in pairs {
            table.insert(name.into(), value);
        }
        table
    }

    fn with(pairs: impl IntoIterator<Item = (&'static str, AMQPValue)>) -> BasicProperties {
        BasicProperties::default().with_headers(table(pairs))
    }

    fn long(text: &str) -> AMQPValue {
        AMQPValue::LongString(text.into())
    }

    #[test]
    fn every_kind_of_header_becomes_text() {
        let inner = table([("n", AMQPValue::LongInt(-1)), ("t", long("x"))]);
        let properties = with([
            ("bool", AMQPValue::Boolean(true)),
            ("int", AMQPValue::LongLongInt(-5)),
            ("float", AMQPValue::Double(1.5)),
            ("nan", AMQPValue::Double(f64::NAN)),
            (
                "decimal",
                AMQPValue::DecimalValue(DecimalValue {
                    scale: 2,
                    value: 314,
                }),
            ),
            ("time", AMQPValue::Timestamp(7)),
            ("text", long("ü")),
            (
                "bytes",
                AMQPValue::ByteArray(ByteArray::from(vec![0xff, 0x00])),
            ),
            (
                "readable",
                AMQPValue::ByteArray(ByteArray::from(b"plain".to_vec())),
            ),
            ("table", AMQPValue::FieldTable(inner)),
            (
                "array",
                AMQPValue::FieldArray(vec![AMQPValue::Void, long("a\"b")].into()),
            ),
            ("void", AMQPValue::Void),
            ("CC", AMQPValue::FieldArray(vec![long("elsewhere")].into())),
        ]);
        let (message, malformed) = read(&properties, Bytes::new(), None);
        assert_eq!(malformed, None);
        let expected = [
            ("amqp-cc", "[\"elsewhere\"]"),
            ("array", "[null,\"a\\\"b\"]"),
            ("bool", "true"),
            ("bytes", "hex:ff00"),
            ("decimal", "314e-2"),
            ("float", "1.5"),
            ("int", "-5"),
            ("nan", "NaN"),
            ("readable", "plain"),
            ("table", "{\"n\":-1,\"t\":\"x\"}"),
            ("text", "ü"),
            ("time", "7"),
            ("void", ""),
        ];
        assert_eq!(message.attributes.iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn headers_that_are_nested_too_deep_are_no_attributes() {
        for (depth, taken) in [(MAX_DEPTH, true), (MAX_DEPTH + 1, false), (500, false)] {
            let deep = |value, _| AMQPValue::FieldArray(vec![value].into());
            let value = (0..depth).fold(AMQPValue::Void, deep);
            let properties = with([("deep", value), ("k", long("v"))]);
            let (message, malformed) = read(&properties, Bytes::new(), None);
            assert_eq!(message.attributes.get("deep").is_some(), taken);
            assert_eq!(message.attributes.get("k"), Some("v"));
            assert_eq!(malformed.is_none(), taken, "{malformed:?}");
        }
    }

    #[test]
    fn numbers_of_any_size_are_short_text() {
        for (number, expected) in [
            (0.0, "0"),
            (-2.0, "-2"),
            (1.5e15, "1500000000000000"),
            (1e300, "1e300"),
            (f64::MIN_POSITIVE, "2.2250738585072014e-308"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(text(&AMQPValue::Double(number)).unwrap(), expected);
        }
        assert_eq!(text(&AMQPValue::Float(0.1)).unwrap(), "0.1");
        assert_eq!(text(&AMQPValue::Float(1e38)).unwrap(), "1e38");
    }

    #[test]
    fn properties_are_the_same_after_they_were_packed() {
        let inner = table([("n", AMQPValue::LongInt(-1)), ("t", long("x"))]);
        let properties = with([
            ("table", AMQPValue::FieldTable(inner)),
            ("array", AMQPValue::FieldArray(vec![AMQPValue::Void].into())),
            ("bytes", AMQPValue::ByteArray(ByteArray::from(vec![0xff]))),
        ])
        .with_message_id("id".into())
        .with_timestamp(7)
        .with_priority(3);
        let packed = Packed::of(properties.clone());
        assert!(matches!(packed, Packed::Wire(_)));
        assert_eq!(packed.unpack().unwrap(), properties);
    }

    #[test]
    fn a_message_survives_the_way_through_a_sink() {
        let mut message = Message::new("body")
            .with_dedup_id("id")
            .with_group("g")
            .with_attribute("a", "1")
            .with_attribute("amqp-content-type", "text/plain")
            .with_attribute("amqp-correlation-id", "c")
            .with_attribute("amqp-priority", "3");
        message.published_at = UNIX_EPOCH.checked_add(Duration::from_secs(1_000));
        let properties = write(&message, Some("x-group")).unwrap();
        assert_eq!(properties.delivery_mode(), &Some(2));
        assert_eq!(
            properties.content_type().as_ref().unwrap().as_str(),
            "text/plain"
        );
        let (read, malformed) = read(&properties, message.body.clone(), Some("x-group"));
        assert_eq!((read, malformed), (message, None));
    }

    #[test]
    fn what_amqp_cannot_carry_is_refused_by_name() {
        let long = "x".repeat(256);
        for message in [
            Message::new("").with_dedup_id(&long),
            Message::new("").with_attribute(&long, "v"),
            Message::new("").with_attribute("amqp-type", &long),
            Message::new("").with_attribute("amqp-priority", "high"),
            Message::new("").with_attribute("CC", "elsewhere"),
            Message::new("").with_attribute("onlyonce-dedup-id", "another"),
        ] {
            let error = write(&message, None).unwrap_err();
            assert_eq!(
                (error.kind(), error.is_retryable()),
                (ErrorKind::Message, false)
            );
        }
        assert!(write(&Message::new("").with_attribute("a", &long), None).is_ok());
    }

    #[test]
    fn whatever_is_read_can_be_written() {
        let properties = with([
            ("amqp-priority", long("high")),
            ("amqp-type", long(&"t".repeat(300))),
            ("CC", long("elsewhere")),
            ("onlyonce-dedup-id", AMQPValue::LongInt(7)),
            ("b", AMQPValue::ByteArray(ByteArray::from(vec![0xff]))),
        ])
        .with_priority(7);
        let (message, _) = read(&properties, Bytes::new(), None);
        assert_eq!(message.attributes.get("amqp-priority"), Some("7"));
        assert_eq!(message.attributes.get("header-amqp-priority"), Some("high"));
        let written = write(&message, None).unwrap();
        assert_eq!(read(&written, Bytes::new(), None), (message, None));
    }

    #[test]
    fn bytes_are_written_as_bytes_and_a_text_as_text() {
        let bytes = AMQPValue::ByteArray(ByteArray::from(vec![0xff; 70_000]));
        let original = with([("b", bytes), ("t", long("hex:6869")), ("u", long("hex:FF"))]);
        let (message, _) = read(&original, Bytes::new(), None);
        let written = write(&message, None).unwrap();
        assert_eq!(written.headers(), original.headers());
        assert!(size(&written) < 71_000);
    }

    fn dead(message: Message) -> Message {
        message.with_attribute(DEAD_LETTER_REASON, "why")
    }

    #[test]
    fn a_dead_letter_from_anywhere_can_be_written() {
        let long = "x".repeat(256);
        let message = dead(
            Message::new("")
                .with_dedup_id(&long)
                .with_attribute(&long, "v")
                .with_attribute("amqp-type", &long)
                .with_attribute("amqp-priority", "high")
                .with_attribute("onlyonce-dedup-id", "another")
                .with_attribute("CC", "elsewhere"),
        );
        let written = write(&message, None).unwrap();
        let (back, malformed) = read(&written, Bytes::new(), None);
        assert_eq!((back.dedup_id, malformed), (Some(long.clone()), None));
        let expected = [
            ("amqp-cc", "elsewhere"),
            ("header-amqp-priority", "high"),
            ("header-amqp-type", &long),
            ("header-onlyonce-dedup-id", "another"),
            ("onlyonce-left-out", &long),
            ("onlyonce-reason", "why"),
        ];
        assert_eq!(back.attributes.iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_dead_letter_that_does_not_fit_goes_without_its_largest_attributes() {
        let text = |bytes| "t".repeat(bytes);
        let message = dead(Message::new(""))
            .with_dedup_id(text(300))
            .with_group(text(50_000))
            .with_attribute("large", text(60_000))
            .with_attribute("larger", text(70_000))
            .with_attribute("small", "s");
        let whole = write(&message, Some("group")).unwrap();
        let fitted = |most| {
            let fitted = fit(whole.clone(), most, Some("group"));
            assert!(size(&fitted) <= most);
            read(&fitted, Bytes::new(), Some("group")).0
        };
        let one = fitted(131_072);
        assert_eq!(one.attributes.get("onlyonce-left-out"), Some("larger"));
        assert_eq!(
            (&one.group, &one.dedup_id),
            (&message.group, &message.dedup_id)
        );
        assert!(one.attributes.get("large").is_some());
        // The group goes when nothing else is left to go, and then the id.
        let tiny = fitted(1_400);
        let left_out = tiny.attributes.get("onlyonce-left-out").unwrap();
        assert_eq!(left_out, "larger, large, small, group, onlyonce-dedup-id");
        assert_eq!(tiny.attributes.get(DEAD_LETTER_REASON), Some("why"));
        assert_eq!(fit(whole.clone(), usize::MAX, None), whole);
    }

    #[test]
    fn no_number_of_headers_makes_a_dead_letter_too_large() {
        let many = (0..40_000).map(|n| (format!("{n}"), String::new()));
        let mut message = Message::new("");
        message.attributes = many.collect();
        let fitted = fit(write(&dead(message), None).unwrap(), 131_072, None);
        assert!(size(&fitted) <= 131_072);
        let left_out = left_out(&fitted).unwrap();
        assert!(left_out.len() <= MAX_LEFT_OUT && left_out.ends_with(" …"));
    }

    #[test]
    fn only_a_dead_letter_goes_without_anything() {
        let message = Message::new("").with_attribute("a", "x".repeat(200_000));
        let whole = write(&message, None).unwrap();
        assert_eq!(fit(whole.clone(), 131_072, None), whole);
    }

    #[test]
    fn a_group_that_is_no_text_is_malformed() {
        let properties = with([("g", AMQPValue::FieldTable(FieldTable::default()))]);
        assert!(
            read(&properties, Bytes::new(), Some("g"))
                .1
                .unwrap()
                .contains("header g")
        );
        let number = with([("g", AMQPValue::LongInt(7))]);
        assert_eq!(
            read(&number, Bytes::new(), Some("g")).0.group.as_deref(),
            Some("7")
        );
    }

    #[test]
    fn attempts_are_counted_from_what_there_is() {
        let death = |queue, reason, count| {
            AMQPValue::FieldTable(table([
                ("queue", long(queue)),
                ("reason", long(reason)),
                ("count", AMQPValue::LongLongInt(count)),
            ]))
        };
        let deaths = AMQPValue::FieldArray(
            vec![
                death("q", "rejected", 2),
                death("q", "expired", 9),
                death("x", "rejected", 9),
            ]
            .into(),
        );
        let none = BasicProperties::default();
        assert_eq!(attempt(&none, "q", false, Counts::None), (1, false));
        assert_eq!(attempt(&none, "q", true, Counts::None), (2, false));
        for (name, value, redelivered, expected) in [
            ("x-death", deaths.clone(), false, (3, true)),
            (
                ATTEMPT,
                AMQPValue::LongLongInt(i64::MAX),
                true,
                (u32::MAX, true),
            ),
            (ATTEMPT, AMQPValue::LongInt(-7), false, (1, false)),
            (ATTEMPT, long("many"), false, (1, false)),
        ] {
            let properties = with([(name, value)]);
            let attempt = attempt(&properties, "q", redelivered, Counts::None);
            assert_eq!(attempt, expected, "{name}");
        }
        let moved = copy(
            &with([
                ("x-death", deaths),
                ("x-delivery-count", AMQPValue::LongInt(1)),
                ("k", long("v")),
            ]),
            4,
            None,
        );
        assert_eq!(attempt(&moved, "q", false, Counts::None), (5, true));
        let (message, _) = read(&moved, Bytes::new(), None);
        assert_eq!(message.attributes.iter().collect::<Vec<_>>(), [("k", "v")]);
    }

    #[test]
    fn only_the_brokers_counts_are_believed() {
        let properties = with([
            ("x-delivery-count", AMQPValue::LongLongInt(3)),
            ("x-acquired-count", AMQPValue::LongLongInt(5)),
        ]);
        for (counts, redelivered, expected, back) in [
            (Counts::None, false, (1, false), 0),
            (Counts::None, true, (2, false), 0),
            (Counts::Deliveries, true, (4, true), 3),
            (Counts::Acquisitions, true, (6, true), 3),
        ] {
            let attempt = attempt(&properties, "q", redelivered, counts);
            assert_eq!(attempt, expected, "{counts:?}");
            assert_eq!(returned(&properties, counts), back, "{counts:?}");
        }
    }

    #[test]
    fn what_another_queue_counted_is_no_attempt_here() {
        let given_up = |acquired| {
            with([
                ("x-delivery-count", AMQPValue::LongLongInt(21)),
                ("x-acquired-count", AMQPValue::LongLongInt(acquired)),
                ("x-last-death-reason", long("delivery_limit")),
            ])
        };
        for (acquired, expected) in [(21, 1), (1, 2), (2, 3)] {
            let properties = given_up(acquired);
            let (attempt, _) = attempt(&properties, "dead", true, Counts::Acquisitions);
            assert_eq!(attempt, expected);
            // But this queue deletes it as if it had taken it back as often.
            assert_eq!(returned(&properties, Counts::Acquisitions), 21);
        }
    }

    #[test]
    fn a_delayed_copy_keeps_its_first_user_as_long_as_its_publisher_is_trusted() {
        let user = |properties: &BasicProperties, own| {
            let mut message = read(properties, Bytes::new(), None).0;
            read_first_user(&mut message, properties, own);
            assert_eq!(message.sender.as_deref(), message.attributes.get(USER_ID));
            message.attributes.get(USER_ID).map(str::to_owned)
        };
        let original = BasicProperties::default().with_user_id("alice".into());
        assert_eq!(user(&original, Some("worker")).as_deref(), Some("alice"));
        let again = copy(&copy(&original, 1, Some("worker")), 2, Some("worker"));
        assert_eq!(again.user_id().as_ref().unwrap().as_str(), "worker");
        assert_eq!(user(&again, Some("worker")).as_deref(), Some("alice"));
        assert_eq!(user(&again, Some("other")), None);
        assert_eq!(user(&copy(&original, 1, None), None), None);
        // The header alone can be written by anyone.
        let forged = with([(FIRST_USER, long("alice"))]);
        assert_eq!(user(&forged, Some("worker")), None);
        assert_eq!(
            user(&forged.with_user_id("mallory".into()), Some("worker")),
            None
        );
        assert_eq!(
            copy(&BasicProperties::default(), 1, Some("worker")).user_id(),
            &None
        );
    }

    #[test]
    fn nobody_publishes_under_the_user_of_another() {
        let message = Message::new("").with_attribute(USER_ID, "alice");
        let written = write(&message, None).unwrap();
        assert_eq!(written.user_id(), &None);
        let (back, _) = read(&written, Bytes::new(), None);
        let kept = [("header-amqp-user-id", "alice")];
        assert_eq!(back.attributes.iter().collect::<Vec<_>>(), kept);
    }

    #[test]
    fn a_copy_keeps_the_properties_but_not_the_expiration() {
        let original = BasicProperties::default()
            .with_message_id("m".into())
            .with_reply_to("r".into())
            .with_priority(2)
            .with_timestamp(9)
            .with_delivery_mode(1)
            .with_expiration("5".into());
        let copy = copy(&original, 1, None);
        assert_eq!(copy.expiration(), &None);
        assert_eq!(copy.delivery_mode(), &Some(2));
        let (copied, original) = (
            read(&copy, Bytes::new(), None).0,
            read(&original, Bytes::new(), None).0,
        );
        assert_eq!(copied, original);
    }
}
