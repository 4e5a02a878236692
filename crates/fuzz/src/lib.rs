//! Fuzz targets: each takes any bytes, hands them to code that reads what comes from outside, and panics where that
//! code breaks its word. None may panic otherwise, hang, or keep what it was given.
//!
//! They run in two ways:
//!
//! - `cargo test -p fuzz` runs each on its corpus and on changes of it, the same every time;
//!   `ONLYONCE_SECONDS=60 cargo test -p fuzz` looks for new ones, for a minute in each target;
//! - `cargo fuzz run --fuzz-dir crates/fuzz/cargo-fuzz TARGET` lets libFuzzer look for longer. It needs a nightly
//!   toolchain, or `RUSTC_BOOTSTRAP=1`.
//!
//! An input that found something goes into `corpus/TARGET`, so that it stays found.

mod frames;
mod headers;
mod input;
mod keys;
mod params;
mod pipeline;
mod pubsub;
mod sqlite;
mod sqs;
mod urls;

pub use frames::rabbitmq_frames;
pub use headers::{rabbitmq_headers, rabbitmq_messages};
pub use keys::keys;
pub use params::params;
pub use pipeline::pipeline;
pub use pubsub::{pubsub_messages, pubsub_received};
pub use sqlite::{sqlite_files, sqlite_records, sqlite_rows, sqlite_settings};
pub use sqs::{sqs_messages, sqs_received};
pub use urls::{secrets, urls};

/// Panics where something is wrong with what is made of these bytes.
pub type Target = fn(&[u8]);

/// Every target by its name.
pub const TARGETS: [(&str, Target); 16] = [
    ("keys", keys),
    ("params", params),
    ("pipeline", pipeline),
    ("pubsub_messages", pubsub_messages),
    ("pubsub_received", pubsub_received),
    ("rabbitmq_frames", rabbitmq_frames),
    ("rabbitmq_headers", rabbitmq_headers),
    ("rabbitmq_messages", rabbitmq_messages),
    ("secrets", secrets),
    ("sqlite_files", sqlite_files),
    ("sqlite_records", sqlite_records),
    ("sqlite_rows", sqlite_rows),
    ("sqlite_settings", sqlite_settings),
    ("sqs_messages", sqs_messages),
    ("sqs_received", sqs_received),
    ("urls", urls),
];
