//! A layer in the client that counts what goes over the wire.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use onlyonce::sqs::aws_sdk_sqs::Client;
use onlyonce::sqs::aws_sdk_sqs::config::interceptors::BeforeTransmitInterceptorContextRef;
use onlyonce::sqs::aws_sdk_sqs::config::{ConfigBag, Intercept, RuntimeComponents};

/// Requests by kind.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) receive: usize,
    pub(crate) delete: usize,
    pub(crate) change_visibility: usize,
    pub(crate) other: usize,
}

impl Counts {
    pub(crate) fn total(&self) -> usize {
        self.receive + self.delete + self.change_visibility + self.other
    }
}

/// Counts each request, those that the client sends again by itself included.
#[derive(Clone, Debug, Default)]
pub(crate) struct Calls(Arc<Mutex<Counts>>);

impl Calls {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn counts(&self) -> Counts {
        *self.lock()
    }

    pub(crate) fn reset(&self) {
        *self.lock() = Counts::default();
    }

    /// The same client, counted.
    pub(crate) fn of(&self, client: &Client) -> Client {
        let config = client.config().to_builder();
        Client::from_conf(config.interceptor(self.clone()).build())
    }
}

impl Intercept for Calls {
    fn name(&self) -> &'static str {
        "Calls"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), onlyonce::BoxError> {
        let target = context.request().headers().get("x-amz-target");
        let mut counts = self.lock();
        match target.unwrap_or_default() {
            "AmazonSQS.ReceiveMessage" => counts.receive += 1,
            "AmazonSQS.DeleteMessage" | "AmazonSQS.DeleteMessageBatch" => counts.delete += 1,
            "AmazonSQS.ChangeMessageVisibility" | "AmazonSQS.ChangeMessageVisibilityBatch" => {
                counts.change_visibility += 1;
            }
            _ => counts.other += 1,
        }
        Ok(())
    }
}
