//! RabbitMQ for onlyonce: a source with manual acks and a sink with publisher confirms.

mod acks;
mod config;
mod connection;
mod delay;
mod error;
mod headers;
mod publisher;
mod sink;
mod source;

pub use config::Config;
pub use sink::RabbitSink;
pub use source::RabbitSource;
