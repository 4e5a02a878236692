//! The broker: leases, and receipts that count for as long as the lease.

use std::ops::RangeInclusive;

use super::protocol::Protocol;
use super::state::{Action, At, Dead, Flight, LANE, Phase, Queued, State};

/// What the broker says to a settlement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
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
            state.workers[worker][place] = Some(Flight {
                message,
                phase: self.first_phase(),
                newest_receipt: true,
                newest_token: false,
                uncertain: false,
            });
        }
    }

    pub fn settlement(&self, state: &State, flight: Flight) -> Answer {
        let late = self.broker == Broker::Lenient && state.queue[flight.message] != Queued::Gone;
        match state.leased(flight) || late {
            true => Answer::Applied,
            false => Answer::LeaseLost,
        }
    }

    pub fn settle(&self, state: &mut State, at: At, action: Action, answer: Answer) {
        let Some(flight) = state.flight(at).filter(|_| answer == Answer::Applied) else {
            return;
        };
        state.queue[flight.message] = match action {
            Action::Ack | Action::DeadLetter => Queued::Gone,
            Action::Nack => Queued::Waiting,
        };
        if action == Action::DeadLetter {
            state.dead[self.keys[flight.message]] = Dead::Confirmed;
        }
    }

    /// What was given back goes back last first, so that the broker finds it in order.
    pub fn may_settle(&self, state: &State, at: At) -> bool {
        let behind = state.workers[at.worker][at.place + 1..].iter().flatten();
        let waits = |f: &Flight| {
            matches!(
                f.phase,
                Phase::Releasing(Action::Nack) | Phase::Settling(Action::Nack)
            )
        };
        !behind.into_iter().any(waits)
    }
}

/// Leases a message anew: older receipts are no longer the newest.
pub fn lease(state: &mut State, message: usize) {
    state.queue[message] = Queued::Leased;
    let of_message = |f: &&mut Flight| f.message == message;
    state
        .all_flights_mut()
        .filter(of_message)
        .for_each(|f| f.newest_receipt = false);
}
