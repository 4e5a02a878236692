//! The names of the message attributes that pipeline and outbox read and write.

/// The attribute that carries a dedup key where the broker has no place of its own for one.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// The attribute that says of what type an event is; an outbox keeps it in a column of its own.
pub const TYPE: &str = "type";
/// Attribute of a dead letter: why it is there.
pub const DEAD_LETTER_REASON: &str = "onlyonce-reason";
/// Attribute of a dead letter: the queue it was taken from.
pub const DEAD_LETTER_QUEUE: &str = "onlyonce-queue";
/// Attribute of a dead letter: the consumer that gave up on it.
pub const DEAD_LETTER_CONSUMER: &str = "onlyonce-consumer";
/// Attribute of a dead letter: the attempts made.
pub const DEAD_LETTER_ATTEMPTS: &str = "onlyonce-attempts";
