//! SQLite for onlyonce: a dedup store whose transactions carry your effects, its outbox, and an embedded durable queue, in one
//! file or in several.
//!
//! [`SqliteStore`] remembers which messages took effect, [`SqliteTx`] is the transaction that a handler gets in
//! transactional mode, [`SqliteOutbox`] has what such transactions publish, [`SqliteQueue`] is a queue for worker processes on
//! one machine. All are handles to a [`Database`]: one thread per file and process, which does whatever waits in one transaction and commits once. A lone
//! command is committed at once; there are no timers.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), onlyonce_core::Error> {
//! # let dir = tempfile::tempdir().expect("a directory");
//! # let path = dir.path().join("app.db");
//! # let url = format!("sqlite:{}?queue=orders", path.display());
//! use std::time::Duration;
//! use onlyonce_core::driver::{ReceiveLimits, Sink, Source};
//! use onlyonce_core::Message;
//! use onlyonce_sqlite::SqliteQueue;
//!
//! // let url = "sqlite:app.db?queue=orders";
//! let queue = SqliteQueue::open(url.parse()?).await?;
//! queue.publish(&[Message::new("one order").with_dedup_id("order-1")]).await;
//! let limit = ReceiveLimits::new(10, Duration::from_secs(1)).with_bytes(1 << 20).with_per_group(10);
//! assert_eq!(queue.receive(limit).await?.len(), 1);
//! # Ok(())
//! # }
//! ```
//!
//! # URLs
//!
//! `sqlite:relative/path`, `sqlite:/absolute/path` or `sqlite:///absolute/path`; the file is created, its directory is
//! not. `sqlite::memory:` is refused, since it would forget with the process.
//!
//! | parameter | default | |
//! |---|---|---|
//! | `queue=orders` | | the queue; the store does not look at it |
//! | `lease=30s` | 30 s | how long a received message is leased |
//! | `max_deliveries=100` | 100 | then it goes to `orders.dead`, with the reason |
//! | `retention=14d` | 14 d | so does what is older |
//! | `turn=30s` | 30 s | how long one transaction may keep the others waiting |
//! | `durable_acks=true` | `false` | acknowledgements are synced to disk, too |
//!
//! # Delivery semantics
//!
//! The queue delivers at least once. A published message has been synced to disk before
//! [`publish`](onlyonce_core::driver::Sink::publish) says so, and stays until it is acknowledged or, by someone, taken from the
//! dead-letter queue.
//!
//! | synced to disk before it is answered | survives the process, not a power failure |
//! |---|---|
//! | publish, complete, the commit of a transaction | claim, renew, start, release, prune; receive, nack, extend, dead-letter, ack |
//!
//! What a power failure takes back costs a redelivery or a second claim, which the record answers: tokens go up
//! even then, because every opening of the file begins a new, synced epoch of them. The exception is `at_most_once`, which
//! has no record: give its queue `durable_acks=true`. This is SQLite's write-ahead log, with `synchronous=FULL` for the
//! left column and `NORMAL` for the right one (<https://www.sqlite.org/pragma.html#pragma_synchronous>). It assumes that
//! the disk keeps what it was told to sync.
//!
//! Leases, claims and retention end by the time of the file: what was seen to pass since it was made, by the machine's
//! monotonic clock, which all processes on a file share and nobody sets. The wall clock decides nothing, whatever it does.
//! While the machine is off or sleeps no time passes, so records and queued messages are kept for longer, and a claim or
//! lease ends at the latest one lease after the restart. (Where there is no such clock, on systems other than Unix, the wall
//! clock stands in, and is believed when it is set forward.)
//!
//! In a handler's transaction, [`SqliteTx::publish`] and [`SqliteTx::enqueue`] send messages that exist if and only if the effect
//! does: the one by the [outbox](SqliteOutbox), from which a [`Relay`](onlyonce_core::Relay) publishes them to any queue, the other
//! to a queue in the same file, without a relay. Code outside of a pipeline uses [`SqliteOutbox::publish_in`] in a transaction of
//! its own.
//!
//! # Order
//!
//! A message of a group is withheld while an earlier one of it is leased or delayed; groups do not wait for each other,
//! and none fills a batch while others wait. Messages come in the order of publication, those that were given back by the
//! time at which they became ready.
//!
//! # Limits
//!
//! - A handler's SQL cannot end the transaction: `COMMIT`, savepoints, and what would outlive it (temporary objects, pragmas)
//!   are refused, and `OR ROLLBACK` or `RAISE(ROLLBACK)` make its message fail.
//! - Within a handler that has used its transaction, publish to a queue in the same file with [`SqliteTx::enqueue`]; with the
//!   queue itself it would wait for its own end, and is refused.
//! - Local disks only: SQLite's locks and its write-ahead log do not work on network file systems
//!   (<https://www.sqlite.org/wal.html>).
//! - One writer per file. While a transaction has its turn, everything else on the file waits except renewals in its
//!   own process, so await what is slow before the first use; other processes' calls fail, retryably, once they have
//!   waited for five seconds. Run all transactional workers of one file in one process.
//! - A message has at most 64 MiB. Not more than 4,096 calls wait for the thread; the next ones wait to be sent.
//! - Records take about 60 bytes of disk, apart from their outcomes, and 3 to 5 bytes of memory in each process, at least
//!   6 MB from the first 32,768 on. They are sealed in segments of 32,768, or of 16 MiB of outcomes, which take the same
//!   memory each; everybody waits for that, some 40 ms, and twice as long on busy cores. To open a file with ten million takes
//!   half a second. A segment is dropped as a whole after the last of its records has expired, so records of very different
//!   retentions keep each other longer than they need.
//! - SQL without end is interrupted when its turn is over or nobody waits for it any more; a closure that loops in Rust is not.
//! - The file and those beside it are created for their owner alone (mode 0600). If the file is deleted or replaced while it is
//!   open, nothing more is committed, and every call fails with [`NotFound`](onlyonce_core::ErrorKind::NotFound).
//! - Dead letters stay in their queue until somebody takes them. One that is redriven after the retention of its dedup record
//!   is a new message.
//! - A process that is killed while it waits is harmless; one that stops (`SIGSTOP`) within a turn stops the file.
//!
//! # Escape hatch
//!
//! [`SqliteTx::with`] and [`Database::with`] give the [`rusqlite::Connection`] itself. The file is an ordinary database:
//! open it beside onlyonce with any client, for reading at any time and for writing in short transactions. The tables
//! named `onlyonce_…` are described in `schema.sql`; they may be read, and may change with any version. A handler that asks for
//! `Native<SqliteReceipt>` sees its message's row and the token of its lease.

mod claims;
mod config;
mod database;
mod error;
mod file;
mod filter;
mod guard;
mod inbox;
mod messages;
mod open_leases;
mod outbox;
mod outgoing;
mod queue;
mod records;
mod session;
mod store;
mod time;
mod transaction;
mod turn;
mod worker;

pub use config::Config;
pub use database::{Commits, Database};
pub use messages::SqliteReceipt;
pub use outbox::SqliteOutbox;
pub use queue::SqliteQueue;
pub use rusqlite;
pub use store::SqliteStore;
pub use transaction::SqliteTx;
