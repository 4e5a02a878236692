use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::time::{Duration, Instant};

use crate::handler::TxSlot;
use crate::{Error, ErrorKind, Failure, Fenced, Outcome, Transaction, TransactionalStore};

use super::counters::add;
use super::engine::Engine;
use super::in_flight::Flight;
use super::lanes::Working;
use super::worker::Ended;

/// Messages of one group that share one transaction, at the most, and for how long it may take in more.
const PARTS: usize = 64;
const OPEN: Duration = Duration::from_millis(20);

/// The commits under way; they are waited for in one place so that no worker stands idle meanwhile.
pub(crate) type Commits<Tx> = UnboundedSender<Commit<Tx>>;

/// A transaction whose parts have all ended, ready to be committed.
pub(crate) struct Commit<Tx> {
    tx: Tx,
    done: Vec<Flight>,
    /// The message after them in the lane, if its handler failed.
    failed: Option<(Flight, Failure)>,
}

/// How one message's part of a transaction ended.
enum Part {
    Completed(Flight),
    Failed(Flight, Failure),
    /// It is dealt with; the transaction goes on without it.
    Left,
    /// The transaction cannot go on.
    Broken(Option<Flight>, Error),
}

impl<Tx: Transaction> Engine<Tx> {
    /// Runs the head of a lane and, as long as that is quick, those behind it, in one transaction.
    pub(crate) async fn run_in_transaction(
        &self,
        store: &dyn TransactionalStore<Tx = Tx>,
        head: Flight,
        working: &Working<'_>,
        commits: &Commits<Tx>,
    ) {
        let tx = match self.within(store.begin()).await {
            Ok(tx) => Arc::new(Mutex::new(tx)),
            Err(error) => return self.in_doubt(head, &error),
        };
        let began = Instant::now();
        let mut done: Vec<Flight> = Vec::new();
        let mut failed = None;
        let mut next = Some(head);
        while let Some(flight) = next.take() {
            match self.run_part(&tx, flight, working).await {
                Part::Completed(flight) => done.push(flight),
                Part::Failed(flight, failure) => failed = Some((flight, failure)),
                Part::Left => {}
                Part::Broken(flight, error) => return self.undone(done, flight, &error),
            }
            if failed.is_none() && done.len() < PARTS && began.elapsed() < OPEN {
                next = done.first().and_then(|head| head.turn.as_ref()?.next());
            }
        }
        if done.is_empty() {
            drop(tx);
            return self.part_failed(failed);
        }
        // A layer that kept the request elsewhere could still be writing; nothing of that may be committed.
        match Arc::try_unwrap(tx) {
            Ok(tx) => {
                let tx = tx.into_inner();
                let _ = commits.send(Commit { tx, done, failed });
            }
            Err(_) => self.undone(done, failed.map(|(flight, _)| flight), &still_borrowed()),
        }
    }

    async fn run_part(&self, slot: &TxSlot<Tx>, flight: Flight, working: &Working<'_>) -> Part {
        let ended = match flight.lease.can_start(self.options.claim_lease) {
            true => self.call(&flight, Some(slot.clone()), working).await,
            false => Ended::Cancelled,
        };
        let Ok(mut tx) = slot.try_lock() else {
            return Part::Broken(Some(flight), still_borrowed());
        };
        match ended {
            Ended::Succeeded(outcome) => self.complete_part(&mut *tx, flight, outcome).await,
            Ended::Failed(failure) => match tx.undo().await {
                Ok(()) => Part::Failed(flight, failure),
                Err(error) => Part::Broken(Some(flight), error),
            },
            Ended::Cancelled => match tx.undo().await {
                Ok(()) => {
                    self.cancelled(flight);
                    Part::Left
                }
                Err(error) => Part::Broken(Some(flight), error),
            },
        }
    }

    async fn complete_part(&self, tx: &mut Tx, flight: Flight, outcome: Outcome) -> Part {
        let Some(completion) = self.completion(&flight, outcome) else {
            let error = Error::new(ErrorKind::Other, "a message without a claim was run");
            return Part::Broken(Some(flight), error);
        };
        match tx.complete(&completion).await {
            Ok(Ok(())) => Part::Completed(flight),
            Ok(Err(Fenced)) => {
                add(&self.counters.fenced, 1);
                Part::Left
            }
            Err(error) => Part::Broken(Some(flight), error),
        }
    }

    /// Nothing of the transaction was, or is known to have been, committed: everything is claimed again, in order.
    fn undone(&self, done: Vec<Flight>, last: Option<Flight>, error: &Error) {
        let mut flights = done.into_iter().chain(last);
        let Some(head) = flights.next() else { return };
        let behind: Vec<_> = flights.collect();
        for flight in &behind {
            flight.lease.unclaim();
        }
        if let Some(turn) = &head.turn {
            turn.put_back(behind);
        }
        self.in_doubt(head, error);
    }

    fn part_failed(&self, failed: Option<(Flight, Failure)>) {
        if let Some((flight, failure)) = failed {
            self.failed(flight, &failure);
        }
    }

    /// Commits what the workers have finished, many at a time: the store makes one commit of them.
    pub(crate) async fn commit_stage(&self, mut receiver: UnboundedReceiver<Commit<Tx>>) {
        let mut commits = FuturesUnordered::new();
        loop {
            tokio::select! {
                received = receiver.recv() => match received {
                    Some(commit) => commits.push(self.commit(commit)),
                    None => return,
                },
                Some(()) = commits.next() => {}
            }
        }
    }

    async fn commit(&self, commit: Commit<Tx>) {
        let Commit {
            tx,
            mut done,
            failed,
        } = commit;
        let result = match done.iter().all(|f| f.lease.lasts()) {
            true => tx.commit().await,
            false => Err(Error::new(
                ErrorKind::Timeout,
                "a lease ended before the commit",
            )),
        };
        if let Err(error) = result {
            return self.undone(done, failed.map(|(flight, _)| flight), &error);
        }
        let failed = failed.map(|(mut flight, failure)| {
            if let Some(head) = done.first_mut()
                && flight.turn.is_none()
            {
                // Its retry, not what is behind it, is next in the lane.
                flight.turn = head.turn.take();
            }
            (flight, failure)
        });
        done.into_iter().for_each(|flight| self.applied(flight));
        self.part_failed(failed);
    }
}

fn still_borrowed() -> Error {
    Error::new(
        ErrorKind::Store,
        "the transaction is still in use after its handler ended: a layer must not run the handler on a task of its own",
    )
    .retryable(true)
}
