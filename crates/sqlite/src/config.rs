use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use onlyonce_core::Error;
use onlyonce_core::driver::Params;
use percent_encoding::percent_decode_str;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use tokio::time::Instant;
use url::Url;

use crate::time::Clock;

/// What ends the name of a queue's dead-letter queue.
pub(crate) const DEAD: &str = ".dead";

const LEASE: Duration = Duration::from_secs(30);
const MAX_DELIVERIES: u32 = 100;
const RETENTION: Duration = Duration::from_secs(14 * 86_400);
const TURN: Duration = Duration::from_secs(30);

/// Which file, which queue in it, and their settings. Read from a URL, which may stand in a file that serde reads, then
/// changed field by field; or made by [`new`](Self::new) for a path.
///
/// It holds no secret.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use onlyonce_sqlite::Config;
///
/// let config: Config = "sqlite:data/app.db?queue=orders&lease=1m".parse()?;
/// assert_eq!(config.queue.as_deref(), Some("orders"));
///
/// #[derive(serde::Deserialize)]
/// struct Settings {
///     orders: Config,
/// }
/// let settings: Settings = serde_json::from_str(r#"{"orders": "sqlite:data/app.db?queue=orders"}"#)?;
/// assert_eq!(settings.orders.queue, config.queue);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// The database file. It is created if it does not exist; its directory is not.
    pub path: PathBuf,
    /// The queue, for [`SqliteQueue`](crate::SqliteQueue); the store does not look at it.
    pub queue: Option<String>,
    /// How long a received message is leased: 30 s unless set.
    pub lease: Duration,
    /// After how many deliveries a message goes to the dead-letter queue instead of being delivered again; `None`: never.
    /// 100 unless set, and `None` for a dead-letter queue.
    pub max_deliveries: Option<u32>,
    /// How old a message may get before it goes to the dead-letter queue instead of being delivered; `None`: any age.
    /// 14 days unless set, and `None` for a dead-letter queue.
    pub retention: Option<Duration>,
    /// How long one message's transaction may keep all others waiting before it is rolled back: 30 s unless set.
    pub turn: Duration,
    /// Acknowledgements also survive a power failure: off unless set, since a lost one costs a redelivery which the
    /// dedup record stops. Turn it on for `at_most_once`, where nothing else stops it.
    pub durable_acks: bool,
    pub(crate) clock: Clock,
}

impl Config {
    /// The settings for a file, all at their defaults.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            queue: None,
            lease: LEASE,
            max_deliveries: Some(MAX_DELIVERIES),
            retention: Some(RETENTION),
            turn: TURN,
            durable_acks: false,
            clock: Clock::default(),
        }
    }

    /// Names the queue. A dead-letter queue (`….dead`) gets no [`max_deliveries`](Self::max_deliveries) and no
    /// [`retention`](Self::retention): nothing leaves it by itself.
    #[must_use]
    pub fn queue(mut self, name: impl Into<String>) -> Self {
        let name = name.into();
        if name.ends_with(DEAD) {
            self.max_deliveries = None;
            self.retention = None;
        }
        self.queue = Some(name);
        self
    }

    /// Takes the time from other clocks than the machine's: for tests. Leases, claims and retention end by `uptime`, which
    /// starts at zero when the machine does; `wall` only says when a message was published. The first who opens a file in a
    /// process chooses its clocks.
    #[must_use]
    pub fn clock(
        mut self,
        wall: impl Fn() -> SystemTime + Send + Sync + 'static,
        uptime: impl Fn() -> Duration + Send + Sync + 'static,
    ) -> Self {
        self.clock = Clock::new(wall, uptime);
        self
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let wrong = if self.lease.is_zero() {
            "`lease` must be longer than nothing"
        } else if self.turn.is_zero() {
            "`turn` must be longer than nothing"
        } else if self.max_deliveries == Some(0) {
            "`max_deliveries` must be at least 1"
        } else if self.retention.is_some_and(|r| r.is_zero()) {
            "`retention` must be longer than nothing"
        } else if self.queue.as_deref() == Some("") {
            "`queue` must not be empty"
        } else {
            return Ok(());
        };
        Err(Error::config(wrong))
    }
}

impl FromStr for Config {
    type Err = Error;

    /// Reads `sqlite:relative/path`, `sqlite:/absolute/path` or `sqlite:///absolute/path`, with the parameters `queue`,
    /// `lease`, `max_deliveries`, `retention`, `turn` and `durable_acks`.
    ///
    /// # Errors
    /// [`Config`](onlyonce_core::ErrorKind::Config): another scheme, no path, a host, `:memory:`, or a parameter that is
    /// unknown or does not parse.
    fn from_str(text: &str) -> Result<Self, Error> {
        // The text is not repeated: it may be another kind's, with a password in it.
        let url = Url::parse(text)
            .map_err(|error| Error::config("not a URL; write `sqlite:path`").caused_by(error))?;
        Self::try_from(&url)
    }
}

impl TryFrom<&Url> for Config {
    type Error = Error;

    /// As [`from_str`](Self::from_str).
    fn try_from(url: &Url) -> Result<Self, Error> {
        let mut config = Self::new(path_of(url)?);
        let mut params = Params::of(url)?;
        if let Some(queue) = params.text("queue") {
            config = config.queue(queue);
        }
        if let Some(lease) = params.duration("lease")? {
            config.lease = lease;
        }
        if let Some(most) = params.parsed("max_deliveries", "a whole number")? {
            config.max_deliveries = Some(most);
        }
        if let Some(retention) = params.duration("retention")? {
            config.retention = Some(retention);
        }
        if let Some(turn) = params.duration("turn")? {
            config.turn = turn;
        }
        if let Some(durable) = params.parsed("durable_acks", "true or false")? {
            config.durable_acks = durable;
        }
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

fn path_of(url: &Url) -> Result<PathBuf, Error> {
    if url.scheme() != "sqlite" {
        return Err(Error::config(format!(
            "the scheme `{}` is not `sqlite`",
            url.scheme()
        )));
    }
    if url.host_str().is_some_and(|host| !host.is_empty()) {
        return Err(Error::config(
            "a SQLite URL has no host: write `sqlite:relative/path` or `sqlite:///absolute/path`",
        ));
    }
    let path = percent_decode_str(url.path())
        .decode_utf8()
        .map_err(|error| Error::config("the path is not UTF-8").caused_by(error))?;
    match &*path {
        "" | "/" => Err(Error::config(
            "the SQLite URL names no file: write `sqlite:path`",
        )),
        ":memory:" | "/:memory:" => Err(Error::config(
            "`sqlite::memory:` is not supported, since nothing in it survives the process: name a file, or use the \
             in-memory queue and store of onlyonce",
        )),
        path => Ok(Path::new(path).to_owned()),
    }
}

/// A duration in the database's unit, at most some million years, so that sums do not overflow.
pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).map_or(i64::MAX / 4, |ms| ms.min(i64::MAX / 4))
}

/// `duration` from now, or a century where that cannot be told.
pub(crate) fn after(duration: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(36_500 * 86_400);
    let now = Instant::now();
    now.checked_add(duration).unwrap_or(now + CENTURY)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: &str) -> Config {
        url.parse().unwrap()
    }

    #[test]
    fn paths_are_relative_or_absolute() {
        for (url, path) in [
            ("sqlite:app.db", "app.db"),
            ("sqlite:data/app.db?queue=q", "data/app.db"),
            ("sqlite:../app.db", "../app.db"),
            ("sqlite:/var/lib/app.db", "/var/lib/app.db"),
            ("sqlite:///var/lib/my%20app.db", "/var/lib/my app.db"),
        ] {
            assert_eq!(config(url).path, Path::new(path), "{url}");
        }
    }

    #[test]
    fn what_cannot_work_is_refused() {
        for (url, hint) in [
            ("sqlite::memory:", "not supported"),
            ("sqlite://data/app.db", "no host"),
            ("sqlite:", "names no file"),
            ("postgres:app.db", "scheme"),
            ("sqlite:a.db?queu=x", "known here: queue"),
            ("sqlite:a.db?lease=0s", "longer than nothing"),
            ("sqlite:a.db?max_deliveries=0", "at least 1"),
            ("sqlite:a.db?queue=", "empty"),
        ] {
            let error = url.parse::<Config>().unwrap_err().to_string();
            assert!(error.contains(hint), "{url}: {error}");
        }
    }

    #[test]
    fn nothing_leaves_a_dead_letter_queue_by_itself() {
        let dead = config("sqlite:a.db?queue=orders.dead");
        assert_eq!((dead.max_deliveries, dead.retention), (None, None));
        let set = config("sqlite:a.db?queue=orders.dead&max_deliveries=3&lease=2m&retention=1h");
        assert_eq!(set.max_deliveries, Some(3));
        assert_eq!(set.lease, Duration::from_secs(120));
        assert_eq!(set.retention, Some(Duration::from_secs(3600)));
    }

    #[test]
    fn serde_reads_the_same_from_a_string() {
        for url in [
            "sqlite:data/app.db",
            "sqlite:/var/lib/app.db?queue=q&lease=1m&max_deliveries=3&retention=1h&turn=2s&durable_acks=true",
        ] {
            let read: Config = serde_json::from_value(url.into()).unwrap();
            assert_eq!(format!("{read:?}"), format!("{:?}", config(url)), "{url}");
        }
    }

    #[test]
    fn secrets_of_other_urls_are_hidden() {
        for (url, hint) in [
            ("sqlite://u:s3cr3t@host/app.db", "no host"),
            ("sqlite:a.db?s3cr3t@host", "%40"),
            ("amqp://u:s3cr3t@host/?queue=q", "scheme"),
            ("s3cr3t", "not a URL"),
        ] {
            let parsed = url.parse::<Config>().unwrap_err();
            let read = serde_json::from_value::<Config>(url.into()).unwrap_err();
            let shown = read.to_string();
            assert!(shown.contains(hint), "{shown}");
            assert!(
                !format!("{parsed} {parsed:?} {read:?} {shown}").contains("s3cr3t"),
                "{shown}"
            );
        }
    }
}
