//! The broker-agnostic heart of onlyonce.

mod error;
mod key;
pub mod memory;
mod message;
mod params;
mod sink;
mod source;
mod store;

pub use error::{BoxError, Error, ErrorKind};
pub use key::{DedupKey, Fingerprint, IDEMPOTENCY_KEY, KeyDigest, KeyPolicy, Scope};
pub use message::{Attributes, Delivery, Lease, Message, Receipt};
pub use params::Params;
pub use sink::Sink;
pub use source::{Action, Answer, Capabilities, Inspection, Limit, Ordering, Settlement, Source};
pub use store::{
    Claim, Claimed, Completion, Fenced, Held, Owner, Store, Token, Transaction, TransactionalStore,
    Verdicts,
};
