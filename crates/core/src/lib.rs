//! The broker-agnostic heart of onlyonce.

pub mod attributes;
pub mod driver;
mod error;
pub mod handler;
mod key;
pub mod memory;
mod message;
mod pipeline;
pub mod prelude;
mod relay;

pub use error::{BoxError, Error, ErrorKind};
pub use handler::{Batch, Context, Failure, Json, Outcome, State};
pub use key::{DedupKey, KeyPolicy};
pub use message::{Attributes, Message};
pub use pipeline::{
    Builder, ConfigRisk, Counters, InDoubt, Pipeline, Report, RetryPolicy, RunError,
};
pub use relay::{Relay, RelayReport};
