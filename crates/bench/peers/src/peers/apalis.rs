//! apalis with its AMQP backend, as in the backend's README: a worker and a function.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;

use apalis::prelude::*;
use apalis_amqp::{AmqpBackend, AmqpTask, Config};
use futures_util::Sink;

use super::Setup;
use crate::PREFETCH;
use crate::queue::Kind;
use crate::work::{Job, Work};

pub(super) async fn consume(setup: &Setup) -> Result<(), crate::Error> {
    let config = Config::default()
        .queue(setup.queue.as_str())
        .prefetch_count(PREFETCH)
        .quorum(setup.kind == Kind::Quorum);
    let mut backend = AmqpBackend::<Job>::new_from_addr(&setup.url)?.with_config(config);
    open_channel(&mut backend).await?;
    let all_done = setup.work.all_done();
    let worker = WorkerBuilder::new("peers")
        .backend(backend)
        .data(setup.work.clone())
        .build(handle);
    let stop = async move {
        all_done.await;
        Ok::<(), WorkerError>(())
    };
    Ok(worker.run_until(stop).await?)
}

/// apalis-amqp 1.0.0 acknowledges on the channel that the backend has when the worker is built. In its examples that is the
/// one they have published on before; a worker that only consumes has none, and would fail to acknowledge anything. This
/// opens the channel as a publish would, without one.
async fn open_channel(backend: &mut AmqpBackend<Job>) -> Result<(), apalis_amqp::Error> {
    poll_fn(|cx| Sink::<AmqpTask>::poll_ready(Pin::new(&mut *backend), cx)).await
}

async fn handle(job: Job, work: Data<Arc<Work>>) -> Result<(), BoxDynError> {
    work.one(&job).await
}
