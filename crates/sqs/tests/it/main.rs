//! SQS, against scripted answers and against two emulators: `./tests/run sqs`.

#![allow(clippy::unwrap_used, reason = "its helpers are test code, too")]

mod broker;
mod common;
mod conformance;
mod emulators;
mod rotation;
mod scripted;
