//! RustStream on its lapin broker: a service with one subscriber, which connects again by itself where it is asked to.

use std::sync::Arc;

use ruststream::runtime::SubscriptionEnd;
use ruststream_lapin::prelude::*;

use super::Setup;
use crate::work::{Job, Work};
use crate::{Error, PREFETCH};

fn broker(setup: &Setup) -> LapinBroker {
    LapinBroker::new(&setup.url).auto_recover(true)
}

/// A service ends when its subscription does, for whatever supervises it to start it again.
const END: SubscriptionEnd = SubscriptionEnd::FailFast;

fn info() -> AppInfo {
    AppInfo::new("peers", "0.1.0")
}

fn queue(setup: &Setup) -> RabbitQueue {
    // The queue is there; what is declared about it does not matter to the subscription.
    RabbitQueue::new(setup.queue.clone()).prefetch(nonzero!(1_000))
}

const _: () = assert!(PREFETCH == 1_000);

/// Sixteen messages at a time, as for handlers that wait for something.
pub(super) async fn workers(setup: &Setup) -> Result<(), Error> {
    let handler = Single(setup.work.clone());
    let app = RustStream::new(info())
        .on_subscription_end(END)
        .with_broker(broker(setup), |b| {
            b.include(
                subscriber(queue(setup), handler)
                    .workers(nonzero!(16))
                    .build(),
            );
        });
    Ok(app.run_until(setup.work.all_done()).await?)
}

/// Up to a hundred messages in a call.
pub(super) async fn batches(setup: &Setup) -> Result<(), Error> {
    let handler = Batch(setup.work.clone());
    let app = RustStream::new(info())
        .on_subscription_end(END)
        .with_broker(broker(setup), |b| {
            b.include(
                subscriber(queue(setup), handler)
                    .batch(nonzero!(100))
                    .build(),
            );
        });
    Ok(app.run_until(setup.work.all_done()).await?)
}

struct Single(Arc<Work>);

impl Handle<Job> for Single {
    async fn handle(
        &self,
        job: &Job,
        _outs: &(),
        _ctx: &mut Context<'_>,
    ) -> Result<(), HandlerOutcome> {
        let done = self.0.one(job).await;
        done.map_err(|_| HandlerOutcome::retry())
    }
}

struct Batch(Arc<Work>);

impl Handle<[Job]> for Batch {
    async fn handle(
        &self,
        jobs: &[Job],
        _outs: &(),
        _ctx: &mut Context<'_>,
    ) -> Result<(), Vec<HandlerOutcome>> {
        let ids = jobs.iter().map(|job| job.id.clone()).collect();
        let done = self.0.many(ids).await;
        done.map_err(|_| jobs.iter().map(|_| HandlerOutcome::retry()).collect())
    }
}
