//! Handlers: plain async functions whose parameters say what they need of the message.

mod batch;
mod content;
mod extract;
mod failure;
mod running;
mod service;

pub(crate) use batch::{Answer, Together};
pub use batch::{Batch, Item};
pub(crate) use extract::States;
pub use extract::{Context, FromMessage, Json, MadeOf, Native, Parts, Rejection, State};
pub(crate) use failure::OnFailure;
pub use failure::{Failure, HandlerError, IntoOutcome, Outcome};
pub use running::{Running, Waiting};
pub(crate) use service::{Callable, TxSlot, callable, within};
pub use service::{
    Handler, HandlerService, NoTx, Outside, OutsideTransaction, Request, TxFn, WithTx,
    outside_transaction,
};
