use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::Error;
use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, HeldClaim, LookUp, Owner, Store, StoreInfo, TransactionalStore,
    Verdicts,
};

use crate::claims::{self, millis};
use crate::config::Config;
use crate::connections::Connections;
use crate::error::{self, TOKENS_LOST, of_call};
use crate::info;
use crate::migration;
use crate::outbox::PgOutbox;
use crate::sharing::Sharing;
use crate::transaction::{Home, PgTx};

/// The connections for claims, renewals and look-ups: they never wait for a handler.
pub(crate) const CONTROL: usize = 2;

/// Remembers in a PostgreSQL database which messages took effect, for workers on any number of machines.
///
/// A clone is another handle on the same connections. Each call is one round trip, whatever the size of its batch. If a future is
/// dropped, its batch was applied as a whole or not at all, and the connection is closed.
///
/// Errors are retryable where the server could not be reached, had no connection left or is starting up
/// ([`Connection`](onlyonce_core::ErrorKind::Connection)), and where another transaction was in the way
/// ([`Conflict`](onlyonce_core::ErrorKind::Conflict)).
#[derive(Clone, Debug)]
pub struct PgStore {
    config: Arc<Config>,
    control: Connections,
    home: Arc<Home>,
}

impl PgStore {
    /// Connects, and makes the store's tables unless they are there or `migrate` is off.
    ///
    /// # Errors
    /// The server cannot be reached, the database does not exist, the user may not make the tables, or they are of a newer version.
    pub async fn open(config: Config) -> Result<Self, Error> {
        config.check()?;
        let control = Connections::new(config.connect(), CONTROL);
        migration::migrate(&config, &control).await?;
        let connections = Connections::new(config.connect(), config.connections);
        let home = Home::new(&config, Sharing::new(connections));
        Ok(Self {
            config: Arc::new(config),
            control,
            home: Arc::new(home),
        })
    }

    /// What handlers publish through their transactions, for a [`Relay`](onlyonce_core::Relay).
    #[must_use]
    pub fn outbox(&self) -> PgOutbox {
        PgOutbox::new(&self.config, self.control.clone())
    }

    /// A call that nobody has to find on disk.
    async fn of_held(
        &self,
        function: &str,
        batch: &[HeldClaim],
        more: &str,
    ) -> Result<Verdicts, Error> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let sql = claims::of_held(&self.home.names, function, batch, more);
        let once = function == "release";
        let rows = self.control.transact(&sql, false).await;
        let verdicts = rows.and_then(|rows| claims::verdicts(&rows, batch, once));
        verdicts.map_err(|error| of_call(&format!("{function} claims"), error))
    }

    /// The server has lost tokens: they go on above them, once that is on disk.
    async fn begin_epoch(&self) -> Result<(), sqlx::Error> {
        let sql = format!("SELECT {}()", self.home.names.of("begin_epoch"));
        self.control.transact(&sql, true).await.map(drop)
    }

    async fn try_claim(&self, sql: &str) -> Result<Vec<ClaimResult>, sqlx::Error> {
        let rows = match self.control.transact(sql, false).await {
            Err(lost) if error::is(&lost, TOKENS_LOST) => {
                self.begin_epoch().await?;
                self.control.transact(sql, false).await?
            }
            other => other?,
        };
        rows.iter().map(claims::claimed).collect()
    }
}

#[async_trait]
impl Store for PgStore {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        info::store_info(&self.config, &self.control).await
    }

    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        let mut answers = vec![ClaimResult::PayloadMismatch; batch.len()];
        for places in claims::rounds(batch) {
            let round: Vec<Claim> = places.iter().map(|place| batch[*place]).collect();
            let sql = claims::claim(&self.home.names, owner, &round, lease);
            let claimed = self.try_claim(&sql).await;
            let claimed = claimed.map_err(|error| of_call("claim keys", error))?;
            for (place, answer) in places.into_iter().zip(claimed) {
                answers[place] = answer;
            }
        }
        Ok(answers)
    }

    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        let lease = format!(", {}", millis(lease));
        self.of_held("renew", batch, &lease).await
    }

    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        self.of_held("start", batch, "").await
    }

    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let sql = claims::complete(&self.home.names, batch, None);
        let rows = self.control.transact(&sql, true).await;
        let recorded = rows.and_then(|rows| claims::recorded(&rows));
        recorded.map_err(|error| error::of_end("record what took effect", error))
    }

    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        self.of_held("release", batch, "").await
    }

    /// Empties partitions whose records have all expired; it counts none of them.
    async fn prune(&self, _: usize) -> Result<usize, Error> {
        for function in ["empty_expired", "change_slot"] {
            let sql = format!("SELECT {}()", self.home.names.of(function));
            let pruned = self.control.transact(&sql, false).await;
            pruned.map_err(|error| of_call("remove expired records", error))?;
        }
        Ok(0)
    }
}

#[async_trait]
impl TransactionalStore for PgStore {
    type Tx = PgTx;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let rows = self
            .control
            .ask(claims::look_up(&self.home.names, batch))
            .await;
        let answers = rows.and_then(|rows| {
            let answers = rows.iter().zip(batch);
            answers
                .map(|(row, claim)| claims::looked_up(claim.key, row))
                .collect()
        });
        answers.map_err(|error| of_call("look keys up", error))
    }

    async fn begin(&self) -> Result<PgTx, Error> {
        PgTx::begin(&self.home, false).await
    }

    async fn begin_alone(&self) -> Result<PgTx, Error> {
        PgTx::begin(&self.home, true).await
    }
}
