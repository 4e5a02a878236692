//! Write one async function; run it on any queue; every message takes effect once.
//!
//! A queue and a store are named by a URL, and each kind is a cargo feature:
//!
//! | feature | source and sink | store |
//! |---|---|---|
//! | (always) | `memory:NAME` | `memory:NAME` |
//! | `sqlite` | `sqlite:PATH?queue=NAME` | `sqlite:PATH` |
//! | `postgres` | | `postgres://USER:PASSWORD@HOST:PORT/DATABASE` |
//! | `rabbitmq` | `amqp://USER:PASSWORD@HOST:PORT/VHOST?queue=NAME` | |
//! | `pubsub` | `pubsub://PROJECT/SUBSCRIPTION`, `pubsub://PROJECT/topics/TOPIC`, `projects/PROJECT/subscriptions/SUBSCRIPTION` | |
//! | `sqs` | `https://sqs.REGION.amazonaws.com/ACCOUNT/NAME`, `sqs://NAME?region=REGION`, `arn:aws:sqs:REGION:ACCOUNT:NAME` | |
//!
//! What is promised, and under which assumptions, stands with the four modes of [`Pipeline`].
//!
//! | module | for whom |
//! |---|---|
//! | the root, and most of it in [`prelude`] | who writes a worker: pipeline, settings, what handlers take and return |
//! | [`attributes`] | who writes or reads messages elsewhere: the names of the attributes that the pipeline knows |
//! | [`handler`] | who writes an extractor or a `tower` layer, or tests a handler without a pipeline |
//! | [`driver`] | who writes an adapter for another broker or store |
//! | [`memory`] | tests and demos: a queue and a store in memory |

mod registry;

/// The README's code compiles.
#[cfg(all(
    doctest,
    feature = "postgres",
    feature = "rabbitmq",
    feature = "sqlite"
))]
#[doc = include_str!("../../../README.md")]
pub struct Readme;

pub use onlyonce_core::*;
pub use registry::{sink, source, store};

#[cfg(feature = "postgres")]
pub use onlyonce_postgres as postgres;
#[cfg(feature = "pubsub")]
pub use onlyonce_pubsub as pubsub;
#[cfg(feature = "rabbitmq")]
pub use onlyonce_rabbitmq as rabbitmq;
#[cfg(feature = "sqlite")]
pub use onlyonce_sqlite as sqlite;
#[cfg(feature = "sqs")]
pub use onlyonce_sqs as sqs;
