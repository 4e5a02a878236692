//! Content headers: a message's properties, and among them its headers.

use std::borrow::Cow;
use std::io;

use onlyonce_core::Attributes;

use super::{table, wire};

/// The header that says why a message could not be read whole, in place of its headers or before them.
pub(crate) const UNREADABLE: &str = "x-onlyonce-unreadable";
/// Beside [`UNREADABLE`]: how the headers begin that it stands for, in hexadecimal.
pub(crate) const RAW: &str = "x-onlyonce-unreadable-bytes";
/// At most this number of their bytes: a dead letter has to fit into a frame as well.
const MOST_RAW: usize = 2_048;

/// Class, weight and the size of the body.
const HEAD: usize = 12;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Text,
    MessageId,
    Headers,
    Fixed(usize),
}

use Kind::{Fixed, Headers, MessageId, Text};

/// The properties in their order; the first has the highest flag.
/// <https://www.rabbitmq.com/resources/specs/amqp0-9-1.xml>, class `basic`.
const PROPERTIES: [Kind; 14] = [
    Text,
    Text,
    Headers,
    Fixed(1),
    Fixed(1),
    Text,
    Text,
    Text,
    MessageId,
    Fixed(8),
    Text,
    Text,
    Text,
    Text,
];
const FIRST_FLAG: u16 = 1 << 15;
const HEADERS_FLAG: u16 = FIRST_FLAG >> 2;
/// Further flags would follow, and none at all.
const OTHER_FLAGS: u16 = 0b11;

/// A content header that the client can read, in `most` bytes.
pub(super) fn readable(payload: &[u8], most: usize) -> io::Result<Cow<'_, [u8]>> {
    let mut content = Content::read(payload)?;
    if payload.len() > most {
        let length = payload.len();
        content.lose_headers(format!(
            "properties and headers take {length} bytes, which do not fit into a frame"
        ));
    }
    if content.is_as_it_was() {
        return Ok(Cow::Borrowed(payload));
    }
    Ok(Cow::Owned(content.write(most)))
}

/// A content header in parts, its text in UTF-8.
#[derive(Default)]
struct Content<'a> {
    head: &'a [u8],
    flags: u16,
    before: Vec<u8>,
    /// Without their length.
    headers: &'a [u8],
    after: Vec<u8>,
    /// The places in `headers` at which a name begins that only this filter may write.
    forged: Vec<usize>,
    /// Whether a text was not UTF-8.
    changed: bool,
    /// Why the message cannot be read whole.
    reason: Option<String>,
    /// Whether the client cannot be given the headers.
    lost: bool,
}

impl<'a> Content<'a> {
    fn read(payload: &'a [u8]) -> io::Result<Self> {
        let mut rest = payload;
        let (head, flags) = (wire::bytes(&mut rest, HEAD), wire::u16(&mut rest));
        let (Some(head), Some(flags)) = (head, flags) else {
            let length = payload.len();
            return Err(wire::invalid(format!("a content header of {length} bytes")));
        };
        let mut content = Self {
            head,
            ..Self::default()
        };
        for (place, kind) in PROPERTIES.into_iter().enumerate() {
            let flag = FIRST_FLAG >> place;
            if flags & flag != 0 && content.property(kind, flag, &mut rest).is_none() {
                content.cannot_read("a property is longer than what it is in".into());
                return Ok(content);
            }
        }
        if !rest.is_empty() || flags & OTHER_FLAGS != 0 {
            content.cannot_read("it has properties that AMQP does not know".into());
        }
        Ok(content)
    }

    /// Takes the next property out of `rest`; `None` if it is not all there.
    fn property(&mut self, kind: Kind, flag: u16, rest: &mut &'a [u8]) -> Option<()> {
        let output = match flag > HEADERS_FLAG {
            true => &mut self.before,
            false => &mut self.after,
        };
        match kind {
            Fixed(size) => output.extend_from_slice(wire::bytes(rest, size)?),
            Text | MessageId => {
                let text = wire::short(rest)?;
                if kind == MessageId && !wire::fits(text) {
                    // Two ids may begin alike, and one would be taken for the other.
                    let id = Attributes::text_of(text);
                    self.cannot_read(format!("its message_id is too long for text: {id}"));
                    return Some(());
                }
                let text = wire::text(text);
                wire::push_short(output, &text);
                self.changed |= matches!(text, Cow::Owned(_));
            }
            Headers => {
                self.headers = wire::long(rest)?;
                match table::check(self.headers) {
                    Ok(forged) => self.forged = forged,
                    Err(why) => self.lose_headers(format!("of its headers, {why}")),
                }
            }
        }
        self.flags |= flag;
        Some(())
    }

    /// The first reason counts.
    fn cannot_read(&mut self, reason: String) {
        self.reason.get_or_insert(reason);
    }

    fn lose_headers(&mut self, reason: String) {
        self.lost = true;
        self.cannot_read(reason);
    }

    fn is_as_it_was(&self) -> bool {
        self.reason.is_none() && !self.changed && self.forged.is_empty()
    }

    fn write(mut self, most: usize) -> Vec<u8> {
        let others = HEAD + 2 + self.before.len() + self.after.len();
        let room = most.saturating_sub(others + 4);
        let mut headers = self.headers();
        if self.lost || headers.len() > room {
            headers = self.stand_in(room);
        }
        if !headers.is_empty() {
            self.flags |= HEADERS_FLAG;
        }
        let mut output = self.head.to_vec();
        output.extend_from_slice(&self.flags.to_be_bytes());
        output.append(&mut self.before);
        if self.flags & HEADERS_FLAG != 0 {
            wire::push_long(&mut output, &headers);
        }
        output.append(&mut self.after);
        output
    }

    /// The headers as they were, those that nobody else may write under another name.
    fn headers(&self) -> Vec<u8> {
        let mut output = Vec::new();
        if let Some(reason) = &self.reason {
            push_header(&mut output, UNREADABLE, b'S', reason.as_bytes());
        }
        let start = output.len();
        output.extend_from_slice(self.headers);
        for at in &self.forged {
            output[start + at].make_ascii_uppercase();
        }
        output
    }

    /// What stands for the headers.
    fn stand_in(&mut self, room: usize) -> Vec<u8> {
        self.cannot_read("its headers do not fit into a frame beside what is not UTF-8".into());
        let mut output = Vec::new();
        let reason = self.reason.as_deref().unwrap_or_default();
        push_header(&mut output, UNREADABLE, b'S', reason.as_bytes());
        // There is room: all else takes 4 kB at most, and the shortest frame has 8.
        let raw = &self.headers[..self.headers.len().min(MOST_RAW)];
        let digits: String = raw.iter().map(|byte| format!("{byte:02x}")).collect();
        let raw = format!("hex:{digits}");
        if output.len() + RAW.len() + raw.len() + 6 <= room {
            push_header(&mut output, RAW, b'S', raw.as_bytes());
        }
        output
    }
}

fn push_header(output: &mut Vec<u8>, name: &str, kind: u8, value: &[u8]) {
    wire::push_short(output, name.as_bytes());
    output.push(kind);
    wire::push_long(output, value);
}
