use std::fmt;
use std::marker::PhantomData;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use google_cloud_auth::credentials::{Builder, CacheableResource, Credentials, anonymous};
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::{
    AcknowledgeRequest, GetSubscriptionRequest, GetTopicRequest, ListTopicSubscriptionsRequest,
    ListTopicSubscriptionsResponse, ModifyAckDeadlineRequest, PullRequest, PullResponse,
    Subscription, Topic,
};
use http::uri::PathAndQuery;
use http::{Extensions, HeaderMap};
use onlyonce_core::Error;
use onlyonce_core::driver::{Standing, exposed_to};
use prost::Message;
use tokio::time::{Instant, sleep_until, timeout};
use tonic::client::Grpc;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use crate::{Config, error};

const CONNECT: Duration = Duration::from_secs(5);
/// A connection that says nothing is asked whether it lives, no more than twice while a pull waits: a server may take more for
/// an attack.
const KEEPALIVE: Duration = Duration::from_secs(45);
/// One that does not answer within this time is dead.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Failed acks are told in the headers, with a line for each id:
/// <https://cloud.google.com/pubsub/docs/exactly-once-delivery>
const MAX_HEADERS: u32 = 4 << 20;
/// Bytes under way to us: of one answer, and of all.
const WINDOW: u32 = 4 << 20;
const WINDOWS: u32 = 16 << 20;
/// A service that asks for a longer pause is asked again after this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// What Google's credentials are asked for.
const SCOPE: &str = "https://www.googleapis.com/auth/pubsub";
const USER_AGENT: &str = concat!("onlyonce-pubsub/", env!("CARGO_PKG_VERSION"));

/// A call of the service, with what goes in and what comes out.
pub(crate) struct Method<Q, R> {
    path: &'static str,
    /// The parameter by which the service finds where the subscription or topic is.
    routed_by: &'static str,
    types: PhantomData<fn(Q) -> R>,
}

impl<Q, R> Method<Q, R> {
    const fn new(path: &'static str, routed_by: &'static str) -> Self {
        Self {
            path,
            routed_by,
            types: PhantomData,
        }
    }
}

pub(crate) const PULL: Method<PullRequest, PullResponse> =
    Method::new("/google.pubsub.v1.Subscriber/Pull", "subscription");
pub(crate) const ACKNOWLEDGE: Method<AcknowledgeRequest, ()> =
    Method::new("/google.pubsub.v1.Subscriber/Acknowledge", "subscription");
pub(crate) const MODIFY_ACK_DEADLINE: Method<ModifyAckDeadlineRequest, ()> = Method::new(
    "/google.pubsub.v1.Subscriber/ModifyAckDeadline",
    "subscription",
);
pub(crate) const GET_SUBSCRIPTION: Method<GetSubscriptionRequest, Subscription> = Method::new(
    "/google.pubsub.v1.Subscriber/GetSubscription",
    "subscription",
);
pub(crate) const GET_TOPIC: Method<GetTopicRequest, Topic> =
    Method::new("/google.pubsub.v1.Publisher/GetTopic", "topic");
pub(crate) const LIST_TOPIC_SUBSCRIPTIONS: Method<
    ListTopicSubscriptionsRequest,
    ListTopicSubscriptionsResponse,
> = Method::new(
    "/google.pubsub.v1.Publisher/ListTopicSubscriptions",
    "topic",
);

/// A channel to the service, made when it is first needed, and how it stands with its credentials. The channel connects again
/// by itself.
pub(crate) struct Connection {
    config: Config,
    /// The channel is the user's, and so is what it sends for credentials.
    given: Option<Channel>,
    client: tokio::sync::Mutex<Option<Client>>,
    standing: Standing,
    /// The service asked for a pause until then.
    paused_until: Mutex<Option<Instant>>,
}

#[derive(Clone)]
struct Client {
    channel: Channel,
    credentials: Option<Credentials>,
}

impl Connection {
    pub(crate) fn new(config: Config, given: Option<Channel>) -> Self {
        Self {
            config,
            given,
            client: tokio::sync::Mutex::default(),
            standing: Standing::new(),
            paused_until: Mutex::default(),
        }
    }

    /// Sends a request about `resource` once, and waits for its answer for at most this long.
    pub(crate) async fn call<Q, R>(
        &self,
        method: &Method<Q, R>,
        resource: &str,
        request: Q,
        limit: Duration,
    ) -> Result<R, Status>
    where
        Q: Message + Clone + Send + Sync + 'static,
        R: Message + Default + Send + Sync + 'static,
    {
        let sent = async {
            match self.send(method, resource, request.clone(), limit).await {
                Err(status) if was_never_sent(&status) => {
                    self.send(method, resource, request, limit).await
                }
                answer => answer,
            }
        };
        let answer = match timeout(limit, sent).await {
            Ok(answer) => answer,
            Err(_) => {
                self.connect_anew().await;
                let text = format!("no answer within {limit:?}");
                Err(Status::deadline_exceeded(text))
            }
        };
        match &answer {
            Ok(_) => self.standing.accepted(),
            Err(status) => {
                let delay = error::retry_delay(status);
                let until = delay.map(|delay| Instant::now() + delay.min(LONGEST_PAUSE));
                let mut paused = self.paused();
                *paused = until.max(*paused);
            }
        }
        answer
    }

    /// A connection that left a request without an answer may be dead, long before its keepalive shows it.
    async fn connect_anew(&self) {
        if let Some(client) = &mut *self.client.lock().await
            && let Ok(channel) = channel(&self.config)
        {
            client.channel = channel;
        }
    }

    /// What the core is told of a failed call.
    pub(crate) fn error(&self, what: &str, status: &Status) -> Error {
        let error = error::of_status(what, status).on_queue(self.config.name());
        match status.code() {
            Code::Unauthenticated => self.standing.refused(error),
            _ => error,
        }
    }

    async fn send<Q, R>(
        &self,
        method: &Method<Q, R>,
        resource: &str,
        message: Q,
        limit: Duration,
    ) -> Result<R, Status>
    where
        Q: Message + Send + Sync + 'static,
        R: Message + Default + Send + Sync + 'static,
    {
        self.pause(limit).await?;
        let client = self.client().await?;
        let mut request = Request::new(message);
        // We give up first, and know it from an answer.
        request.set_timeout(limit + Duration::from_secs(1));
        self.add_headers(&client, request.metadata_mut()).await?;
        let routed: String = url::form_urlencoded::byte_serialize(resource.as_bytes()).collect();
        let routed = MetadataValue::try_from(format!("{}={routed}", method.routed_by));
        if let Ok(routed) = routed {
            request
                .metadata_mut()
                .insert("x-goog-request-params", routed);
        }
        // What is too large would come again for ever: the service knows its limits.
        let mut grpc = Grpc::new(client.channel).max_decoding_message_size(usize::MAX);
        grpc.ready()
            .await
            .map_err(|error| Status::unavailable(chain(&error)))?;
        let path = PathAndQuery::from_static(method.path);
        let answer = grpc.unary(request, path, ProstCodec::default()).await?;
        Ok(answer.into_inner())
    }

    fn paused(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.paused_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for as long as the service asked to, if that is within the request's own time.
    async fn pause(&self, limit: Duration) -> Result<(), Status> {
        let until = *self.paused();
        let Some(until) = until.filter(|until| *until > Instant::now()) else {
            return Ok(());
        };
        let left = until - Instant::now();
        if left >= limit {
            let text = format!("not sent: the service asked to wait for another {left:?}");
            return Err(Status::resource_exhausted(text));
        }
        sleep_until(until).await;
        Ok(())
    }

    async fn client(&self) -> Result<Client, Status> {
        if let Some(channel) = &self.given {
            return Ok(Client {
                channel: channel.clone(),
                credentials: None,
            });
        }
        let mut known = self.client.lock().await;
        let stale = self.standing.is_stale();
        let client = match &*known {
            Some(client) if !stale => return Ok(client.clone()),
            Some(client) => Client {
                channel: client.channel.clone(),
                credentials: credentials(&self.config)?,
            },
            None => {
                warn_if_exposed(&self.config);
                Client {
                    channel: channel(&self.config)?,
                    credentials: credentials(&self.config)?,
                }
            }
        };
        self.standing.renewed();
        *known = Some(client.clone());
        Ok(client)
    }

    /// The credentials' headers, of a token that is renewed before it ends.
    async fn add_headers(&self, client: &Client, metadata: &mut MetadataMap) -> Result<(), Status> {
        let Some(credentials) = &client.credentials else {
            return Ok(());
        };
        let headers = headers(credentials).await?;
        let mut all = metadata.clone().into_headers();
        all.extend(headers);
        if let Some(project) = &self.config.quota_project
            && let Ok(project) = project.parse()
        {
            all.insert("x-goog-user-project", project);
        }
        *metadata = MetadataMap::from_headers(all);
        Ok(())
    }
}

async fn headers(credentials: &Credentials) -> Result<HeaderMap, Status> {
    match credentials.headers(Extensions::new()).await {
        Ok(CacheableResource::New { data, .. }) => Ok(data),
        Ok(CacheableResource::NotModified) => Ok(HeaderMap::new()),
        Err(error) => {
            let text = format!("no token from the credentials: {}", chain(&error));
            Err(match error.is_transient() {
                true => Status::unavailable(text),
                false => Status::unauthenticated(text),
            })
        }
    }
}

/// Those of the [usual places](https://cloud.google.com/docs/authentication/application-default-credentials); none for an
/// emulator.
fn credentials(config: &Config) -> Result<Option<Credentials>, Status> {
    if let Some(given) = &config.credentials.0 {
        return Ok(Some(given.clone()));
    }
    if config.target().starts_with("http://") {
        return Ok(None);
    }
    choose_cryptography();
    let found = Builder::default().with_scopes([SCOPE]).build();
    found
        .map(Some)
        .map_err(|error| Status::unauthenticated(chain(&error)))
}

/// The same for Google's publisher, which wants some in any case.
pub(crate) fn credentials_of_publisher(config: &Config) -> Result<Credentials, Error> {
    let found = credentials(config).map_err(|status| {
        error::of_status("there are no credentials", &status).on_queue(config.name())
    })?;
    Ok(found.unwrap_or_else(|| anonymous::Builder::new().build()))
}

/// Google's crates ask rustls for the process's provider; it is ring, unless the program has chosen another.
fn choose_cryptography() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

fn warn_if_exposed(config: &Config) {
    if let Some(host) = exposed_to(&config.target()) {
        tracing::warn!(
            host,
            "messages go to another machine unencrypted; write https:// instead of http://"
        );
    }
}

fn channel(config: &Config) -> Result<Channel, Status> {
    let target = config.target();
    let unusable = |error: tonic::transport::Error| {
        Status::invalid_argument(format!("the endpoint cannot be used: {}", chain(&error)))
    };
    let mut endpoint = Endpoint::from_shared(target.clone()).map_err(unusable)?;
    if target.starts_with("https://") {
        choose_cryptography();
        let tls = ClientTlsConfig::new().with_native_roots();
        endpoint = endpoint.tls_config(tls).map_err(unusable)?;
    }
    let endpoint = endpoint
        .user_agent(USER_AGENT)
        .map_err(unusable)?
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOWS)
        .http2_max_header_list_size(MAX_HEADERS);
    Ok(endpoint.connect_lazy())
}

/// The connection was found to be closed before the request went out: it goes by another.
fn was_never_sent(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<hyper::Error>() {
            return error.is_canceled();
        }
        cause = error.source();
    }
    false
}

/// The causes as text.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}
