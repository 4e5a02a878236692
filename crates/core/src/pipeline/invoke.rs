//! How a handler is called: with its request, for as long as lease and claim last.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::Ordering;

use futures_util::FutureExt as _;
use futures_util::future::{Either, select};
use tokio::time::Instant;

use crate::driver::Transaction;
use crate::handler::{Parts, Request, TxSlot};
use crate::{Context, Failure, Outcome};

use super::Mode;
use super::engine::Engine;
use super::in_flight::InFlight;
use super::lanes::Working;

/// How a handler ended.
pub(crate) enum Ended<T> {
    Succeeded(T),
    Failed(Failure),
    /// Cut off: lease or claim ended first, or the pipeline was told to stop at once.
    Cancelled,
}

impl<Tx: Transaction> Engine<Tx> {
    /// Runs the handler, for as long as lease and claim last.
    pub(crate) async fn call(
        &self,
        in_flight: &InFlight,
        tx: Option<TxSlot<Tx>>,
        working: &Working<'_>,
    ) -> Ended<Outcome> {
        let request = Request {
            parts: self.parts(in_flight),
            limit: self.options.handler_timeout,
            tx,
        };
        let started = Instant::now();
        let handler = async { (self.handler)(request).await };
        let ended = self.guarded(in_flight, working, handler).await;
        self.measured(started);
        if matches!(ended, Ended::Succeeded(_)) {
            self.readable.store(true, Ordering::Relaxed);
        }
        ended
    }

    /// Runs what may panic, or take too long, for as long as lease and claim last.
    pub(crate) async fn guarded<T>(
        &self,
        in_flight: &InFlight,
        working: &Working<'_>,
        run: impl Future<Output = Result<T, Failure>>,
    ) -> Ended<T> {
        let mut run = pin!(AssertUnwindSafe(run).catch_unwind());
        // Most handlers of the fast kind return at once: no timer is set for them.
        let result = match run.as_mut().now_or_never() {
            Some(result) => Some(result),
            None => {
                let end = pin!(self.end(in_flight));
                match working.pause(select(run, end)).await {
                    Either::Left((result, _)) => Some(result),
                    Either::Right(((), _)) => None,
                }
            }
        };
        // However it ended: past the deadline nothing of it counts.
        let lasts = self.mode == Mode::AtMostOnce || in_flight.lease.lasts();
        match result.map(|caught| caught.unwrap_or_else(panicked)) {
            Some(Ok(value)) if lasts => Ended::Succeeded(value),
            Some(Err(failure)) if lasts => Ended::Failed(failure),
            ended => {
                self.warn_of_cut(in_flight, ended.is_some());
                Ended::Cancelled
            }
        }
    }

    /// Resolves when the handler must be dropped.
    async fn end(&self, in_flight: &InFlight) {
        let lease_ended = async {
            match self.mode {
                Mode::AtMostOnce => std::future::pending().await,
                _ => in_flight.lease.ended().await,
            }
        };
        tokio::select! {
            biased;
            () = lease_ended => {}
            () = self.cancel.cancelled() => {}
        }
    }

    fn measured(&self, started: Instant) {
        let nanos = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let mean = self.handler_nanos.load(Ordering::Relaxed);
        let next = match mean {
            0 => nanos.max(1),
            // An eighth of the difference: a change shows within a dozen messages.
            _ => mean - mean / 8 + nanos / 8,
        };
        self.handler_nanos.store(next, Ordering::Relaxed);
    }

    pub(crate) fn parts(&self, in_flight: &InFlight) -> Parts {
        Parts {
            message: in_flight.delivery.message.clone(),
            context: Context {
                queue: self.queue.clone(),
                consumer: self.consumer.clone(),
                key: in_flight.key.clone(),
                attempt: in_flight.attempt(),
            },
            native: Some(in_flight.delivery.receipt.clone()),
            states: self.states.clone(),
        }
    }
}

fn panicked<T>(panic: Box<dyn Any + Send>) -> Result<T, Failure> {
    let text = panic_text(&*panic);
    Err(Failure::retry(format!("the handler panicked: {text}")))
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
