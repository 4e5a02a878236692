use onlyonce_core::Error;
use onlyonce_core::driver::{Delivery, Ready, ReceiveLimits};

use crate::subscription::BATCH;

/// A pull that brings so many was worth its request: there may be more.
const WORTH: usize = 20;

/// Which pulls are worth sending, and what they brought.
#[derive(Debug)]
pub(crate) struct Pulls {
    pub(crate) ready: Ready,
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
            ready: Ready::default(),
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
        if !self.ready.leave_room(limits) {
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
}
