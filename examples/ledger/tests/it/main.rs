//! The `ledger` program on an embedded queue.

#![allow(clippy::unwrap_used, reason = "its helpers are test code, too")]
#![allow(unreachable_pub, reason = "tests have no users")]

mod common;
mod demo;
mod events;
mod poison;
#[cfg(unix)]
mod stale;
