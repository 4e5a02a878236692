//! A worker as a process of its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::Error;
use crate::peers::{Peer, Setup};
use crate::queue::Kind;
use crate::work::{Effect, Work};

/// One worker, which runs until it is killed, or fails.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The broker, with its vhost: amqp://user:password@host:port/vhost
    #[arg(long)]
    url: String,
    #[arg(long)]
    queue: String,
    #[arg(long, value_enum)]
    kind: Kind,
    #[arg(long, value_enum)]
    peer: Peer,
    #[arg(long, value_enum)]
    effect: Effect,
    /// The SQLite file of the effects.
    #[arg(long)]
    database: PathBuf,
    /// How long each effect takes, in milliseconds.
    #[arg(long, default_value_t = 0)]
    slow: u64,
    /// A queue for what is given up, for the peers that take one.
    #[arg(long)]
    dead_letters: Option<String>,
}

pub(crate) async fn run(args: Args) -> Result<(), Error> {
    let slow = Duration::from_millis(args.slow);
    let work = Work::new(args.effect, args.database, slow, usize::MAX)?;
    let setup = Setup {
        url: args.url,
        queue: args.queue,
        kind: args.kind,
        dead_letters: args.dead_letters,
        alone: false,
        work: Arc::new(work),
    };
    args.peer.consume(&setup).await?;
    Err("the worker ended by itself".into())
}
