//! What most workers use: `use onlyonce::prelude::*;`.

pub use crate::{
    Batch, Context, DedupKey, Failure, Json, KeyPolicy, Message, Outcome, Pipeline, RetryPolicy,
    State,
};
