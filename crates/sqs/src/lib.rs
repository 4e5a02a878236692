//! AWS SQS for onlyonce.
mod batch;
mod config;
mod error;
mod leases;
mod message;
mod polls;
mod queue;
mod settings;
mod sink;
mod source;

pub use aws_sdk_sqs;

pub use config::Config;
pub use sink::SqsSink;
pub use source::SqsSource;
