//! Pub/Sub as a list of requests and answers: `acknowledge(&["a"]).gets(done())`.
//!
//! A request without a line in the script fails its test, and so does a line that nobody asked for; but a pull without one
//! waits, as on an empty subscription. `Script::channel` is in memory: with the clock paused, answers take exactly as long
//! as they are told to. `Script::listen` is on a port, for what needs an address.

use std::any::{Any, TypeId, type_name};
use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::Debug;
use std::future::{pending, ready};
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::future::BoxFuture;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::*;
use http::Uri;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite, duplex};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::server::{Grpc, UnaryService};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};
use tonic_prost::ProstCodec;
use tonic_types::{ErrorDetails, StatusExt as _};

pub(crate) const SUBSCRIPTION: &str = "projects/project/subscriptions/orders";
pub(crate) const TOPIC: &str = "projects/project/topics/orders";

/// What the service says of an ack id that it does not know any more.
pub(crate) const INVALID: &str = "PERMANENT_FAILURE_INVALID_ACK_ID";
/// What it says of one that comes after others of its ordering key, in a request that has not those.
pub(crate) const UNORDERED: &str = "TRANSIENT_FAILURE_UNORDERED_ACK_ID";
/// What it says of one that may be tried again.
pub(crate) const TRANSIENT: &str = "TRANSIENT_FAILURE_SERVICE_UNAVAILABLE";

/// A request of the one method that takes it.
pub(crate) trait Method: Message + Clone + Debug + Default + 'static {
    type Answer: Message + Clone + Default + 'static;
}

macro_rules! methods {
    ($($path:literal: $request:ty => $answer:ty;)+) => {
        $(impl Method for $request {
            type Answer = $answer;
        })+

        async fn route(call: Call, request: http::Request<Incoming>) -> http::Response<Body> {
            match request.uri().path() {
                $($path => call.take::<$request>(request).await,)+
                path => call.script.fault(format!("no such method: {path}")).into_http(),
            }
        }
    };
}

methods! {
    "/google.pubsub.v1.Subscriber/Pull": PullRequest => PullResponse;
    "/google.pubsub.v1.Subscriber/Acknowledge": AcknowledgeRequest => ();
    "/google.pubsub.v1.Subscriber/ModifyAckDeadline": ModifyAckDeadlineRequest => ();
    "/google.pubsub.v1.Subscriber/GetSubscription": GetSubscriptionRequest => Subscription;
    "/google.pubsub.v1.Publisher/Publish": PublishRequest => PublishResponse;
    "/google.pubsub.v1.Publisher/GetTopic": GetTopicRequest => Topic;
    "/google.pubsub.v1.Publisher/ListTopicSubscriptions":
        ListTopicSubscriptionsRequest => ListTopicSubscriptionsResponse;
}

type Test = Box<dyn Fn(&dyn Any) -> bool + Send>;

/// A request that is expected.
pub(crate) struct Request {
    method: TypeId,
    expected: String,
    is_expected: Test,
}

/// A request of this kind, of which this is true.
pub(crate) fn request<M: Method>(
    expected: &str,
    is_expected: impl Fn(&M) -> bool + Send + 'static,
) -> Request {
    Request {
        method: TypeId::of::<M>(),
        expected: format!("{}: {expected}", type_name::<M>()),
        is_expected: Box::new(move |message| message.downcast_ref().is_some_and(&is_expected)),
    }
}

fn any<M: Method>() -> Request {
    request("any", |_: &M| true)
}

pub(crate) fn pull() -> Request {
    any::<PullRequest>()
}

pub(crate) fn publish() -> Request {
    any::<PublishRequest>()
}

pub(crate) fn get_subscription() -> Request {
    any::<GetSubscriptionRequest>()
}

pub(crate) fn get_topic() -> Request {
    any::<GetTopicRequest>()
}

pub(crate) fn list_subscriptions() -> Request {
    any::<ListTopicSubscriptionsRequest>()
}

/// These very ids, in this order.
pub(crate) fn acknowledge(ids: &[&str]) -> Request {
    let (shown, ids) = (format!("{ids:?}"), owned(ids));
    request(&shown, move |sent: &AcknowledgeRequest| sent.ack_ids == ids)
}

/// These very ids, in this order; for no time to give them back.
pub(crate) fn modify_deadline(ids: &[&str], seconds: i32) -> Request {
    let (shown, ids) = (format!("{ids:?}, {seconds} s"), owned(ids));
    request(&shown, move |sent: &ModifyAckDeadlineRequest| {
        sent.ack_ids == ids && sent.ack_deadline_seconds == seconds
    })
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

impl Request {
    pub(crate) fn gets(self, answer: Answer) -> Step {
        Step {
            request: self,
            answer,
        }
    }
}

pub(crate) struct Step {
    request: Request,
    answer: Answer,
}

#[derive(Clone)]
pub(crate) struct Answer {
    what: What,
    after: Duration,
    going_away: bool,
}

#[derive(Clone)]
enum What {
    Message(Arc<dyn Any + Send + Sync>),
    Status(Status),
    Broken,
    Never,
}

impl Answer {
    fn of(what: What) -> Self {
        Self {
            what,
            after: Duration::ZERO,
            going_away: false,
        }
    }

    pub(crate) fn after(mut self, after: Duration) -> Self {
        self.after = after;
        self
    }

    /// The connection takes no more requests from this answer on.
    pub(crate) fn going_away(mut self) -> Self {
        self.going_away = true;
        self
    }

    /// What became of each of these ack ids, as exactly-once subscriptions say it.
    pub(crate) fn naming<T: Into<String>>(self, ids: impl IntoIterator<Item = (T, T)>) -> Self {
        let ids = ids.into_iter().map(|(id, what)| (id.into(), what.into()));
        let ids: HashMap<String, String> = ids.collect();
        self.detailed(|details| {
            let domain = "pubsub.googleapis.com";
            details.set_error_info("EXACTLY_ONCE_ACKID_FAILURE", domain, ids);
        })
    }

    pub(crate) fn retry_after(self, delay: Duration) -> Self {
        self.detailed(|details| {
            details.set_retry_info(Some(delay));
        })
    }

    pub(crate) fn detailed(mut self, add: impl FnOnce(&mut ErrorDetails)) -> Self {
        let What::Status(status) = &mut self.what else {
            panic!("an answer that is no error has no details");
        };
        let mut details = status.get_error_details();
        add(&mut details);
        *status = Status::with_error_details(status.code(), status.message(), details);
        self
    }
}

pub(crate) fn ok<T: Message + 'static>(message: T) -> Answer {
    Answer::of(What::Message(Arc::new(message)))
}

/// To what is answered with nothing but that.
pub(crate) fn done() -> Answer {
    ok(())
}

pub(crate) fn refused(code: Code, message: &str) -> Answer {
    Answer::of(What::Status(Status::new(code, message)))
}

/// The connection breaks before the answer comes.
pub(crate) fn broken() -> Answer {
    Answer::of(What::Broken)
}

pub(crate) fn never() -> Answer {
    Answer::of(What::Never)
}

/// What the service delivers of a message called so: that is its data and its ack id.
pub(crate) fn message_of(key: &str, name: &str) -> ReceivedMessage {
    let message = PubsubMessage {
        data: name.to_owned().into(),
        message_id: format!("id-of-{name}"),
        publish_time: Some(prost_types::Timestamp {
            seconds: 1_700_000_000,
            nanos: 0,
        }),
        ordering_key: key.to_owned(),
        ..PubsubMessage::default()
    };
    ReceivedMessage {
        ack_id: name.to_owned(),
        message: Some(message),
        delivery_attempt: 0,
    }
}

/// Without an ordering key.
pub(crate) fn messages(names: &[&str]) -> Answer {
    messages_of("", names)
}

pub(crate) fn messages_of(key: &str, names: &[&str]) -> Answer {
    let received = names.iter().map(|name| message_of(key, name));
    ok(PullResponse {
        received_messages: received.collect(),
    })
}

/// A pull that found nothing.
pub(crate) fn nothing() -> Answer {
    messages(&[])
}

pub(crate) fn published(ids: &[&str]) -> Answer {
    ok(PublishResponse {
        message_ids: owned(ids),
    })
}

/// A request that was sent.
#[derive(Clone, Debug)]
pub(crate) struct Sent<M> {
    pub(crate) message: M,
    pub(crate) metadata: MetadataMap,
    /// The first connection is 0, and so on.
    pub(crate) connection: usize,
    /// When it was sent and answered, since the script began.
    pub(crate) at: Duration,
    pub(crate) answered: Option<Duration>,
    /// Nobody waits for its answer any more.
    pub(crate) given_up: bool,
}

impl<M> Sent<M> {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.metadata.get(name).map(|value| value.to_str().unwrap())
    }

    fn map<T>(&self, message: T) -> Sent<T> {
        Sent {
            message,
            metadata: self.metadata.clone(),
            connection: self.connection,
            at: self.at,
            answered: self.answered,
            given_up: self.given_up,
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Open,
    GoingAway,
    Gone,
}

#[derive(Default)]
struct Connections {
    frozen: bool,
    fates: Vec<Fate>,
}

type Rule = Box<dyn Fn(&dyn Any) -> Answer + Send>;

struct Shared {
    begun: Instant,
    steps: Mutex<Vec<Step>>,
    rules: Mutex<HashMap<TypeId, Rule>>,
    sent: Mutex<Vec<Sent<Arc<dyn Any + Send + Sync>>>>,
    /// Between the service and us, for each answer.
    way: Mutex<Duration>,
    faults: Mutex<Vec<String>>,
    connections: watch::Sender<Connections>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

/// When it is dropped, every step must have been taken, and nothing else sent.
pub(crate) struct Script(Arc<Shared>);

impl Script {
    /// Requests of one kind come in this order; those of different kinds in any.
    pub(crate) fn of(steps: impl IntoIterator<Item = Step>) -> Self {
        Self(Arc::new(Shared {
            begun: Instant::now(),
            steps: Mutex::new(steps.into_iter().collect()),
            rules: Mutex::default(),
            sent: Mutex::default(),
            way: Mutex::default(),
            faults: Mutex::default(),
            connections: watch::Sender::default(),
        }))
    }

    /// How any number of requests of one kind are answered once the steps for them have been taken.
    pub(crate) fn then<M: Method>(self, rule: impl Fn(&M) -> Answer + Send + 'static) -> Self {
        let rule: Rule = Box::new(move |message| rule(message.downcast_ref().unwrap()));
        locked(&self.0.rules).insert(TypeId::of::<M>(), rule);
        self
    }

    /// Every answer takes this long.
    pub(crate) fn far_away(self, way: Duration) -> Self {
        *locked(&self.0.way) = way;
        self
    }

    /// A channel in memory that takes as large answers as the service gives.
    pub(crate) fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_static("http://script");
        self.channel_as(&endpoint.http2_max_header_list_size(8 << 20))
    }

    /// A channel in memory, set up like this one.
    pub(crate) fn channel_as(&self, endpoint: &Endpoint) -> Channel {
        let script = self.0.clone();
        endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let (here, there) = duplex(64 << 10);
            tokio::spawn(serve(script.clone(), there));
            ready(io::Result::Ok(TokioIo::new(here)))
        }))
    }

    /// The URL at which it can be reached, without TLS.
    pub(crate) async fn listen(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let script = self.0.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(script.clone(), stream));
            }
        });
        url
    }

    /// All connections break; new ones can be made.
    pub(crate) fn drop_connections(&self) {
        self.0.all_are(Fate::Gone);
    }

    /// All connections are closed as the service does it now and then: requests under way are answered, and new ones need
    /// a new connection.
    pub(crate) fn go_away(&self) {
        self.0.all_are(Fate::GoingAway);
    }

    /// Nothing is read or written any more, and nothing closed; connections can still be made.
    pub(crate) fn freeze(&self) {
        self.0.connections.send_modify(|all| all.frozen = true);
    }

    pub(crate) fn thaw(&self) {
        self.0.connections.send_modify(|all| all.frozen = false);
    }

    /// The requests of this kind, so far.
    pub(crate) fn sent<M: Method>(&self) -> Vec<Sent<M>> {
        let sent = locked(&self.0.sent);
        let sent = sent.iter().filter_map(|sent| {
            let message: &M = sent.message.downcast_ref()?;
            Some(sent.map(message.clone()))
        });
        sent.collect()
    }

    /// How many requests of this kind wait for their answers.
    pub(crate) fn under_way<M: Method>(&self) -> usize {
        let sent = self.sent::<M>().into_iter();
        sent.filter(|sent| sent.answered.is_none() && !sent.given_up)
            .count()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let mut faults = std::mem::take(&mut *locked(&self.0.faults));
        let left = locked(&self.0.steps);
        let never = |step: &Step| format!("never sent: {}", step.request.expected);
        faults.extend(left.iter().map(never));
        match std::thread::panicking() {
            true => faults.iter().for_each(|fault| eprintln!("{fault}")),
            false => assert!(faults.is_empty(), "{faults:#?}"),
        }
    }
}

impl Shared {
    fn record(&self, sent: Sent<Arc<dyn Any + Send + Sync>>) -> usize {
        let mut all = locked(&self.sent);
        all.push(sent);
        all.len() - 1
    }

    fn answer<M: Method>(&self, message: &M) -> Answer {
        let method = TypeId::of::<M>();
        let mut steps = locked(&self.steps);
        let Some(at) = steps.iter().position(|step| step.request.method == method) else {
            return match locked(&self.rules).get(&method) {
                Some(rule) => rule(message),
                None if method == TypeId::of::<PullRequest>() => never(),
                None => self.unexpected(format!("not in the script: {message:?}")),
            };
        };
        let Step { request, answer } = steps.remove(at);
        match (request.is_expected)(message) {
            true => answer,
            false => self.unexpected(format!("{message:?}, instead of {}", request.expected)),
        }
    }

    fn unexpected(&self, what: String) -> Answer {
        Answer::of(What::Status(self.fault(what)))
    }

    /// What nobody asks for again.
    fn fault(&self, what: String) -> Status {
        let status = Status::unimplemented(&what);
        locked(&self.faults).push(what);
        status
    }

    /// The number of a new connection.
    fn connected(&self) -> usize {
        let mut number = 0;
        self.connections.send_modify(|all| {
            number = all.fates.len();
            all.fates.push(Fate::Open);
        });
        number
    }

    fn is(&self, connection: usize, fate: Fate) {
        self.connections
            .send_modify(|all| all.fates[connection] = fate);
    }

    fn all_are(&self, fate: Fate) {
        self.connections.send_modify(|all| {
            let open = all.fates.iter_mut().filter(|fate| **fate != Fate::Gone);
            open.for_each(|open| *open = fate);
        });
    }
}

async fn serve<T>(script: Arc<Shared>, stream: T)
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let number = script.connected();
    let mut connections = script.connections.subscribe();
    let service = service_fn(move |request| {
        let script = script.clone();
        let call = Call { script, number };
        async { Ok::<_, Infallible>(route(call, request).await) }
    });
    let server = http2::Builder::new(TokioExecutor::new());
    let mut connection = pin!(server.serve_connection(TokioIo::new(stream), service));
    loop {
        let (frozen, fate) = {
            let all = connections.borrow_and_update();
            (all.frozen, all.fates[number])
        };
        match fate {
            Fate::Open => {}
            Fate::GoingAway => connection.as_mut().graceful_shutdown(),
            Fate::Gone => return,
        }
        tokio::select! {
            _ = &mut connection, if !frozen => return,
            changed = connections.changed() => changed.unwrap(),
        }
    }
}

/// What became of a request, whichever way it ends.
struct Outcome {
    script: Arc<Shared>,
    at: usize,
    answered: bool,
}

impl Drop for Outcome {
    fn drop(&mut self) {
        let sent = &mut locked(&self.script.sent)[self.at];
        match self.answered {
            true => sent.answered = Some(self.script.begun.elapsed()),
            false => sent.given_up = true,
        }
    }
}

/// A request on one of the connections.
#[derive(Clone)]
struct Call {
    script: Arc<Shared>,
    number: usize,
}

impl Call {
    async fn take<M: Method>(self, request: http::Request<Incoming>) -> http::Response<Body> {
        let codec = ProstCodec::<M::Answer, M>::default();
        let mut grpc = Grpc::new(codec).max_decoding_message_size(usize::MAX);
        grpc.unary(self, request).await
    }

    async fn answer<M: Method>(
        self,
        request: tonic::Request<M>,
    ) -> Result<Response<M::Answer>, Status> {
        let Self { script, number } = self;
        let (metadata, _, message) = request.into_parts();
        let mut outcome = Outcome {
            at: script.record(Sent {
                message: Arc::new(message.clone()),
                metadata,
                connection: number,
                at: script.begun.elapsed(),
                answered: None,
                given_up: false,
            }),
            script: script.clone(),
            answered: false,
        };
        let answer = script.answer(&message);
        let after = answer.after + *locked(&script.way);
        if !after.is_zero() {
            sleep(after).await;
        }
        if answer.going_away {
            script.is(number, Fate::GoingAway);
        }
        if matches!(answer.what, What::Never) {
            pending().await
        }
        outcome.answered = true;
        drop(outcome);
        match answer.what {
            What::Message(message) => {
                let message: Option<&M::Answer> = message.downcast_ref();
                let fault = || script.fault(format!("no answer to {}", type_name::<M>()));
                Ok(Response::new(message.ok_or_else(fault)?.clone()))
            }
            What::Status(status) => Err(status),
            What::Broken | What::Never => {
                script.is(number, Fate::Gone);
                pending().await
            }
        }
    }
}

impl<M: Method> UnaryService<M> for Call {
    type Response = M::Answer;
    type Future = BoxFuture<'static, Result<Response<M::Answer>, Status>>;

    fn call(&mut self, request: tonic::Request<M>) -> Self::Future {
        Box::pin(self.clone().answer(request))
    }
}

/// Until nothing moves any more: the paused clock goes on only when no task can run.
pub(crate) async fn quiet() {
    sleep(Duration::from_millis(1)).await;
}

pub(crate) fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
