//! What a handler may take and return, and how it is tested without a pipeline.

use std::fmt;
use std::sync::Arc;

use onlyonce_core::handler::{
    FromMessage as _, HandlerService, NoTx, Parts, Request, outside_transaction,
};
use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::{
    BoxError, Context, DedupKey, Error, ErrorKind, Failure, Message, Pipeline, State,
};
use tokio::sync::Mutex;
use tower::Service as _;

use crate::support::{IDLE, numbered, publish};

/// An error as `thiserror` and others make it: its text repeats its cause.
#[derive(Debug)]
struct Repeats(std::num::ParseIntError);

impl fmt::Display for Repeats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no amount: {}", self.0)
    }
}

impl std::error::Error for Repeats {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

fn number(text: &str) -> Result<i64, std::num::ParseIntError> {
    text.parse()
}

/// A standard error, a boxed one, one of `anyhow`, a text: all work with `?`, whatever the handler returns.
#[test]
fn any_error_is_a_failure() {
    let standard = || -> Result<i64, Failure> { Ok(number("x")?) };
    let boxed = || -> Result<(), Failure> { Err(BoxError::from("boxed"))? };
    let context = || -> Result<(), Failure> {
        Err(anyhow::Error::new(number("x").unwrap_err()).context("cannot book"))?
    };
    let text = || -> Result<i64, Failure> { Ok(None.ok_or("nothing")?) };
    let invalid = "invalid digit found in string";
    assert_eq!(standard().unwrap_err().to_string(), invalid);
    assert_eq!(boxed().unwrap_err().to_string(), "boxed");
    assert_eq!(
        context().unwrap_err().to_string(),
        format!("cannot book: {invalid}")
    );
    assert_eq!(text().unwrap_err().to_string(), "nothing");
}

#[test]
fn a_cause_is_told_once() {
    let repeats = || Repeats(number("x").unwrap_err());
    let once = "no amount: invalid digit found in string";
    assert_eq!(Failure::retry(repeats()).to_string(), once);
    let error = Error::new(ErrorKind::Other, "cannot pay").caused_by(repeats());
    let chain = anyhow::Error::new(error.clone());
    assert_eq!(error.to_string(), format!("cannot pay: {once}"));
    assert!(error.cause().is_some_and(|cause| cause.is::<Repeats>()));
    assert_eq!(chain.chain().count(), 2, "{chain:?}");
}

#[tokio::test(start_paused = true)]
async fn a_handler_may_fail_with_an_error_of_anyhow() {
    let queue = MemoryQueue::new("orders");
    publish(&queue, [numbered(1)]).await;
    let report = Pipeline::at_least_once(queue.clone())
        .retry(onlyonce_core::RetryPolicy::default().max_attempts(1))
        .stop_when_idle(IDLE)
        .run(async || Err::<(), _>(anyhow::anyhow!("not today")))
        .await
        .unwrap();
    assert_eq!(report.dead_lettered, 1);
    let reason = &queue.dead_letters()[0].reason;
    assert!(reason.ends_with("not today"), "{reason}");
}

/// As in axum, a handler gets a clone of what was given.
#[test]
fn a_state_is_what_was_given() {
    let parts = Parts::new(Message::new(""))
        .with_state(Arc::new(7))
        .with_state("text");
    let State(number): State<Arc<i32>> = State::from_message(&parts).unwrap();
    let text = State::<&str>::from_message(&parts).unwrap();
    assert_eq!((*number, text.len()), (7, 4));
    assert!(State::<String>::from_message(&parts).is_err());
}

#[tokio::test]
async fn a_handler_is_called_without_a_pipeline() {
    let handler = async |body: String, context: Context, key: DedupKey| {
        assert_eq!(
            (&*body, &*context.queue, key.as_str()),
            ("1", "orders", "k")
        );
        match context.attempt {
            2 => Ok(()),
            _ => Err(Failure::retry("not yet")),
        }
    };
    let mut service = HandlerService::<_, NoTx, _>::new(handler);
    let context = Context::new("orders", "billing").with_key(DedupKey::new("k"));
    let parts = Parts::new(Message::new("1")).with_context(context.clone());
    assert!(service.call(Request::new(parts.clone())).await.is_err());
    let second = parts.with_context(context.with_attempt(2));
    assert!(service.call(Request::new(second)).await.is_ok());
}

#[tokio::test]
async fn a_handler_with_a_transaction_is_called_without_a_pipeline() {
    let store = MemoryStore::new();
    let tx = onlyonce_core::driver::TransactionalStore::begin(&store)
        .await
        .unwrap();
    let tx = Arc::new(Mutex::new(tx));
    let handler = async |body: String, tx: &mut MemoryTx| tx.push(body);
    let request = Request::new(Parts::new(Message::new("1"))).with_tx(tx);
    let mut service = HandlerService::new(handler);
    assert!(service.call(request).await.is_ok());
}

/// A handler that leaves the transaction out says so; its message is recorded as done all the same.
#[tokio::test(start_paused = true)]
async fn a_handler_may_work_outside_the_transaction() {
    let (queue, store) = (MemoryQueue::new("orders"), MemoryStore::new());
    publish(&queue, [numbered(1), numbered(1)]).await;
    let report = Pipeline::transactional(queue, store)
        .stop_when_idle(IDLE)
        .run(outside_transaction(async |body: String| {
            assert_eq!(body, "1")
        }))
        .await
        .unwrap();
    assert_eq!((report.applied, report.duplicates), (1, 1));
}
