//! The suites, on what must pass them and on what must not; the simulated broker; the proxy.

#![allow(clippy::unwrap_used, reason = "its helpers are test code, too")]

mod log;
mod log_pipelines;
mod memory;
mod planted;
mod proxy;
mod simulated;
