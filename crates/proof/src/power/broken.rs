//! What can be broken after a power failure.

use std::fmt;

/// What does not hold after a power failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Broken {
    Unopened,
    Corrupt,
    MessageLost,
    RecordLost,
    EffectTwice,
    EffectWithoutRecord,
    RecordWithoutEffect,
    FollowerAlone,
    AckLost,
    RunsAgain,
    TokenFell,
    NotEnded,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unopened => "the file opens",
            Self::Corrupt => "the file is intact",
            Self::MessageLost => "published: queued, done or dead",
            Self::RecordLost => "what was recorded stays so",
            Self::EffectTwice => "no effect is there twice",
            Self::EffectWithoutRecord => "no effect without its record",
            Self::RecordWithoutEffect => "no record without its effect",
            Self::FollowerAlone => "published in a transaction, or not",
            Self::AckLost => "what was acked durably stays so",
            Self::RunsAgain => "at most once: nothing runs again",
            Self::TokenFell => "tokens go up",
            Self::NotEnded => "in the end, each effect once",
        })
    }
}

/// Whatever can be broken.
pub const PROMISES: [Broken; 12] = [
    Broken::Unopened,
    Broken::Corrupt,
    Broken::MessageLost,
    Broken::RecordLost,
    Broken::EffectTwice,
    Broken::EffectWithoutRecord,
    Broken::RecordWithoutEffect,
    Broken::FollowerAlone,
    Broken::AckLost,
    Broken::RunsAgain,
    Broken::TokenFell,
    Broken::NotEnded,
];
