//! The ledger: its tables, the one way to write them, and their audit; in SQLite or in PostgreSQL.

#[cfg(feature = "postgres")]
pub mod postgres;
pub mod sqlite;

use std::str::FromStr;

use onlyonce::{BoxError, Error};

use crate::audit::Audit;

/// Where the ledger is: beside the store's own tables, so that one transaction writes both.
#[derive(Debug)]
pub enum Place {
    Sqlite(onlyonce::sqlite::Config),
    #[cfg(feature = "postgres")]
    Postgres(Box<onlyonce::postgres::Config>),
}

impl FromStr for Place {
    type Err = Error;

    /// Reads the store's URL.
    fn from_str(url: &str) -> Result<Self, Error> {
        match url.split_once(':').map(|(scheme, _)| scheme) {
            #[cfg(feature = "postgres")]
            Some("postgres" | "postgresql") => Ok(Self::Postgres(Box::new(url.parse()?))),
            #[cfg(not(feature = "postgres"))]
            Some("postgres" | "postgresql") => Err(Error::config(
                "for `postgres:` the ledger is built with `--features postgres`",
            )),
            _ => Ok(Self::Sqlite(url.parse()?)),
        }
    }
}

impl Place {
    pub async fn audit(&self) -> Result<Audit, BoxError> {
        Ok(match self {
            Self::Sqlite(config) => sqlite::audit(&config.path)?,
            #[cfg(feature = "postgres")]
            Self::Postgres(config) => postgres::audit(config).await?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_says_where_the_ledger_is() {
        let sqlite = "sqlite:ledger.db".parse();
        assert!(matches!(sqlite, Ok(Place::Sqlite(_))), "{sqlite:?}");
        let postgres = "postgres://worker@db/shop?schema=ledger".parse::<Place>();
        #[cfg(feature = "postgres")]
        assert!(matches!(postgres, Ok(Place::Postgres(_))), "{postgres:?}");
        #[cfg(not(feature = "postgres"))]
        assert!(
            postgres
                .unwrap_err()
                .to_string()
                .contains("--features postgres")
        );
    }
}
