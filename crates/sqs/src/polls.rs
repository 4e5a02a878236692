use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use onlyonce_core::{Delivery, Error, Limit, Receipt};
use tokio::time::Instant;

use crate::queue::BATCH;

/// The longest wait that SQS knows, in seconds.
const LONGEST_WAIT: f64 = 20.0;
/// Between requests that do not wait.
const PAUSE: Duration = Duration::from_millis(100);
/// For so long SQS knows a receive attempt:
/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ReceiveMessage.html>
const ATTEMPT: Duration = Duration::from_secs(300);

/// Which long polls are worth sending, and what they brought.
#[derive(Debug)]
pub(crate) struct Polls {
    pub(crate) ready: VecDeque<Delivery>,
    /// Under way.
    running: usize,
    /// Messages that those under way may bring.
    asked: usize,
    /// How many at once the load is worth: one more after each that came back full, one less after each that did not
    /// bring half of what was asked for.
    worth: usize,
    most: usize,
    /// Polls whose answer was lost, to be asked for again.
    lost: Vec<Poll>,
    /// Why the last one failed, for the next receive.
    pub(crate) error: Option<Error>,
    /// A queue that is empty is not asked again before this.
    pub(crate) pause_until: Option<Instant>,
}

/// One receive request.
#[derive(Clone, Debug)]
pub(crate) struct Poll {
    pub(crate) messages: usize,
    pub(crate) wait: Duration,
    /// By this a FIFO queue knows the request when it is repeated, and gives the same messages.
    pub(crate) attempt: Option<String>,
    first_sent: Instant,
}

impl Polls {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            ready: VecDeque::new(),
            running: 0,
            asked: 0,
            worth: 1,
            most,
            lost: Vec::new(),
            error: None,
            pause_until: None,
        }
    }

    /// The next poll to send for a receive that may return `limit`, waiting no longer than `wait`; none if those under
    /// way do.
    pub(crate) fn next(&mut self, limit: Limit, wait: Duration, fifo: bool) -> Option<Poll> {
        let now = Instant::now();
        let paused = self.pause_until.is_some_and(|until| until > now);
        if self.error.is_some() || paused || self.running >= self.worth {
            return None;
        }
        let bytes = self.ready.iter().map(|delivery| delivery.message.size());
        if !limit.allows_more(self.ready.len(), bytes.sum()) {
            return None;
        }
        self.lost.retain(|poll| now < poll.first_sent + ATTEMPT);
        let room = limit.messages.saturating_sub(self.asked + self.ready.len());
        // A FIFO queue fills a receive from one group first.
        let whole = BATCH.min(if fifo { limit.per_group.max(1) } else { BATCH });
        let messages = whole.min(room);
        // What a small request could still bring, a whole one will when there is room: requests cost money.
        if messages == 0 || (messages < whole && self.asked + self.ready.len() > 0) {
            return None;
        }
        let again = self.lost.iter().position(|poll| poll.messages <= room);
        let mut poll = match again {
            Some(at) => self.lost.swap_remove(at),
            None => Poll {
                messages,
                wait: Duration::ZERO,
                attempt: fifo.then(|| format!("{:032x}", fastrand::u128(..))),
                first_sent: now,
            },
        };
        poll.wait = whole_seconds(wait);
        self.running += 1;
        self.asked += poll.messages;
        Some(poll)
    }

    pub(crate) fn came_back(&mut self, poll: &Poll, deliveries: Vec<Delivery>) {
        self.ended(poll);
        self.error = None;
        let got = deliveries.len();
        if got >= poll.messages {
            self.worth = (self.worth + 1).min(self.most);
        } else if got * 2 < poll.messages {
            self.worth = (self.worth - 1).max(1);
        }
        let pause = got == 0 && poll.wait.is_zero();
        self.pause_until = pause.then(|| Instant::now() + PAUSE);
        self.ready.extend(deliveries);
    }

    /// Its answer was lost, or it was refused.
    pub(crate) fn failed(&mut self, poll: Poll, error: Error) {
        self.ended(&poll);
        self.worth = 1;
        if error.is_retryable() && poll.attempt.is_some() {
            self.lost.push(poll);
        }
        self.error = Some(error);
    }

    fn ended(&mut self, poll: &Poll) {
        self.running -= 1;
        self.asked -= poll.messages;
    }

    /// Takes what `limit` allows of what has come and is still leased. What is left of a group waits until nobody has a
    /// message of it any more: should that one be given back, its followers must be, too.
    pub(crate) fn take(&mut self, limit: Limit, groups_out: &HashSet<&str>) -> Vec<Delivery> {
        let now = Instant::now();
        let (mut taken, mut left) = (Vec::new(), VecDeque::new());
        let mut bytes = 0;
        for delivery in self.ready.drain(..) {
            let more = limit.allows_more(taken.len(), bytes);
            if delivery.lease.until.is_some_and(|until| until <= now) {
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

    /// Takes out what has come of these groups.
    pub(crate) fn withdraw(&mut self, groups: &HashSet<&str>) -> Vec<Receipt> {
        let ready = std::mem::take(&mut self.ready).into_iter();
        let (withdrawn, left): (VecDeque<_>, VecDeque<_>) =
            ready.partition(|delivery| is_of(delivery, groups));
        self.ready = left;
        withdrawn
            .into_iter()
            .map(|delivery| delivery.receipt)
            .collect()
    }
}

fn is_of(delivery: &Delivery, groups: &HashSet<&str>) -> bool {
    let group = delivery.message.group.as_deref();
    group.is_some_and(|group| groups.contains(group))
}

/// A poll that comes back just after its receive has ended is no loss; one that goes on much longer takes messages from
/// other consumers.
fn whole_seconds(wait: Duration) -> Duration {
    let seconds = (wait.as_secs_f64() + 0.25).floor().clamp(0.0, LONGEST_WAIT);
    Duration::from_secs_f64(seconds)
}
