use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use onlyonce_core::Error;
use onlyonce_core::driver::Params;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use url::Url;

use crate::names::Names;

/// How many transactions are under way at once unless set.
const CONNECTIONS: usize = 8;
const MOST_CONNECTIONS: usize = 1_000;
/// How long a transaction waits for a lock unless set.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the server lets a transaction be idle unless set.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const PREFIX: &str = "onlyonce_";
/// What a name of PostgreSQL may have, less what ours add to the prefix.
const LONGEST: usize = 40;
/// What would end a name within SQL.
const FORBIDDEN: [char; 6] = ['"', '\'', '$', '{', '}', '\0'];

/// How strictly transactions are kept apart: <https://www.postgresql.org/docs/current/transaction-iso.html>.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isolation {
    /// Each statement sees what was committed before it: PostgreSQL's default.
    #[default]
    ReadCommitted,
    /// All of a transaction sees what was committed before it.
    RepeatableRead,
    /// As if transactions came one after another. Those that cannot are done again.
    Serializable,
}

impl Isolation {
    pub(crate) fn sql(self) -> &'static str {
        match self {
            Self::ReadCommitted => "READ COMMITTED",
            Self::RepeatableRead => "REPEATABLE READ",
            Self::Serializable => "SERIALIZABLE",
        }
    }
}

impl FromStr for Isolation {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "read-committed" => Ok(Self::ReadCommitted),
            "repeatable-read" => Ok(Self::RepeatableRead),
            "serializable" => Ok(Self::Serializable),
            _ => Err(()),
        }
    }
}

/// Which database, and how it is used. Made from a URL: see the [crate's first page](crate).
#[derive(Clone)]
#[non_exhaustive]
pub struct Config {
    /// How to connect. What is not in the URL comes from where libpq looks for it, too: `PGPASSWORD`, `~/.pgpass` and so on.
    pub connect: PgConnectOptions,
    /// The schema of the store's tables: `public` unless set.
    pub schema: String,
    /// How the names of its tables begin: `onlyonce_` unless set.
    pub prefix: String,
    /// How many transactions of handlers are under way at once, each on a connection: 8 unless set. Handlers beyond that wait
    /// for their turn, and share commits. Claims, renewals and look-ups have two more connections of their own.
    pub connections: usize,
    /// How strictly handlers' transactions are kept apart.
    pub isolation: Isolation,
    /// How long a transaction waits for a lock before it gives up, to be done again: 5 s unless set.
    pub lock_timeout: Duration,
    /// After which time without a statement the server ends a handler's transaction, and with it its locks: 60 s unless set.
    /// Only a worker that hangs or is frozen is idle for that long.
    pub idle_timeout: Duration,
    /// The tables are made, or brought to this version, when the store is opened: on unless set.
    pub migrate: bool,
    /// There is a pooler in transaction mode in between, as PgBouncer: off unless set. A connection is somebody else's after each
    /// transaction then, so statements that a handler has prepared go with its transaction, and relays are not told of new messages
    /// (`LISTEN` would tell whoever has the connection next), but look for them.
    pub transaction_pooler: bool,
}

/// Neither the password nor anything else of how to connect.
impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("database", &self.name())
            .field("schema", &self.schema)
            .field("prefix", &self.prefix)
            .field("connections", &self.connections)
            .field("isolation", &self.isolation)
            .field("lock_timeout", &self.lock_timeout)
            .field("idle_timeout", &self.idle_timeout)
            .field("migrate", &self.migrate)
            .field("transaction_pooler", &self.transaction_pooler)
            .finish_non_exhaustive()
    }
}

impl Config {
    /// The settings for a database, all others at their defaults.
    #[must_use]
    pub fn new(connect: PgConnectOptions) -> Self {
        Self {
            connect,
            schema: "public".into(),
            prefix: PREFIX.into(),
            connections: CONNECTIONS,
            isolation: Isolation::default(),
            lock_timeout: LOCK_TIMEOUT,
            idle_timeout: IDLE_TIMEOUT,
            migrate: true,
            transaction_pooler: false,
        }
    }

    /// The store's name, for people: where it is, without user and password.
    pub(crate) fn name(&self) -> String {
        let (host, port) = (self.connect.get_host(), self.connect.get_port());
        let database = self.connect.get_database();
        let database = database.unwrap_or_else(|| self.connect.get_username());
        format!("postgres://{host}:{port}/{database}")
    }

    /// How to connect, with what else is set.
    pub(crate) fn connect(&self) -> PgConnectOptions {
        match self.transaction_pooler {
            true => self.connect.clone().statement_cache_capacity(0),
            false => self.connect.clone(),
        }
    }

    pub(crate) fn names(&self) -> Names {
        Names::new(&self.schema, &self.prefix)
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let is_name = |text: &str| {
            let mut letters = text.chars();
            letters
                .next()
                .is_some_and(|first| first.is_ascii_lowercase() || first == '_')
                && letters.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        let wrong = if !is_name(&self.prefix) || self.prefix.len() > LONGEST {
            "`prefix` must be lower-case letters, digits and `_`, at most 40"
        } else if self.schema.is_empty()
            || self.schema.len() > 63
            || self.schema.contains(FORBIDDEN)
        {
            "`schema` must be a name of 1 to 63 bytes without quotes, `$`, `{` and `}`"
        } else if !(1..=MOST_CONNECTIONS).contains(&self.connections) {
            "`connections` must be between 1 and 1000"
        } else if self.lock_timeout < Duration::from_millis(1) {
            "`lock_timeout` must be at least 1ms"
        } else if self.idle_timeout < Duration::from_secs(1) {
            "`idle_timeout` must be at least 1s"
        } else {
            return Ok(());
        };
        Err(Error::config(wrong))
    }
}

impl FromStr for Config {
    type Err = Error;

    /// Reads `postgres://USER:PASSWORD@HOST:PORT/DATABASE` with the parameters of the [crate's first page](crate).
    ///
    /// # Errors
    /// [`Config`](onlyonce_core::ErrorKind::Config): another scheme, or a parameter that is unknown or does not parse.
    fn from_str(text: &str) -> Result<Self, Error> {
        // The text is not repeated: it may have a password in it.
        let url = Url::parse(text).map_err(|error| {
            Error::config("not a URL; write `postgres://USER@HOST:PORT/DATABASE`").caused_by(error)
        })?;
        Self::try_from(&url)
    }
}

impl TryFrom<&Url> for Config {
    type Error = Error;

    /// As [`from_str`](Self::from_str).
    fn try_from(url: &Url) -> Result<Self, Error> {
        if !matches!(url.scheme(), "postgres" | "postgresql") {
            return Err(Error::config(format!(
                "the scheme `{}` is not `postgres`",
                url.scheme()
            )));
        }
        let mut params = Params::of(url)?;
        let connect = connect(url, &mut params)?;
        let mut config = Self::new(connect);
        if let Some(schema) = params.text("schema") {
            config.schema = schema;
        }
        if let Some(prefix) = params.text("prefix") {
            config.prefix = prefix;
        }
        if let Some(connections) = params.parsed("connections", "a whole number")? {
            config.connections = connections;
        }
        let levels = "read-committed, repeatable-read or serializable";
        if let Some(isolation) = params.parsed("isolation", levels)? {
            config.isolation = isolation;
        }
        if let Some(timeout) = params.duration("lock_timeout")? {
            config.lock_timeout = timeout;
        }
        if let Some(timeout) = params.duration("idle_timeout")? {
            config.idle_timeout = timeout;
        }
        if let Some(migrate) = params.parsed("migrate", "true or false")? {
            config.migrate = migrate;
        }
        config.transaction_pooler = match params.text("pooler").as_deref() {
            None | Some("none") => false,
            Some("transaction") => true,
            Some(_) => return Err(Error::config("`pooler` is none or transaction")),
        };
        params.finish()?;
        config.check()?;
        Ok(config)
    }
}

/// How to connect. sqlx reads what is before the `?`, and where else libpq looks.
fn connect(url: &Url, params: &mut Params) -> Result<PgConnectOptions, Error> {
    let mut bare = url.clone();
    bare.set_query(None);
    let of_libpq = [
        "host",
        "sslrootcert",
        "sslcert",
        "sslkey",
        "application_name",
    ];
    let mut kept = Vec::new();
    for name in of_libpq {
        kept.extend(params.text(name).map(|value| (name, value)));
    }
    if !kept.is_empty() {
        bare.query_pairs_mut().extend_pairs(kept);
    }
    let mut connect: PgConnectOptions = bare.as_str().parse().map_err(|_| {
        Error::config(
            "user, password, host or database in the URL cannot be read; percent-encode them",
        )
    })?;
    let modes = "disable, allow, prefer, require, verify-ca or verify-full";
    if let Some(mode) = params.parsed::<PgSslMode>("sslmode", modes)? {
        connect = connect.ssl_mode(mode);
    }
    Ok(connect)
}

impl<'de> Deserialize<'de> for Config {
    /// From the URL as a string; see [`from_str`](Self::from_str).
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let url = String::deserialize(deserializer)?;
        url.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: &str) -> Config {
        url.parse().unwrap()
    }

    #[test]
    fn what_is_not_given_has_its_default() {
        let config = config("postgres://worker@db.example:6432/shop");
        assert_eq!(config.name(), "postgres://db.example:6432/shop");
        assert_eq!((&*config.schema, &*config.prefix), ("public", "onlyonce_"));
        assert_eq!(config.connections, 8);
        assert_eq!(config.isolation, Isolation::ReadCommitted);
    }

    #[test]
    fn parameters_are_read() {
        let config = config(
            "postgresql://worker@db/shop?schema=Odd%20one&prefix=dedup_&connections=3&isolation=serializable\
             &lock_timeout=2s&idle_timeout=1m&migrate=false&sslmode=verify-full&sslrootcert=/etc/ca.pem\
             &application_name=worker&pooler=transaction",
        );
        assert_eq!((&*config.schema, &*config.prefix), ("Odd one", "dedup_"));
        assert_eq!(config.isolation, Isolation::Serializable);
        assert_eq!((config.connections, config.migrate), (3, false));
        assert!(config.transaction_pooler);
        assert_eq!(config.connect.get_application_name(), Some("worker"));
        assert!(matches!(
            config.connect.get_ssl_mode(),
            PgSslMode::VerifyFull
        ));
    }

    #[test]
    fn what_cannot_work_is_refused() {
        for (url, hint) in [
            ("mysql://db/shop", "scheme"),
            ("postgres://db/shop?shema=x", "known here"),
            ("postgres://db/shop?prefix=Shop", "lower-case"),
            ("postgres://db/shop?prefix=x;drop", "lower-case"),
            ("postgres://db/shop?schema=", "name"),
            ("postgres://db/shop?connections=0", "between 1"),
            ("postgres://db/shop?isolation=chaos", "serializable"),
            ("postgres://db/shop?sslmode=maybe", "verify-full"),
            ("postgres://db/shop?lock_timeout=0s", "at least"),
            ("postgres://db/shop?pooler=session", "none or transaction"),
        ] {
            let error = url.parse::<Config>().unwrap_err().to_string();
            assert!(error.contains(hint), "{url}: {error}");
        }
    }

    #[test]
    fn no_password_is_shown() {
        let good = "postgres://u:s3cr3t@db/shop";
        let shown = format!("{:?} {}", config(good), config(good).name());
        assert!(!shown.contains("s3cr3t"), "{shown}");
        for url in [
            "postgres://u:s3cr3t@db/shop?nothing=1",
            "postgres://u:s3cr3t@db:port/shop",
            "postgres://u:%ffs3cr3t@db/shop",
            "mysql://u:s3cr3t@db/shop",
            "s3cr3t",
        ] {
            let parsed = url.parse::<Config>().unwrap_err();
            let read = serde_json::from_value::<Config>(url.into()).unwrap_err();
            let shown = format!("{parsed} {parsed:?} {read} {read:?}");
            assert!(!shown.contains("s3cr3t"), "{shown}");
        }
    }
}
