//! What is particular to SQLite; what every source and store promises is in `conformance`.

#![allow(clippy::unwrap_used)]

mod clocks;
mod conformance;
mod database;
mod grammar;
mod outbox;
mod processes;
mod queue;
mod store;
mod support;
mod transaction;
mod turns;
