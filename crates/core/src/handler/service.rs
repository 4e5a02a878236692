use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use tower_service::Service;

use crate::driver::Transaction;
use crate::{BoxError, Error, ErrorKind};

use super::{Failure, FromMessage, HandlerError, IntoOutcome, MadeOf, Outcome, Parts, Running};

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A transaction lent to a handler: the pipeline takes it back when the handler is done or dropped.
pub(crate) type TxSlot<Tx> = Arc<tokio::sync::Mutex<Tx>>;

/// One message on its way to the handler; what `tower` layers see.
///
/// A unit test of a layer makes one from [`Parts`]:
///
/// ```
/// use onlyonce_core::Message;
/// use onlyonce_core::handler::{NoTx, Parts, Request};
///
/// let request = Request::<NoTx>::new(Parts::new(Message::new("{}")));
/// assert_eq!(request.parts.context.attempt, 1);
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub struct Request<Tx> {
    /// The message and its context; of a batch, the first message and its context, and [all](Parts::messages).
    pub parts: Parts,
    /// How long the handler may take, from when it is called: a layer before it may wait as it likes.
    pub(crate) limit: Option<Duration>,
    pub(crate) tx: Option<TxSlot<Tx>>,
}

impl<Tx> Request<Tx> {
    /// A request without a transaction and without a time-out.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self {
            parts,
            limit: None,
            tx: None,
        }
    }

    /// Lends the handler this transaction.
    #[must_use]
    pub fn with_tx(mut self, tx: Arc<tokio::sync::Mutex<Tx>>) -> Self {
        self.tx = Some(tx);
        self
    }
}

/// An async function that handles messages.
///
/// Implemented for functions of up to six parameters that each are [`FromMessage`]. In transactional mode one more, the last, is
/// the store's transaction, `&mut Tx`. Without it no effect would be part of the transaction, so such a function is no handler
/// there:
///
/// ```compile_fail
/// # use onlyonce_core::{Pipeline, memory::{MemoryQueue, MemoryStore}};
/// async fn pay(body: String) {}
///
/// # async fn run() {
/// Pipeline::transactional(MemoryQueue::new("payments"), MemoryStore::new())
///     .run(pay)
///     .await;
/// # }
/// ```
///
/// [`outside_transaction`] says that this is meant. `Args` keeps the implementations apart and is inferred.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler for this pipeline",
    note = "a handler is an async function of at most six parameters, each of which implements `FromMessage` (`Json<T>`, `State<T>`, `Context`, …)",
    note = "in transactional mode its last parameter is the store's transaction, `&mut {Tx}`; in the other modes it has none",
    note = "it returns `()`, an `Outcome`, or a `Result` of either"
)]
pub trait Handler<Tx, Args>: Send + Sync + 'static {
    /// Calls it for one message.
    fn call(
        self: Arc<Self>,
        request: Request<Tx>,
    ) -> impl Future<Output = Result<Outcome, Failure>> + Send;

    /// The type of a state that a parameter needs and does not find.
    fn missing(parts: &Parts) -> Option<&'static str>;

    /// What its parameters are made of, without the transaction.
    fn parameters() -> Vec<MadeOf>;
}

/// Marks the [`Handler`] implementations whose last parameter is the transaction.
#[derive(Debug)]
pub struct WithTx<Args>(PhantomData<Args>);

/// An async function whose last parameter borrows the transaction.
pub trait TxFn<'a, Tx: 'a, Args>: Send + Sync + 'static {
    /// What it resolves to.
    type Output: IntoOutcome;
    /// Its future, which borrows the transaction.
    type Future: Future<Output = Self::Output> + Send + 'a;

    /// Calls it.
    fn call_with(&self, args: Args, tx: &'a mut Tx) -> Self::Future;
}

macro_rules! handlers {
    ($($arg:ident),*) => {
        impl<F, Fut, $($arg,)*> Handler<NoTx, ($($arg,)*)> for F
        where
            F: Fn($($arg),*) -> Fut + Send + Sync + 'static,
            Fut: Future<Output: IntoOutcome> + Send,
            $($arg: FromMessage + Send,)*
        {
            async fn call(self: Arc<Self>, request: Request<NoTx>) -> Result<Outcome, Failure> {
                let _parts = &request.parts;
                self($($arg::from_message(_parts)?),*).await.into_outcome()
            }

            fn missing(_parts: &Parts) -> Option<&'static str> {
                None$(.or_else(|| $arg::missing(_parts)))*
            }

            fn parameters() -> Vec<MadeOf> {
                vec![$($arg::made_of()),*]
            }
        }

        impl<'a, F, Fut, Tx, $($arg,)*> TxFn<'a, Tx, ($($arg,)*)> for F
        where
            F: Fn($($arg,)* &'a mut Tx) -> Fut + Send + Sync + 'static,
            Fut: Future<Output: IntoOutcome> + Send + 'a,
            Tx: 'a,
        {
            type Output = Fut::Output;
            type Future = Fut;

            #[allow(non_snake_case, reason = "the type parameters name the values too")]
            fn call_with(&self, ($($arg,)*): ($($arg,)*), tx: &'a mut Tx) -> Fut {
                self($($arg,)* tx)
            }
        }

        impl<F, Tx, $($arg,)*> Handler<Tx, WithTx<($($arg,)*)>> for F
        where
            F: for<'a> TxFn<'a, Tx, ($($arg,)*)>,
            Tx: Transaction,
            $($arg: FromMessage + Send,)*
        {
            async fn call(self: Arc<Self>, request: Request<Tx>) -> Result<Outcome, Failure> {
                let Request { parts: _parts, tx, .. } = request;
                let args = ($($arg::from_message(&_parts)?,)*);
                let slot = tx.ok_or_else(|| Failure::dead_letter("no transaction in this mode"))?;
                let mut tx = slot.lock().await;
                self.call_with(args, &mut *tx).await.into_outcome()
            }

            fn missing(_parts: &Parts) -> Option<&'static str> {
                None$(.or_else(|| $arg::missing(_parts)))*
            }

            fn parameters() -> Vec<MadeOf> {
                vec![$($arg::made_of()),*]
            }
        }
    };
}

handlers!();
handlers!(A);
handlers!(A, B);
handlers!(A, B, C);
handlers!(A, B, C, D);
handlers!(A, B, C, D, E);
handlers!(A, B, C, D, E, F6);

/// A handler whose effects are not part of the transaction; see [`outside_transaction`].
#[derive(Debug)]
pub struct OutsideTransaction<H>(Arc<H>);

/// Marks the [`Handler`] implementation of [`OutsideTransaction`].
#[derive(Debug)]
pub struct Outside<Args>(PhantomData<Args>);

/// Lets a handler that takes no `&mut Tx` run in transactional mode. Its effects are not part of the transaction, so they
/// happen at least once: none of them is rolled back with it.
pub fn outside_transaction<H>(handler: H) -> OutsideTransaction<H> {
    OutsideTransaction(Arc::new(handler))
}

impl<H, Tx, Args> Handler<Tx, Outside<Args>> for OutsideTransaction<H>
where
    H: Handler<NoTx, Args>,
    Tx: Transaction,
    Args: 'static,
{
    async fn call(self: Arc<Self>, request: Request<Tx>) -> Result<Outcome, Failure> {
        self.0.clone().call(Request::new(request.parts)).await
    }

    fn missing(parts: &Parts) -> Option<&'static str> {
        H::missing(parts)
    }

    fn parameters() -> Vec<MadeOf> {
        H::parameters()
    }
}

/// A handler as the innermost `tower` service.
pub struct HandlerService<H, Tx, Args> {
    handler: Arc<H>,
    types: PhantomData<fn(Tx, Args)>,
}

impl<H, Tx, Args> HandlerService<H, Tx, Args> {
    /// The service that calls this handler.
    pub fn new(handler: H) -> Self {
        Self {
            handler: Arc::new(handler),
            types: PhantomData,
        }
    }
}

impl<H, Tx, Args> Clone for HandlerService<H, Tx, Args> {
    fn clone(&self) -> Self {
        Self {
            handler: self.handler.clone(),
            types: PhantomData,
        }
    }
}

impl<H, Tx, Args> std::fmt::Debug for HandlerService<H, Tx, Args> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HandlerService")
    }
}

impl<H, Tx, Args> Service<Request<Tx>> for HandlerService<H, Tx, Args>
where
    H: Handler<Tx, Args>,
    Tx: Send + 'static,
    Args: 'static,
{
    type Response = Outcome;
    type Error = HandlerError;
    type Future = BoxFuture<Result<Outcome, HandlerError>>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), HandlerError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Tx>) -> Self::Future {
        let handler = self.handler.clone();
        Box::pin(async move {
            let limit = request.limit;
            within(limit, handler.call(request))
                .await
                .map_err(HandlerError)
        })
    }
}

/// Drops what takes longer than `limit`, without what it [waits](Running::wait) for others, which is a failure.
pub(crate) async fn within<T>(
    limit: Option<Duration>,
    run: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let Some(limit) = limit else {
        return Running::scope(None, run).await;
    };
    let running = Running::new();
    tokio::select! {
        biased;
        result = Running::scope(Some(running.clone()), run) => result,
        () = running.has_run_for(limit) => Err(Failure::retry(Error::new(
            ErrorKind::Timeout,
            format!("the handler took longer than its time-out of {limit:?} (handler_timeout)"),
        ))),
    }
}

/// The handler with all its layers, its types forgotten.
pub(crate) type Callable<Tx> =
    Arc<dyn Fn(Request<Tx>) -> BoxFuture<Result<Outcome, Failure>> + Send + Sync>;

pub(crate) fn callable<S, Tx>(service: S) -> Callable<Tx>
where
    S: Service<Request<Tx>, Response = Outcome> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    Tx: Send + 'static,
{
    // Layers need not be `Sync`; the lock is held for the clone alone.
    let service = Mutex::new(service);
    Arc::new(move |request| {
        let mut service = service
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        Box::pin(async move {
            let ready = poll_fn(|cx| service.poll_ready(cx)).await;
            ready.map_err(failure)?;
            service.call(request).await.map_err(failure)
        })
    })
}

/// What a layer made of the handler's error; a failure of ours keeps what it asked for.
fn failure(error: impl Into<BoxError>) -> Failure {
    match error.into().downcast::<HandlerError>() {
        Ok(ours) => ours.0,
        Err(other) => Failure::retry(other),
    }
}

/// The transaction type of the modes that have none.
#[derive(Debug)]
pub enum NoTx {
    #[doc(hidden)]
    Never(Infallible),
}

#[async_trait::async_trait]
impl crate::driver::Transaction for NoTx {
    async fn complete(
        &mut self,
        _: &[crate::driver::Completion],
    ) -> Result<Result<(), crate::driver::Fenced>, crate::Error> {
        match *self {
            Self::Never(ref never) => match *never {},
        }
    }
    async fn rollback(&mut self) -> Result<(), crate::Error> {
        match *self {
            Self::Never(ref never) => match *never {},
        }
    }
    fn is_conflict(&self, _: &(dyn std::error::Error + 'static)) -> bool {
        match *self {
            Self::Never(ref never) => match *never {},
        }
    }
    async fn commit(self) -> Result<(), crate::Error> {
        match self {
            Self::Never(never) => match never {},
        }
    }
}
