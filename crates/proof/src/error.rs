use onlyonce_core::{BoxError, Error, ErrorKind};

/// What a worker process could not do.
pub fn failed(what: &str, error: impl Into<BoxError>) -> Error {
    Error::new(ErrorKind::Other, what).caused_by(error)
}
