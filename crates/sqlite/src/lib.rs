//! SQLite for onlyonce.

mod claims;
mod config;
mod database;
mod error;
mod filter;
mod held;
mod inbox;
mod messages;
mod queue;
mod records;
mod session;
mod store;
mod transaction;
mod turn;
mod worker;

pub use config::Config;
pub use database::{Commits, Database};
pub use messages::DEAD_LETTER_REASON;
pub use queue::SqliteQueue;
pub use store::SqliteStore;
pub use transaction::SqliteTx;
