use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::time::{Duration, Instant};

use crate::handler::TxSlot;
use crate::{Completion, Error, ErrorKind, Failure, Fenced, Transaction, TransactionalStore};

use super::complete::fenced;
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

/// A transaction to be committed: what it carries, in the order of the lane.
pub(crate) struct Commit<Tx> {
    tx: Tx,
    done: Vec<Flight>,
    last: Option<Last>,
}

/// The message after those that are done.
enum Last {
    /// It completes with the commit, in one round trip.
    Succeeded(Flight, Completion),
    Failed(Flight, Failure),
    Cancelled(Flight),
}

impl Last {
    fn flight(self) -> Flight {
        match self {
            Self::Succeeded(flight, _) | Self::Failed(flight, _) | Self::Cancelled(flight) => {
                flight
            }
        }
    }

    fn flight_mut(&mut self) -> &mut Flight {
        match self {
            Self::Succeeded(flight, _) | Self::Failed(flight, _) | Self::Cancelled(flight) => {
                flight
            }
        }
    }
}

/// How one message's part of a transaction ended.
enum Part {
    Succeeded(Flight, Completion),
    Failed(Flight, Failure),
    Cancelled(Flight),
    /// The transaction cannot go on.
    Broken(Flight, Error),
}

/// What has been run in one transaction so far.
struct Batch {
    began: Instant,
    done: Vec<Flight>,
}

impl Batch {
    /// The next of the lane, if the transaction can take it in; `flight` holds the lane's turn if nobody in `done` does.
    fn next(&self, flight: &Flight, most: u32) -> Option<Flight> {
        let apart = flight.alone || flight.attempt() > most;
        if apart || self.done.len() >= PARTS || self.began.elapsed() >= OPEN {
            return None;
        }
        self.done
            .first()
            .unwrap_or(flight)
            .turn
            .as_ref()?
            .next(most)
    }
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
        let begin = match head.alone {
            true => store.begin_alone(),
            false => store.begin(),
        };
        let tx = match working.pause(self.within(begin)).await {
            Ok(tx) => Arc::new(Mutex::new(tx)),
            Err(error) => return self.in_doubt(head, &error),
        };
        let mut batch = Batch {
            began: Instant::now(),
            done: Vec::new(),
        };
        let mut last = None;
        let mut next = Some(head);
        while let Some(flight) = next.take() {
            match self.run_part(&tx, flight, working).await {
                Part::Succeeded(flight, completion) => {
                    next = batch.next(&flight, self.options.retry.max_attempts);
                    if next.is_none() {
                        last = Some(Last::Succeeded(flight, completion));
                    } else if let Err((flight, error)) = self
                        .complete_part(&tx, &mut batch, flight, &completion)
                        .await
                    {
                        let flights = batch.done.into_iter().chain([flight]).chain(next);
                        return self.broken(flights, error);
                    }
                }
                Part::Failed(flight, failure) => last = Some(Last::Failed(flight, failure)),
                Part::Cancelled(flight) => last = Some(Last::Cancelled(flight)),
                Part::Broken(flight, error) => {
                    return self.broken(batch.done.into_iter().chain([flight]), error);
                }
            }
        }
        let done = batch.done;
        let succeeded = matches!(last, Some(Last::Succeeded(..)));
        if done.is_empty() && !succeeded {
            drop(tx);
            return self.finish(last, Ok(()));
        }
        // A layer that kept the request elsewhere could still be writing; nothing of that may be committed.
        match Arc::try_unwrap(tx) {
            Ok(tx) => {
                let tx = tx.into_inner();
                let _ = commits.send(Commit { tx, done, last });
            }
            Err(_) => self.broken(in_order(done, last), still_borrowed()),
        }
    }

    async fn run_part(&self, slot: &TxSlot<Tx>, mut flight: Flight, working: &Working<'_>) -> Part {
        let ended = match self.can_start(&flight) {
            true => {
                self.begin(&mut flight);
                self.call(&flight, Some(slot.clone()), working).await
            }
            false => Ended::Cancelled,
        };
        let failure = match ended {
            Ended::Succeeded(outcome) => match self.completion(&flight, outcome) {
                Some(completion) => return Part::Succeeded(flight, completion),
                // Its claim ended in this moment.
                None => None,
            },
            Ended::Failed(failure) => Some(failure),
            Ended::Cancelled => None,
        };
        let Ok(mut tx) = slot.try_lock() else {
            return Part::Broken(flight, still_borrowed());
        };
        match (tx.undo().await, failure) {
            (Ok(()), Some(failure)) => {
                // It may have rolled back all that shared its commit, and would again.
                flight.alone = true;
                Part::Failed(flight, failure)
            }
            (Ok(()), None) => Part::Cancelled(flight),
            (Err(error), _) => Part::Broken(flight, error),
        }
    }

    /// Ends a part that is not the last.
    async fn complete_part(
        &self,
        slot: &TxSlot<Tx>,
        batch: &mut Batch,
        flight: Flight,
        completion: &Completion,
    ) -> Result<(), (Flight, Error)> {
        let Ok(mut tx) = slot.try_lock() else {
            return Err((flight, still_borrowed()));
        };
        match tx.complete(completion).await {
            Ok(Ok(())) => batch.done.push(flight),
            Ok(Err(Fenced)) => {
                add(&self.counters.fenced, 1);
                return Err((flight, fenced()));
            }
            Err(error) => return Err((flight, error)),
        }
        Ok(())
    }

    /// The transaction cannot be committed, or is not known to have been.
    fn broken(&self, flights: impl IntoIterator<Item = Flight>, error: Error) {
        let mut flights = flights.into_iter();
        let Some(head) = flights.next() else { return };
        let behind: Vec<_> = flights.collect();
        match error.kind() {
            ErrorKind::Refused if head.alone => self.failed(head, &Failure::retry(error)),
            ErrorKind::Refused => self.separate(head, behind, &error),
            _ => self.undone(head, behind, &error),
        }
    }

    /// Nothing is known to have been committed: everything is claimed again, in order.
    fn undone(&self, head: Flight, behind: Vec<Flight>, error: &Error) {
        for flight in &behind {
            flight.lease.unclaim();
        }
        if let Some(turn) = &head.turn {
            turn.put_back(behind);
        }
        self.in_doubt(head, error);
    }

    /// Nothing was committed, and one of these or of those that shared the commit is why: each is done again alone, in
    /// order, which shows whose failure it is and spares the others. It is no attempt of theirs.
    fn separate(&self, mut head: Flight, mut behind: Vec<Flight>, error: &Error) {
        tracing::warn!(queue = &*self.queue, message_id = %head.label(), followers = behind.len(), %error, "a commit was refused; its messages are done again one by one");
        head.alone = true;
        behind.iter_mut().for_each(|flight| flight.alone = true);
        if let Some(turn) = &head.turn {
            turn.put_back(behind);
        }
        self.lanes.push([head]);
    }

    /// Commits what the workers have finished, many at a time: the store makes one commit of them.
    pub(crate) async fn commit_stage(&self, mut receiver: UnboundedReceiver<Commit<Tx>>) {
        let mut commits = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
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
            mut last,
        } = commit;
        let succeeded = match &last {
            Some(Last::Succeeded(flight, completion)) => Some((flight, completion)),
            _ => None,
        };
        let mut all = done.iter().chain(succeeded.map(|(flight, _)| flight));
        let result = match succeeded {
            _ if !all.all(|flight| flight.lease.lasts()) => Err(Error::new(
                ErrorKind::Timeout,
                "a lease ended before the commit",
            )),
            Some((_, completion)) => tx.complete_and_commit(completion).await,
            None => tx.commit().await.map(Ok),
        };
        let verdict = match result {
            Ok(verdict) => verdict,
            Err(error) => return self.broken(in_order(done, last), error),
        };
        // If the last one has to be tried again, that is next in the lane, not what is behind it.
        let turn = done.first_mut().and_then(|head| head.turn.take());
        if let (Some(last), Some(turn)) = (&mut last, turn) {
            last.flight_mut().turn = Some(turn);
        }
        done.into_iter().for_each(|flight| self.applied(flight));
        self.finish(last, verdict);
    }

    fn finish(&self, last: Option<Last>, verdict: Result<(), Fenced>) {
        match last {
            Some(Last::Succeeded(flight, _)) => self.completed(flight, verdict),
            Some(Last::Failed(flight, failure)) => self.failed(flight, &failure),
            Some(Last::Cancelled(flight)) => self.cancelled(flight),
            None => {}
        }
    }
}

fn in_order(done: Vec<Flight>, last: Option<Last>) -> impl Iterator<Item = Flight> {
    done.into_iter().chain(last.map(Last::flight))
}

fn still_borrowed() -> Error {
    Error::new(
        ErrorKind::Store,
        "the transaction is still in use after its handler ended: a layer must not run the handler on a task of its own",
    )
    .retryable(true)
}
