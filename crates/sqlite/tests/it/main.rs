//! What is particular to SQLite; what every source and store promises is in `conformance`.

#![allow(clippy::unwrap_used)]

mod conformance;
mod grammar;
mod processes;
mod queue;
mod store;
mod support;
mod transaction;
