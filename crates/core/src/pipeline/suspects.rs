//! Messages that have had all their attempts although none of them is known to have failed: their workers died, or their
//! leases ended. Such a message may have been the cause, or only have been held beside it.
//!
//! So it runs alone, and the store counts that it has started. If no such run ends, the message was the cause, and it is
//! dead-lettered without another run. One is not enough: a worker may be killed from outside while it runs a suspect. Where no
//! store can count, only the runs that this worker knows of do: a message is never given up for deliveries in which it may only
//! have been held.

use tokio::sync::{RwLockReadGuard, RwLockWriteGuard};

use crate::driver::Transaction;

use super::Mode;
use super::engine::Engine;
use super::in_flight::InFlight;
use super::lanes::Working;

/// How many runs alone may fail to end before the message is given up.
const RUNS_ALONE: u32 = 3;

/// Held while a message runs; dropped when it has.
pub(crate) enum Place<'a> {
    Beside { _place: RwLockReadGuard<'a, ()> },
    Alone { _place: RwLockWriteGuard<'a, ()> },
}

impl<Tx: Transaction> Engine<Tx> {
    /// Waits until the message may run: beside others, or if it is a suspect alone.
    pub(crate) async fn place(
        &self,
        in_flight: &mut Box<InFlight>,
        working: &Working<'_>,
    ) -> Place<'_> {
        self.number(in_flight);
        if self.is_suspect(in_flight) {
            let _place = working.pause(self.running.write()).await;
            return Place::Alone { _place };
        }
        let _place = match self.running.try_read() {
            Ok(place) => place,
            Err(_) => working.pause(self.running.read()).await,
        };
        Place::Beside { _place }
    }

    /// Why a suspect is not to run again, if it is not.
    pub(crate) fn no_run_left(&self, in_flight: &InFlight) -> Option<String> {
        if !self.is_suspect(in_flight) {
            return None;
        }
        let attempt = in_flight.attempt();
        let alone = in_flight.in_doubt().map_or(0, |starts| starts.count);
        let ended = in_flight.known_runs() > self.options.retry.max_attempts || alone >= RUNS_ALONE;
        ended.then(|| {
            format!(
                "gave up before attempt {attempt}: no run before it has ended, not even alone; it may crash its worker, block its thread or take longer than its lease"
            )
        })
    }

    /// Says in the log why a handler was cut off, and what to set.
    pub(crate) fn warn_of_cut(&self, in_flight: &InFlight, ended: bool) {
        let blocked = match ended {
            true => " It ended by itself, but too late: does it block its thread?",
            false => "",
        };
        let why = if self.cancel.is_cancelled() {
            "the drain timed out: see drain_timeout".to_owned()
        } else if in_flight.lease.connection_is_lost() {
            "the connection that it was delivered by is gone, or the broker took it back after its acknowledgement time-out".to_owned()
        } else if in_flight.lease.leased() {
            let lease = self.options.claim_lease;
            format!(
                "its claim was not renewed within {lease:?}: see claim_lease, and whether the store answers"
            )
        } else {
            let lease = self.lease.unwrap_or_default();
            format!(
                "the queue's lease of {lease:?} ended before the handler did: make the handler faster, or the lease longer at the queue"
            )
        };
        tracing::warn!(
            queue = &*self.queue,
            message_id = %in_flight.label(),
            attempt = in_flight.attempt(),
            handler = self.handler_name,
            "the handler was cut off, which counts as an attempt: {why}.{blocked}"
        );
    }
}

impl<Tx> Engine<Tx> {
    /// Whether it has had all its attempts.
    pub(crate) fn is_suspect(&self, in_flight: &InFlight) -> bool {
        self.mode != Mode::AtMostOnce && in_flight.attempt() > self.options.retry.max_attempts
    }
}
