//! The peers, one a file.

mod apalis;
mod by_hand;
mod mq_bridge;
mod omniqueue;
mod onlyonce;
mod ruststream;

use std::sync::Arc;

use crate::Error;
use crate::queue::Kind;
use crate::work::Work;

/// Who consumes, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Peer {
    /// lapin by hand, every ack awaited.
    OneByOne,
    /// lapin by hand, up to a hundred messages at a time.
    Hundreds,
    Apalis,
    RuststreamWorkers,
    RuststreamBatches,
    MqBridge,
    OmniqueueReceive,
    OmniqueueReceiveAll,
    AtLeastOnce,
    Transactional,
    TransactionalBatches,
}

/// What to consume and what to do with it.
pub(crate) struct Setup {
    pub(crate) url: String,
    pub(crate) queue: String,
    pub(crate) kind: Kind,
    pub(crate) dead_letters: Option<String>,
    /// Each message comes alone, and the moment of its commit is to be known.
    pub(crate) alone: bool,
    pub(crate) work: Arc<Work>,
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::OneByOne => "lapin by hand, one by one",
            Self::Hundreds => "lapin by hand, up to 100 at a time",
            Self::Apalis => "apalis",
            Self::RuststreamWorkers => "RustStream, 16 workers",
            Self::RuststreamBatches => "RustStream, batches",
            Self::MqBridge => "mq-bridge",
            Self::OmniqueueReceive => "omniqueue, `receive`",
            Self::OmniqueueReceiveAll => "omniqueue, `receive_all`",
            Self::AtLeastOnce => "onlyonce at_least_once",
            Self::Transactional => "onlyonce transactional, SQLite",
            Self::TransactionalBatches => "onlyonce transactional, SQLite, batches",
        }
    }

    /// Until all is handled and settled as far as the peer can tell; with an error when the connection is lost, unless the peer
    /// connects again by itself.
    pub(crate) async fn consume(self, setup: &Setup) -> Result<(), Error> {
        match self {
            Self::OneByOne => by_hand::one_by_one(setup).await,
            Self::Hundreds => by_hand::hundreds(setup).await,
            Self::Apalis => apalis::consume(setup).await,
            Self::RuststreamWorkers => ruststream::workers(setup).await,
            Self::RuststreamBatches => ruststream::batches(setup).await,
            Self::MqBridge => mq_bridge::consume(setup).await,
            Self::OmniqueueReceive => omniqueue::receive(setup).await,
            Self::OmniqueueReceiveAll => omniqueue::receive_all(setup).await,
            Self::AtLeastOnce => onlyonce::at_least_once(setup).await,
            Self::Transactional => onlyonce::transactional(setup).await,
            Self::TransactionalBatches => onlyonce::transactional_batches(setup).await,
        }
    }
}
