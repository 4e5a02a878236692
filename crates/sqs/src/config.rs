use std::str::FromStr;
use std::time::Duration;

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::retry::RetryConfig;
use aws_sdk_sqs::config::timeout::TimeoutConfig;
use aws_sdk_sqs::config::{IdentityCache, SharedHttpClient, StalledStreamProtectionConfig};
use onlyonce_core::Error;
use onlyonce_core::driver::{Params, check_endpoint, exposed_to, has_credentials};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use url::Url;

/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-queues.html>
const MAX_NAME: usize = 80;
const CONNECT: Duration = Duration::from_secs(3);
const MAX_VISIBILITY: Duration = Duration::from_secs(12 * 3_600);

/// Which queue is meant, and how to use it. Read from a URL or an ARN, which may stand in a file that serde reads, then
/// changed field by field.
///
/// It holds no secret: credentials come from where AWS's own tools have them.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use onlyonce_sqs::Config;
///
/// let config: Config = "sqs://orders.fifo?region=eu-central-1".parse()?;
/// assert!(config.is_fifo());
///
/// #[derive(serde::Deserialize)]
/// struct Settings {
///     orders: Config,
/// }
/// let settings: Settings = serde_json::from_str(r#"{"orders": "sqs://orders.fifo?region=eu-central-1"}"#)?;
/// assert_eq!(settings.orders.name(), config.name());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    pub(crate) address: Address,
    /// The queue's region; by default that of its address, else what the environment or the profile says.
    pub region: Option<String>,
    /// Where to send requests, instead of the region's public endpoint.
    pub endpoint: Option<String>,
    /// For how long a message is leased: the visibility timeout asked for with each receive. By default the queue's own.
    /// Whole seconds, up to 12 hours.
    pub visibility_timeout: Option<Duration>,
    /// How many long polls may be under way at most; 10 by default. Without load there is one.
    pub polls: usize,
    /// How long a request may take, beyond the wait of a long poll; 10 s by default.
    pub timeout: Duration,
}

/// What the queue is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) name: String,
    /// The account that owns the queue, if it is not the caller's.
    pub(crate) account: Option<String>,
    /// The queue URL, where it is known.
    pub(crate) url: Option<String>,
}

impl Address {
    /// A queue by its ARN, `arn:PARTITION:sqs:REGION:ACCOUNT:NAME`; with its region.
    pub(crate) fn of_arn(arn: &str) -> Option<(Self, String)> {
        let parts: Vec<&str> = arn.split(':').collect();
        let ["arn", _, "sqs", region, account, name] = parts[..] else {
            return None;
        };
        let address = Self {
            name: name.to_owned(),
            account: Some(account.to_owned()),
            url: None,
        };
        let whole = ![region, account, name].contains(&"");
        whole.then(|| (address, region.to_owned()))
    }

    pub(crate) fn is_fifo(&self) -> bool {
        self.name.ends_with(".fifo")
    }
}

impl Config {
    /// The queue's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.address.name
    }

    /// Whether it is a FIFO queue: SQS has their names end in `.fifo`, and no others.
    #[must_use]
    pub fn is_fifo(&self) -> bool {
        self.address.is_fifo()
    }

    /// A client for this queue's region and endpoint, with the credentials of the
    /// [usual chain](https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html): environment, profile,
    /// SSO, web identity, container, instance. It makes each request once: retries are the pipeline's part.
    /// Sends no request to SQS; without a region it may ask the instance for its own.
    ///
    /// # Errors
    /// There is no region.
    pub async fn connect(&self) -> Result<Client, Error> {
        let config = self.load().await;
        if config.region().is_none() {
            return Err(Error::config(
                "no AWS region: add `region=…` to the URL, or set AWS_REGION",
            )
            .on_queue(self.name()));
        }
        if let Some(host) = config.endpoint_url().and_then(exposed_to) {
            tracing::warn!(
                host,
                "messages and session tokens go to another machine unencrypted; write https:// instead of http://"
            );
        }
        Ok(Client::new(&config))
    }

    /// The same client, with credentials from a chain that has read nothing yet.
    pub(crate) async fn with_fresh_credentials(&self, client: &Client) -> Client {
        let fresh = self.load().await;
        let mut config = client.config().to_builder();
        config.set_credentials_provider(fresh.credentials_provider());
        config.set_identity_cache(IdentityCache::lazy().build());
        Client::from_conf(config.build())
    }

    async fn load(&self) -> SdkConfig {
        // A request has its own bound; this one leaves time for another try.
        let time_outs = TimeoutConfig::builder().connect_timeout(CONNECT).build();
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .http_client(http_client())
            .retry_config(RetryConfig::disabled())
            .timeout_config(time_outs)
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
        if let Some(region) = &self.region {
            loader = loader.region(Region::new(region.clone()));
        }
        if let Some(endpoint) = &self.endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        loader.load().await
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let fault = |what: &str| Err(Error::config(what).on_queue(self.name()));
        if self.polls == 0 {
            return fault("`polls=0` would receive nothing; give 1 or more");
        }
        if self.timeout.is_zero() {
            return fault("`timeout` cannot be zero");
        }
        match self.visibility_timeout {
            Some(time) if time.subsec_nanos() != 0 || time.is_zero() || time > MAX_VISIBILITY => {
                fault("`visibility_timeout` must be whole seconds, from 1s to 12h")
            }
            _ => Ok(()),
        }
    }
}

/// rustls with ring, or plain HTTP: what the crate's features say.
fn http_client() -> SharedHttpClient {
    let builder = aws_smithy_http_client::Builder::new();
    #[cfg(feature = "rustls-ring")]
    return builder
        .tls_provider(aws_smithy_http_client::tls::Provider::Rustls(
            aws_smithy_http_client::tls::rustls_provider::CryptoMode::Ring,
        ))
        .build_https();
    #[cfg(not(feature = "rustls-ring"))]
    return builder.build_http();
}

impl FromStr for Config {
    type Err = Error;

    /// Reads a queue URL, `sqs://NAME` or an ARN; see the [crate's page](crate#urls).
    ///
    /// # Errors
    /// [`Config`](onlyonce_core::ErrorKind::Config): another form, credentials, an unknown parameter, a value that does not
    /// parse.
    fn from_str(text: &str) -> Result<Self, Error> {
        // The text is not repeated: it may hold a secret.
        let url = Url::parse(text).map_err(|error| {
            Error::config("not a queue's address; write its URL, `sqs://NAME?region=…` or its ARN")
                .caused_by(error)
        })?;
        Self::try_from(&url)
    }
}

impl TryFrom<&Url> for Config {
    type Error = Error;

    /// As [`from_str`](Self::from_str).
    fn try_from(url: &Url) -> Result<Self, Error> {
        if has_credentials(url) {
            return Err(Error::config(
                "no credentials in a queue's URL: they come from the environment or the profile",
            ));
        }
        let mut params = Params::of(url)?;
        let (address, region, endpoint) = match url.scheme() {
            "https" | "http" => of_queue_url(url)?,
            "sqs" => (of_name(url, params.text("account"))?, None, None),
            "arn" => of_arn(url)?,
            _ => {
                return Err(Error::config(
                    "an SQS queue is named by its URL (https:), sqs://NAME or arn:aws:sqs:…",
                ));
            }
        };
        let config = Self {
            address,
            region: params.text("region").or(region),
            endpoint: params.text("endpoint").or(endpoint),
            visibility_timeout: params.duration("visibility_timeout")?,
            polls: params.parsed("polls", "a number")?.unwrap_or(10),
            timeout: params
                .duration("timeout")?
                .unwrap_or(Duration::from_secs(10)),
        };
        params.finish()?;
        check_name(config.name())?;
        if let Some(endpoint) = &config.endpoint {
            check_endpoint(endpoint, "http://127.0.0.1:4566")?;
        }
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

type Found = (Address, Option<String>, Option<String>);

/// `https://sqs.REGION.amazonaws.com/ACCOUNT/NAME`. Another host (an emulator's, a VPC or FIPS endpoint's) is where
/// requests go.
fn of_queue_url(url: &Url) -> Result<Found, Error> {
    let segments: Vec<&str> = url.path().trim_matches('/').split('/').collect();
    let [.., account, name] = segments[..] else {
        return Err(Error::config(
            "a queue's URL ends in /ACCOUNT/NAME, as the AWS console shows it",
        ));
    };
    let mut queue_url = url.clone();
    queue_url.set_query(None);
    let region = url.host_str().and_then(region_of_host);
    let public = region.as_ref().is_some_and(|region| is_public(url, region));
    let endpoint = (!public).then(|| url.origin().ascii_serialization());
    let address = Address {
        name: name.to_owned(),
        account: Some(account.to_owned()),
        url: Some(queue_url.into()),
    };
    Ok((address, region, endpoint))
}

/// Whether the region's endpoint, which the SDK knows, is meant; it may be set to another in the environment.
fn is_public(url: &Url, region: &str) -> bool {
    let origin = url.origin().ascii_serialization();
    [
        format!("https://sqs.{region}.amazonaws.com"),
        format!("https://sqs.{region}.amazonaws.com.cn"),
        format!("https://{region}.queue.amazonaws.com"),
    ]
    .contains(&origin)
}

/// <https://docs.aws.amazon.com/general/latest/gr/sqs-service.html>
fn region_of_host(host: &str) -> Option<String> {
    let known = [".amazonaws.com", ".amazonaws.com.cn", ".api.aws"];
    if !known.iter().any(|suffix| host.ends_with(suffix)) {
        return None;
    }
    let labels: Vec<&str> = host.split('.').collect();
    let at = labels
        .iter()
        .position(|label| matches!(*label, "sqs" | "sqs-fips"));
    let region = match at {
        Some(at) => labels.get(at + 1)?,
        // REGION.queue.amazonaws.com, as it was once written.
        None if labels.get(1) == Some(&"queue") => labels.first()?,
        None => return None,
    };
    // Of sqs.amazonaws.com, there is none.
    (*region != "amazonaws").then(|| (*region).to_owned())
}

fn of_name(url: &Url, account: Option<String>) -> Result<Address, Error> {
    if url.port().is_some() || !matches!(url.path(), "" | "/") {
        return Err(Error::config(
            "write `sqs://NAME?region=…`; for an emulator add `endpoint=http://HOST:PORT`",
        ));
    }
    Ok(Address {
        name: url.host_str().unwrap_or_default().to_owned(),
        account,
        url: None,
    })
}

fn of_arn(url: &Url) -> Result<Found, Error> {
    let arn = format!("arn:{}", url.path());
    match Address::of_arn(&arn) {
        Some((address, region)) => Ok((address, Some(region), None)),
        None => Err(Error::config(
            "not a queue's ARN; write arn:aws:sqs:REGION:ACCOUNT:NAME",
        )),
    }
}

fn check_name(name: &str) -> Result<(), Error> {
    let bare = name.strip_suffix(".fifo").unwrap_or(name);
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if bare.is_empty() || name.len() > MAX_NAME || !bare.chars().all(plain) {
        return Err(Error::config(
            "the queue's name must be 1 to 80 letters, digits, `-` and `_`, of which a FIFO queue's end in `.fifo`",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        text.parse().unwrap()
    }

    fn refused(text: &str) -> String {
        text.parse::<Config>().unwrap_err().to_string()
    }

    #[test]
    fn a_queue_is_found_by_url_name_or_arn() {
        let by_url = config("https://sqs.eu-central-1.amazonaws.com/123456789012/orders.fifo");
        let by_name = config("sqs://orders.fifo?region=eu-central-1&account=123456789012");
        let by_arn = config("arn:aws:sqs:eu-central-1:123456789012:orders.fifo");
        for config in [&by_url, &by_name, &by_arn] {
            assert_eq!(config.name(), "orders.fifo");
            assert!(config.is_fifo());
            assert_eq!(config.region.as_deref(), Some("eu-central-1"));
            assert_eq!(config.address.account.as_deref(), Some("123456789012"));
            assert_eq!(config.endpoint, None, "the SDK knows the region's endpoint");
        }
    }

    #[test]
    fn case_and_underscores_of_a_name_are_kept() {
        assert_eq!(config("sqs://My_Queue?region=x").name(), "My_Queue");
        assert_eq!(
            config("arn:aws-cn:sqs:cn-north-1:1:My_Queue?polls=3").polls,
            3
        );
    }

    #[test]
    fn regions_are_read_from_every_form_of_host() {
        for (host, region) in [
            ("sqs.us-east-1.amazonaws.com", Some("us-east-1")),
            (
                "sqs-fips.us-gov-west-1.amazonaws.com",
                Some("us-gov-west-1"),
            ),
            ("sqs.cn-north-1.amazonaws.com.cn", Some("cn-north-1")),
            ("eu-west-1.queue.amazonaws.com", Some("eu-west-1")),
            ("sqs.eu-west-1.api.aws", Some("eu-west-1")),
            (
                "vpce-0a.sqs.us-east-2.vpce.amazonaws.com",
                Some("us-east-2"),
            ),
            ("sqs.eu-central-1.localhost.localstack.cloud", None),
            ("127.0.0.1", None),
        ] {
            assert_eq!(region_of_host(host).as_deref(), region, "{host}");
        }
    }

    #[test]
    fn another_host_is_the_endpoint() {
        let local = config("http://127.0.0.1:4566/000000000000/orders?region=us-east-1");
        assert_eq!(local.endpoint.as_deref(), Some("http://127.0.0.1:4566"));
        let path = config("http://localhost:4566/queue/us-east-1/000000000000/orders");
        assert_eq!(path.name(), "orders");
        for host in [
            "https://vpce-1.sqs.us-east-2.vpce.amazonaws.com",
            "https://sqs-fips.us-east-2.amazonaws.com",
            "https://sqs.us-east-2.api.aws",
        ] {
            let other = config(&format!("{host}/1/orders"));
            assert_eq!(other.endpoint.as_deref(), Some(host));
            assert_eq!(other.region.as_deref(), Some("us-east-2"));
        }
    }

    #[test]
    fn what_cannot_work_is_refused_with_what_to_do() {
        for (text, hint) in [
            ("orders", "write its URL"),
            (
                "https://sqs.eu-west-1.amazonaws.com/orders",
                "/ACCOUNT/NAME",
            ),
            ("https://sqs.eu-west-1.amazonaws.com/1/or.ders", "letters"),
            ("sqs://?region=x", "1 to 80"),
            ("sqs://a:1", "endpoint="),
            ("arn:aws:sns:eu-west-1:1:topic", "arn:aws:sqs"),
            ("arn:aws:sqs:eu-west-1:1:", "arn:aws:sqs"),
            ("sqs://a?visibility=30s", "visibility_timeout"),
            ("sqs://a?visibility_timeout=500ms", "whole seconds"),
            ("sqs://a?visibility_timeout=13h", "12h"),
            ("sqs://a?polls=0", "1 or more"),
            ("sqs://a?endpoint=localhost:4566", "http://"),
            ("sqs://a?endpoint=http://:s3cr3t%40localhost", "http://"),
        ] {
            let error = refused(text);
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    #[test]
    fn credentials_in_a_url_are_refused_and_not_repeated() {
        for text in [
            "https://AKIA:s3cr3t@sqs.eu-west-1.amazonaws.com/1/orders",
            "sqs://AKIA:s3cr3t@orders",
            "sqs://orders?secret=s3cr3t",
            "sqs://a?endpoint=http://:s3cr3t@localhost",
            "s3cr3t",
        ] {
            let error = refused(text);
            assert!(!error.contains("s3cr3t"), "{error}");
            let read = serde_json::from_value::<Config>(text.into()).unwrap_err();
            assert_eq!(read.to_string(), error);
        }
    }

    #[test]
    fn serde_reads_the_same_from_a_string() {
        for text in [
            "https://sqs.eu-central-1.amazonaws.com/123456789012/orders.fifo?polls=3&timeout=5s",
            "sqs://orders?region=eu-central-1&visibility_timeout=30s",
            "arn:aws:sqs:eu-central-1:123456789012:orders",
        ] {
            let read: Config = serde_json::from_value(text.into()).unwrap();
            assert_eq!(format!("{read:?}"), format!("{:?}", config(text)), "{text}");
        }
    }
}
