//! Public conformance suites for any onlyonce source and store.

mod gap;
mod macros;
pub mod source;
pub mod store;
pub mod transactional_store;

pub use gap::Gap;
