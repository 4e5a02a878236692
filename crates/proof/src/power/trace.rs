//! What the recorder wrote down: everything that happened to the files of a folder, in its order.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The file to which a worker writes its notes. They are about the files, and are not lost with them.
pub const NOTES: &str = "notes";

/// SQLite maps it into memory and makes it anew after a power failure: it is never looked at again.
const SHARED_MEMORY: &str = "-shm";

/// The recorder's `struct head`.
const HEAD: usize = 24;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Create(String),
    Unlink(String),
    Write {
        file: String,
        at: usize,
        data: Arc<[u8]>,
    },
    Truncate {
        file: String,
        size: usize,
    },
    Sync(String),
    /// Of the folder itself: which files there are.
    SyncFolder,
    Note(Note),
}

/// What a worker knows. What it was answered is a promise from then on.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum Note {
    /// It is about to open the database.
    Opening,
    Opened,
    /// Messages whose publication was confirmed.
    Published(Vec<u32>),
    /// The highest token of a batch of claims.
    Token(u64),
    /// The records that were confirmed, with their effects where these are in the same transaction.
    Recorded(Vec<[u8; 16]>),
    /// Messages, by the queue's own ids, whose acknowledgement was confirmed.
    Acked(Vec<i64>),
    /// The handler of this message began, by the queue's own id.
    Ran(i64),
}

/// Whether a file of this name is part of what the power failure leaves.
pub fn matters(name: &str) -> bool {
    name != NOTES && !name.ends_with(SHARED_MEMORY)
}

/// Reads a whole trace.
pub fn read(mut bytes: &[u8]) -> Result<Vec<Event>, String> {
    let mut events = Vec::new();
    while !bytes.is_empty() {
        events.extend(event(&mut bytes)?);
    }
    Ok(events)
}

/// The next event, if it is one that matters.
fn event(bytes: &mut &[u8]) -> Result<Option<Event>, String> {
    let head = take(bytes, HEAD)?;
    let (kind, name) = (short(&head[..4]), short(&head[4..8]));
    let (at, size) = (long(&head[8..16]), long(&head[16..]));
    let name = take(bytes, name as usize)?;
    let file = String::from_utf8(name.to_vec()).map_err(|_| "a file's name is not UTF-8")?;
    let data = take(bytes, size)?;
    if file == NOTES {
        return note(kind, data);
    }
    if !matters(&file) {
        return Ok(None);
    }
    Ok(Some(match char::from_u32(kind) {
        Some('c') => Event::Create(file),
        Some('u') => Event::Unlink(file),
        Some('t') => Event::Truncate { file, size: at },
        Some('s') if file.is_empty() => Event::SyncFolder,
        Some('s') => Event::Sync(file),
        Some('w') => Event::Write {
            file,
            at,
            data: data.into(),
        },
        _ => return Err(format!("an event of the unknown kind {kind}")),
    }))
}

fn note(kind: u32, line: &[u8]) -> Result<Option<Event>, String> {
    if char::from_u32(kind) != Some('w') {
        return Ok(None);
    }
    let note = serde_json::from_slice(line).map_err(|error| format!("a broken note: {error}"))?;
    Ok(Some(Event::Note(note)))
}

fn take<'a>(bytes: &mut &'a [u8], size: usize) -> Result<&'a [u8], String> {
    let (taken, rest) = bytes.split_at_checked(size).ok_or("the trace breaks off")?;
    *bytes = rest;
    Ok(taken)
}

fn short(bytes: &[u8]) -> u32 {
    u32::from_ne_bytes(bytes.try_into().unwrap_or_default())
}

fn long(bytes: &[u8]) -> usize {
    u64::from_ne_bytes(bytes.try_into().unwrap_or_default()) as usize
}
