//! SQS as a list of requests and answers: `delete(&["a"]).gets(done(1))`.
//!
//! A request without a line in the script fails its test, and so does a line that nobody asked for; but a receive without
//! one finds an empty queue. With the clock paused, answers take exactly as long as they are told to. (The replay client
//! of AWS answers at once, whatever the request.)

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::Duration;

use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::http::{HttpRequest, HttpResponse};
use aws_sdk_sqs::config::retry::RetryConfig;
use aws_sdk_sqs::config::{
    BehaviorVersion, Credentials, HttpClient, ProvideCredentials, Region, RuntimeComponents,
};
use aws_smithy_runtime_api::client::http::{
    HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use http_body::{Body, Frame};
use onlyonce_core::Error;
use onlyonce_core::driver::{
    Delivery, Disposition, Receipt, ReceiveLimits, SettleResult, Settlement, Source as _,
};
use onlyonce_sqs::{Config, SqsSink, SqsSource, aws_sdk_sqs};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

/// Before the name of every queue.
pub(crate) const URL: &str = "https://sqs.eu-central-1.amazonaws.com/123456789012/";

/// A request that is expected.
pub(crate) struct Request {
    action: &'static str,
    /// Members that its body has, with these very values.
    body: Value,
}

pub(crate) fn request(action: &'static str, body: Value) -> Request {
    Request { action, body }
}

pub(crate) fn receive() -> Request {
    request("ReceiveMessage", json!({}))
}

fn entries(action: &'static str, handles: &[&str], more: &Value) -> Request {
    let entry = |(id, handle): (usize, &&str)| {
        let mut entry = json!({ "Id": id.to_string(), "ReceiptHandle": handle });
        if let Some(more) = more.as_object() {
            entry.as_object_mut().unwrap().extend(more.clone());
        }
        entry
    };
    let entries: Vec<Value> = handles.iter().enumerate().map(entry).collect();
    request(action, json!({ "Entries": entries }))
}

pub(crate) fn delete(handles: &[&str]) -> Request {
    entries("DeleteMessageBatch", handles, &json!(null))
}

pub(crate) fn change_visibility(handles: &[&str], seconds: u32) -> Request {
    let more = json!({ "VisibilityTimeout": seconds });
    entries("ChangeMessageVisibilityBatch", handles, &more)
}

pub(crate) fn send() -> Request {
    request("SendMessageBatch", json!({}))
}

pub(crate) fn get_attributes() -> Request {
    request("GetQueueAttributes", json!({}))
}

impl Request {
    /// The members of the body that matter here.
    pub(crate) fn with(mut self, body: Value) -> Self {
        self.body = body;
        self
    }

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
}

#[derive(Clone)]
enum What {
    Http {
        status: u16,
        headers: Vec<(&'static str, String)>,
        body: String,
    },
    Broken,
    Cut,
    Never,
}

impl Answer {
    fn http(status: u16, form: &str, body: &str) -> Self {
        Self::of(What::Http {
            status,
            headers: vec![("content-type", form.to_owned())],
            body: body.to_owned(),
        })
    }

    fn of(what: What) -> Self {
        Self {
            what,
            after: Duration::ZERO,
        }
    }

    pub(crate) fn after(mut self, after: Duration) -> Self {
        self.after = after;
        self
    }

    /// The header by which SQS tells the code of its old protocol.
    pub(crate) fn query_code(mut self, code: &str) -> Self {
        if let What::Http { headers, .. } = &mut self.what {
            headers.push(("x-amzn-query-error", format!("{code};Sender")));
        }
        self
    }
}

pub(crate) fn raw(status: u16, body: &str) -> Answer {
    Answer::http(status, "application/x-amz-json-1.0", body)
}

pub(crate) fn ok(body: Value) -> Answer {
    raw(200, &body.to_string())
}

/// An error as SQS sends it.
pub(crate) fn refused(status: u16, code: &str, message: &str) -> Answer {
    let body = json!({ "__type": format!("com.amazonaws.sqs#{code}"), "message": message });
    raw(status, &body.to_string())
}

/// A proxy answers in its place.
pub(crate) fn page(status: u16) -> Answer {
    Answer::http(status, "text/html", "<html><body>Gateway</body></html>")
}

/// The connection breaks before the answer comes.
pub(crate) fn broken() -> Answer {
    Answer::of(What::Broken)
}

/// The connection breaks within the answer.
pub(crate) fn cut() -> Answer {
    Answer::of(What::Cut)
}

struct CutBody;

impl Body for CutBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        Poll::Ready(Some(Err(io::ErrorKind::ConnectionReset.into())))
    }
}

pub(crate) fn never() -> Answer {
    Answer::of(What::Never)
}

/// Each of `count` entries was done.
pub(crate) fn done(count: usize) -> Answer {
    let ids: Vec<usize> = (0..count).collect();
    partly(&ids, &[])
}

/// What became of the entries of a batch.
pub(crate) fn partly(done: &[usize], failed: &[Value]) -> Answer {
    let done: Vec<Value> = done
        .iter()
        .map(|id| json!({ "Id": id.to_string(), "MessageId": "m", "MD5OfMessageBody": "0" }))
        .collect();
    ok(json!({ "Successful": done, "Failed": failed }))
}

pub(crate) fn failed(id: usize, code: &str, message: &str, sender_fault: bool) -> Value {
    json!({ "Id": id.to_string(), "Code": code, "Message": message, "SenderFault": sender_fault })
}

/// What SQS delivers of a message called so: that is its body and its receipt handle.
fn message_of(group: &str, name: &str) -> Value {
    json!({
        "MessageId": format!("id-of-{name}"),
        "ReceiptHandle": name,
        "Body": name,
        "Attributes": {
            "ApproximateReceiveCount": "1",
            "MessageDeduplicationId": format!("dedup-{name}"),
            "MessageGroupId": group,
            "SentTimestamp": "1700000000000",
        },
    })
}

pub(crate) fn messages(names: &[&str]) -> Answer {
    messages_of("group", names)
}

/// No group comes with a second receive before all of the first is settled.
pub(crate) fn messages_of(group: &str, names: &[&str]) -> Answer {
    let messages = names.iter().map(|name| message_of(group, name));
    ok(json!({ "Messages": messages.collect::<Vec<Value>>() }))
}

/// As SQS answers, when nothing came.
pub(crate) fn nothing() -> Answer {
    ok(json!({}))
}

/// A request that was sent.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    action: String,
    pub(crate) body: Value,
    /// When it was sent and answered, since the script began.
    pub(crate) at: Duration,
    pub(crate) answered: Option<Duration>,
    /// Nobody waits for its answer any more.
    pub(crate) given_up: bool,
}

struct Shared {
    begun: Instant,
    steps: Mutex<Vec<Step>>,
    sent: Mutex<Vec<Sent>>,
    /// Between SQS and us, for each answer.
    way: Mutex<Duration>,
    faults: Mutex<Vec<String>>,
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
            sent: Mutex::default(),
            way: Mutex::default(),
            faults: Mutex::default(),
        }))
    }

    /// Every answer takes this long.
    pub(crate) fn far_away(self, way: Duration) -> Self {
        *locked(&self.0.way) = way;
        self
    }

    pub(crate) fn source(&self, queue: &str) -> SqsSource {
        SqsSource::with_client(config(queue), self.client()).unwrap()
    }

    pub(crate) fn sink(&self, queue: &str) -> SqsSink {
        SqsSink::with_client(config(queue), self.client()).unwrap()
    }

    pub(crate) fn client(&self) -> Client {
        self.client_with(Credentials::new(
            "AKIDEXAMPLE",
            "secret",
            None,
            None,
            "script",
        ))
    }

    pub(crate) fn client_with(&self, credentials: impl ProvideCredentials + 'static) -> Client {
        let config = aws_sdk_sqs::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("eu-central-1"))
            .credentials_provider(credentials)
            .retry_config(RetryConfig::disabled())
            .http_client(Http(self.0.clone()))
            .build();
        Client::from_conf(config)
    }

    /// The requests of this kind, so far.
    pub(crate) fn sent(&self, action: &str) -> Vec<Sent> {
        let sent = locked(&self.0.sent);
        sent.iter()
            .filter(|s| s.action == action)
            .cloned()
            .collect()
    }

    /// How many requests of this kind wait for their answers.
    pub(crate) fn under_way(&self, action: &str) -> usize {
        let sent = self.sent(action).into_iter();
        sent.filter(|sent| sent.answered.is_none() && !sent.given_up)
            .count()
    }

    /// The values of a member of the requests of this kind.
    pub(crate) fn sent_values(&self, action: &str, member: &str) -> Vec<Value> {
        let sent = self.sent(action).into_iter();
        sent.map(|sent| sent.body[member].clone()).collect()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let mut faults = std::mem::take(&mut *locked(&self.0.faults));
        let left = locked(&self.0.steps);
        faults.extend(left.iter().map(|step| {
            let Request { action, body } = &step.request;
            format!("never sent: {action} {body}")
        }));
        match std::thread::panicking() {
            true => faults.iter().for_each(|fault| eprintln!("{fault}")),
            false => assert!(faults.is_empty(), "{faults:#?}"),
        }
    }
}

impl Shared {
    fn record(&self, action: &str, body: &Value) -> usize {
        let mut sent = locked(&self.sent);
        sent.push(Sent {
            action: action.to_owned(),
            body: body.clone(),
            at: self.begun.elapsed(),
            answered: None,
            given_up: false,
        });
        sent.len() - 1
    }

    fn answer(&self, action: &str, body: &Value) -> Answer {
        let mut steps = locked(&self.steps);
        let Some(at) = steps.iter().position(|step| step.request.action == action) else {
            if action == "ReceiveMessage" {
                let wait = body["WaitTimeSeconds"].as_u64().unwrap_or_default();
                return nothing().after(Duration::from_secs(wait));
            }
            return self.fault(format!("not in the script: {action} {body}"));
        };
        let step = steps.remove(at);
        let expected = step.request.body;
        let differs = |(name, value): (&String, &Value)| body.get(name) != Some(value);
        if expected.as_object().unwrap().iter().any(differs) {
            return self.fault(format!("{action}: {body}, instead of {expected}"));
        }
        step.answer
    }

    fn fault(&self, what: String) -> Answer {
        locked(&self.faults).push(what);
        broken()
    }
}

/// What became of a request, whichever way it ends.
struct Outcome {
    script: Arc<Shared>,
    at: usize,
    answered: bool,
}

impl Outcome {
    fn is_answered(&mut self) {
        self.answered = true;
    }
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

#[derive(Clone)]
struct Http(Arc<Shared>);

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Http")
    }
}

impl HttpConnector for Http {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let target = request.headers().get("x-amz-target").unwrap_or_default();
        let action = target.strip_prefix("AmazonSQS.").unwrap_or(target);
        let body = request.body().bytes().unwrap_or_default();
        let body: Value = serde_json::from_slice(body).unwrap();
        let mut outcome = Outcome {
            at: self.0.record(action, &body),
            script: self.0.clone(),
            answered: false,
        };
        let answer = self.0.answer(action, &body);
        let way = *locked(&self.0.way);
        HttpConnectorFuture::new(async move {
            sleep(answer.after + way).await;
            let response = match answer.what {
                What::Never => std::future::pending().await,
                What::Broken => Err(ConnectorError::io("connection reset by peer".into())),
                What::Cut => {
                    let body = SdkBody::from_body_1_x(CutBody);
                    Ok(HttpResponse::new(200.try_into().unwrap(), body))
                }
                What::Http {
                    status,
                    headers,
                    body,
                } => {
                    let status = status.try_into().unwrap();
                    let mut response = HttpResponse::new(status, body.into());
                    for (name, value) in headers {
                        response.headers_mut().insert(name, value);
                    }
                    Ok(response)
                }
            };
            outcome.is_answered();
            response
        })
    }
}

impl HttpClient for Http {
    fn http_connector(
        &self,
        _: &HttpConnectorSettings,
        _: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(self.clone())
    }
}

pub(crate) fn config(queue: &str) -> Config {
    format!("{URL}{queue}").parse().unwrap()
}

pub(crate) fn limit(messages: usize, wait: Duration) -> ReceiveLimits {
    ReceiveLimits::new(messages, wait)
}

/// A source that has just received messages of these names, in requests of ten, and the steps that follow.
pub(crate) async fn holding(
    queue: &str,
    names: &[&str],
    steps: impl IntoIterator<Item = Step>,
) -> (Script, SqsSource, Vec<Delivery>) {
    let groups = ["group", "group-2", "group-3", "group-4"];
    let receives = groups.iter().zip(names.chunks(10));
    let receives = receives.map(|(group, names)| receive().gets(messages_of(group, names)));
    let script = Script::of(receives.chain(steps));
    let source = script.source(queue);
    let mut held = Vec::new();
    while held.len() < names.len() {
        let received = source.receive(limit(10, seconds(1))).await.unwrap();
        assert!(!received.is_empty(), "{} of {names:?}", held.len());
        held.extend(received);
    }
    (script, source, held)
}

pub(crate) fn ack(delivery: &Delivery) -> Settlement {
    settlement(delivery, Disposition::Ack)
}

pub(crate) fn nack(delivery: &Delivery, delay: Duration) -> Settlement {
    settlement(delivery, Disposition::Nack { delay })
}

pub(crate) fn dead(delivery: &Delivery, reason: &str) -> Settlement {
    let reason = reason.to_owned();
    settlement(delivery, Disposition::DeadLetter { reason })
}

fn settlement(delivery: &Delivery, disposition: Disposition) -> Settlement {
    Settlement::new(delivery.receipt.clone(), disposition)
}

pub(crate) fn receipts(held: &[Delivery]) -> Vec<Receipt> {
    held.iter()
        .map(|delivery| delivery.receipt.clone())
        .collect()
}

/// The bodies of what was received.
pub(crate) fn names(received: &[Delivery]) -> Vec<&str> {
    let bodies = received.iter().map(|delivery| &delivery.message.body);
    bodies
        .map(|body| std::str::from_utf8(body).unwrap())
        .collect()
}

/// What became of each settlement, in a word.
/// What an extension is answered, without until when.
pub(crate) async fn extend(
    source: &SqsSource,
    receipts: &[Receipt],
    lease: Duration,
) -> Vec<SettleResult> {
    let answers = source.extend(receipts, lease).await.into_iter();
    answers.map(SettleResult::from).collect()
}

pub(crate) fn words(answers: &[SettleResult]) -> Vec<&'static str> {
    let word = |answer: &SettleResult| match answer {
        SettleResult::Applied => "applied",
        SettleResult::LeaseLost => "lost",
        SettleResult::Unknown(error) if error.is_retryable() => "again",
        SettleResult::Unknown(_) => "never",
    };
    answers.iter().map(word).collect()
}

/// The error of the only answer.
pub(crate) fn error_in(answers: &[SettleResult]) -> &Error {
    match answers {
        [SettleResult::Unknown(error)] => error,
        _ => panic!("{answers:?}"),
    }
}

/// Until nothing moves any more: the paused clock goes on only when no task can run.
pub(crate) async fn quiet() {
    sleep(Duration::from_millis(1)).await;
}

pub(crate) fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
