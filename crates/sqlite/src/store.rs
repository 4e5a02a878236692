use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::Error;
use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, Durability, HeldClaim, LookUp, Owner, Store, StoreInfo,
    TransactionalStore, Verdicts,
};

use crate::claims;
use crate::config::Config;
use crate::database::Database;
use crate::outbox::SqliteOutbox;
use crate::session::Session;
use crate::transaction::SqliteTx;
use crate::turn::Terms;

/// So many keys are looked up by the thread that asks, if the connection is idle: some microseconds each, and where the page is
/// not in memory a read of the disk.
const FEW: usize = 4;

/// Remembers in a SQLite file which messages took effect.
///
/// Records are synced to disk before [`complete`](Store::complete) answers; claims survive the process but not a power
/// failure, after which tokens still go up. Whatever is asked at the same moment, by whomever, shares one transaction
/// and one sync. If a future is dropped, its batch was applied as a whole or not at all.
///
/// Errors are retryable where the file was locked by another process for 5 s
/// ([`Timeout`](onlyonce_core::ErrorKind::Timeout)), or the disk was full or failed
/// ([`Store`](onlyonce_core::ErrorKind::Store)).
#[derive(Clone, Debug)]
pub struct SqliteStore {
    database: Database,
    turn: Duration,
}

impl SqliteStore {
    /// Opens the store in the file of `config`; its queue, if any, is not looked at.
    ///
    /// # Errors
    /// As [`Database::open`].
    pub async fn open(config: Config) -> Result<Self, Error> {
        let turn = config.turn;
        let database = Database::open(config).await?;
        Ok(Self { database, turn })
    }

    /// The file it is in.
    #[must_use]
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// What its transactions [publish](SqliteTx::publish), for a [`Relay`](onlyonce_core::Relay).
    #[must_use]
    pub fn outbox(&self) -> SqliteOutbox {
        SqliteOutbox::of(self.database.clone())
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn store_info(&self) -> Result<StoreInfo, Error> {
        let file = self.database.path().display().to_string();
        let mut info = StoreInfo::new(file, Durability::Disk);
        // SQLite has one writer; what comes at the same moment shares its commit.
        info.transactions = Some(1);
        Ok(info)
    }
    async fn claim(
        &self,
        owner: Owner,
        batch: &[Claim],
        lease: Duration,
    ) -> Result<Vec<ClaimResult>, Error> {
        let batch = batch.to_vec();
        let claim = move |session: &mut _| claims::claim(session, owner, &batch, lease);
        Ok(self.database.work(false, claim).await?)
    }

    async fn renew(&self, batch: &[HeldClaim], lease: Duration) -> Result<Verdicts, Error> {
        let batch = batch.to_vec();
        let renew = move |session: &mut _| claims::renew(session, &batch, lease);
        Ok(self.database.urgent(renew).await?)
    }

    async fn start(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        let batch = batch.to_vec();
        let start = move |session: &mut _| claims::start(session, &batch);
        Ok(self.database.work(false, start).await?)
    }

    async fn complete(&self, batch: &[Completion]) -> Result<Verdicts, Error> {
        let batch = batch.to_vec();
        let complete = move |session: &mut _| claims::complete_all(session, &batch);
        Ok(self.database.work(true, complete).await?)
    }

    async fn release(&self, batch: &[HeldClaim]) -> Result<Verdicts, Error> {
        let batch = batch.to_vec();
        let release = move |session: &mut _| claims::release(session, &batch);
        Ok(self.database.work(false, release).await?)
    }

    async fn prune(&self, limit: usize) -> Result<usize, Error> {
        let prune = move |session: &mut Session| {
            let now = session.now();
            session.savepoint(|session| session.records.prune(&session.conn, now, limit))
        };
        Ok(self.database.work(false, prune).await?)
    }
}

#[async_trait]
impl TransactionalStore for SqliteStore {
    type Tx = SqliteTx;

    async fn look_up(&self, batch: &[Claim]) -> Result<Vec<LookUp>, Error> {
        // A message that comes alone would wait for two changes of thread.
        if batch.len() <= FEW
            && let Some(answers) = self
                .database
                .read(|session| claims::look_up(session, batch))
        {
            return Ok(answers);
        }
        let batch = batch.to_vec();
        let look_up = move |session: &mut Session| claims::look_up(session, &batch);
        Ok(self.database.work(false, look_up).await?)
    }

    async fn begin(&self) -> Result<SqliteTx, Error> {
        let (limit, alone) = (self.turn, false);
        Ok(SqliteTx::new(&self.database, Terms { limit, alone }))
    }

    async fn begin_alone(&self) -> Result<SqliteTx, Error> {
        let (limit, alone) = (self.turn, true);
        Ok(SqliteTx::new(&self.database, Terms { limit, alone }))
    }
}
