use bytes::Bytes;
use onlyonce::rabbitmq::filter::Filter;
use onlyonce::rabbitmq::headers;
use onlyonce::rabbitmq::lapin::protocol::basic::parse_properties;

use crate::headers::anonymous;

/// Type, channel and length before the payload; after it, the end.
const HEAD: usize = 7;
const END: usize = 1;
const CONTENT_HEADER: u8 = 2;
/// Class, weight and size of the body.
const BEFORE_PROPERTIES: usize = 12;

/// What a broker may send: it does not matter how it is cut, and the client can parse the properties that come out. The
/// first byte says how long the pieces are.
pub fn rabbitmq_frames(data: &[u8]) {
    let Some((&size, frames)) = data.split_first() else {
        return;
    };
    let (whole, failed) = filtered(frames, frames.len().max(1));
    let (pieces, failed_too) = filtered(frames, usize::from(size).max(1));
    assert_eq!((&whole, &failed), (&pieces, &failed_too));
    for frame in complete(&whole) {
        if frame[0] == CONTENT_HEADER {
            check(&frame[HEAD + BEFORE_PROPERTIES..frame.len() - END]);
        }
    }
}

fn filtered(frames: &[u8], size: usize) -> (Vec<u8>, Option<String>) {
    let (mut filter, mut output) = (Filter::default(), Vec::new());
    for piece in frames.chunks(size) {
        if let Err(error) = filter.read(piece, &mut output) {
            return (output, Some(error.to_string()));
        }
    }
    (output, None)
}

/// The frames that are there whole.
fn complete(mut output: &[u8]) -> Vec<&[u8]> {
    let mut frames = Vec::new();
    // The answer to a client of another version is no frame.
    while output.len() > HEAD && output[0] != b'A' {
        let length: [u8; 4] = output[3..HEAD].try_into().expect("four bytes");
        let length = HEAD + u32::from_be_bytes(length) as usize + END;
        let Some(frame) = output.split_off(..length) else {
            break;
        };
        frames.push(frame);
    }
    frames
}

fn check(properties: &[u8]) {
    let (rest, parsed) = parse_properties(properties).expect("the client can parse it");
    assert_eq!(rest, b"");
    let (message, malformed) = headers::read(&parsed, Bytes::new(), None);
    let written = headers::write(&message, None).expect("what was read can be written");
    let (again, none) = headers::read(&written, Bytes::new(), None);
    assert_eq!(none, None);
    assert_eq!(anonymous(again), anonymous(message), "{malformed:?}");
}
