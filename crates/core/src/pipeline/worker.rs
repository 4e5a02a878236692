use std::slice::from_ref;

use tokio::sync::oneshot;

use crate::driver::Transaction;
use crate::handler::within;
use crate::{Error, ErrorKind, Outcome};

use super::Mode;
use super::batch::halves;
use super::counters::add;
use super::engine::Engine;
use super::in_flight::{InFlight, Next};
use super::invoke::{Answers, Ended};
use super::lanes::Working;
use super::transaction::Commits;

impl<Tx: Transaction> Engine<Tx> {
    /// One of `concurrency` workers: runs one message after another, whichever lane they come from.
    pub(crate) async fn work(&self, commits: &Commits<Tx>) {
        loop {
            let (mut in_flight, working) = self.lanes.next().await;
            let _place = self.place(&mut in_flight, &working).await;
            if let Some(in_flight) = self.prepare(in_flight, &working).await {
                match &self.transactions {
                    Some(store) => {
                        let batch = self.with_others(in_flight, &working).await;
                        self.run_in_transaction(&**store, batch, &working, commits)
                            .await;
                    }
                    None if self.batches.is_some() => {
                        let batch = self.with_others(in_flight, &working).await;
                        self.run_batch(batch, &working).await;
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
        match in_flight.take_next() {
            Next::DeadLetter { reason, .. } => {
                self.dead_letter(in_flight, reason);
                return None;
            }
            Next::Replay(_) if !in_flight.lease.can_start_again() => {
                self.cancelled(in_flight);
                return None;
            }
            Next::Replay(outcome) => {
                self.replay(in_flight, outcome, working).await;
                return None;
            }
            Next::Run { .. } => {}
        }
        let in_flight = self.with_time_left(in_flight)?;
        if self.mode == Mode::AtMostOnce {
            let (confirmed, wait) = oneshot::channel();
            let _ = self.stages.confirm.send((in_flight, confirmed));
            return working.pause(wait).await.ok();
        }
        if in_flight.in_doubt().is_some() {
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
            if in_flight.lease.held().is_none() {
                self.claim_after_all(in_flight);
                return None;
            }
            return working.pause(self.mark_started(in_flight)).await;
        }
        Some(in_flight)
    }

    /// It was looked up, and has turned out to be a suspect: its starts are counted under a claim.
    fn claim_after_all(&self, mut in_flight: Box<InFlight>) {
        in_flight.must_claim = true;
        in_flight.lease.forget_claim();
        self.lanes.push([in_flight]);
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
                self.guarded(from_ref(&in_flight), working, replay).await
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
        let ended = self.call(from_ref(&in_flight), None, working).await;
        self.ended([in_flight], ended);
    }

    /// Runs a handler of batches; what fails as a whole is run again in halves, until the guilty message is alone.
    async fn run_batch(&self, batch: Vec<Box<InFlight>>, working: &Working<'_>) {
        let mut parts = vec![batch];
        while let Some(part) = parts.pop() {
            // The parts before it may have taken a while.
            let (mut part, late): (Vec<_>, Vec<_>) =
                part.into_iter().partition(|one| self.can_start(one));
            late.into_iter().for_each(|one| self.cut_off(one));
            part.iter_mut().for_each(|one| self.begin(one));
            match self.call(&part, None, working).await {
                Ended::Failed(_) if part.len() > 1 => parts.extend(halves(part)),
                ended => self.ended(part, ended),
            }
        }
    }

    fn ended(&self, messages: impl IntoIterator<Item = Box<InFlight>>, ended: Ended<Answers>) {
        let messages = messages.into_iter();
        match ended {
            Ended::Succeeded(answers) => {
                for (in_flight, answer) in messages.zip(answers.each()) {
                    match answer {
                        Ok(outcome) => self.succeeded(in_flight, outcome),
                        Err(failure) => self.failed(in_flight, &failure),
                    }
                }
            }
            Ended::Failed(failure) => messages.for_each(|one| self.failed(one, &failure)),
            Ended::Cancelled => messages.for_each(|one| self.cut_off(one)),
        }
    }

    fn succeeded(&self, in_flight: Box<InFlight>, outcome: Outcome) {
        match self.store {
            Some(_) => {
                let _ = self.stages.complete.send((in_flight, outcome));
            }
            None => self.applied(in_flight),
        }
    }

    fn cut_off(&self, mut in_flight: Box<InFlight>) {
        if self.mode == Mode::AtMostOnce {
            in_flight.leave_lane();
            return add(&self.counters.lost, 1);
        }
        if self.quarantines() {
            in_flight.doubt();
        }
        self.cancelled(in_flight);
    }
}

fn too_late() -> Error {
    Error::new(
        ErrorKind::Timeout,
        "its start was marked, but too late to run it",
    )
    .retryable(true)
}
