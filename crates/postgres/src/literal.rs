//! Values as they stand in SQL. What we ask goes as one text with several statements, so that it is one round trip and needs no
//! prepared statement; nothing in it was written by anybody else: digits, and bytes as hexadecimal digits.

use std::fmt::Write as _;

/// An array, `'{…}'`, of what `write` adds for each.
pub(crate) fn array<T>(
    values: impl IntoIterator<Item = T>,
    write: impl Fn(&mut String, T),
) -> String {
    let mut text = String::from("'{");
    for (n, value) in values.into_iter().enumerate() {
        if n > 0 {
            text.push(',');
        }
        write(&mut text, value);
    }
    text.push_str("}'");
    text
}

/// 16 bytes as `uuid`.
pub(crate) fn uuids<'a>(values: impl IntoIterator<Item = &'a [u8; 16]>) -> String {
    array(values, |text, bytes| hex(text, bytes))
}

pub(crate) fn numbers(values: impl IntoIterator<Item = i64>) -> String {
    array(values, |text, number| {
        write!(text, "{number}").unwrap_or_default();
    })
}

pub(crate) fn optional_numbers(values: impl IntoIterator<Item = Option<i64>>) -> String {
    array(values, |text, number| match number {
        Some(number) => write!(text, "{number}").unwrap_or_default(),
        None => text.push_str("NULL"),
    })
}

/// Bytes, or nothing, as hexadecimal text.
pub(crate) fn optional_bytes<'a>(values: impl IntoIterator<Item = Option<&'a [u8]>>) -> String {
    array(values, |text, bytes| match bytes {
        Some(bytes) => {
            text.push('"');
            hex(text, bytes);
            text.push('"');
        }
        None => text.push_str("NULL"),
    })
}

/// Text of somebody else's, as digits.
pub(crate) fn text(value: &str) -> String {
    let mut literal = String::from("convert_from(decode('");
    hex(&mut literal, value.as_bytes());
    literal.push_str("', 'hex'), 'UTF8')");
    literal
}

pub(crate) fn optional_text(value: Option<&str>) -> String {
    value.map_or_else(|| "NULL".into(), text)
}

/// Bytes.
pub(crate) fn bytes(value: &[u8]) -> String {
    let mut literal = String::from("decode('");
    hex(&mut literal, value);
    literal.push_str("', 'hex')");
    literal
}

pub(crate) fn hex(text: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

/// The bytes of hexadecimal text; `None` if it is none.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let bytes = pairs.iter().map(|[high, low]| {
        let byte = digit(*high)? << 4 | digit(*low)?;
        u8::try_from(byte).ok()
    });
    bytes.collect::<Option<_>>().filter(|_| rest.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_and_read() {
        assert_eq!(numbers([1, -2]), "'{1,-2}'");
        assert_eq!(optional_numbers([None, Some(7)]), "'{NULL,7}'");
        assert_eq!(
            optional_bytes([Some(&b"\x00'a"[..]), None, Some(b"")]),
            r#"'{"002761",NULL,""}'"#
        );
        assert_eq!(unhex("002761").as_deref(), Some(&b"\x00'a"[..]));
        assert_eq!((unhex("0"), unhex("0g")), (None, None));
    }
}
