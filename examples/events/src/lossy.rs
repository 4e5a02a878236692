use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use onlyonce::driver::{Sink, SinkInfo};
use onlyonce::{Error, ErrorKind, Message};

/// How many answers are lost.
const LOST: u32 = 3;

/// A sink whose queue takes everything, and whose first answers are lost on their way back. The publisher cannot know, and publishes
/// the same again.
pub struct Lossy<S> {
    inner: S,
    calls: AtomicU32,
}

impl<S> Lossy<S> {
    pub fn new(inner: S) -> Self {
        let calls = AtomicU32::new(0);
        Self { inner, calls }
    }
}

#[async_trait]
impl<S: Sink> Sink for Lossy<S> {
    fn name(&self) -> &str {
        self.inner.name()
    }

    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        self.inner.sink_info().await
    }

    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        let mut answers = self.inner.publish(batch).await;
        if self.calls.fetch_add(1, Ordering::Relaxed) < LOST {
            let lost = || Err(Error::new(ErrorKind::Connection, "the answer was lost"));
            answers.fill_with(lost);
        }
        answers
    }

    async fn close(&self) -> Result<(), Error> {
        self.inner.close().await
    }
}
