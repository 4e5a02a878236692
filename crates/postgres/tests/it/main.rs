//! On a PostgreSQL server: `./tests/run postgres`.
#![allow(clippy::unwrap_used)]

mod conformance;
mod support;
