//! Payloads that were compressed before they were sent.

use std::borrow::Cow;
use std::io::Read;

use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use ruzstd::decoding::StreamingDecoder;

use crate::Message;
use crate::driver::Printable;
use crate::handler::Rejection;

/// What a payload may come to: a few hundred bytes can stand for gigabytes.
const MOST: usize = 16 << 20;
/// Where a producer says how it has encoded the payload: a header, or RabbitMQ's property.
const DECLARED: [&str; 2] = ["content-encoding", "amqp-content-encoding"];
/// Said by clients that mean the characters.
const PLAIN: [&str; 5] = ["", "identity", "utf-8", "utf8", "us-ascii"];
const BOM: &[u8] = b"\xef\xbb\xbf";

/// The payload, decoded as its message declares.
pub(super) fn decoded(message: &Message) -> Result<Cow<'_, [u8]>, Rejection> {
    let body = &*message.body;
    let declared = declared(message).to_ascii_lowercase();
    let mut encodings = declared
        .split([',', ':'])
        .map(str::trim)
        .filter(|name| !PLAIN.contains(name));
    let Some(encoding) = encodings.next() else {
        return Ok(Cow::Borrowed(body));
    };
    let fault = |why: String| {
        let declared = Printable(&declared);
        Rejection(format!("content-encoding `{declared}`: {why}"))
    };
    if encodings.next().is_some() {
        return Err(fault("only one is read".into()));
    }
    let decoded = match encoding {
        "gzip" | "x-gzip" => bounded(MultiGzDecoder::new(body)),
        "deflate" if is_zlib(body) => bounded(ZlibDecoder::new(body)),
        "deflate" => bounded(DeflateDecoder::new(body)),
        "zstd" => StreamingDecoder::new(body)
            .map_err(|error| format!("the payload is not: {error}"))
            .and_then(bounded),
        _ => Err("only gzip, deflate and zstd are read".into()),
    };
    decoded.map(Cow::Owned).map_err(fault)
}

fn declared(message: &Message) -> &str {
    let mut attributes = message.attributes.iter();
    attributes
        .find(|(name, _)| {
            DECLARED
                .iter()
                .any(|known| name.eq_ignore_ascii_case(known))
        })
        .map_or("", |(_, value)| value)
}

fn bounded(decoder: impl Read) -> Result<Vec<u8>, String> {
    let mut all = Vec::new();
    match decoder.take(MOST as u64 + 1).read_to_end(&mut all) {
        Ok(read) if read <= MOST => Ok(all),
        Ok(_) => Err(format!("it decodes to more than {MOST} bytes")),
        Err(error) => Err(format!("the payload is not: {error}")),
    }
}

/// HTTP's `deflate` is zlib's format, but some send the bare one.
/// <https://www.rfc-editor.org/rfc/rfc1950>
fn is_zlib(body: &[u8]) -> bool {
    match *body {
        [method, flags, ..] => {
            method & 0x0f == 8 && u16::from_be_bytes([method, flags]).is_multiple_of(31)
        }
        _ => false,
    }
}

/// JSON without a byte-order mark, which <https://www.rfc-editor.org/rfc/rfc8259#section-8.1> lets a reader ignore.
pub(super) fn without_bom(text: &[u8]) -> &[u8] {
    text.strip_prefix(BOM).unwrap_or(text)
}

/// What a payload that is not text looks like, by its first bytes.
pub(super) fn guess(body: &[u8]) -> Option<&'static str> {
    let known: [(&[u8], &str); 5] = [
        (
            b"\x1f\x8b",
            "it looks like gzip, and no content-encoding says so",
        ),
        (
            b"\x28\xb5\x2f\xfd",
            "it looks like zstd, and no content-encoding says so",
        ),
        (b"\xff\xfe", "it begins with the byte-order mark of UTF-16"),
        (b"\xfe\xff", "it begins with the byte-order mark of UTF-16"),
        (BOM, "it begins with a byte-order mark"),
    ];
    let found = known.iter().find(|(magic, _)| body.starts_with(magic));
    match found {
        Some((_, what)) => Some(what),
        None if is_zlib(body) && std::str::from_utf8(body).is_err() => {
            Some("it looks like zlib's deflate, and no content-encoding says so")
        }
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zlib(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        compress_to_vec(bytes, CompressionLevel::Fastest)
    }

    fn declaring(encoding: &str, body: Vec<u8>) -> Message {
        Message::new(body).with_attribute("Content-Encoding", encoding)
    }

    fn refusal(message: &Message) -> String {
        decoded(message).unwrap_err().0
    }

    #[test]
    fn what_is_declared_is_decoded() {
        let text = b"{\"id\":1}".repeat(100);
        for (encoding, body) in [
            ("gzip", gzip(&text)),
            ("x-gzip", [gzip(&text[..80]), gzip(&text[80..])].concat()),
            ("GZIP:UTF-8", gzip(&text)),
            ("deflate", zlib(&text)),
            ("deflate", deflate(&text)),
            ("zstd", zstd(&text)),
            ("utf-8", text.clone()),
            ("identity", text.clone()),
        ] {
            assert_eq!(
                &*decoded(&declaring(encoding, body)).unwrap(),
                text,
                "{encoding}"
            );
        }
        let property = Message::new(gzip(&text)).with_attribute("amqp-content-encoding", "gzip");
        assert_eq!(&*decoded(&property).unwrap(), text);
        let undeclared = Message::new(gzip(&text));
        assert_eq!(&*decoded(&undeclared).unwrap(), &*undeclared.body);
    }

    #[test]
    fn what_cannot_be_decoded_is_named() {
        for (encoding, why) in [
            ("br", "only gzip, deflate and zstd"),
            ("gzip, zstd", "only one"),
            ("gzip", "is not"),
            ("deflate", "is not"),
            ("zstd", "is not"),
        ] {
            let reason = refusal(&declaring(encoding, b"{\"id\":1}".to_vec()));
            assert!(
                reason.contains(encoding) && reason.contains(why),
                "{reason}"
            );
        }
        let cut = gzip(&b"{\"id\":1}".repeat(100));
        let reason = refusal(&declaring("gzip", cut[..cut.len() - 9].to_vec()));
        assert!(reason.contains("is not"), "{reason}");
    }

    /// Some thousand bytes stand for all of this.
    #[test]
    fn no_payload_grows_without_bound() {
        let blanks = vec![b' '; MOST + 1];
        let fits = declaring("gzip", gzip(&blanks[1..]));
        assert_eq!(decoded(&fits).unwrap().len(), MOST);
        for (encoding, bomb) in [
            ("gzip", gzip(&blanks)),
            ("deflate", zlib(&blanks)),
            ("zstd", zstd(&blanks)),
        ] {
            assert!(bomb.len() < MOST / 100, "{} bytes", bomb.len());
            let reason = refusal(&declaring(encoding, bomb));
            assert!(reason.contains("more than 16777216 bytes"), "{reason}");
        }
    }

    #[test]
    fn what_no_one_declared_is_guessed() {
        let text = b"{\"id\":1}".repeat(100);
        for (body, what) in [
            (gzip(&text), "gzip"),
            (zlib(&text), "deflate"),
            (zstd(&text), "zstd"),
            (b"\xff\xfe{\0".to_vec(), "UTF-16"),
        ] {
            assert!(guess(&body).unwrap().contains(what), "{what}");
        }
        for body in [&b"{"[..], b"", b"x^ is text"] {
            assert_eq!(guess(body), None);
        }
    }
}
