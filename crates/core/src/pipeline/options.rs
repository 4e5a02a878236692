use std::time::Duration;

use crate::KeyPolicy;

use super::batch::Limits;
use super::{ConfigRisk, RetryPolicy};

/// What to do with a message that may have taken effect: its former owner had started the handler and vanished before
/// it recorded an end. Only in `idempotent` mode; a transaction leaves no doubt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum InDoubt {
    /// Run the handler again; the downstream recognises the key.
    #[default]
    RunAgain,
    /// Put it into the dead-letter queue for a person to look at. Costs one more store call per message.
    ///
    /// The doubt stays in the store, so that a duplicate does not run either. Only a message that comes back from the
    /// dead-letter queue runs: it is known by the attribute [`DEAD_LETTER_REASON`](crate::attributes::DEAD_LETTER_REASON), which a
    /// redrive must leave in place.
    Quarantine,
}

pub(crate) struct Options {
    pub(crate) consumer: String,
    /// Of the queue, in place of what the source tells.
    pub(crate) identity: Option<String>,
    pub(crate) dedup_key: KeyPolicy,
    pub(crate) concurrency: usize,
    pub(crate) batch: Limits,
    pub(crate) prefetch_messages: usize,
    pub(crate) prefetch_bytes: usize,
    pub(crate) claim_lease: Duration,
    pub(crate) dedup_retention: Duration,
    pub(crate) retry: RetryPolicy,
    pub(crate) on_in_doubt: InDoubt,
    pub(crate) handler_timeout: Option<Duration>,
    pub(crate) drain_timeout: Duration,
    pub(crate) stop_when_idle: Option<Duration>,
    pub(crate) require_ordering: bool,
    pub(crate) allowed: Vec<ConfigRisk>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            consumer: "default".into(),
            identity: None,
            dedup_key: KeyPolicy::default(),
            concurrency: 64,
            batch: Limits::default(),
            prefetch_messages: 1_000,
            prefetch_bytes: 64 << 20,
            claim_lease: Duration::from_secs(30),
            // Longer than the longest retention of a queue (SQS: 14 days).
            dedup_retention: Duration::from_secs(15 * 86_400),
            retry: RetryPolicy::default(),
            on_in_doubt: InDoubt::default(),
            handler_timeout: None,
            drain_timeout: Duration::from_secs(30),
            stop_when_idle: None,
            require_ordering: false,
            allowed: Vec::new(),
        }
    }
}
