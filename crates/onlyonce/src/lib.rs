//! Write one async function; run it on any queue; every message takes effect once.
//!
//! A queue and a store are named by a URL, and each kind is a cargo feature:
//!
//! | feature | source and sink | store |
//! |---|---|---|
//! | (always) | `memory:NAME` | `memory:NAME` |
//! | `sqlite` | `sqlite:PATH?queue=NAME` | `sqlite:PATH` |
//! | `rabbitmq` | `amqp://USER:PASSWORD@HOST:PORT/VHOST?queue=NAME` | |
//! | `sqs` | `https://sqs.REGION.amazonaws.com/ACCOUNT/NAME`, `sqs://NAME?region=REGION`, `arn:aws:sqs:REGION:ACCOUNT:NAME` | |
//!
//! What is promised, and under which assumptions, stands with the four modes of [`Pipeline`].

mod registry;

/// The README's code compiles.
#[cfg(all(doctest, feature = "rabbitmq", feature = "sqlite"))]
#[doc = include_str!("../../../README.md")]
pub struct Readme;

pub use onlyonce_core::*;
pub use registry::{sink, source, store};

#[cfg(feature = "rabbitmq")]
pub use onlyonce_rabbitmq as rabbitmq;
#[cfg(feature = "sqlite")]
pub use onlyonce_sqlite as sqlite;
#[cfg(feature = "sqs")]
pub use onlyonce_sqs as sqs;
