use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use google_cloud_auth::credentials::Credentials;
use onlyonce_core::Error;
use onlyonce_core::driver::{Params, check_endpoint, has_credentials};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use url::Url;

/// Where requests go unless something else is said.
const PUBLIC: &str = "https://pubsub.googleapis.com";
const REGIONAL: &str = "https://europe-west3-pubsub.googleapis.com";
/// By this every client of Google's finds the emulator: `HOST:PORT`.
const EMULATOR: &str = "PUBSUB_EMULATOR_HOST";
/// <https://cloud.google.com/pubsub/docs/subscription-properties#ack_deadline>
pub(crate) const SHORTEST_LEASE: Duration = Duration::from_secs(10);
pub(crate) const LONGEST_LEASE: Duration = Duration::from_secs(600);

const FORM: &str = "a Pub/Sub subscription is `pubsub://PROJECT/SUBSCRIPTION` or `projects/PROJECT/subscriptions/SUBSCRIPTION`, \
     a topic `pubsub://PROJECT/topics/TOPIC` or `projects/PROJECT/topics/TOPIC`";

/// Which subscription or topic is meant, and how to use it. Read from a URL or a resource name, which may stand in a file that
/// serde reads, then changed field by field.
///
/// It holds no secret: credentials come from where Google's own tools have them.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use onlyonce_pubsub::Config;
///
/// let config: Config = "pubsub://my-project/orders?lease=60s".parse()?;
/// assert_eq!(config.resource(), "projects/my-project/subscriptions/orders");
///
/// #[derive(serde::Deserialize)]
/// struct Settings {
///     invoices: Config,
/// }
/// let settings: Settings = serde_json::from_str(r#"{"invoices": "pubsub://my-project/topics/invoices"}"#)?;
/// assert_eq!(settings.invoices.resource(), "projects/my-project/topics/invoices");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    pub(crate) address: Address,
    /// Where to send requests, instead of the global endpoint: a [locational][1] or a private one. One that begins with
    /// `http://` is an emulator's: no TLS, and no credentials.
    ///
    /// [1]: https://cloud.google.com/pubsub/docs/reference/service_apis_overview#pubsub_endpoints
    pub endpoint: Option<String>,
    /// For how long a message is leased, asked for with an extension after each pull where the subscription's ack deadline is
    /// not enough. By default the subscription's ack deadline. Whole seconds, from 10 s to 10 minutes.
    pub lease: Option<Duration>,
    /// How many pulls may be under way at most; 4 by default. Without load there is one.
    pub pulls: usize,
    /// How long a request may take, but for a pull, which waits for messages; 10 s by default.
    pub timeout: Duration,
    /// The project that requests are [counted for](https://cloud.google.com/docs/quotas/quota-project), instead of that of the
    /// credentials.
    pub quota_project: Option<String>,
    pub(crate) credentials: Given,
}

/// Credentials of the user's own.
#[derive(Clone, Default)]
pub(crate) struct Given(pub(crate) Option<Credentials>);

impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "given" } else { "none" })
    }
}

/// A subscription or a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    project: String,
    kind: Kind,
    pub(crate) name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Subscription,
    Topic,
}

impl Kind {
    fn collection(self) -> &'static str {
        match self {
            Self::Subscription => "subscriptions",
            Self::Topic => "topics",
        }
    }
}

impl Address {
    /// `projects/PROJECT/subscriptions/NAME` or `projects/PROJECT/topics/NAME`.
    pub(crate) fn of_resource(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split('/').collect();
        let ["projects", project, collection, name] = parts[..] else {
            return None;
        };
        if name.is_empty() {
            return None;
        }
        let kind = [Kind::Subscription, Kind::Topic];
        let kind = kind.into_iter().find(|k| k.collection() == collection)?;
        Some(Self {
            project: project.to_owned(),
            kind,
            name: name.to_owned(),
        })
    }

    pub(crate) fn resource(&self) -> String {
        let (project, collection) = (&self.project, self.kind.collection());
        format!("projects/{project}/{collection}/{}", self.name)
    }

    pub(crate) fn is_topic(&self) -> bool {
        self.kind == Kind::Topic
    }

    fn check(&self) -> Result<(), Error> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.~+%".contains(c);
        let name = &self.name;
        // https://cloud.google.com/pubsub/docs/pubsub-basics#resource_names
        let fits = (3..=255).contains(&name.len())
            && name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(plain)
            && !name.starts_with("goog");
        if !fits {
            return Err(Error::config(
                "the name of a subscription or topic must have 3 to 255 letters, digits and `-_.~+%`, begin with a letter, and not with `goog`",
            ));
        }
        // example.com:project is one of a domain's.
        let of_project = |c: char| c.is_ascii_alphanumeric() || "-:.".contains(c);
        if self.project.is_empty() || !self.project.chars().all(of_project) {
            return Err(Error::config(
                "the project's id must be letters, digits and `-`",
            ));
        }
        Ok(())
    }
}

impl Config {
    /// The name of the subscription or topic, without its project.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.address.name
    }

    /// The whole name: `projects/PROJECT/subscriptions/SUBSCRIPTION` or `projects/PROJECT/topics/TOPIC`.
    #[must_use]
    pub fn resource(&self) -> String {
        self.address.resource()
    }

    /// With credentials of your own, instead of those of the usual places: to impersonate another account, for example. They
    /// are asked for a token with each request, and have to renew it.
    #[must_use]
    pub fn with_credentials(mut self, credentials: Credentials) -> Self {
        self.credentials = Given(Some(credentials));
        self
    }

    /// Where requests go: what is configured, else the emulator of the environment, else Google.
    pub(crate) fn target(&self) -> String {
        let emulator = || {
            let host = std::env::var(EMULATOR).ok();
            host.filter(|host| !host.is_empty())
                .map(|host| format!("http://{host}"))
        };
        let endpoint = self.endpoint.clone().or_else(emulator);
        endpoint.unwrap_or_else(|| PUBLIC.to_owned())
    }

    /// Whether this is Google's endpoint that stands for all regions.
    pub(crate) fn is_global(&self) -> bool {
        self.target() == PUBLIC
    }

    pub(crate) fn beside(&self, address: Address) -> Self {
        Self {
            address,
            ..self.clone()
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let fault = |what: &str| Err(Error::config(what).on_queue(self.name()));
        self.address.check()?;
        if self.pulls == 0 {
            return fault("`pulls=0` would receive nothing; give 1 or more");
        }
        if self.timeout.is_zero() {
            return fault("`timeout` cannot be zero");
        }
        let leases = SHORTEST_LEASE..=LONGEST_LEASE;
        match self.lease {
            Some(time) if time.subsec_nanos() != 0 || !leases.contains(&time) => {
                fault("`lease` must be whole seconds, from 10s to 10m")
            }
            _ => self.endpoint.as_deref().map_or(Ok(()), |endpoint| {
                check_endpoint(endpoint, REGIONAL)?;
                match is_bare(endpoint) {
                    true => Ok(()),
                    false => fault("`endpoint` must end behind its host and port"),
                }
            }),
        }
    }
}

impl FromStr for Config {
    type Err = Error;

    /// Reads `pubsub://…` or `projects/…`; see the [crate's page](crate#urls).
    ///
    /// # Errors
    /// [`Config`](onlyonce_core::ErrorKind::Config): another form, credentials, an unknown parameter, a value that does not
    /// parse.
    fn from_str(text: &str) -> Result<Self, Error> {
        let whole = match text.starts_with("projects/") {
            true => format!("pubsub:{text}"),
            false => text.to_owned(),
        };
        // The text is not repeated: it may hold a secret.
        let url = Url::parse(&whole).map_err(|error| Error::config(FORM).caused_by(error))?;
        Self::try_from(&url)
    }
}

impl TryFrom<&Url> for Config {
    type Error = Error;

    /// As [`from_str`](Self::from_str).
    fn try_from(url: &Url) -> Result<Self, Error> {
        if has_credentials(url) {
            return Err(Error::config(
                "no credentials in a subscription's URL: they come from the environment, as Google's own tools have them",
            ));
        }
        let mut params = Params::of(url)?;
        let config = Self {
            address: address_of(url).ok_or_else(|| Error::config(FORM))?,
            endpoint: params.text("endpoint"),
            lease: params.duration("lease")?,
            pulls: params.parsed("pulls", "a number")?.unwrap_or(4),
            timeout: params
                .duration("timeout")?
                .unwrap_or(Duration::from_secs(10)),
            quota_project: params.text("quota_project"),
            credentials: Given::default(),
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

fn address_of(url: &Url) -> Option<Address> {
    if url.scheme() != "pubsub" || url.port().is_some() {
        return None;
    }
    let Some(project) = url.host_str() else {
        return Address::of_resource(url.path());
    };
    let path = url.path().trim_matches('/');
    let (collection, name) = path.split_once('/').unwrap_or(("subscriptions", path));
    Address::of_resource(&format!("projects/{project}/{collection}/{name}"))
}

/// It is no more than scheme, host and port.
fn is_bare(endpoint: &str) -> bool {
    Url::parse(endpoint).is_ok_and(|url| matches!(url.path(), "" | "/") && url.query().is_none())
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
    fn a_subscription_is_found_by_url_or_resource_name() {
        for text in [
            "pubsub://my-project/orders",
            "pubsub://my-project/subscriptions/orders",
            "projects/my-project/subscriptions/orders",
            "pubsub:projects/my-project/subscriptions/orders",
        ] {
            let config = config(text);
            assert_eq!(config.name(), "orders", "{text}");
            let whole = "projects/my-project/subscriptions/orders";
            assert_eq!(config.resource(), whole, "{text}");
            assert!(!config.address.is_topic());
        }
    }

    #[test]
    fn a_topic_is_found_by_url_or_resource_name() {
        for text in [
            "pubsub://my-project/topics/orders?timeout=3s",
            "projects/my-project/topics/orders?timeout=3s",
        ] {
            let config = config(text);
            assert_eq!(config.resource(), "projects/my-project/topics/orders");
            assert!(config.address.is_topic());
            assert_eq!(config.timeout, Duration::from_secs(3));
        }
    }

    #[test]
    fn a_project_of_a_domain_is_named_by_its_resource() {
        let config = config("projects/example.com:shop/subscriptions/orders?lease=30s");
        let whole = "projects/example.com:shop/subscriptions/orders";
        assert_eq!(config.resource(), whole);
        assert_eq!(config.lease, Some(Duration::from_secs(30)));
    }

    #[test]
    fn what_cannot_work_is_refused_with_what_to_write() {
        for (text, expected) in [
            ("pubsub://my-project", "pubsub://PROJECT/SUBSCRIPTION"),
            ("pubsub://my-project/a/b/c", "pubsub://PROJECT/SUBSCRIPTION"),
            (
                "pubsub://my-project/snapshots/s-1",
                "pubsub://PROJECT/SUBSCRIPTION",
            ),
            (
                "pubsub://my-project:80/orders",
                "pubsub://PROJECT/SUBSCRIPTION",
            ),
            ("projects//subscriptions/orders", "project's id"),
            ("kafka://my-project/orders", "pubsub://PROJECT/SUBSCRIPTION"),
            ("pubsub://my-project/ab", "3 to 255"),
            ("pubsub://my-project/google-orders", "goog"),
            ("pubsub://my-project/1orders", "begin with a letter"),
            ("pubsub://my-project/orders?pulls=0", "pulls"),
            ("pubsub://my-project/orders?timeout=0s", "timeout"),
            ("pubsub://my-project/orders?lease=9s", "from 10s to 10m"),
            ("pubsub://my-project/orders?lease=601s", "from 10s to 10m"),
            ("pubsub://my-project/orders?lease=10500ms", "whole seconds"),
            (
                "pubsub://my-project/orders?leese=10s",
                "known here: endpoint, lease",
            ),
            (
                "pubsub://my-project/orders?endpoint=127.0.0.1:80",
                "like https://europe",
            ),
            ("pubsub://my-project/orders?endpoint=http://u:p@h", "an `@`"),
            (
                "pubsub://my-project/orders?endpoint=http://u:p%40h",
                "like https://europe",
            ),
            (
                "pubsub://my-project/orders?endpoint=http://h/x",
                "behind its host",
            ),
        ] {
            let error = refused(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn no_secret_of_a_url_is_repeated() {
        for text in [
            "pubsub://user:s3cr3t@my-project/orders",
            "pubsub://my-project/orders?key=s3cr3t",
            "pubsub://s3cr3t@my-project/orders",
            "pubsub://[s3cr3t/orders",
        ] {
            let error = refused(text);
            assert!(!error.contains("s3cr3t"), "{error}");
        }
    }
}
