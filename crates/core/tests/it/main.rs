//! The pipeline on the in-memory queue and store, in virtual time.

#![allow(clippy::unwrap_used, reason = "its helpers are test code, too")]
#![allow(unreachable_pub, reason = "tests have no users")]

mod attempts;
mod batches;
mod busy_keys;
mod conflicts;
mod cut_off;
mod handlers;
mod hanging;
mod layers;
mod leases;
mod logs;
mod look_ups;
mod pipeline;
mod prefetch;
mod regressions;
mod relay;
mod requests;
mod set_aside;
mod support;
mod threads;
mod together;
