//! Which messages a handler gets in one call, and which share a transaction.

use tokio::time::{Duration, Instant, timeout_at};

use crate::driver::Transaction;

use super::Mode;
use super::engine::Engine;
use super::in_flight::InFlight;
use super::lanes::Working;

/// How much a handler of batches gets at once, at the most, and how long the first message waits for others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) messages: usize,
    pub(crate) bytes: usize,
    pub(crate) wait: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            messages: 100,
            bytes: 4 << 20,
            wait: Duration::ZERO,
        }
    }
}

impl Limits {
    /// What is left for others, if there is any.
    fn without(self, one: &InFlight) -> Option<Self> {
        let bytes = self.bytes.saturating_sub(one.delivery.message.size());
        let messages = self.messages.saturating_sub(1);
        (messages > 0 && bytes > 0).then_some(Self {
            messages,
            bytes,
            ..self
        })
    }
}

/// The second half, and what is to be run before it.
pub(crate) fn halves(mut batch: Vec<Box<InFlight>>) -> [Vec<Box<InFlight>>; 2] {
    let second = batch.split_off(batch.len() / 2);
    [second, batch]
}

impl<Tx: Transaction> Engine<Tx> {
    /// The head of a lane, and for a handler of batches what can be run with it.
    pub(crate) async fn with_others(
        &self,
        head: Box<InFlight>,
        working: &Working<'_>,
    ) -> Vec<Box<InFlight>> {
        let limits = self.batches.filter(|_| self.may_be_beside_others(&head));
        let mut room = limits.and_then(|limits| limits.without(&head));
        let mut batch = vec![head];
        let Some(wait) = room.map(|room| room.wait) else {
            return batch;
        };
        let deadline = Instant::now() + wait;
        loop {
            let more = self.lanes.more();
            self.fill(&mut batch, &mut room);
            if wait.is_zero() || room.is_none() || self.stop.is_cancelled() {
                return batch;
            }
            let more = async {
                tokio::select! {
                    biased;
                    () = self.stop.cancelled() => Ok(()),
                    more = timeout_at(deadline, more) => more,
                }
            };
            if working.pause(more).await.is_err() {
                return batch;
            }
        }
    }

    /// Adds what is ready: of a transaction's messages those behind the last in its lane too, which is safe since all of them
    /// can be rolled back.
    fn fill(&self, batch: &mut Vec<Box<InFlight>>, room: &mut Option<Limits>) {
        while let Some(left) = *room {
            let lane = batch.iter().rev().find_map(|one| one.lane.as_ref());
            let lane = lane.filter(|_| self.transactions.is_some());
            let next = lane
                .and_then(|lane| lane.next(|one| self.joins(one)))
                .or_else(|| self.lanes.pop_if(|one| self.joins(one)));
            match next {
                Some(next) => {
                    *room = left.without(&next);
                    batch.push(next);
                }
                None => return,
            }
        }
    }

    /// Whether it may be run at once, with others that are being run.
    pub(crate) fn joins(&self, one: &mut InFlight) -> bool {
        self.number(one);
        let may_run = self.store.is_none() || one.lease.precondition().is_some();
        one.is_to_run()
            && may_run
            && self.may_be_beside_others(one)
            && !self.is_set_aside(one)
            && self.can_start(one)
    }

    /// Whether it may share a call or a transaction with others: not if it may be the one that breaks it, and not where the way of
    /// each message is a way of its own.
    pub(crate) fn may_be_beside_others(&self, one: &InFlight) -> bool {
        let own_way = self.mode == Mode::AtMostOnce || self.quarantines();
        !own_way && !one.alone && one.in_doubt().is_none() && !self.is_suspect(one)
    }
}
