//! The broker-agnostic heart of onlyonce.

mod error;
mod handler;
mod key;
pub mod memory;
mod message;
mod params;
mod pipeline;
mod printable;
mod sink;
mod source;
mod store;

pub use error::{BoxError, Error, ErrorKind};
pub use handler::{
    Context, Failure, FromMessage, Handler, HandlerError, HandlerService, IntoOutcome, Json, NoTx,
    Outcome, Parts, Rejection, Request, Running, State, TxFn, Waiting, WithTx,
};
pub use key::{DedupKey, Fingerprint, IDEMPOTENCY_KEY, KeyDigest, KeyPolicy, Scope};
pub use message::{Attributes, Delivery, Lease, Message, Receipt};
pub use params::Params;
pub use pipeline::{
    Builder, ConfigRisk, Counters, DEAD_LETTER_ATTEMPTS, DEAD_LETTER_CONSUMER, DEAD_LETTER_QUEUE,
    DEAD_LETTER_REASON, InDoubt, Pipeline, Report, RetryPolicy,
};
pub use printable::Printable;
pub use sink::{Sink, SinkInfo};
pub use source::{
    Capabilities, Disposition, Ordering, QueueInfo, ReceiveLimits, SettleResult, Settlement, Source,
};
pub use store::{
    Claim, ClaimResult, Completion, Fenced, HeldClaim, Owner, Starts, Store, Token, Transaction,
    TransactionalStore, Verdicts,
};
