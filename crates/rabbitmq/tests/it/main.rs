//! RabbitMQ's own, against a live broker: `./tests/run rabbitmq`. What changes the whole node is in `node`, which runs alone.

#![allow(clippy::unwrap_used, reason = "its helpers are test code, too")]

mod broker;
mod common;
mod conformance;
mod dead_letters;
mod faults;
mod hostile;
mod node;
mod raw;
mod returns;
