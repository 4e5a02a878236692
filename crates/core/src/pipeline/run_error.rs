use std::fmt;

use crate::{Error, Report};

/// Why a pipeline ended by itself, and what it had done until then.
///
/// Turns into an [`Error`] with `?`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RunError {
    /// What happened.
    pub error: Error,
    /// The counts at the end.
    pub report: Report,
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for RunError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl From<RunError> for Error {
    fn from(ended: RunError) -> Self {
        ended.error
    }
}
