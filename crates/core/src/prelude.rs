//! What most workers use: `use onlyonce::prelude::*;`.

pub use crate::{
    Context, DedupKey, Failure, Json, KeyPolicy, Message, Outcome, Pipeline, RetryPolicy, State,
};
