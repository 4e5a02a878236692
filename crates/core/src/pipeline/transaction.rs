use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::time::{Duration, Instant};

use crate::driver::{Completion, Fenced, Transaction, TransactionalStore};
use crate::handler::TxSlot;
use crate::{Error, ErrorKind, Failure};

use super::counters::add;
use super::engine::Engine;
use super::in_flight::InFlight;
use super::invoke::Ended;
use super::lanes::Working;
use super::transitions::fenced;

/// Messages of one group that share one transaction, at the most, and for how long it may take in more.
const SAVEPOINTS: usize = 64;
const OPEN: Duration = Duration::from_millis(20);

/// The commits under way; they are waited for in one place so that no worker stands idle meanwhile.
pub(crate) type Commits<Tx> = UnboundedSender<Commit<Tx>>;

/// A transaction to be committed: what it carries, in the order of the lane.
pub(crate) struct Commit<Tx> {
    tx: Tx,
    done: Vec<Box<InFlight>>,
    last: Option<Last>,
}

/// The message after those that are done.
enum Last {
    /// It completes with the commit, in one round trip.
    Succeeded(Box<InFlight>, Completion),
    Failed(Box<InFlight>, Failure),
    Cancelled(Box<InFlight>),
}

impl Last {
    fn in_flight(self) -> Box<InFlight> {
        match self {
            Self::Succeeded(in_flight, _)
            | Self::Failed(in_flight, _)
            | Self::Cancelled(in_flight) => in_flight,
        }
    }

    fn in_flight_mut(&mut self) -> &mut Box<InFlight> {
        match self {
            Self::Succeeded(in_flight, _)
            | Self::Failed(in_flight, _)
            | Self::Cancelled(in_flight) => in_flight,
        }
    }
}

/// How one message's run in a transaction ended.
enum RunEnd {
    Succeeded(Box<InFlight>, Completion),
    Failed(Box<InFlight>, Failure),
    Cancelled(Box<InFlight>),
    /// The transaction cannot go on.
    Broken(Box<InFlight>, Error),
}

/// What has been run in one transaction so far.
struct Batch {
    began: Instant,
    done: Vec<Box<InFlight>>,
}

impl Batch {
    /// Whether there is room for another.
    fn has_room(&self) -> bool {
        self.done.len() < SAVEPOINTS && self.began.elapsed() < OPEN
    }
}

impl<Tx: Transaction> Engine<Tx> {
    /// Runs the head of a lane and, as long as that is quick, those behind it, in one transaction.
    pub(crate) async fn run_in_transaction(
        &self,
        store: &dyn TransactionalStore<Tx = Tx>,
        head: Box<InFlight>,
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
        while let Some(in_flight) = next.take() {
            match self.run_in_savepoint(&tx, in_flight, working).await {
                RunEnd::Succeeded(in_flight, completion) => {
                    next = self.next_of_batch(&batch, &in_flight);
                    if next.is_none() {
                        last = Some(Last::Succeeded(in_flight, completion));
                    } else if let Err((in_flight, error)) = self
                        .complete_savepoint(&tx, &mut batch, in_flight, &completion)
                        .await
                    {
                        let messages = batch.done.into_iter().chain([in_flight]).chain(next);
                        return self.broken(messages, error);
                    }
                }
                RunEnd::Failed(in_flight, failure) => last = Some(Last::Failed(in_flight, failure)),
                RunEnd::Cancelled(in_flight) => last = Some(Last::Cancelled(in_flight)),
                RunEnd::Broken(in_flight, error) => {
                    return self.broken(batch.done.into_iter().chain([in_flight]), error);
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

    /// The next of the lane, if it can run at once and in the same transaction; `in_flight` holds the lane if nobody in
    /// `batch` does.
    fn next_of_batch(&self, batch: &Batch, in_flight: &InFlight) -> Option<Box<InFlight>> {
        let shares = |one: &InFlight| !one.alone && !self.is_suspect(one);
        if !shares(in_flight) || !batch.has_room() {
            return None;
        }
        let first = batch.done.first().map_or(in_flight, |first| &**first);
        let runs = |one: &InFlight| {
            one.is_to_run() && one.lease.precondition().is_some() && !self.is_set_aside(one)
        };
        first.lane.as_ref()?.next(|one| shares(one) && runs(one))
    }

    async fn run_in_savepoint(
        &self,
        slot: &TxSlot<Tx>,
        mut in_flight: Box<InFlight>,
        working: &Working<'_>,
    ) -> RunEnd {
        let ended = match self.can_start(&in_flight) {
            true => {
                self.begin(&mut in_flight);
                self.call(&in_flight, Some(slot.clone()), working).await
            }
            false => Ended::Cancelled,
        };
        let failure = match ended {
            Ended::Succeeded(outcome) => match self.completion(&in_flight, outcome) {
                Some(completion) => return RunEnd::Succeeded(in_flight, completion),
                // Its claim ended in this moment.
                None => None,
            },
            Ended::Failed(failure) => Some(failure),
            Ended::Cancelled => None,
        };
        let Ok(mut tx) = slot.try_lock() else {
            return RunEnd::Broken(in_flight, still_borrowed());
        };
        match (tx.rollback().await, failure) {
            (Ok(()), Some(failure)) => {
                // It may have rolled back all that shared its commit, and would again.
                in_flight.alone = true;
                RunEnd::Failed(in_flight, failure)
            }
            (Ok(()), None) => RunEnd::Cancelled(in_flight),
            (Err(error), _) => RunEnd::Broken(in_flight, error),
        }
    }

    /// Ends a savepoint that is not the last.
    async fn complete_savepoint(
        &self,
        slot: &TxSlot<Tx>,
        batch: &mut Batch,
        in_flight: Box<InFlight>,
        completion: &Completion,
    ) -> Result<(), (Box<InFlight>, Error)> {
        let Ok(mut tx) = slot.try_lock() else {
            return Err((in_flight, still_borrowed()));
        };
        match tx.complete(completion).await {
            Ok(Ok(())) => batch.done.push(in_flight),
            Ok(Err(Fenced)) => {
                add(&self.counters.fenced, 1);
                return Err((in_flight, fenced()));
            }
            Err(error) => return Err((in_flight, error)),
        }
        Ok(())
    }

    /// The transaction cannot be committed, or is not known to have been.
    fn broken(&self, messages: impl IntoIterator<Item = Box<InFlight>>, error: Error) {
        let mut messages = messages.into_iter();
        let Some(head) = messages.next() else { return };
        let behind: Vec<_> = messages.collect();
        match error.kind() {
            ErrorKind::Refused if head.alone => self.failed(head, &Failure::retry(error)),
            ErrorKind::Refused => self.separate(head, behind, &error),
            _ => self.not_committed(head, behind, &error),
        }
    }

    /// Nothing is known to have been committed: everything is claimed again, in order.
    fn not_committed(&self, head: Box<InFlight>, behind: Vec<Box<InFlight>>, error: &Error) {
        for in_flight in &behind {
            in_flight.lease.forget_claim();
        }
        if let Some(lane) = &head.lane {
            lane.put_back(behind);
        }
        self.in_doubt(head, error);
    }

    /// Nothing was committed, and one of these or of those that shared the commit is why: each is done again alone, in
    /// order, which shows whose failure it is and spares the others. It is no attempt of theirs.
    fn separate(&self, mut head: Box<InFlight>, mut behind: Vec<Box<InFlight>>, error: &Error) {
        tracing::warn!(queue = &*self.queue, message_id = %head.label(), followers = behind.len(), %error, "a commit was refused; its messages are done again one by one");
        head.alone = true;
        behind
            .iter_mut()
            .for_each(|in_flight| in_flight.alone = true);
        if let Some(lane) = &head.lane {
            lane.put_back(behind);
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
            Some(Last::Succeeded(in_flight, completion)) => Some((in_flight, completion)),
            _ => None,
        };
        let mut all = done.iter().chain(succeeded.map(|(in_flight, _)| in_flight));
        let result = match succeeded {
            _ if !all.all(|in_flight| in_flight.lease.lasts()) => Err(Error::new(
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
        let lane = done.first_mut().and_then(|head| head.lane.take());
        if let (Some(last), Some(lane)) = (&mut last, lane) {
            last.in_flight_mut().lane = Some(lane);
        }
        done.into_iter()
            .for_each(|in_flight| self.applied(in_flight));
        self.finish(last, verdict);
    }

    fn finish(&self, last: Option<Last>, verdict: Result<(), Fenced>) {
        match last {
            Some(Last::Succeeded(in_flight, _)) => self.completed(in_flight, verdict),
            Some(Last::Failed(in_flight, failure)) => self.failed(in_flight, &failure),
            Some(Last::Cancelled(in_flight)) => self.cancelled(in_flight),
            None => {}
        }
    }
}

fn in_order(done: Vec<Box<InFlight>>, last: Option<Last>) -> impl Iterator<Item = Box<InFlight>> {
    done.into_iter().chain(last.map(Last::in_flight))
}

fn still_borrowed() -> Error {
    Error::new(
        ErrorKind::Store,
        "the transaction is still in use after its handler ended: a layer must not run the handler on a task of its own",
    )
    .retryable(true)
}
