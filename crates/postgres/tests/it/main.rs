//! On a PostgreSQL server: `./tests/run postgres`.
#![allow(clippy::unwrap_used)]

mod conflicts;
mod conformance;
mod debezium;
mod faults;
mod handlers;
mod looks;
mod migrations;
mod pruning;
mod restores;
mod servers;
mod sharing;
mod support;
