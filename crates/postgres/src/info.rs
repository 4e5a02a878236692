use onlyonce_core::driver::{Durability, StoreInfo};
use onlyonce_core::{Error, ErrorKind};
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use crate::config::Config;
use crate::connections::Connections;
use crate::error::of_call;
use crate::store::CONTROL;

/// The oldest version on which this is run.
const OLDEST: i32 = 130_000;

const QUESTION: &str = "SELECT
    current_setting('server_version') AS version,
    current_setting('server_version_num')::integer AS number,
    current_setting('synchronous_commit') AS synchronous_commit,
    current_setting('fsync') AS fsync,
    current_setting('full_page_writes') AS full_page_writes,
    current_setting('synchronous_standby_names') AS synchronous_standby_names,
    current_setting('max_connections')::bigint
        - current_setting('superuser_reserved_connections')::bigint AS max_connections,
    pg_is_in_recovery() AS is_standby,
    (SELECT count(*) FROM pg_stat_replication) AS standbys,
    to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS clock";

/// Looks at the server.
pub(crate) async fn store_info(config: &Config, control: &Connections) -> Result<StoreInfo, Error> {
    let rows = control.ask(QUESTION.into()).await;
    let found = rows.and_then(|rows| rows.first().map(read).transpose());
    let found = found.map_err(|error| of_call("be looked at", error))?;
    match found {
        Some(server) => server.info(config),
        None => Err(Error::new(
            ErrorKind::Store,
            "PostgreSQL told nothing of itself",
        )),
    }
}

struct Server {
    version: String,
    number: i32,
    synchronous_commit: String,
    fsync: String,
    full_page_writes: String,
    synchronous_standby_names: String,
    max_connections: i64,
    is_standby: bool,
    standbys: i64,
    clock: String,
}

fn read(row: &PgRow) -> Result<Server, sqlx::Error> {
    Ok(Server {
        version: row.try_get("version")?,
        number: row.try_get("number")?,
        synchronous_commit: row.try_get("synchronous_commit")?,
        fsync: row.try_get("fsync")?,
        full_page_writes: row.try_get("full_page_writes")?,
        synchronous_standby_names: row.try_get("synchronous_standby_names")?,
        max_connections: row.try_get("max_connections")?,
        is_standby: row.try_get("is_standby")?,
        standbys: row.try_get("standbys")?,
        clock: row.try_get("clock")?,
    })
}

impl Server {
    fn info(self, config: &Config) -> Result<StoreInfo, Error> {
        let name = config.name();
        if self.number < OLDEST {
            let what = format!(
                "the store {name} is PostgreSQL {}: it takes 13 or newer",
                self.version
            );
            return Err(Error::config(what));
        }
        if self.is_standby {
            let what = format!(
                "the store {name} is a standby, which takes no writes: connect to the primary"
            );
            return Err(Error::config(what));
        }
        let needed = config.connections + CONTROL;
        if usize::try_from(self.max_connections).is_ok_and(|most| most < needed) {
            let what = format!(
                "each worker wants {needed} connections to the store {name} (`connections` and {CONTROL}), which has {} for \
                 everybody: set `connections` lower, or `max_connections` of the server higher",
                self.max_connections
            );
            return Err(Error::config(what));
        }
        let mut info = StoreInfo::new(name, self.durability());
        info.lags = self.lags();
        info.transactions = Some(config.connections);
        info.settings = self.settings();
        Ok(info)
    }

    /// What is left of what was committed, if the server fails.
    fn durability(&self) -> Durability {
        let is_synced = self.fsync == "on" && self.full_page_writes == "on";
        match is_synced && self.synchronous_commit != "off" {
            true => Durability::Disk,
            false => Durability::Machine,
        }
    }

    fn lags(&self) -> Option<String> {
        let waits = !self.synchronous_standby_names.is_empty()
            && matches!(
                &*self.synchronous_commit,
                "on" | "remote_write" | "remote_apply"
            );
        (self.standbys > 0 && !waits).then(|| {
            format!(
                "it has {} standby servers, and no commit waits for one: set `synchronous_standby_names`, with \
                 `synchronous_commit` at `on`",
                self.standbys
            )
        })
    }

    fn settings(self) -> Vec<(String, String)> {
        let settings = [
            ("server_version", self.version),
            ("synchronous_commit", self.synchronous_commit),
            ("fsync", self.fsync),
            ("full_page_writes", self.full_page_writes),
            ("synchronous_standby_names", self.synchronous_standby_names),
            ("max_connections", self.max_connections.to_string()),
            ("standbys", self.standbys.to_string()),
            ("clock", self.clock),
        ];
        settings
            .map(|(name, value)| (name.to_owned(), value))
            .into()
    }
}
