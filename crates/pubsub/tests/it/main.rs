//! Pub/Sub, against scripted answers and against Google's emulator: `./tests/run pubsub`.

#![allow(clippy::unwrap_used, reason = "its helpers are test code, too")]

mod common;
mod conformance;
mod emulator;
mod faults;
mod scripted;
