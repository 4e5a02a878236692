use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use onlyonce::handler::Request;
use tokio::time::sleep;
use tower_layer::Layer;
use tower_service::Service;

use crate::options::Faults;

/// Makes handlers slow: before they begin, and between their effect and their end.
#[derive(Clone, Copy, Debug)]
pub struct Delay {
    before: Duration,
    after: Duration,
}

impl Delay {
    pub fn new(faults: &Faults) -> Self {
        Self {
            before: faults.delay_before,
            after: faults.delay_after,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Delayed<S> {
    delay: Delay,
    inner: S,
}

impl<S> Layer<S> for Delay {
    type Service = Delayed<S>;

    fn layer(&self, inner: S) -> Delayed<S> {
        Delayed {
            delay: *self,
            inner,
        }
    }
}

impl<S, Tx> Service<Request<Tx>> for Delayed<S>
where
    S: Service<Request<Tx>>,
    S::Future: Send + 'static,
    S::Response: Send,
    S::Error: Send,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Tx>) -> Self::Future {
        let Delay { before, after } = self.delay;
        let handler = self.inner.call(request);
        Box::pin(async move {
            wait(before).await;
            let result = handler.await;
            wait(after).await;
            result
        })
    }
}

async fn wait(time: Duration) {
    if !time.is_zero() {
        sleep(time).await;
    }
}
