//! What the broker sends, before the client parses it. [`lapin`] ends the connection at text that is not UTF-8, and its
//! parser of header tables calls itself for each table within a table, until the stack of its thread overflows; each value
//! that it makes takes up to a hundred times its bytes. So one message could stop every worker that gets it. The filter
//! hands on every frame that the client can take as it is, byte for byte, and changes the others:
//!
//! - Text that is not UTF-8, in a property, an exchange or a routing key, becomes `hex:` and its bytes in hexadecimal.
//! - Headers that are nested more than [32 deep](MAX_DEPTH), that are not in a form of AMQP, that would take more than
//!   [20 times](FACTOR) their bytes and [64 KiB](SLACK), or that do not fit into a frame, give way to the header
//!   `x-onlyonce-unreadable`, which says why. All other properties stay. [`headers::read`](crate::headers::read) calls
//!   such a message malformed.
//!
//! A header `x-onlyonce-unreadable` that a producer sent becomes `X-onlyonce-unreadable`, unless it is on a delayed copy,
//! which has the header `x-onlyonce-attempt` as well.
//!
//! Every connection of this crate goes through it, [`Config::connect`](crate::Config::connect) included.

mod content;
mod method;
mod stream;
mod table;
mod wire;

use std::io;
use std::sync::{Arc, OnceLock};

pub(crate) use content::{RAW, UNREADABLE};
pub(crate) use stream::connector;
pub use table::{FACTOR, MAX_DEPTH, SLACK};

/// Type, channel and the length of the payload.
const HEAD: usize = 7;
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;
/// Ends each frame.
const END: u8 = 0xCE;
/// The first byte of a protocol header, with which a server answers a client of another version before it hangs up.
const OTHER_VERSION: u8 = b'A';
/// Of a frame, in bytes. A content header has no bound of its own: what the broker adds to it, or translates from another
/// protocol, may make it longer than the client's frames. So it can be as long as a message.
const LARGEST: usize = 128 << 20;
/// The least that a client must take, and so what holds before there is an agreement.
const LEAST_FRAME_MAX: usize = 8_192;

/// What the broker said of itself.
#[derive(Debug, Default)]
pub(crate) struct Broker {
    /// Major and minor number.
    version: OnceLock<(u16, u16)>,
}

impl Broker {
    /// Major and minor number of its version, if it told.
    pub(crate) fn version(&self) -> Option<(u16, u16)> {
        self.version.get().copied()
    }
}

/// Reads the bytes of one connection, from the first, and writes what the client can parse.
///
/// It holds one frame at most.
#[derive(Debug)]
pub struct Filter {
    state: State,
    /// Of the frame that is being read: its head, then all of it if it may have to be changed.
    held: Vec<u8>,
    /// The longest frame that the client takes.
    frame_max: usize,
    broker: Arc<Broker>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Head,
    /// How many bytes of a frame are still to be held.
    Holding(usize),
    /// How many bytes of a frame are still to be handed on.
    Passing(usize),
    /// No more frames.
    OtherVersion,
}

impl Default for Filter {
    fn default() -> Self {
        Self::new(Arc::default())
    }
}

impl Filter {
    pub(crate) fn new(broker: Arc<Broker>) -> Self {
        Self {
            state: State::Head,
            held: Vec::new(),
            frame_max: LEAST_FRAME_MAX,
            broker,
        }
    }

    /// Reads the next bytes, however they were cut, and appends to `output` what is known to be whole.
    ///
    /// # Errors
    /// What the broker sends is not AMQP. Nothing after it can be read.
    pub fn read(&mut self, mut input: &[u8], output: &mut Vec<u8>) -> io::Result<()> {
        while let Some(first) = input.first() {
            match self.state {
                State::Head if self.held.is_empty() && *first == OTHER_VERSION => {
                    self.state = State::OtherVersion;
                }
                State::Head => {
                    let missing = HEAD - self.held.len();
                    if take(&mut input, missing, &mut self.held) == missing {
                        self.begin(output)?;
                    }
                }
                State::Holding(left) => {
                    let left = left - take(&mut input, left, &mut self.held);
                    self.state = State::Holding(left);
                    if left == 0 {
                        self.finish(output)?;
                    }
                }
                State::Passing(left) => {
                    let left = left - take(&mut input, left, output);
                    self.state = State::Passing(left);
                    if left == 0 {
                        check_end(output.last())?;
                        self.state = State::Head;
                    }
                }
                State::OtherVersion => {
                    output.extend_from_slice(input);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The head of a frame is there.
    fn begin(&mut self, output: &mut Vec<u8>) -> io::Result<()> {
        let (kind, length) = (self.held[0], &self.held[3..]);
        let length = length
            .iter()
            .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
        let Some(length) = usize::try_from(length).ok().filter(|n| *n <= LARGEST) else {
            return Err(wire::invalid(format!(
                "a frame of {length} bytes; the most is {LARGEST}"
            )));
        };
        match kind {
            METHOD | HEADER => self.state = State::Holding(length + 1),
            BODY | HEARTBEAT => {
                output.append(&mut self.held);
                self.state = State::Passing(length + 1);
            }
            _ => return Err(wire::invalid(format!("a frame of the unknown type {kind}"))),
        }
        Ok(())
    }

    /// A frame is held whole.
    fn finish(&mut self, output: &mut Vec<u8>) -> io::Result<()> {
        let mut frame = std::mem::take(&mut self.held);
        self.state = State::Head;
        check_end(frame.pop().as_ref())?;
        let (head, payload) = frame.split_at(HEAD);
        let payload = if head[0] == METHOD {
            self.learn(payload);
            method::readable(payload)
        } else {
            content::readable(payload, self.frame_max - HEAD - 1)?
        };
        // No longer than it was, or than the longest frame.
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        output.extend_from_slice(&head[..HEAD - 4]);
        output.extend_from_slice(&length.to_be_bytes());
        output.extend_from_slice(&payload);
        output.push(END);
        Ok(())
    }

    /// What the broker says of itself and of the connection, as far as it matters here.
    fn learn(&mut self, payload: &[u8]) {
        if let Some(version) = method::version(payload) {
            let _ = self.broker.version.set(version);
        }
        if let Some(frame_max) = method::frame_max(payload) {
            self.frame_max = frame_max.max(LEAST_FRAME_MAX);
        }
    }
}

/// Moves up to `most` bytes; says how many.
fn take(input: &mut &[u8], most: usize, output: &mut Vec<u8>) -> usize {
    let (taken, rest) = input.split_at(most.min(input.len()));
    output.extend_from_slice(taken);
    *input = rest;
    taken.len()
}

fn check_end(last: Option<&u8>) -> io::Result<()> {
    match last {
        Some(&END) => Ok(()),
        _ => Err(wire::invalid("a frame is longer than it says".into())),
    }
}

#[cfg(test)]
mod tests;
