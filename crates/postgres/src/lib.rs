//! PostgreSQL for onlyonce.

mod claims;
mod config;
mod connections;
mod error;
mod info;
mod literal;
mod migration;
mod names;
mod outbox;
mod sharing;
mod store;
mod transaction;

pub use config::{Config, Isolation};
pub use migration::migration;
pub use outbox::PgOutbox;
pub use sqlx;
pub use store::PgStore;
pub use transaction::PgTx;
