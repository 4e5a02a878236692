//! The broker: leases, and receipts that count for as long as the lease.

use std::ops::RangeInclusive;

use super::protocol::Protocol;
use super::state::{At, Dead, Disposition, InFlight, LANE, Phase, Queued, State};

/// What the broker says to a settlement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettleResult {
    Applied,
    LeaseLost,
}

/// How strictly the broker takes its leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broker {
    /// Only the newest receipt settles, and only while its lease lasts.
    Strict,
    /// Every receipt settles, however old.
    Lenient,
}

impl Protocol {
    /// Which messages the broker may deliver to `worker` next, as one batch. In a group they come in order, and are
    /// withheld while an earlier one is leased.
    pub fn deliverable(&self, state: &State, worker: usize) -> Vec<RangeInclusive<usize>> {
        let messages = 0..self.keys.len();
        let is = |m: usize, queued| state.queue[m] == queued;
        if state.workers[worker][0].is_some() {
            return Vec::new();
        }
        if !self.grouped {
            let waiting = messages.filter(|&m| is(m, Queued::Waiting));
            return waiting.map(|m| m..=m).collect();
        }
        let Some(first) = messages.clone().find(|&m| !is(m, Queued::Gone)) else {
            return Vec::new();
        };
        let run = messages.skip(first).take_while(|&m| is(m, Queued::Waiting));
        run.take(LANE).map(|last| first..=last).collect()
    }

    pub fn receive(&self, state: &mut State, worker: usize, batch: RangeInclusive<usize>) {
        for (place, message) in batch.enumerate() {
            lease(state, message);
            state.workers[worker][place] = Some(InFlight {
                message,
                phase: self.first_phase(),
                newest_receipt: true,
                newest_token: false,
                looked_up: false,
                in_doubt: false,
            });
        }
    }

    pub fn settlement(&self, state: &State, in_flight: InFlight) -> SettleResult {
        let late = self.broker == Broker::Lenient && state.queue[in_flight.message] != Queued::Gone;
        match state.leased(in_flight) || late {
            true => SettleResult::Applied,
            false => SettleResult::LeaseLost,
        }
    }

    pub fn settle(
        &self,
        state: &mut State,
        at: At,
        disposition: Disposition,
        answer: SettleResult,
    ) {
        let Some(in_flight) = state
            .in_flight(at)
            .filter(|_| answer == SettleResult::Applied)
        else {
            return;
        };
        state.queue[in_flight.message] = match disposition {
            Disposition::Ack | Disposition::DeadLetter => Queued::Gone,
            Disposition::Nack => Queued::Waiting,
        };
        if disposition == Disposition::DeadLetter {
            state.dead[self.keys[in_flight.message]] = Dead::Confirmed;
        }
    }

    /// What was given back goes back last first, so that the broker finds it in order.
    pub fn may_settle(&self, state: &State, at: At) -> bool {
        let behind = state.workers[at.worker][at.place + 1..].iter().flatten();
        let waits = |f: &InFlight| {
            matches!(
                f.phase,
                Phase::Releasing(Disposition::Nack) | Phase::Settling(Disposition::Nack)
            )
        };
        !behind.into_iter().any(waits)
    }
}

/// Leases a message anew: older receipts are no longer the newest.
pub fn lease(state: &mut State, message: usize) {
    state.queue[message] = Queued::Leased;
    let of_message = |f: &&mut InFlight| f.message == message;
    state
        .all_in_flight_mut()
        .filter(of_message)
        .for_each(|f| f.newest_receipt = false);
}
