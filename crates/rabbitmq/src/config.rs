use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::uri::{AMQPScheme, AMQPUri, SASLMechanism};
use onlyonce_core::Error;
use onlyonce_core::driver::Params;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use url::Url;

use crate::connection;

/// Names of queues, exchanges, routing keys and headers: AMQP's short strings.
const MAX_NAME: usize = 255;
/// What delay queues append to the queue's name needs this much room.
const MAX_QUEUE: usize = MAX_NAME - 24;

/// Where the broker is, which queue is meant, and how to use it. Read from a URL, which may stand in a file that serde
/// reads, then changed field by field.
///
/// `Debug` shows no password.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use onlyonce_rabbitmq::Config;
///
/// let config: Config = "amqp://localhost/shop?queue=orders".parse()?;
/// assert_eq!(config.endpoint(), "amqp://localhost:5672/shop");
///
/// #[derive(serde::Deserialize)]
/// struct Settings {
///     orders: Config,
/// }
/// let settings: Settings = serde_json::from_str(r#"{"orders": "amqp://localhost/shop?queue=orders"}"#)?;
/// assert_eq!(settings.orders.queue, config.queue);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct Config {
    uri: AMQPUri,
    /// Further hosts, and their ports.
    failover: Vec<(String, u16)>,
    /// PEM files of the certificate by which the client shows who it is, and of its private key; read at every
    /// connection, so that they can be renewed.
    pub certfile: Option<PathBuf>,
    /// The private key of [`certfile`](Self::certfile).
    pub keyfile: Option<PathBuf>,
    /// A PEM file of certificates to trust besides the system's.
    pub cacertfile: Option<PathBuf>,
    /// The queue: to consume from, or to publish to through the default exchange.
    pub queue: Option<String>,
    /// A sink's exchange, instead of a queue.
    pub exchange: Option<String>,
    /// The routing key to go with [`exchange`](Self::exchange); empty by default.
    pub routing_key: Option<String>,
    /// The header that carries a message's group; none by default. An attribute of this name is taken for the group.
    pub group_header: Option<String>,
    /// Whether the queue was declared with `x-single-active-consumer`. Without a group header the whole queue is then one
    /// group.
    pub single_active_consumer: bool,
    /// Whether it is a quorum queue, which counts deliveries. Believed only where the broker does not tell.
    pub quorum: bool,
    /// The delivery limit that a [policy](https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling) sets, since
    /// AMQP tells only the one with which the queue was declared; -1 for none. `None` by default: no policy sets one.
    pub delivery_limit: Option<i64>,
    /// Whether to wait for a queue that does not exist; otherwise that is an error which is not retryable.
    pub wait_for_queue: bool,
    /// How many messages the broker may send ahead of their settlement, and so how many are held in memory at most;
    /// 500 by default.
    pub prefetch: u16,
    /// The source's [priority](https://www.rabbitmq.com/docs/consumer-priority): messages go to consumers of a lower one
    /// only while those of a higher one cannot take more. None: 0.
    pub consumer_priority: Option<i32>,
    /// Further arguments of `basic.consume`; none by default.
    pub consumer_arguments: FieldTable,
    /// The broker's [`consumer_timeout`](https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout), after which
    /// it closes a channel that holds an unsettled message; 30 minutes by default, as the broker's. Zero: it is
    /// switched off there.
    pub consumer_timeout: Duration,
    /// Whether a nack with a delay is made by way of delay queues; on by default.
    pub delayed_retry: bool,
    /// How often the connection is probed; it is given up after twice as long. 20 s by default, at least 1 s.
    pub heartbeat: Duration,
    /// How long connecting, a request, or the confirmation of a batch may take; 30 s by default.
    pub timeout: Duration,
}

impl Config {
    /// The vhost's address, without credentials: for logs and errors.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let scheme = match self.uri.scheme {
            AMQPScheme::AMQP => "amqp",
            AMQPScheme::AMQPS => "amqps",
        };
        let authority = &self.uri.authority;
        let vhost = self.uri.vhost.replace('/', "%2f");
        format!("{scheme}://{}:{}/{vhost}", authority.host, authority.port)
    }

    pub(crate) fn vhost(&self) -> &str {
        &self.uri.vhost
    }

    /// Opens a plain connection to the vhost. It is not shared with any source or sink, and nothing keeps it up.
    ///
    /// # Errors
    /// No host can be reached within [`timeout`](Self::timeout) each, or the broker refuses.
    pub async fn connect(&self) -> Result<lapin::Connection, Error> {
        let target = self.queue.as_ref().or(self.exchange.as_ref());
        connection::connect(self, "connection")
            .await
            .map(|(connection, _)| connection)
            .map_err(|fault| fault.error("cannot connect", target.map_or("", String::as_str)))
    }

    /// The user by whose credentials the broker knows this client. By a certificate it knows one that is not known here.
    pub(crate) fn user(&self) -> Option<&str> {
        let by_password = self.uri.query.auth_mechanism != Some(SASLMechanism::External);
        by_password.then_some(&self.uri.authority.userinfo.username)
    }

    /// # Errors
    /// A file cannot be read.
    pub(crate) fn tls(&self) -> Result<OwnedTLSConfig, Error> {
        let identity = match (&self.certfile, &self.keyfile) {
            (Some(cert), Some(key)) => Some(OwnedIdentity::PKCS8 {
                pem: file("certfile", cert)?,
                key: file("keyfile", key)?,
            }),
            _ => None,
        };
        let chain = self.cacertfile.as_deref();
        let chain = chain.map(|path| file("cacertfile", path)).transpose()?;
        let no_pem = |_| Error::config("`cacertfile` is not PEM");
        Ok(OwnedTLSConfig {
            identity,
            cert_chain: chain.map(String::from_utf8).transpose().map_err(no_pem)?,
        })
    }

    pub(crate) fn consume_arguments(&self) -> FieldTable {
        let mut arguments = self.consumer_arguments.clone();
        if let Some(priority) = self.consumer_priority {
            arguments.insert("x-priority".into(), AMQPValue::LongInt(priority));
        }
        arguments
    }

    pub(crate) fn warn_of_plain_credentials(&self) {
        let exposed = self.uris().find(sends_plain_credentials);
        if let Some(uri) = exposed.filter(|_| self.user().is_some()) {
            tracing::warn!(
                host = uri.authority.host,
                "user and password go to another machine unencrypted; write amqps:// instead of amqp://"
            );
        }
    }

    /// Where to connect to, in this order.
    pub(crate) fn uris(&self) -> impl Iterator<Item = AMQPUri> + '_ {
        let first = self.uri();
        let others = self.failover.iter().map({
            let first = first.clone();
            move |(host, port)| {
                let mut uri = first.clone();
                (uri.authority.host, uri.authority.port) = (host.clone(), *port);
                uri
            }
        });
        std::iter::once(first).chain(others)
    }

    fn uri(&self) -> AMQPUri {
        let mut uri = self.uri.clone();
        // AMQP counts whole seconds, and zero would switch the probes off.
        let heartbeat = self.heartbeat.as_secs().clamp(1, u16::MAX.into());
        uri.query.heartbeat = u16::try_from(heartbeat).ok();
        uri.query.connection_timeout = u64::try_from(self.timeout.as_millis()).ok();
        uri
    }

    /// Checks what the fields' types leave open, and returns the queue to consume from.
    pub(crate) fn source_queue(&self) -> Result<&str, Error> {
        self.check()?;
        if self.exchange.is_some() || self.routing_key.is_some() {
            return Err(Error::config(
                "`exchange` and `routing_key` are for publishing; bind a queue to the exchange and give `queue=NAME`",
            ));
        }
        self.queue.as_deref().ok_or_else(|| {
            Error::config("no queue given; write `?queue=NAME` at the end of the URL")
        })
    }

    /// Exchange and routing key to publish to.
    pub(crate) fn sink_target(&self) -> Result<(ShortString, ShortString), Error> {
        self.check()?;
        match (&self.queue, &self.exchange, &self.routing_key) {
            (Some(queue), None, None) => Ok((ShortString::default(), name("queue", queue)?)),
            (None, Some(exchange), key) => Ok((
                name("exchange", exchange)?,
                name("routing_key", key.as_deref().unwrap_or_default())?,
            )),
            (Some(_), _, _) => Err(Error::config(
                "give either `queue`, or `exchange` with `routing_key`",
            )),
            (None, None, _) => Err(Error::config(
                "nowhere to publish to; write `?queue=NAME` or `?exchange=NAME&routing_key=KEY` at the end of the URL",
            )),
        }
    }

    /// Whether messages have to stay in order.
    pub(crate) fn is_grouped(&self) -> bool {
        self.group_header.is_some() || self.single_active_consumer
    }

    /// Whether it holds back what is given back with a delay: by a copy, which would upset the order of a group.
    pub(crate) fn delays(&self) -> bool {
        self.delayed_retry && !self.is_grouped()
    }

    fn check(&self) -> Result<(), Error> {
        if self.prefetch == 0 {
            return Err(Error::config(
                "`prefetch=0` would mean no bound; give 1 to 65535",
            ));
        }
        let tls = self.uri.scheme == AMQPScheme::AMQPS;
        let files = [&self.certfile, &self.keyfile, &self.cacertfile];
        if !tls && files.into_iter().any(Option::is_some) {
            return Err(Error::config(
                "`certfile`, `keyfile` and `cacertfile` are for TLS; write amqps:// instead of amqp://",
            ));
        }
        if self.certfile.is_some() != self.keyfile.is_some() {
            return Err(Error::config("give `certfile` and `keyfile` together"));
        }
        if self.user().is_none() && self.certfile.is_none() {
            return Err(Error::config(
                "`auth_mechanism=external` needs a client certificate: `certfile` and `keyfile`",
            ));
        }
        if self.timeout.is_zero() {
            return Err(Error::config("`timeout` cannot be zero"));
        }
        let names = [
            ("queue", &self.queue, MAX_QUEUE),
            ("exchange", &self.exchange, MAX_NAME),
            ("routing_key", &self.routing_key, MAX_NAME),
            ("group_header", &self.group_header, MAX_NAME),
        ];
        for (what, name, most) in names {
            let Some(name) = name else { continue };
            // The empty exchange is the default one, and a routing key may be empty.
            if name.is_empty() && what != "routing_key" {
                return Err(Error::config(format!("`{what}` is empty")));
            }
            if name.len() > most {
                return Err(Error::config(format!(
                    "`{what}` has {} bytes; the most is {most}",
                    name.len()
                )));
            }
        }
        Ok(())
    }
}

/// A name as AMQP carries it.
pub(crate) fn name(what: &str, text: &str) -> Result<ShortString, Error> {
    ShortString::try_new(text).map_err(|_| {
        Error::config(format!(
            "`{what}` has {} bytes; the most is {MAX_NAME}",
            text.len()
        ))
    })
}

impl FromStr for Config {
    type Err = Error;

    /// Reads `amqp://user:password@host:port/vhost?queue=NAME&…`, see the crate's page for all parameters.
    ///
    /// # Errors
    /// Another form, an unknown parameter, a value that does not parse.
    fn from_str(text: &str) -> Result<Self, Error> {
        // Their errors are not passed on: they may quote the URL, and it has a password in it.
        let url = Url::parse(text).map_err(|_| {
            Error::config("this is not a URL; further hosts are written `failover=host:port,…`")
        })?;
        Self::try_from(&url)
    }
}

impl TryFrom<&Url> for Config {
    type Error = Error;

    /// As [`from_str`](Self::from_str).
    fn try_from(url: &Url) -> Result<Self, Error> {
        let mut uri = address(url)?;
        let mut params = Params::of(url)?;
        let yes_no = "true or false";
        let config = Self {
            queue: params.text("queue"),
            exchange: params.text("exchange"),
            routing_key: params.text("routing_key"),
            group_header: params.text("group_header"),
            single_active_consumer: params
                .parsed("single_active_consumer", yes_no)?
                .unwrap_or(false),
            quorum: params.parsed("quorum", yes_no)?.unwrap_or(false),
            delivery_limit: params.parsed("delivery_limit", "a whole number, -1 for none")?,
            wait_for_queue: params.parsed("wait_for_queue", yes_no)?.unwrap_or(false),
            prefetch: params
                .parsed("prefetch", "a number from 1 to 65535")?
                .unwrap_or(500),
            consumer_priority: params.parsed("consumer_priority", "a whole number")?,
            consumer_arguments: FieldTable::default(),
            consumer_timeout: params
                .duration("consumer_timeout")?
                .unwrap_or(Duration::from_secs(1_800)),
            delayed_retry: params.parsed("delayed_retry", yes_no)?.unwrap_or(true),
            heartbeat: params
                .duration("heartbeat")?
                .unwrap_or(Duration::from_secs(20)),
            timeout: params
                .duration("timeout")?
                .unwrap_or(Duration::from_secs(30)),
            failover: params
                .text("failover")
                .map(|text| hosts(&text, uri.scheme.default_port()))
                .transpose()?
                .unwrap_or_default(),
            certfile: params.text("certfile").map(Into::into),
            keyfile: params.text("keyfile").map(Into::into),
            cacertfile: params.text("cacertfile").map(Into::into),
            uri: {
                uri.query.auth_mechanism = params
                    .text("auth_mechanism")
                    .map(|text| mechanism(&text))
                    .transpose()?;
                uri
            },
        };
        params.finish()?;
        config.check()?;
        Ok(config)
    }
}

impl<'de> Deserialize<'de> for Config {
    /// From the URL as a string; see [`from_str`](Self::from_str).
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let url = String::deserialize(deserializer)?;
        url.parse().map_err(D::Error::custom)
    }
}

fn address(url: &Url) -> Result<AMQPUri, Error> {
    let form = || {
        Error::config(
            "write the URL like `amqp://user:password@host:5672/vhost?queue=NAME`, or with amqps",
        )
    };
    let host = url.host_str().filter(|host| !host.is_empty());
    let (Some(host), "amqp" | "amqps") = (host, url.scheme()) else {
        return Err(form());
    };
    if host.contains(',') {
        return Err(Error::config(
            "give one host before the vhost, and further ones as `failover=host:port,…`",
        ));
    }
    if is_torn(url) {
        return Err(Error::config(
            "in a URL's user and password write `/`, `?`, `#` and `@` as %2f, %3f, %23 and %40, and an `@` in the vhost as %40",
        ));
    }
    let mut bare = url.clone();
    bare.set_query(None);
    bare.set_fragment(None);
    let mut uri: AMQPUri = bare.as_str().parse().map_err(|_| form())?;
    // The parser takes IPv6 addresses for localhost, and a lone slash for a vhost without a name.
    uri.authority.host = host.trim_matches(['[', ']']).to_owned();
    if uri.vhost.is_empty() {
        uri.vhost = "/".to_owned();
    }
    Ok(uri)
}

fn mechanism(text: &str) -> Result<SASLMechanism, Error> {
    match text {
        "plain" => Ok(SASLMechanism::Plain),
        "external" => Ok(SASLMechanism::External),
        _ => Err(Error::config("`auth_mechanism` is `plain` or `external`")),
    }
}

/// `host:port,host:port`; the port may be missing.
fn hosts(text: &str, default_port: u16) -> Result<Vec<(String, u16)>, Error> {
    let hosts = text.split(',');
    let host = |text| {
        // Whatever else a URL may have would be ignored.
        let url = Url::parse(&format!("amqp://{text}")).ok()?;
        let host = url.host_str().filter(|host| !host.is_empty())?;
        let port = url.port().map_or(String::new(), |port| format!(":{port}"));
        let plain = format!("{host}{port}") == text;
        let bare = host.trim_matches(['[', ']']).to_owned();
        plain.then(|| (bare, url.port().unwrap_or(default_port)))
    };
    hosts.map(host).collect::<Option<_>>().ok_or_else(|| {
        Error::config("write further hosts like `failover=mq2.example:5672,mq3.example:5672`")
    })
}

fn file(what: &str, path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|error| {
        Error::config(format!("cannot read `{what}` {}", path.display())).caused_by(error)
    })
}

/// Whether a password goes over the network as it is.
fn sends_plain_credentials(uri: &AMQPUri) -> bool {
    let host = &uri.authority.host;
    let loopback = match host.parse::<IpAddr>() {
        Ok(address) => address.is_loopback(),
        Err(_) => host == "localhost",
    };
    uri.scheme == AMQPScheme::AMQP && !loopback
}

/// Whether a password that is not percent-encoded seems to have ended too soon, so that its rest stands for something
/// that is printed.
fn is_torn(url: &Url) -> bool {
    let in_query = url.query().is_some_and(|query| query.contains('@'));
    url.path().contains('@') || (in_query && url.username().is_empty())
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("endpoint", &self.endpoint())
            .field("user", &self.uri.authority.userinfo.username)
            .field("password", &"(hidden)")
            .field("failover", &self.failover)
            .field("auth_mechanism", &self.uri.query.auth_mechanism)
            .field("certfile", &self.certfile)
            .field("keyfile", &self.keyfile)
            .field("cacertfile", &self.cacertfile)
            .field("queue", &self.queue)
            .field("exchange", &self.exchange)
            .field("routing_key", &self.routing_key)
            .field("group_header", &self.group_header)
            .field("single_active_consumer", &self.single_active_consumer)
            .field("quorum", &self.quorum)
            .field("delivery_limit", &self.delivery_limit)
            .field("wait_for_queue", &self.wait_for_queue)
            .field("prefetch", &self.prefetch)
            .field("consumer_priority", &self.consumer_priority)
            .field("consumer_arguments", &self.consumer_arguments)
            .field("consumer_timeout", &self.consumer_timeout)
            .field("delayed_retry", &self.delayed_retry)
            .field("heartbeat", &self.heartbeat)
            .field("timeout", &self.timeout)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Config {
        text.parse().unwrap()
    }

    fn refused(text: &str) -> String {
        let error = match text.parse::<Config>() {
            Err(error) => error,
            Ok(config) => config
                .source_queue()
                .and(config.sink_target().map(|_| ""))
                .unwrap_err(),
        };
        assert!(!error.is_retryable());
        error.to_string()
    }

    #[test]
    fn a_url_gives_everything() {
        let config = parse(
            "amqps://us%40er:p%2fw@mq.example:99/a%2fb?queue=orders&prefetch=7&group_header=x-group\
             &consumer_timeout=5m&quorum=true&delivery_limit=-1&wait_for_queue=true&single_active_consumer=true&delayed_retry=false&heartbeat=5s&timeout=2s",
        );
        let uri = config.uri();
        assert_eq!(uri.vhost, "a/b");
        assert_eq!(uri.authority.userinfo.username, "us@er");
        assert_eq!(uri.authority.userinfo.password, "p/w");
        assert_eq!(uri.query.heartbeat, Some(5));
        assert_eq!(config.endpoint(), "amqps://mq.example:99/a%2fb");
        assert_eq!(config.source_queue().unwrap(), "orders");
        assert_eq!(config.prefetch, 7);
        assert_eq!(config.group_header.as_deref(), Some("x-group"));
        assert_eq!(config.consumer_timeout, Duration::from_secs(300));
        assert!(config.wait_for_queue && config.delivery_limit == Some(-1));
        assert!(config.single_active_consumer && config.quorum && !config.delayed_retry);
    }

    #[test]
    fn the_vhost_is_slash_unless_given() {
        for text in [
            "amqp://h?queue=q",
            "amqp://h/?queue=q",
            "amqp://h/%2f?queue=q",
        ] {
            assert_eq!(parse(text).uri().vhost, "/", "{text}");
        }
        assert_eq!(parse("amqp://h/v?queue=q").uri().vhost, "v");
        let six = parse("amqp://[::1]:5673/?queue=q").uri().authority;
        assert_eq!((six.host.as_str(), six.port), ("::1", 5673));
        let four = parse("amqp://127.0.0.1/?queue=q").uri().authority;
        assert_eq!((four.host.as_str(), four.port), ("127.0.0.1", 5672));
    }

    #[test]
    fn further_hosts_come_after_the_first() {
        let config =
            parse("amqps://u:p@a.example/v?queue=q&failover=b.example:99,[::1]:7,c.example");
        let hosts: Vec<_> = config
            .uris()
            .map(|uri| (uri.authority.host, uri.authority.port))
            .collect();
        let expected = [
            ("a.example", 5671),
            ("b.example", 99),
            ("::1", 7),
            ("c.example", 5671),
        ];
        assert_eq!(hosts, expected.map(|(host, port)| (host.to_owned(), port)));
        assert!(
            config
                .uris()
                .all(|uri| uri.vhost == "v" && uri.authority.userinfo.username == "u")
        );
        for bad in ["b,", ",b", "u@b", "b/v", "b:x", "b:99999", "b?x"] {
            let bad = format!("amqp://h/?queue=q&failover={}", bad.replace('@', "%40"));
            assert!(refused(&bad).contains("failover=mq2.example"), "{bad}");
        }
        for list in ["amqp://a:1,b:2/?queue=q", "amqp://a,b/?queue=q"] {
            assert!(refused(list).contains("failover="), "{list}");
        }
    }

    #[test]
    fn a_client_certificate_takes_the_place_of_the_user() {
        let external = "amqps://h/?queue=q&auth_mechanism=external";
        let config = parse(&format!(
            "{external}&certfile=/none/c.pem&keyfile=/none/k.pem"
        ));
        assert_eq!(config.user(), None);
        assert_eq!(
            config.uri().query.auth_mechanism,
            Some(SASLMechanism::External)
        );
        let error = config.tls().unwrap_err();
        assert!(
            error.to_string().contains("`certfile` /none/c.pem"),
            "{error}"
        );
        assert_eq!(parse("amqps://u:p@h/?queue=q").user(), Some("u"));
        assert!(refused(external).contains("needs a client certificate"));
        assert!(refused("amqps://h/?queue=q&certfile=c").contains("together"));
        assert!(refused("amqp://h/?queue=q&cacertfile=c").contains("amqps://"));
        assert!(refused("amqps://h/?queue=q&auth_mechanism=none").contains("`external`"));
    }

    #[test]
    fn credentials_that_anybody_can_read_are_noticed() {
        let plain = |text| sends_plain_credentials(&parse(text).uri());
        for text in ["amqp://mq.example/?queue=q", "amqp://10.0.0.1/?queue=q"] {
            assert!(plain(text), "{text}");
        }
        for text in [
            "amqps://mq.example/?queue=q",
            "amqp://localhost/?queue=q",
            "amqp://127.0.0.2/?queue=q",
            "amqp://[::1]/?queue=q",
        ] {
            assert!(!plain(text), "{text}");
        }
    }

    #[test]
    fn a_priority_goes_to_the_consumer() {
        let arguments = parse("amqp://h/?queue=q&consumer_priority=-5").consume_arguments();
        let priority = arguments.inner().get("x-priority");
        assert_eq!(priority, Some(&AMQPValue::LongInt(-5)));
        assert!(
            parse("amqp://h/?queue=q")
                .consume_arguments()
                .inner()
                .is_empty()
        );
        assert!(refused("amqp://h/?queue=q&consumer_priority=high").contains("whole number"));
    }

    #[test]
    fn what_cannot_work_says_what_to_write() {
        assert!(refused("amqp://h/").contains("?queue=NAME"));
        assert!(refused("amqp://h/?exchange=e").contains("bind a queue"));
        assert!(refused("amqp://h/?queue=q&exchange=e").contains("bind a queue"));
        assert!(refused("amqp://h/?queue=").contains("`queue` is empty"));
        assert!(refused("amqp://h/?queue=q&prefetch=0").contains("no bound"));
        assert!(refused("amqp://h/?queue=q&prefetch=70000").contains("1 to 65535"));
        assert!(refused("amqp://h/?queue=q&prefetsch=1").contains("known here: queue"));
        assert!(refused("amqp://h/?queue=q&heartbeat=20").contains("30s"));
        assert!(refused(&format!("amqp://h/?queue={}", "q".repeat(250))).contains("250 bytes"));
        assert!(refused("http://h/?queue=q").contains("amqp://"));
        assert!(refused("amqp:///?queue=q").contains("amqp://"));
    }

    #[test]
    fn a_sink_takes_a_queue_or_an_exchange() {
        let target = |text| {
            parse(text)
                .sink_target()
                .map(|(e, k)| (e.to_string(), k.to_string()))
        };
        assert_eq!(
            target("amqp://h/?queue=q").unwrap(),
            (String::new(), "q".into())
        );
        assert_eq!(
            target("amqp://h/?exchange=e&routing_key=k").unwrap(),
            ("e".into(), "k".into())
        );
        assert_eq!(
            target("amqp://h/?exchange=e").unwrap(),
            ("e".into(), String::new())
        );
        assert!(target("amqp://h/?queue=q&exchange=e").is_err());
        assert!(target("amqp://h/?queue=q&routing_key=k").is_err());
        assert!(target("amqp://h/").is_err());
    }

    #[test]
    fn serde_reads_the_same_from_a_string() {
        let url = "amqps://user:s3cr3t@h/v?queue=q&prefetch=7&timeout=2s";
        let read: Config = serde_json::from_value(url.into()).unwrap();
        assert_eq!(read.uri(), parse(url).uri());
        assert_eq!(format!("{read:?}"), format!("{:?}", parse(url)));
        assert!(!format!("{read:?}").contains("s3cr3t"));

        for (rest, hint) in [
            ("?queue=q&nope=1", "known here: queue"),
            (":port?queue=q", "not a URL"),
        ] {
            let bad = format!("amqp://user:s3cr3t@h{rest}");
            let error = serde_json::from_value::<Config>(bad.into()).unwrap_err();
            assert!(error.to_string().contains(hint), "{error}");
            assert!(
                !format!("{error} {error:?}").contains("s3cr3t"),
                "{error:?}"
            );
        }
    }

    #[test]
    fn secrets_are_hidden() {
        let secret = "s3cr3t";
        let config = parse(&format!("amqp://u:{secret}@h/?queue=q"));
        assert!(!format!("{config:?} {}", config.endpoint()).contains(secret));
        for bad in [
            "/?nope=1",
            "/%ff?queue=q",
            ":badport/?queue=q",
            "/?prefetch=x",
            "/?prefetch=x#",
        ] {
            let error = format!("amqp://u:{secret}@h{bad}")
                .parse::<Config>()
                .unwrap_err();
            assert!(!format!("{error} {error:?}").contains(secret), "{error:?}");
        }
        // A password that is not percent-encoded ends at any of these.
        for end in ["/", "?", "#"] {
            let url = format!("amqp://u:12{end}{secret}@h/?queue=q");
            let error = url.parse::<Config>().unwrap_err();
            assert!(!format!("{error} {error:?}").contains(secret), "{error:?}");
        }
        let key = parse("amqp://u:p@h/a%40b?exchange=e&routing_key=a%40b");
        assert_eq!(key.routing_key.as_deref(), Some("a@b"));
    }
}
