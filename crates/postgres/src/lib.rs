//! PostgreSQL for onlyonce: a dedup store whose transactions carry your effects, for workers on any number of machines, and an
//! outbox for the messages that are to leave if and only if an effect stayed.
//!
//! [`PgStore`] remembers which messages took effect, [`PgTx`] is the transaction that a handler gets in transactional mode, and
//! is [sqlx](https://docs.rs/sqlx)'s connection; [`PgOutbox`] is what a [`Relay`](onlyonce_core::Relay) publishes from.
//!
//! ```no_run
//! use onlyonce_core::memory::MemoryQueue;
//! use onlyonce_core::{Failure, Pipeline};
//! use onlyonce_postgres::{PgStore, PgTx, sqlx};
//!
//! async fn pay(cents: String, tx: &mut PgTx) -> Result<(), Failure> {
//!     let cents: i64 = cents.parse()?;
//!     sqlx::query("UPDATE account SET cents = cents + $1 WHERE id = 7")
//!         .bind(cents)
//!         .execute(&mut **tx)
//!         .await?;
//!     Ok(())
//! }
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let store = PgStore::open("postgres://worker@db.example/shop".parse()?).await?;
//! Pipeline::transactional(MemoryQueue::new("payments"), store).run(pay).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Add `sqlx` with the features that your own types need (`json`, `uuid`, `chrono`, the macros); it must be the version that is
//! [re-exported](sqlx) here.
//!
//! # URLs
//!
//! `postgres://USER:PASSWORD@HOST:PORT/DATABASE`, PostgreSQL 13 or newer; it was run on 13.23, 15.18 and 18.6. What is not given comes from where libpq looks:
//! `PGPASSWORD`, `~/.pgpass` and so on (<https://www.postgresql.org/docs/current/libpq-envars.html>).
//!
//! | parameter | default | |
//! |---|---|---|
//! | `sslmode`, `sslrootcert`, `sslcert`, `sslkey` | `prefer` | TLS, in libpq's words: use `verify-full` (<https://www.postgresql.org/docs/current/libpq-ssl.html>) |
//! | `host=/run/postgresql` | | a Unix socket |
//! | `application_name=worker` | | shown in `pg_stat_activity` |
//! | `schema=messaging` | `public` | where the store's tables are |
//! | `prefix=dedup_` | `onlyonce_` | how their names begin |
//! | `connections=8` | 8 | handlers' transactions at the same time; two more connections are for claims and look-ups |
//! | `isolation=serializable` | `read-committed` | also `repeatable-read`: how strictly handlers' transactions are kept apart |
//! | `lock_timeout=5s` | 5 s | how long a transaction waits for a lock before it is done again |
//! | `idle_timeout=60s` | 60 s | after which the server ends the transaction of a worker that hangs, with its locks |
//! | `pooler=transaction` | `none` | there is a PgBouncer, or another pooler in transaction mode, in between |
//! | `migrate=false` | `true` | the tables are made by somebody else: see [`migration`] |
//!
//! # Delivery semantics
//!
//! A record commits in the transaction of the effect, and its key is unique. Of two workers that run one message at the same time
//! the second waits until the first has committed, for `lock_timeout` at most, is told so, and rolls back.
//!
//! | on disk before it is answered | may be taken back by a crash of the server |
//! |---|---|
//! | complete, the commit of a transaction | claim, renew, start, release, prune, settlements of the outbox |
//!
//! What is taken back costs a second run or a second publication, which the record, or the next consumer, recognises. Tokens rise
//! even so, over crashes, failovers and restored backups: where the server has lost some, an unlogged table is empty, and the
//! sequence jumps ahead, on disk, before the next token is given.
//!
//! - A commit that the server refuses (a deferred constraint, an aborted transaction, a trigger) has not happened, and is the
//!   failure of the message that caused it. A commit whose answer was lost is asked for.
//! - A deadlock (40P01), a serialization failure (40001) and a lock time-out (55P03) are conflicts: the message runs again, by
//!   itself, and that is no attempt of it. A handler has to return the error of sqlx, or one that has it as its source.
//! - `COMMIT` and `ROLLBACK` of a handler's are found out before its message is acked.
//! - Claims, leases and retention end by the server's clock.
//!
//! It assumes that the server keeps what it has committed. `fsync`, `full_page_writes` or `synchronous_commit` at `off`, and a primary
//! with standby servers of which no commit waits for one, are refused at the start, as are standby servers themselves. After a
//! failover to an asynchronous standby the last effects are gone together with their records, while their messages were acked: they
//! are lost, and none is doubled.
//!
//! # Order
//!
//! A store has none. Messages of the outbox leave in the order of their group: see [`Outbox`](onlyonce_core::driver::Outbox).
//!
//! # Shared commits
//!
//! As long as a connection is free each message has a transaction of its own. When all are in use and others wait, whoever is done
//! hands the open transaction on, each message in a savepoint, and the last one commits for all: at most 64 of them, within 20 ms.
//! The records of all are made with the commit. While commits are shared nobody waits for a lock longer than 50 ms. After a conflict
//! transactions run singly, or shared but one at a time, whichever gets more done, until all are shared again after a second, then two, up
//! to a minute. So few `connections` mean large commits, and many mean more handlers at a time.
//!
//! Should another worker have recorded one of these messages meanwhile, none of them is committed: each is done again in a commit of its
//! own, which is no attempt. So a handler can run more than once, and only one of these runs takes effect.
//!
//! # Limits
//!
//! - A handler holds its connection from its first to its last line: await what is slow before it, or outside of it.
//! - A handler that is cut off while a statement runs leaves the server to finish that statement: set `statement_timeout` where one can
//!   take long.
//! - `SET CONSTRAINTS ALL IMMEDIATE` fails in a transaction that is shared, and the message is tried again in one of its own: name the
//!   constraints instead.
//! - What outlives a transaction (`SET` without `LOCAL`, temporary tables, session locks) is seen by the next handler on that
//!   connection.
//! - Records take about 120 bytes, indexes included, apart from their outcomes. They are in eight partitions, each written to for a
//!   third of the longest retention and emptied as a whole, so records are kept for up to 4/3 of it, and nothing has to be
//!   vacuumed. Claims and messages of the outbox are deleted one by one, and need autovacuum.
//! - Behind a pooler in transaction mode relays look for messages once a second, since nobody can tell them.
//! - Texts in the outbox cannot have a NUL character, and a message at most 256 MiB.
//!
//! # Escape hatch
//!
//! [`PgTx`] is sqlx's connection. The tables are described in `schema.sql` and `outbox.sql`; they may be read, and may change with
//! any version. The table `onlyonce_outbox` has the columns that
//! [Debezium's outbox event router](https://debezium.io/documentation/reference/stable/transformations/outbox-event-router.html)
//! reads by default; with it no relay is needed, and rows are yours to delete.

mod claims;
mod config;
mod connections;
mod contention;
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
