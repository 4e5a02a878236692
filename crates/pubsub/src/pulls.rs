use std::collections::{HashSet, VecDeque};

use onlyonce_core::Error;
use onlyonce_core::driver::{Delivery, ReceiveLimits};
use tokio::time::Instant;

use crate::subscription::BATCH;

/// A pull that brings so many was worth its request: there may be more.
const WORTH: usize = 20;

/// Which pulls are worth sending, and what they brought.
#[derive(Debug)]
pub(crate) struct Pulls {
    pub(crate) ready: VecDeque<Delivery>,
    /// Under way.
    running: usize,
    /// Messages that those under way may bring.
    asked: usize,
    /// How many at once the load is worth: one more after each that came back full, one less after each that brought few.
    worth: usize,
    most: usize,
    /// Why the last one failed, for the next receive.
    pub(crate) error: Option<Error>,
    /// How many receives wait.
    receives: usize,
}

/// One request.
#[derive(Debug)]
pub(crate) struct Pull {
    pub(crate) messages: usize,
}

impl Pulls {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            ready: VecDeque::new(),
            running: 0,
            asked: 0,
            worth: 1,
            most,
            error: None,
            receives: 0,
        }
    }

    pub(crate) fn receive_began(&mut self) {
        self.receives += 1;
    }

    pub(crate) fn receive_ended(&mut self) {
        self.receives -= 1;
    }

    /// Whether somebody waits for what pulls bring.
    pub(crate) fn are_awaited(&self) -> bool {
        self.receives > 0
    }

    /// The next pull to send for a receive that may return `limits`; none if those under way do.
    pub(crate) fn next(&mut self, limits: ReceiveLimits) -> Option<Pull> {
        if self.error.is_some() || self.running >= self.worth {
            return None;
        }
        let bytes = self.ready.iter().map(|delivery| delivery.message.size());
        if !limits.allows_more(self.ready.len(), bytes.sum()) {
            return None;
        }
        let held = self.asked + self.ready.len();
        let messages = limits.messages.saturating_sub(held).min(BATCH);
        // What a small request could still bring, a larger one will when there is room.
        if messages == 0 || (messages < WORTH && held > 0) {
            return None;
        }
        self.running += 1;
        self.asked += messages;
        Some(Pull { messages })
    }

    pub(crate) fn came_back(&mut self, pull: &Pull, deliveries: Vec<Delivery>) {
        self.ended(pull);
        self.error = None;
        let enough = pull.messages.min(WORTH);
        if deliveries.len() >= enough {
            self.worth = (self.worth + 1).min(self.most);
        } else if deliveries.len() * 2 < enough {
            self.worth = (self.worth - 1).max(1);
        }
        self.ready.extend(deliveries);
    }

    pub(crate) fn failed(&mut self, pull: &Pull, error: Error) {
        self.ended(pull);
        self.worth = 1;
        self.error = Some(error);
    }

    /// Nobody waits for it any more.
    pub(crate) fn ended(&mut self, pull: &Pull) {
        self.running -= 1;
        self.asked -= pull.messages;
    }

    /// Takes what `limits` allows of what has come and is not `gone`. What is left of a group waits until nobody has a message
    /// of it any more: should that one be given back, its followers must be, too.
    pub(crate) fn take(
        &mut self,
        limits: ReceiveLimits,
        groups_out: &HashSet<&str>,
        gone: impl Fn(&Delivery) -> bool,
    ) -> Vec<Delivery> {
        let now = Instant::now();
        let (mut taken, mut left) = (Vec::new(), VecDeque::new());
        let mut bytes = 0;
        for delivery in self.ready.drain(..) {
            let more = limits.allows_more(taken.len(), bytes);
            let ended = delivery.lease.until.is_some_and(|until| until <= now);
            if ended || gone(&delivery) {
                continue;
            } else if !more || is_of(&delivery, groups_out) {
                left.push_back(delivery);
            } else {
                bytes += delivery.message.size();
                taken.push(delivery);
            }
        }
        self.ready = left;
        taken
    }

    /// Drops what has come of these groups: it is given back.
    pub(crate) fn withdraw(&mut self, groups: &HashSet<&str>) {
        self.ready.retain(|delivery| !is_of(delivery, groups));
    }
}

fn is_of(delivery: &Delivery, groups: &HashSet<&str>) -> bool {
    let group = delivery.message.group.as_deref();
    group.is_some_and(|group| groups.contains(group))
}
