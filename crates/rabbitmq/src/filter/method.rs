//! Method frames: those whose text comes from elsewhere, and those in which the broker tells of itself.

use std::borrow::Cow;

use super::wire;

enum Field {
    Short,
    Other(usize),
}

use Field::{Other, Short};

/// The methods that carry text which somebody else chose, or which the broker cut to 255 bytes wherever that was.
/// <https://www.rabbitmq.com/amqp-0-9-1-reference>
const WITH_TEXT: [(u16, u16, &[Field]); 6] = [
    // connection.close, connection.blocked, channel.close
    (10, 50, &[Other(2), Short, Other(4)]),
    (10, 60, &[Short]),
    (20, 40, &[Other(2), Short, Other(4)]),
    // basic.return, basic.deliver, basic.get-ok
    (60, 50, &[Other(2), Short, Short, Short]),
    (60, 60, &[Short, Other(9), Short, Short]),
    (60, 71, &[Other(9), Short, Short, Other(4)]),
];
const CONNECTION_START: (u16, u16) = (10, 10);
const CONNECTION_TUNE: (u16, u16) = (10, 30);

/// The method with text that is UTF-8.
pub(super) fn readable(payload: &[u8]) -> Cow<'_, [u8]> {
    // Another form is for the client to refuse.
    rewrite(payload).map_or(Cow::Borrowed(payload), Cow::Owned)
}

fn rewrite(payload: &[u8]) -> Option<Vec<u8>> {
    let mut rest = payload;
    let id = id(&mut rest)?;
    let (.., fields) = WITH_TEXT
        .iter()
        .find(|(class, method, _)| (*class, *method) == id)?;
    let mut output = payload[..payload.len() - rest.len()].to_vec();
    for field in *fields {
        match field {
            Short => wire::push_short(&mut output, &wire::text(wire::short(&mut rest)?)),
            Other(many) => output.extend_from_slice(wire::bytes(&mut rest, *many)?),
        }
    }
    output.extend_from_slice(rest);
    Some(output)
}

fn id(input: &mut &[u8]) -> Option<(u16, u16)> {
    Some((wire::u16(input)?, wire::u16(input)?))
}

/// The longest frame that the broker sends, from `connection.tune`; [`Config`](crate::Config) asks for no other.
pub(super) fn frame_max(mut payload: &[u8]) -> Option<usize> {
    if id(&mut payload)? != CONNECTION_TUNE {
        return None;
    }
    let _channel_max = wire::u16(&mut payload)?;
    match wire::u32(&mut payload)? {
        0 => Some(usize::MAX),
        bytes => bytes.try_into().ok(),
    }
}

/// Major and minor number of the broker's version, from `connection.start`.
pub(super) fn version(mut payload: &[u8]) -> Option<(u16, u16)> {
    if id(&mut payload)? != CONNECTION_START {
        return None;
    }
    let _protocol = wire::bytes(&mut payload, 2)?;
    let mut properties = wire::long(&mut payload)?;
    // RabbitMQ's properties are texts, and its capabilities a table, which has the form of a text.
    while let Some(name) = wire::short(&mut properties) {
        let _kind = wire::octet(&mut properties)?;
        let value = wire::long(&mut properties)?;
        if name == b"version" {
            return numbers(std::str::from_utf8(value).ok()?);
        }
    }
    None
}

fn numbers(version: &str) -> Option<(u16, u16)> {
    let mut numbers = version.split(['.', '-', '+']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}
