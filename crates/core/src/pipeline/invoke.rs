//! How a handler is called: with its request, for as long as lease and claim last.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::Ordering;

use futures_util::FutureExt as _;
use futures_util::future::{Either, select, select_all};
use tokio::time::Instant;

use crate::driver::Transaction;
use crate::handler::{Answer, Parts, Request, Together, TxSlot};
use crate::{Context, Failure, Outcome};

use super::Mode;
use super::engine::Engine;
use super::in_flight::InFlight;
use super::lanes::Working;

/// What the handler says of the messages of one call, in their order.
pub(crate) enum Answers {
    One(Outcome),
    Each(Vec<Answer>),
}

impl Answers {
    pub(crate) fn each(self) -> impl Iterator<Item = Answer> {
        let (one, more) = match self {
            Self::One(outcome) => (Some(Ok(outcome)), Vec::new()),
            Self::Each(answers) => (None, answers),
        };
        one.into_iter().chain(more)
    }
}

/// How a handler ended.
pub(crate) enum Ended<T> {
    Succeeded(T),
    Failed(Failure),
    /// Cut off: lease or claim ended first, or the pipeline was told to stop at once.
    Cancelled,
}

impl<T> Ended<T> {
    fn map<U>(self, f: impl FnOnce(T) -> U) -> Ended<U> {
        match self {
            Self::Succeeded(value) => Ended::Succeeded(f(value)),
            Self::Failed(failure) => Ended::Failed(failure),
            Self::Cancelled => Ended::Cancelled,
        }
    }
}

impl<Tx: Transaction> Engine<Tx> {
    /// Runs the handler for these messages, for as long as all their leases and claims last. A batch of which each message has
    /// its answer has succeeded.
    pub(crate) async fn call(
        &self,
        messages: &[Box<InFlight>],
        tx: Option<TxSlot<Tx>>,
        working: &Working<'_>,
    ) -> Ended<Answers> {
        let Some(first) = messages.first() else {
            return Ended::Succeeded(Answers::Each(Vec::new()));
        };
        let mut parts = self.parts(first);
        let together = self.batches.map(|_| {
            let all = messages.iter().map(|one| self.parts(one));
            Together::new(all.collect())
        });
        parts.together.clone_from(&together);
        let request = Request {
            parts,
            limit: self.options.handler_timeout,
            tx,
        };
        let started = Instant::now();
        let handler = async { (self.handler)(request).await };
        let ended = self.guarded(messages, working, handler).await;
        self.measured(started, messages.len());
        if matches!(ended, Ended::Succeeded(_)) {
            self.readable.store(true, Ordering::Relaxed);
        }
        match together {
            None => ended.map(Answers::One),
            Some(together) => each(together.take_answers(), ended),
        }
    }

    /// Runs what may panic, or take too long, for as long as lease and claim last.
    pub(crate) async fn guarded<T>(
        &self,
        messages: &[Box<InFlight>],
        working: &Working<'_>,
        run: impl Future<Output = Result<T, Failure>>,
    ) -> Ended<T> {
        let mut run = pin!(AssertUnwindSafe(run).catch_unwind());
        // Most handlers of the fast kind return at once: no timer is set for them.
        let result = match run.as_mut().now_or_never() {
            Some(result) => Some(result),
            None => {
                let end = pin!(self.end(messages));
                match working.pause(select(run, end)).await {
                    Either::Left((result, _)) => Some(result),
                    Either::Right(((), _)) => None,
                }
            }
        };
        // However it ended: past the deadline nothing of it counts.
        let mut leases = messages.iter().map(|one| &one.lease);
        let lasts = self.mode == Mode::AtMostOnce || leases.all(|lease| lease.lasts());
        match result.map(|caught| caught.unwrap_or_else(panicked)) {
            Some(Ok(value)) if lasts => Ended::Succeeded(value),
            Some(Err(failure)) if lasts => Ended::Failed(failure),
            ended => {
                let cut = messages.iter().find(|one| !one.lease.lasts());
                if let Some(cut) = cut.or(messages.first()) {
                    self.warn_of_cut(cut, ended.is_some());
                }
                Ended::Cancelled
            }
        }
    }

    /// Resolves when the handler must be dropped.
    async fn end(&self, messages: &[Box<InFlight>]) {
        let lease_ended = async {
            match messages {
                _ if self.mode == Mode::AtMostOnce => std::future::pending().await,
                [one] => one.lease.ended().await,
                many => {
                    let ends = many.iter().map(|one| Box::pin(one.lease.ended()));
                    select_all(ends).await;
                }
            }
        };
        tokio::select! {
            biased;
            () = lease_ended => {}
            () = self.cancel.cancelled() => {}
        }
    }

    /// What one message of a call took.
    fn measured(&self, started: Instant, messages: usize) {
        let nanos = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let nanos = nanos / u64::try_from(messages).unwrap_or(1).max(1);
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
            together: None,
        }
    }
}

/// What a call for many messages comes to. If it failed as a whole, what it said of a message counts only if it failed each of
/// them: otherwise nobody knows what was done.
fn each(said: Vec<Option<Answer>>, ended: Ended<Outcome>) -> Ended<Answers> {
    match ended {
        Ended::Succeeded(outcome) => {
            let each = said
                .into_iter()
                .map(|said| said.unwrap_or_else(|| Ok(outcome.clone())));
            Ended::Succeeded(Answers::Each(each.collect()))
        }
        Ended::Failed(failure) => {
            let failures = said.into_iter().map(|said| said.filter(Result::is_err));
            match failures.collect() {
                Some(each) => Ended::Succeeded(Answers::Each(each)),
                None => Ended::Failed(failure),
            }
        }
        Ended::Cancelled => Ended::Cancelled,
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
