use std::time::Duration;

use onlyonce_core::driver::{Delivery, Ready, ReceiveLimits};
use onlyonce_core::{Error, ErrorKind};
use tokio::time::Instant;

use crate::queue::BATCH;

/// The longest wait that SQS knows, in seconds.
const LONGEST_WAIT: f64 = 20.0;
const SECOND: Duration = Duration::from_secs(1);
/// Between requests that do not wait.
const PAUSE: Duration = Duration::from_millis(100);
/// SQS remembers a receive attempt for this long:
/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ReceiveMessage.html>
const ATTEMPT: Duration = Duration::from_secs(300);

/// Which long polls are worth sending, and what they brought.
#[derive(Debug)]
pub(crate) struct Polls {
    pub(crate) ready: Ready,
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
    /// The last poll found nothing.
    empty: bool,
}

/// One receive request.
#[derive(Clone, Debug)]
pub(crate) struct Poll {
    pub(crate) messages: usize,
    pub(crate) wait: Duration,
    /// By this a FIFO queue knows the request when it is repeated, and gives the same messages.
    pub(crate) attempt: Option<String>,
    begun: Instant,
    /// Until then SQS may be withholding what a lost answer brought; `None` if nothing was sent.
    pub(crate) withheld: Option<Instant>,
    /// Its first answer was lost.
    again: bool,
}

impl Polls {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            ready: Ready::default(),
            running: 0,
            asked: 0,
            worth: 1,
            most,
            lost: Vec::new(),
            error: None,
            pause_until: None,
            empty: false,
        }
    }

    /// The next poll to send for a receive that may return `limit`, waiting no longer than `wait`; none if those under
    /// way do.
    pub(crate) fn next(
        &mut self,
        limits: ReceiveLimits,
        wait: Duration,
        fifo: bool,
    ) -> Option<Poll> {
        let now = Instant::now();
        let paused = self.pause_until.is_some_and(|until| until > now);
        if self.error.is_some() || paused {
            return None;
        }
        if let Some(poll) = self.lost_poll(limits) {
            return Some(self.begin(poll));
        }
        if self.running >= self.worth {
            return None;
        }
        let outlast = self.empty && limits.wait >= SECOND;
        let wait = whole_seconds(wait, outlast);
        if !self.ready.leave_room(limits) {
            return None;
        }
        let room = self.room(limits);
        // A FIFO queue fills a receive from one group first.
        let whole = BATCH.min(if fifo { limits.per_group.max(1) } else { BATCH });
        let messages = whole.min(room);
        // What a small request could still bring, a whole one will when there is room: requests cost money.
        if messages == 0 || (messages < whole && self.asked + self.ready.len() > 0) {
            return None;
        }
        Some(self.begin(Poll {
            messages,
            wait,
            attempt: fifo.then(|| format!("{:032x}", fastrand::u128(..))),
            begun: now,
            withheld: None,
            again: false,
        }))
    }

    fn room(&self, limits: ReceiveLimits) -> usize {
        limits
            .messages
            .saturating_sub(self.asked + self.ready.len())
    }

    /// A poll whose answer was lost, while SQS may know it. What it brought is there at once, or not at all.
    fn lost_poll(&mut self, limits: ReceiveLimits) -> Option<Poll> {
        let now = Instant::now();
        self.lost.retain(|poll| {
            now < poll.begun + ATTEMPT && poll.withheld.is_some_and(|until| now < until)
        });
        let room = self.room(limits);
        let at = self.lost.iter().position(|poll| poll.messages <= room)?;
        let lost = self.lost.swap_remove(at);
        Some(Poll {
            wait: Duration::ZERO,
            again: true,
            ..lost
        })
    }

    fn begin(&mut self, poll: Poll) -> Poll {
        self.running += 1;
        self.asked += poll.messages;
        poll
    }

    pub(crate) fn came_back(&mut self, poll: &Poll, deliveries: Vec<Delivery>) {
        self.ended(poll);
        self.error = None;
        let got = deliveries.len();
        self.empty = got == 0;
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
        match error.kind() {
            // Somebody else has got the messages meanwhile: the attempt is over, and the next is a new one.
            // https://github.com/awslabs/amazon-sqs-java-messaging-lib/issues/213
            ErrorKind::Message if poll.again => return,
            // Of any other answer, of throttling too, SQS may say that the attempt cannot be repeated.
            ErrorKind::Timeout | ErrorKind::Connection if poll.attempt.is_some() => {
                self.lost.push(poll);
            }
            _ => {}
        }
        self.error = Some(error);
    }

    fn ended(&mut self, poll: &Poll) {
        self.running -= 1;
        self.asked -= poll.messages;
    }
}

/// A poll that comes back just after its receive has ended is no loss; one that goes on much longer takes messages from
/// other consumers. On an idle queue, though, what is left of a receive would cost a request of its own, so there a poll
/// may `outlast` it by up to a second.
fn whole_seconds(wait: Duration, outlast: bool) -> Duration {
    let wait = wait.as_secs_f64();
    let seconds = if outlast {
        wait.ceil()
    } else {
        (wait + 0.25).floor()
    };
    Duration::from_secs_f64(seconds.clamp(0.0, LONGEST_WAIT))
}
