//! A broker and a store on which everything goes wrong, in virtual time, decided by one seed.
//!
//! They wrap [`MemoryQueue`](onlyonce_core::memory::MemoryQueue) and [`MemoryStore`](onlyonce_core::memory::MemoryStore)
//! as a network and a crowd of workers would: requests are lost or come late (even after their sender has given up or
//! crashed), replies are lost after the call took effect, entries of a batch fail, connections break, leases end,
//! duplicates appear. [`Capabilities`](onlyonce_core::driver::Capabilities) say which kind of broker it is.
//!
//! What a transaction [publishes](Tx::publish) is in the storage's outbox; relays reach it with an [`OutboxConnection`], and publish to a
//! [`Downstream`], which compares what it gets with what was committed.
//!
//! Beside them, [`Log`] is a partitioned log without faults, for sources that know a position and no single acks.
//!
//! Run them on tokio's current-thread runtime with a paused clock (`start_paused`): the same seed then gives the same
//! history, and minutes pass in milliseconds.
//!
//! ```
//! use std::time::Duration;
//! use onlyonce_core::{Message, Outcome, Pipeline, Failure, memory::MemoryTx};
//! use onlyonce_testkit::simulated::{Broker, Faults, Mix, Storage};
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), onlyonce_core::Error> {
//! let faults = Faults::new(42, Mix::everything(0.05), Duration::from_secs(60));
//! let broker = Broker::new("orders", &faults);
//! let storage = Storage::new(&faults);
//! broker.publish(Message::new("an order").with_dedup_id("order-1")).await;
//!
//! let worker = 1;
//! let pipeline = Pipeline::transactional(broker.connect(worker), storage.connect(worker))
//!     .dead_letter(broker.dead_letters().connect(worker))
//!     .stop_when_idle(Duration::from_secs(300));
//! pipeline.run(async |body: bytes::Bytes, tx: &mut onlyonce_testkit::simulated::Tx| {
//!     tx.push(body);
//!     Ok::<_, Failure>(Outcome::default())
//! }).await?;
//! assert_eq!(storage.effects(), ["an order"]);
//! # Ok(()) }
//! ```

mod broker;
mod downstream;
mod faults;
mod log;
mod network;
mod outbox;
mod outgoing;
mod replay;
mod sessions;
mod sink;
mod source;
mod store;
mod tx;

pub use broker::{Broker, MALFORMED};
pub use downstream::{Downstream, Publisher};
pub use faults::{Call, Fault, Faults, Mix};
pub use log::{Log, LogConsumer, LogProducer, LogReceipt};
pub use outbox::OutboxConnection;
pub use outgoing::Committed;
pub use sink::{DeadLetters, Sender};
pub use source::{Consumer, SimulatedReceipt};
pub use store::{Connection, Storage};
pub use tx::Tx;
