use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::Ordering;

use futures_util::FutureExt as _;
use futures_util::future::{Either, select};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::handler::{TxSlot, within};
use crate::{Error, ErrorKind, Failure, Outcome, Request, Transaction};

use super::Mode;
use super::counters::add;
use super::engine::Engine;
use super::in_flight::{Flight, InFlight};
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
            let (mut flight, working) = self.lanes.next().await;
            let _place = self.place(&mut flight, &working).await;
            if let Some(flight) = self.prepare(flight, &working).await {
                match &self.transactions {
                    Some(store) => {
                        self.run_in_transaction(&**store, flight, &working, commits)
                            .await;
                    }
                    None => self.run(flight, &working).await,
                }
            }
            drop(working);
            // Handlers that never wait must not keep the other tasks of this thread from running.
            tokio::task::consume_budget().await;
        }
    }

    /// Deals with what is not to be run; returns what is.
    async fn prepare(&self, mut flight: Flight, working: &Working<'_>) -> Option<Flight> {
        if let Some(reason) = flight.doomed.take() {
            self.dead_letter(flight, reason);
            return None;
        }
        if let Some(outcome) = flight.replay.take() {
            self.replay(flight, outcome, working).await;
            return None;
        }
        let flight = self.with_time_left(flight)?;
        if self.mode == Mode::AtMostOnce {
            let (confirmed, wait) = oneshot::channel();
            let _ = self.stages.confirm.send((flight, confirmed));
            return working.pause(wait).await.ok();
        }
        if flight.uncertain.is_some() {
            add(&self.counters.uncertain, 1);
            if self.quarantines() {
                self.dead_letter(
                    flight,
                    "uncertain: a former owner may have produced the effect before it vanished",
                );
                return None;
            }
        }
        if let Some(reason) = self.no_run_left(&flight) {
            self.dead_letter(flight, reason);
            return None;
        }
        if self.store.is_some() && (self.quarantines() || self.is_suspect(&flight)) {
            return working.pause(self.mark_started(flight)).await;
        }
        Some(flight)
    }

    fn with_time_left(&self, flight: Flight) -> Option<Flight> {
        if self.can_start(&flight) {
            return Some(flight);
        }
        self.cancelled(flight);
        None
    }

    pub(crate) fn can_start(&self, flight: &InFlight) -> bool {
        flight.lease.can_start(self.options.claim_lease)
    }

    async fn mark_started(&self, flight: Flight) -> Option<Flight> {
        let (store, held) = (self.store.as_ref()?, flight.lease.held()?);
        match self.within(store.start(&[held])).await {
            // That took a while.
            Ok(verdicts) if verdicts == [Ok(())] && self.can_start(&flight) => return Some(flight),
            Ok(verdicts) if verdicts == [Ok(())] => self.in_doubt(flight, &too_late()),
            Ok(_) => self.fenced(flight),
            Err(error) => self.in_doubt(flight, &error),
        }
        None
    }

    async fn replay(&self, mut flight: Flight, outcome: Outcome, working: &Working<'_>) {
        self.begin(&mut flight);
        let ended = match &self.on_duplicate {
            Some(replay) => {
                let context = self.parts(&flight).context;
                let limit = self.options.handler_timeout;
                let replay = within(limit, async { replay(context, outcome).await });
                self.guarded(&flight, working, replay).await
            }
            None => Ended::Succeeded(()),
        };
        match ended {
            Ended::Succeeded(()) => self.duplicate(flight),
            Ended::Failed(failure) => self.failed(flight, &failure),
            Ended::Cancelled if flight.known_runs() >= self.options.retry.max_attempts => {
                let runs = flight.known_runs();
                let reason = format!("gave up: on_duplicate was cut off {runs} times before");
                self.dead_letter(flight, reason);
            }
            Ended::Cancelled => self.cancelled(flight),
        }
    }

    async fn run(&self, mut flight: Flight, working: &Working<'_>) {
        self.begin(&mut flight);
        match self.call(&flight, None, working).await {
            Ended::Succeeded(outcome) if self.store.is_some() => {
                let _ = self.stages.complete.send((flight, outcome));
            }
            Ended::Succeeded(_) => self.applied(flight),
            Ended::Failed(failure) => self.failed(flight, &failure),
            Ended::Cancelled if self.mode == Mode::AtMostOnce => {
                flight.turn = None;
                add(&self.counters.lost, 1);
            }
            Ended::Cancelled => {
                if self.quarantines() {
                    flight.doubt();
                }
                self.cancelled(flight);
            }
        }
    }

    /// Runs the handler, for as long as lease and claim last.
    pub(crate) async fn call(
        &self,
        flight: &InFlight,
        tx: Option<TxSlot<Tx>>,
        working: &Working<'_>,
    ) -> Ended<Outcome> {
        let request = Request {
            parts: self.parts(flight),
            limit: self.options.handler_timeout,
            tx,
        };
        let started = Instant::now();
        let handler = async { (self.handler)(request).await };
        let ended = self.guarded(flight, working, handler).await;
        self.measured(started);
        if matches!(ended, Ended::Succeeded(_)) {
            self.readable.store(true, Ordering::Relaxed);
        }
        ended
    }

    /// Runs what may panic, or take too long, for as long as lease and claim last.
    async fn guarded<T>(
        &self,
        flight: &InFlight,
        working: &Working<'_>,
        run: impl Future<Output = Result<T, Failure>>,
    ) -> Ended<T> {
        let mut run = pin!(AssertUnwindSafe(run).catch_unwind());
        // Most handlers of the fast kind return at once: no timer is set for them.
        let result = match run.as_mut().now_or_never() {
            Some(result) => Some(result),
            None => {
                let end = pin!(self.end(flight));
                match working.pause(select(run, end)).await {
                    Either::Left((result, _)) => Some(result),
                    Either::Right(((), _)) => None,
                }
            }
        };
        // However it ended: past the deadline nothing of it counts.
        let lasts = self.mode == Mode::AtMostOnce || flight.lease.lasts();
        match result.map(|caught| caught.unwrap_or_else(panicked)) {
            Some(Ok(value)) if lasts => Ended::Succeeded(value),
            Some(Err(failure)) if lasts => Ended::Failed(failure),
            ended => {
                self.warn_of_cut(flight, ended.is_some());
                Ended::Cancelled
            }
        }
    }

    /// Resolves when the handler must be dropped.
    async fn end(&self, flight: &InFlight) {
        let lease_ended = async {
            match self.mode {
                Mode::AtMostOnce => std::future::pending().await,
                _ => flight.lease.ended().await,
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
