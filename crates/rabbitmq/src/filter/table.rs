//! Header tables, read without recursion and without making values of them.

use super::content::UNREADABLE;
use super::wire;
use crate::headers::ATTEMPT;

/// Tables and arrays within the headers may be nested so deep.
pub const MAX_DEPTH: usize = 32;
/// Headers may take this many times their bytes in memory, and [`SLACK`] beyond.
///
/// So a table of texts is never too much, however many and short they are.
pub const FACTOR: usize = 20;
/// See [`FACTOR`]. In bytes.
pub const SLACK: usize = 64 << 10;

// What values take in memory at most, as the client's values or as attributes, with what the allocator adds.
/// An entry of a B-tree whose nodes are as empty as they may be.
const ENTRY: usize = 128;
/// The first node of a B-tree, which is the least that it takes.
const TABLE: usize = 640;
/// An element of a vector that has just grown.
const ELEMENT: usize = 64;
/// The least that a vector takes.
const ARRAY: usize = 160;
/// What is allocated takes this more than its bytes.
const ALLOCATION: usize = 32;
/// A byte of text, as JSON may write it (`\u0000`).
const BYTE: usize = 6;

/// A table or an array that is being read.
struct Level<'a> {
    rest: &'a [u8],
    named: bool,
}

/// Checks a table, given without its length. Returns the places where a name begins that only this filter may write; the
/// error says why the client should not parse the table.
pub(super) fn check(table: &[u8]) -> Result<Vec<usize>, String> {
    let most = SLACK.saturating_add(table.len().saturating_mul(FACTOR));
    let mut memory = TABLE;
    let (mut forged, mut is_copy) = (Vec::new(), false);
    let mut open = vec![Level {
        rest: table,
        named: true,
    }];
    loop {
        let depth = open.len();
        let Some(level) = open.last_mut() else { break };
        if level.rest.is_empty() {
            open.pop();
            continue;
        }
        if level.named {
            let at = table.len() - level.rest.len() + 1;
            let name = name(&mut level.rest)?;
            memory += ENTRY + text(name);
            is_copy |= depth == 1 && name == ATTEMPT.as_bytes();
            if depth == 1 && name == UNREADABLE.as_bytes() {
                forged.push(at);
            }
        } else {
            memory += ELEMENT;
        }
        let inner = value(&mut level.rest, &mut memory)?;
        if memory > most {
            return Err(format!(
                "as values they would take more than {most} bytes of memory, {FACTOR} times their own and {SLACK}"
            ));
        }
        if let Some(inner) = inner {
            if depth > MAX_DEPTH {
                return Err(format!("they are nested more than {MAX_DEPTH} deep"));
            }
            open.push(inner);
        }
    }
    if is_copy {
        forged.clear();
    }
    Ok(forged)
}

fn name<'a>(input: &mut &'a [u8]) -> Result<&'a [u8], String> {
    let name = wire::short(input).ok_or_else(broken)?;
    match std::str::from_utf8(name) {
        Ok(_) => Ok(name),
        Err(_) => {
            let shown = wire::text(name);
            let shown = String::from_utf8_lossy(&shown);
            Err(format!("the name {shown} is not UTF-8"))
        }
    }
}

/// Splits off a value: whole, or the beginning of a table or an array, whose content is returned.
fn value<'a>(input: &mut &'a [u8], memory: &mut usize) -> Result<Option<Level<'a>>, String> {
    let kind = wire::octet(input).ok_or_else(broken)?;
    let size = match kind {
        b'V' => 0,
        b't' | b'b' | b'B' => 1,
        b's' | b'U' | b'u' => 2,
        b'I' | b'i' | b'f' => 4,
        b'D' => 5,
        b'L' | b'l' | b'd' | b'T' => 8,
        b'S' | b'x' => {
            *memory += text(wire::long(input).ok_or_else(broken)?);
            return Ok(None);
        }
        b'F' | b'A' => {
            let rest = wire::long(input).ok_or_else(broken)?;
            let named = kind == b'F';
            if !rest.is_empty() {
                *memory += if named { TABLE } else { ARRAY };
            }
            return Ok(Some(Level { rest, named }));
        }
        _ => return Err(format!("a value is of the unknown type {kind:#04x}")),
    };
    wire::bytes(input, size).ok_or_else(broken)?;
    Ok(None)
}

fn text(bytes: &[u8]) -> usize {
    match bytes.len() {
        0 => 0,
        length => ALLOCATION + length * BYTE,
    }
}

fn broken() -> String {
    "a value is longer than what it is in".into()
}
