use onlyonce_core::{Error, ErrorKind};
use sqlx::Row as _;

use crate::config::Config;
use crate::connections::Connections;
use crate::error;

/// The version of the tables and functions that this crate knows.
pub(crate) const VERSION: i32 = 1;

/// The statements that make the store's tables and functions, for a database administrator to run where the workers' user may
/// not. They can be run again.
///
/// ```
/// let config = "postgres://worker@db/shop?schema=messaging".parse()?;
/// let sql = onlyonce_postgres::migration(&config);
/// assert!(sql.contains("CREATE TABLE IF NOT EXISTS \"messaging\".onlyonce_record"));
/// # Ok::<(), onlyonce_core::Error>(())
/// ```
///
/// The workers' user then needs no more than to use them, and `migrate=false` in its URL:
///
/// ```sql
/// GRANT USAGE ON SCHEMA messaging TO worker;
/// GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA messaging TO worker;
/// GRANT SELECT, USAGE, UPDATE ON ALL SEQUENCES IN SCHEMA messaging TO worker;
/// ```
#[must_use]
pub fn migration(config: &Config) -> String {
    let names = config.names();
    let given = [
        ("version", VERSION.to_string()),
        ("lock", names.lock().to_string()),
        ("channel", names.channel()),
        ("prefix_", names.prefix().to_owned()),
    ];
    let text = concat!(
        include_str!("schema.sql"),
        include_str!("functions.sql"),
        include_str!("outbox.sql")
    );
    format!(
        "CREATE SCHEMA IF NOT EXISTS {};\n{}",
        names.schema(),
        names.in_text(text, &given)
    )
}

/// Makes the tables, or finds that they are of this version.
pub(crate) async fn migrate(config: &Config, control: &Connections) -> Result<(), Error> {
    match version(config, control).await? {
        Some(VERSION) => Ok(()),
        Some(newer) if newer > VERSION => Err(Error::config(format!(
            "the tables of the store {} are of version {newer}, and this worker knows {VERSION}: update onlyonce",
            config.name()
        ))),
        _ if config.migrate => apply(config, control).await,
        found => Err(Error::config(format!(
            "the store {} has {}, and `migrate=false`: have its administrator run what onlyonce_postgres::migration prints",
            config.name(),
            found.map_or("no tables".into(), |older| format!(
                "tables of version {older}"
            )),
        ))),
    }
}

async fn version(config: &Config, control: &Connections) -> Result<Option<i32>, Error> {
    let sql = format!("SELECT version FROM {}", config.names().of("store"));
    match control.ask(sql).await {
        Ok(rows) => {
            let row = rows.first().map(|row| row.try_get(0)).transpose();
            row.map_err(|error| error::of_call("tell the version of the store's tables", error))
        }
        Err(missing) if error::is(&missing, "42P01") || error::is(&missing, "3F000") => Ok(None),
        Err(other) => Err(error::of_call(
            "be asked for the version of the store's tables",
            other,
        )),
    }
}

/// One worker at a time; the others then find that there is nothing left to do.
async fn apply(config: &Config, control: &Connections) -> Result<(), Error> {
    let mut text = migration(config);
    let schema = format!(
        "SELECT FROM pg_catalog.pg_namespace WHERE nspname = '{}'",
        config.schema
    );
    let exists = control
        .ask(schema)
        .await
        .map_err(|e| error::of_call("look for the schema", e))?;
    if !exists.is_empty() {
        // To make it takes a right even where it is there already.
        text = text.lines().skip(1).collect::<Vec<_>>().join("\n");
    }
    let lock = config.names().lock();
    let sql = format!(
        "SELECT pg_catalog.pg_advisory_xact_lock({lock}, 0);\nSET LOCAL client_min_messages TO warning;\n{text}"
    );
    let applied = control.transact(&sql, true).await;
    applied.map(drop).map_err(|failed| {
        let failed = error::of_call("make the store's tables", failed);
        match failed.kind() {
            ErrorKind::Permission => Error::new(
                ErrorKind::Permission,
                "the user may not make the store's tables: have an administrator run what onlyonce_postgres::migration \
                 prints, and add `migrate=false` to the URL",
            )
            .caused_by(failed),
            _ => failed,
        }
    })
}
