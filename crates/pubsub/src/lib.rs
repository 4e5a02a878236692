//! Google Pub/Sub for onlyonce.

mod config;
mod connection;
mod error;
mod leases;
pub mod message;
mod pulls;
mod settling;
mod sink;
mod source;
mod subscription;

pub use config::Config;
pub use leases::PubSubReceipt;
pub use sink::PubSubSink;
pub use source::PubSubSource;

pub use google_cloud_auth;
/// The service's own messages, as tonic's stubs.
pub use googleapis_tonic_google_pubsub_v1::google::pubsub::v1;
