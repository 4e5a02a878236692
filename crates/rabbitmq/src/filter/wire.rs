//! AMQP's values as bytes: each function splits one off, or answers `None` if it is not all there.

use std::borrow::Cow;
use std::io;

use onlyonce_core::Attributes;

/// Of a short string, in bytes.
const MAX_SHORT: usize = 255;

pub(super) fn octet(input: &mut &[u8]) -> Option<u8> {
    input.split_off_first().copied()
}

pub(super) fn u16(input: &mut &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(array(input)?))
}

pub(super) fn u32(input: &mut &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(array(input)?))
}

fn array<const N: usize>(input: &mut &[u8]) -> Option<[u8; N]> {
    bytes(input, N)?.try_into().ok()
}

pub(super) fn bytes<'a>(input: &mut &'a [u8], many: usize) -> Option<&'a [u8]> {
    input.split_off(..many)
}

/// A short string, without its length.
pub(super) fn short<'a>(input: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = octet(input)?;
    bytes(input, length.into())
}

/// A long string, table, array or byte array, without its length.
pub(super) fn long<'a>(input: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32(input)?;
    bytes(input, length.try_into().ok()?)
}

pub(super) fn push_short(output: &mut Vec<u8>, text: &[u8]) {
    let text = &text[..text.len().min(MAX_SHORT)];
    // Cut to what one octet counts.
    output.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
    output.extend_from_slice(text);
}

pub(super) fn push_long(output: &mut Vec<u8>, bytes: &[u8]) {
    // Part of a frame, which is shorter.
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    output.extend_from_slice(&length.to_be_bytes());
    output.extend_from_slice(bytes);
}

/// A short string as text: bytes that are not UTF-8 as `hex:…`, with an ellipsis where they do not fit.
pub(super) fn text(short: &[u8]) -> Cow<'_, [u8]> {
    if std::str::from_utf8(short).is_ok() {
        return Cow::Borrowed(short);
    }
    let mut text = Attributes::text_of(short);
    if text.len() > MAX_SHORT {
        text.truncate(MAX_SHORT - '…'.len_utf8());
        text.push('…');
    }
    Cow::Owned(text.into_bytes())
}

/// Whether [`text`] keeps all of it.
pub(super) fn fits(short: &[u8]) -> bool {
    text(short).len() < MAX_SHORT || std::str::from_utf8(short).is_ok()
}

pub(super) fn invalid(what: String) -> io::Error {
    let what = format!("the broker sends what is not AMQP 0-9-1: {what}");
    io::Error::new(io::ErrorKind::InvalidData, what)
}
