//! What one call to a sink carries, and what its answers mean.

use std::collections::HashSet;

use crate::driver::{OutboxDisposition, OutboxSettlement, Outgoing};
use crate::{Error, ErrorKind, RetryPolicy};

/// Messages that were fetched together, on their way out.
pub(super) struct Round {
    /// Not published yet, in order.
    left: Vec<Outgoing>,
    /// Whether the sink itself stops a group at its first failure.
    stops_groups: bool,
}

/// What the answers to one call come to.
#[derive(Debug, Default)]
pub(super) struct Answers {
    pub(super) settlements: Vec<OutboxSettlement>,
    /// Nothing was published, which was not the messages' own doing: what was said of the first.
    pub(super) queue_is_away: Option<Error>,
}

impl Round {
    pub(super) fn new(fetched: Vec<Outgoing>, stops_groups: bool) -> Self {
        Self {
            left: fetched,
            stops_groups,
        }
    }

    /// Takes what may be published together: where a sink goes on with a group after a failure, one message of each.
    pub(super) fn next_call(&mut self) -> Vec<Outgoing> {
        if self.stops_groups {
            return std::mem::take(&mut self.left);
        }
        let mut groups = HashSet::new();
        let (call, left) = std::mem::take(&mut self.left)
            .into_iter()
            .partition(|outgoing| match &outgoing.message.group {
                Some(group) => groups.insert(group.clone()),
                None => true,
            });
        self.left = left;
        call
    }

    /// Takes what a call carried, and its answers. Nothing that stands behind a failure in its group is published in this
    /// round.
    pub(super) fn answered(
        &mut self,
        call: Vec<Outgoing>,
        answers: Vec<Result<(), Error>>,
        retry: &RetryPolicy,
    ) -> Answers {
        // What a queue takes others beside is a failure of the message.
        let takes_some = answers.iter().any(Result::is_ok);
        let mut stopped: HashSet<String> = HashSet::new();
        let mut result = Answers::default();
        for (outgoing, answer) in call.into_iter().zip(answers) {
            let group = outgoing.message.group.as_ref();
            let disposition = match answer {
                Ok(()) => OutboxDisposition::Sent,
                // It was held up by the one before it.
                Err(_) if group.is_some_and(|group| stopped.contains(group)) => continue,
                Err(error) => {
                    stopped.extend(group.cloned());
                    if !takes_some && !is_of_the_message(&error) {
                        result.queue_is_away.get_or_insert(error);
                        continue;
                    }
                    failed(&outgoing, &error, retry)
                }
            };
            let settlement = OutboxSettlement::new(outgoing.id, disposition);
            result.settlements.push(settlement);
        }
        self.left.retain(|outgoing| {
            let group = outgoing.message.group.as_ref();
            group.is_none_or(|group| !stopped.contains(group))
        });
        result
    }
}

fn failed(outgoing: &Outgoing, error: &Error, retry: &RetryPolicy) -> OutboxDisposition {
    let attempt = outgoing.attempts.saturating_add(1);
    let reason = error.to_string();
    match !error.is_retryable() && attempt >= retry.max_attempts {
        true => OutboxDisposition::SetAside { reason },
        false => OutboxDisposition::Failed {
            reason,
            retry_in: retry.delay(attempt),
        },
    }
}

/// Whether the error speaks of the one message. What speaks of the queue, or of the way there, would be said of any other.
fn is_of_the_message(error: &Error) -> bool {
    let kind = error.kind();
    let of_one = matches!(
        kind,
        ErrorKind::Message | ErrorKind::Refused | ErrorKind::Other
    );
    of_one && !error.is_retryable()
}
