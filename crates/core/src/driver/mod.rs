//! What an adapter for a broker or a store implements, and what it is given for that.
//!
//! A broker is a [`Source`] and a [`Sink`], a store a [`Store`] and, where it has transactions, a [`TransactionalStore`], which
//! can have an [`Outbox`]. The suites of `onlyonce-testkit` show whether they do what their documentation here asks of them.
//!
//! Structs here can get more fields, and are made by their constructors. The enums that an adapter must decide on
//! ([`Disposition`], [`SettleResult`], [`ExtendResult`], [`ClaimResult`], [`FetchResult`],
//! [`OutboxDisposition`]) are complete: one more is a change that each adapter has to be adapted to, so it does not compile until
//! it is.

mod ack_window;
mod delivery;
mod digest;
mod endpoint;
mod outbox;
mod params;
mod printable;
mod ready;
mod receipt;
mod sink;
mod source;
mod standing;
mod store;

pub use crate::handler::{Running, Waiting};
pub use ack_window::AckWindow;
pub use delivery::{Delivery, Lease};
pub use digest::{Fingerprint, KeyDigest, Scope};
pub use endpoint::{check_endpoint, exposed_to, has_credentials};
pub use outbox::{
    Fetch, FetchResult, Outbox, OutboxDisposition, OutboxSettlement, OutboxTransaction, Outgoing,
    OutgoingId, SetAside,
};
pub use params::Params;
pub use printable::Printable;
pub use ready::Ready;
pub use receipt::Receipt;
pub use sink::{Sink, SinkInfo};
pub use source::{
    Acks, Capabilities, Disposition, ExtendResult, Ordering, QueueInfo, ReceiveLimits,
    SettleResult, Settlement, Source,
};
pub use standing::Standing;
pub use store::{
    Claim, ClaimResult, Completion, Durability, Fenced, HeldClaim, LookUp, LookedUp, Owner,
    Precondition, Starts, Store, StoreInfo, Token, Transaction, TransactionalStore, Verdicts,
};
