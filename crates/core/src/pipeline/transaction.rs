use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use smallvec::{SmallVec, smallvec};
use tokio::sync::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::time::{Duration, Instant};

use crate::driver::{Completion, Fenced, Transaction, TransactionalStore};
use crate::handler::{Answer, TxSlot};
use crate::{BoxError, Error, ErrorKind, Failure};

use super::batch::halves;
use super::counters::add;
use super::engine::Engine;
use super::in_flight::InFlight;
use super::invoke::{Answers, Ended};
use super::lanes::{LaneLock, Working};
use super::transitions::fenced;

/// Messages of one group that share one transaction, at the most, and for how long it may take in more.
const SAVEPOINTS: usize = 64;
const OPEN: Duration = Duration::from_millis(20);

/// A handler of single messages has one of them, which takes no allocation.
type Few<T> = SmallVec<[T; 1]>;

/// The commits under way; they are waited for in one place so that no worker stands idle meanwhile.
pub(crate) type Commits<Tx> = UnboundedSender<Commit<Tx>>;

/// A transaction to be committed, and what was run in it.
pub(crate) struct Commit<Tx> {
    tx: Tx,
    run: Run,
}

/// What is run in one transaction, in order. Each call of the handler is a savepoint.
struct Run {
    began: Instant,
    /// It is one message, in a commit of its own.
    alone: bool,
    /// The lanes of all messages here. What is not done has its lane back when the others are committed.
    lanes: Few<LaneLock>,
    /// To be run, the next one last.
    parts: Few<Vec<Box<InFlight>>>,
    /// Recorded in the savepoints that have ended.
    done: Vec<Box<InFlight>>,
    /// Done in the present savepoint. The records of the last one are written with the commit, in one round trip.
    last: Few<Box<InFlight>>,
    records: Few<Completion>,
    not_done: Vec<(Box<InFlight>, NotDone)>,
}

enum NotDone {
    Failed(Failure),
    Cancelled,
}

/// The transaction cannot go on.
struct Broken(Error);

impl Run {
    fn new(mut batch: Vec<Box<InFlight>>) -> Self {
        Self {
            began: Instant::now(),
            alone: batch.iter().any(|one| one.alone),
            lanes: batch.iter_mut().filter_map(|one| one.lane.take()).collect(),
            parts: smallvec![batch],
            done: Vec::new(),
            last: Few::new(),
            records: Few::new(),
            not_done: Vec::new(),
        }
    }

    /// Whether there is room for another.
    fn has_room(&self) -> bool {
        self.done.len() + self.last.len() < SAVEPOINTS && self.began.elapsed() < OPEN
    }

    /// This message is not done, so what was to be run behind it in its lane goes back there.
    fn not_done(&mut self, one: Box<InFlight>, why: NotDone) {
        if let Some(lane) = self.lanes.iter().find(|lane| lane.is_of(&one)) {
            let parts = self.parts.iter_mut().rev();
            let behind = parts.flat_map(|part| part.extract_if(.., |other| lane.is_of(other)));
            lane.put_back(behind.collect());
        }
        self.not_done.push((one, why));
    }

    /// It has failed, and may have rolled back all that shared its commit, and would again.
    fn failed(&mut self, mut one: Box<InFlight>, failure: Failure) {
        one.alone = true;
        self.not_done(one, NotDone::Failed(failure));
    }

    fn cancelled(&mut self, part: Vec<Box<InFlight>>) {
        let mut part = VecDeque::from(part);
        while let Some(one) = part.pop_front() {
            self.parts.push(part.into());
            self.not_done(one, NotDone::Cancelled);
            part = self.parts.pop().unwrap_or_default().into();
        }
    }

    /// Puts everything back into the lanes, and returns the first of each; what is behind it is seen by `behind`.
    fn heads(self, behind: impl Fn(&mut InFlight)) -> Vec<Box<InFlight>> {
        let mut heads = self.done;
        heads.extend(self.last);
        heads.extend(self.not_done.into_iter().map(|(one, _)| one));
        heads.extend(self.parts.into_iter().flatten());
        heads.sort_by_key(|one| one.seq);
        for lane in self.lanes {
            let mut of_lane = heads
                .extract_if(.., |one| lane.is_of(one))
                .collect::<VecDeque<_>>();
            let Some(mut first) = of_lane.pop_front() else {
                continue;
            };
            of_lane.iter_mut().for_each(|one| behind(one));
            lane.put_back(of_lane.into());
            first.lane = Some(lane);
            heads.push(first);
        }
        heads
    }
}

impl<Tx: Transaction> Engine<Tx> {
    /// Runs the head of a lane and, as long as that is quick, those behind it, in one transaction; or a batch, in parts if it
    /// fails.
    pub(crate) async fn run_in_transaction(
        &self,
        store: &dyn TransactionalStore<Tx = Tx>,
        batch: Vec<Box<InFlight>>,
        working: &Working<'_>,
        commits: &Commits<Tx>,
    ) {
        let mut run = Run::new(batch);
        let begin = match run.alone {
            true => store.begin_alone(),
            false => store.begin(),
        };
        let tx = match working.pause(self.within(begin)).await {
            Ok(tx) => Arc::new(Mutex::new(tx)),
            Err(error) => return self.not_committed(run, &error),
        };
        if let Err(Broken(error)) = self.run_parts(&tx, &mut run, working).await {
            return self.broken(run, error);
        }
        if run.done.is_empty() && run.last.is_empty() {
            drop(tx);
            return self.finish(run);
        }
        // A layer that kept the request elsewhere could still be writing; nothing of that may be committed.
        match Arc::try_unwrap(tx) {
            Ok(tx) => {
                let tx = tx.into_inner();
                let _ = commits.send(Commit { tx, run });
            }
            Err(_) => self.broken(run, still_borrowed()),
        }
    }

    async fn run_parts(
        &self,
        slot: &TxSlot<Tx>,
        run: &mut Run,
        working: &Working<'_>,
    ) -> Result<(), Broken> {
        while !run.parts.is_empty() {
            self.end_savepoint(slot, run).await?;
            self.run_in_savepoint(slot, run, working).await?;
            self.add_next(run);
        }
        Ok(())
    }

    /// Adds the next of the lane, if it can run at once and in the same transaction. A batch is whole when it comes.
    fn add_next(&self, run: &mut Run) {
        let goes_on = self.batches.is_none() && run.not_done.is_empty();
        if goes_on && run.has_room() && run.last.iter().all(|one| self.may_be_beside_others(one)) {
            let lane = run.lanes.first();
            let next = lane.and_then(|lane| lane.next(|one| self.joins(one)));
            run.parts.extend(next.map(|next| vec![next]));
        }
    }

    /// Ends the savepoint of what was run last; it is not the last of all.
    async fn end_savepoint(&self, slot: &TxSlot<Tx>, run: &mut Run) -> Result<(), Broken> {
        if run.last.is_empty() {
            return Ok(());
        }
        let mut tx = slot.try_lock().map_err(|_| Broken(still_borrowed()))?;
        match tx.complete(&run.records).await {
            Ok(Ok(())) => {
                run.records.clear();
                run.done.extend(run.last.drain(..));
                Ok(())
            }
            Ok(Err(Fenced)) => {
                add(&self.counters.fenced, 1);
                Err(Broken(fenced()))
            }
            Err(error) => Err(Broken(error)),
        }
    }

    /// Calls the handler for the next part.
    async fn run_in_savepoint(
        &self,
        slot: &TxSlot<Tx>,
        run: &mut Run,
        working: &Working<'_>,
    ) -> Result<(), Broken> {
        let Some(mut part) = run.parts.pop().filter(|part| !part.is_empty()) else {
            return Ok(());
        };
        let ended = match part.iter().all(|one| self.can_start(one)) {
            true => {
                part.iter_mut().for_each(|one| self.begin(one));
                self.call(&part, Some(slot.clone()), working).await
            }
            false => Ended::Cancelled,
        };
        let conflict = match &ended {
            Ended::Failed(failure) => {
                let tx = slot.try_lock().map_err(|_| Broken(still_borrowed()))?;
                is_conflict(&*tx, &failure.error).then(|| conflict(&failure.error))
            }
            _ => None,
        };
        if let Some(conflict) = conflict {
            run.parts.push(part);
            return Err(Broken(conflict));
        }
        if self.sort(part, ended, run) {
            return Ok(());
        }
        let mut tx = slot.try_lock().map_err(|_| Broken(still_borrowed()))?;
        tx.rollback().await.map_err(Broken)
    }

    /// Sorts messages by what became of them; whether something was done, and the savepoint is to be kept.
    fn sort(&self, part: Vec<Box<InFlight>>, ended: Ended<Answers>, run: &mut Run) -> bool {
        match ended {
            Ended::Succeeded(answers) => {
                return self.sort_answered(part, answers.each().collect(), run);
            }
            Ended::Failed(_) if part.len() > 1 => run.parts.extend(halves(part)),
            Ended::Failed(failure) => {
                let guilty = part.into_iter().next();
                if let Some(guilty) = guilty {
                    run.failed(guilty, failure);
                }
            }
            Ended::Cancelled => run.cancelled(part),
        }
        false
    }

    fn sort_answered(&self, part: Vec<Box<InFlight>>, answers: Few<Answer>, run: &mut Run) -> bool {
        if is_overtaken(&part, &answers) {
            run.parts.extend(halves(part));
            return false;
        }
        let done = part.iter().zip(&answers);
        let done = done.filter_map(|(one, answer)| Some((one, answer.as_ref().ok()?)));
        let records = done.map(|(one, outcome)| self.completion(one, outcome.clone()));
        let Some(records) = records.collect() else {
            // A claim ended in this moment.
            run.cancelled(part);
            return false;
        };
        run.records = records;
        for (one, answer) in part.into_iter().zip(answers) {
            match answer {
                Ok(_) => run.last.push(one),
                Err(failure) => run.failed(one, failure),
            }
        }
        !run.last.is_empty()
    }

    /// The transaction cannot be committed, or is not known to have been.
    fn broken(&self, run: Run, error: Error) {
        match error.kind() {
            ErrorKind::Refused if run.alone => {
                let heads = run.heads(|_| {}).into_iter();
                heads.for_each(|one| self.failed(one, &Failure::retry(error.clone())));
            }
            ErrorKind::Refused => self.separate(run, &error),
            ErrorKind::Conflict => self.conflicted_all(run, &error),
            _ => self.not_committed(run, &error),
        }
    }

    /// Nothing was committed, since another transaction was in the way: each is done again in a commit of its own.
    fn conflicted_all(&self, run: Run, error: &Error) {
        let heads = run.heads(|behind| behind.alone = true);
        heads
            .into_iter()
            .for_each(|one| self.conflicted(one, error));
    }

    /// Nothing is known to have been committed: everything is claimed again, in order.
    fn not_committed(&self, run: Run, error: &Error) {
        let heads = run.heads(|behind| {
            behind.lease.forget_claim();
        });
        heads.into_iter().for_each(|one| self.in_doubt(one, error));
    }

    /// Nothing was committed, and one of these or of those that shared the commit is why: each is done again alone, in
    /// order, which shows whose failure it is and spares the others. It is no attempt of theirs.
    fn separate(&self, run: Run, error: &Error) {
        let mut heads = run.heads(|behind| behind.alone = true);
        heads.iter_mut().for_each(|one| one.alone = true);
        let first = heads.first().map(|one| one.label());
        tracing::warn!(queue = &*self.queue, message_id = first.map(tracing::field::display), %error, "a commit was refused; its messages are done again one by one");
        self.lanes.push(heads);
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
        let Commit { tx, mut run } = commit;
        let mut all = run.done.iter().chain(&run.last);
        let result = match run.records.as_slice() {
            _ if !all.all(|one| one.lease.lasts()) => Err(Error::new(
                ErrorKind::Timeout,
                "a lease ended before the commit",
            )),
            [] => tx.commit().await.map(Ok),
            records => tx.complete_and_commit(records).await,
        };
        let verdict = match result {
            Ok(verdict) => verdict,
            Err(error) => return self.broken(run, error),
        };
        run.done.drain(..).for_each(|one| self.applied(one));
        if let Err(Fenced) = verdict {
            let heads = run.heads(|behind| {
                behind.lease.forget_claim();
            });
            return heads
                .into_iter()
                .for_each(|one| self.completed(one, verdict));
        }
        run.last.drain(..).for_each(|one| self.applied(one));
        self.finish(run);
    }

    /// What is done is committed: the rest has its lane back, and goes on.
    fn finish(&self, mut run: Run) {
        for (mut one, why) in run.not_done {
            let lane = run.lanes.iter().position(|lane| lane.is_of(&one));
            one.lane = lane.map(|place| run.lanes.swap_remove(place));
            match why {
                NotDone::Failed(failure) => self.failed(one, &failure),
                NotDone::Cancelled => self.cancelled(one),
            }
        }
    }
}

/// Whether a message of a group was run behind one that failed.
fn is_overtaken(part: &[Box<InFlight>], answers: &[Answer]) -> bool {
    let group = |place: usize| {
        part.get(place)
            .and_then(|one| one.delivery.message.group.as_deref())
    };
    let mut failed = (0..).zip(answers).filter(|(_, answer)| answer.is_err());
    failed.any(|(place, _)| {
        let failed = group(place);
        failed.is_some() && (place + 1..part.len()).any(|behind| group(behind) == failed)
    })
}

/// Whether the error of a handler, or one of its causes, is of a conflict with another transaction.
fn is_conflict<Tx: Transaction>(tx: &Tx, error: &BoxError) -> bool {
    let mut cause = Some(&**error as &(dyn std::error::Error + 'static));
    while let Some(error) = cause {
        let ours = error.downcast_ref::<Error>();
        // Ours leaves out its cause where it tells its source.
        if ours.is_some_and(|ours| ours.kind() == ErrorKind::Conflict)
            || tx.is_conflict(error)
            || ours
                .and_then(Error::cause)
                .is_some_and(|cause| tx.is_conflict(cause))
        {
            return true;
        }
        cause = error.source();
    }
    false
}

fn conflict(cause: &BoxError) -> Error {
    let what = format!("another transaction was in the handler's way: {cause}");
    Error::new(ErrorKind::Conflict, what)
}

fn still_borrowed() -> Error {
    Error::new(
        ErrorKind::Store,
        "the transaction is still in use after its handler ended: a layer must not run the handler on a task of its own",
    )
    .retryable(true)
}
