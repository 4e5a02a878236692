use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::Ordering;

use futures_util::FutureExt as _;
use futures_util::future::{Either, select};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::driver::Transaction;
use crate::handler::Request;
use crate::handler::{TxSlot, within};
use crate::{Error, ErrorKind, Failure, Outcome};

use super::Mode;
use super::counters::add;
use super::engine::Engine;
use super::in_flight::InFlight;
use super::lanes::Working;
use super::transaction::Commits;

/// How a handler ended.
pub(crate) enum Ended<T> {
    Succeeded(T),
    Failed(Failure),
    /// Cut off: lease or claim ended first, or the pipeline was told to stop at once.
    Cancelled,
}

impl<Tx: Transaction> Engine<Tx> {
    /// One of `concurrency` workers: runs one message after another, whichever lane they come from.
    pub(crate) async fn work(&self, commits: &Commits<Tx>) {
        loop {
            let (mut in_flight, working) = self.lanes.next().await;
            let _place = self.place(&mut in_flight, &working).await;
            if let Some(in_flight) = self.prepare(in_flight, &working).await {
                match &self.transactions {
                    Some(store) => {
                        self.run_in_transaction(&**store, in_flight, &working, commits)
                            .await;
                    }
                    None => self.run(in_flight, &working).await,
                }
            }
            drop(working);
            // Handlers that never wait must not keep the other tasks of this thread from running.
            tokio::task::consume_budget().await;
        }
    }

    /// Deals with what is not to be run; returns what is.
    async fn prepare(
        &self,
        mut in_flight: Box<InFlight>,
        working: &Working<'_>,
    ) -> Option<Box<InFlight>> {
        if self.is_set_aside(&in_flight) {
            self.ack_set_aside(in_flight).await;
            return None;
        }
        if let Some(reason) = in_flight.doomed.take() {
            self.dead_letter(in_flight, reason);
            return None;
        }
        if let Some(outcome) = in_flight.replay.take() {
            self.replay(in_flight, outcome, working).await;
            return None;
        }
        let in_flight = self.with_time_left(in_flight)?;
        if self.mode == Mode::AtMostOnce {
            let (confirmed, wait) = oneshot::channel();
            let _ = self.stages.confirm.send((in_flight, confirmed));
            return working.pause(wait).await.ok();
        }
        if in_flight.in_doubt.is_some() {
            add(&self.counters.in_doubt, 1);
            if self.quarantines() {
                self.dead_letter(
                    in_flight,
                    "in doubt: a former owner may have produced the effect before it vanished",
                );
                return None;
            }
        }
        if let Some(reason) = self.no_run_left(&in_flight) {
            self.dead_letter(in_flight, reason);
            return None;
        }
        if self.store.is_some() && (self.quarantines() || self.is_suspect(&in_flight)) {
            return working.pause(self.mark_started(in_flight)).await;
        }
        Some(in_flight)
    }

    fn with_time_left(&self, in_flight: Box<InFlight>) -> Option<Box<InFlight>> {
        if self.can_start(&in_flight) {
            return Some(in_flight);
        }
        self.cancelled(in_flight);
        None
    }

    pub(crate) fn can_start(&self, in_flight: &InFlight) -> bool {
        in_flight.lease.can_start(self.options.claim_lease)
    }

    async fn mark_started(&self, in_flight: Box<InFlight>) -> Option<Box<InFlight>> {
        let (store, held) = (self.store.as_ref()?, in_flight.lease.held()?);
        match self.within(store.start(&[held])).await {
            // That took a while.
            Ok(verdicts) if verdicts == [Ok(())] && self.can_start(&in_flight) => {
                return Some(in_flight);
            }
            Ok(verdicts) if verdicts == [Ok(())] => self.in_doubt(in_flight, &too_late()),
            Ok(_) => self.fenced(in_flight),
            Err(error) => self.in_doubt(in_flight, &error),
        }
        None
    }

    async fn replay(&self, mut in_flight: Box<InFlight>, outcome: Outcome, working: &Working<'_>) {
        self.begin(&mut in_flight);
        let ended = match &self.on_duplicate {
            Some(replay) => {
                let context = self.parts(&in_flight).context;
                let limit = self.options.handler_timeout;
                let replay = within(limit, async { replay(context, outcome).await });
                self.guarded(&in_flight, working, replay).await
            }
            None => Ended::Succeeded(()),
        };
        match ended {
            Ended::Succeeded(()) => self.duplicate(in_flight),
            Ended::Failed(failure) => self.failed(in_flight, &failure),
            Ended::Cancelled if in_flight.known_runs() >= self.options.retry.max_attempts => {
                let runs = in_flight.known_runs();
                let reason = format!("gave up: on_duplicate was cut off {runs} times before");
                self.dead_letter(in_flight, reason);
            }
            Ended::Cancelled => self.cancelled(in_flight),
        }
    }

    async fn run(&self, mut in_flight: Box<InFlight>, working: &Working<'_>) {
        self.begin(&mut in_flight);
        match self.call(&in_flight, None, working).await {
            Ended::Succeeded(outcome) if self.store.is_some() => {
                let _ = self.stages.complete.send((in_flight, outcome));
            }
            Ended::Succeeded(_) => self.applied(in_flight),
            Ended::Failed(failure) => self.failed(in_flight, &failure),
            Ended::Cancelled if self.mode == Mode::AtMostOnce => {
                in_flight.lane = None;
                add(&self.counters.lost, 1);
            }
            Ended::Cancelled => {
                if self.quarantines() {
                    in_flight.doubt();
                }
                self.cancelled(in_flight);
            }
        }
    }

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
    async fn guarded<T>(
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
}

fn too_late() -> Error {
    Error::new(
        ErrorKind::Timeout,
        "its start was marked, but too late to run it",
    )
    .retryable(true)
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
