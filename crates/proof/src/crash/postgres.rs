//! The ledger in PostgreSQL, in a schema of its own beside the store's tables, and the worker whose effects go there.

use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::driver::{OutboxTransaction as _, Source};
use onlyonce_core::{Context, Error, Failure, Json, Pipeline, Relay, State};
use onlyonce_postgres::sqlx::{self, AssertSqlSafe, Connection as _, PgConnection, Row as _};
use onlyonce_postgres::{Config, PgStore, PgTx};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::audit::Entry;
use super::instrument::Instrument;
use super::traffic::Transfer;
use super::watched::{Downstream, Watched};
use super::worker::{LEASE, Work, overcome, settings};
use crate::error::failed;

/// For which destination handlers publish.
const BOOKED: &str = "booked";
/// How often the relay looks.
const POLL: Duration = Duration::from_millis(50);
/// What is left in the outbox is published within this time, or else the worker ends without it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the ledger is.
#[derive(Clone)]
struct Ledger {
    post: Arc<str>,
}

impl Ledger {
    fn new(schema: &str) -> Self {
        // Always in the order of the accounts, so that no two transfers wait for each other.
        let post = format!(
            r#"WITH e AS (INSERT INTO "{schema}".entries (transfer, account, amount) VALUES ($1, $2::bigint, -$4::bigint), ($1, $3::bigint, $4))
               INSERT INTO "{schema}".balances AS b SELECT * FROM (VALUES ($2, -$4), ($3, $4)) AS n (account, change) ORDER BY 1
               ON CONFLICT (account) DO UPDATE SET balance = b.balance + excluded.balance"#
        );
        Self { post: post.into() }
    }

    async fn post(&self, db: &mut PgConnection, transfer: &Transfer) -> sqlx::Result<()> {
        let sql = AssertSqlSafe(Arc::clone(&self.post));
        let posted = sqlx::query(sql)
            .bind(i64::from(transfer.id))
            .bind(i64::from(transfer.from))
            .bind(i64::from(transfer.to))
            .bind(transfer.amount);
        posted.execute(db).await.map(drop)
    }
}

/// Makes the tables of the store and of the ledger. `entries` has no key on purpose: a transfer that is applied twice must show.
pub async fn create(url: &str) -> Result<(), Error> {
    let config: Config = url.parse()?;
    drop(PgStore::open(config.clone()).await?);
    let schema = &config.schema;
    let tables = format!(
        r#"CREATE TABLE "{schema}".entries (
               place bigserial, transfer bigint NOT NULL, account bigint NOT NULL, amount bigint NOT NULL
           );
           CREATE TABLE "{schema}".balances (account bigint PRIMARY KEY, balance bigint NOT NULL)"#
    );
    execute(&config, tables).await
}

pub async fn remove(url: &str) -> Result<(), Error> {
    let config: Config = url.parse()?;
    let schema = format!(r#"DROP SCHEMA "{}" CASCADE"#, config.schema);
    execute(&config, schema).await
}

async fn execute(config: &Config, sql: String) -> Result<(), Error> {
    let mut db = connect(config).await?;
    let done = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut db).await;
    done.map_err(|error| failed("the ledger", error))?;
    db.close()
        .await
        .map_err(|error| failed("the ledger", error))
}

async fn connect(config: &Config) -> Result<PgConnection, Error> {
    let connected = PgConnection::connect_with(&config.connect).await;
    connected.map_err(|error| failed("cannot connect to the ledger", error))
}

/// What was booked, in order, and what all balances come to.
pub async fn books(url: &str) -> Result<(Vec<Entry>, i64), Error> {
    let config: Config = url.parse()?;
    let schema = &config.schema;
    let mut db = connect(&config).await?;
    let read = async {
        let entries =
            format!(r#"SELECT transfer, account, amount FROM "{schema}".entries ORDER BY place"#);
        let rows = sqlx::query(AssertSqlSafe(entries))
            .fetch_all(&mut db)
            .await?;
        let entry = |row: &sqlx::postgres::PgRow| {
            let number = |column: usize| row.try_get::<i64, _>(column);
            let small = |number: i64| u32::try_from(number).unwrap_or(u32::MAX);
            Ok::<_, sqlx::Error>((small(number(0)?), small(number(1)?), number(2)?))
        };
        let entries: sqlx::Result<Vec<Entry>> = rows.iter().map(entry).collect();
        let sum = format!(r#"SELECT coalesce(sum(balance), 0)::bigint FROM "{schema}".balances"#);
        let sum = sqlx::query_scalar(AssertSqlSafe(sum))
            .fetch_one(&mut db)
            .await?;
        Ok::<_, sqlx::Error>((entries?, sum))
    };
    read.await.map_err(|error| failed("the audit", error))
}

/// How many messages are in the outbox.
pub async fn left(url: &str) -> Result<u64, Error> {
    let config: Config = url.parse()?;
    let mut db = connect(&config).await?;
    let sql = format!(
        r#"SELECT count(*) FROM "{}"."{}outbox""#,
        config.schema, config.prefix
    );
    let count: sqlx::Result<i64> = sqlx::query_scalar(AssertSqlSafe(sql))
        .fetch_one(&mut db)
        .await;
    let count = count.map_err(|error| failed("the outbox", error))?;
    Ok(count.unsigned_abs())
}

/// Works until nothing is left, with a relay beside it.
pub async fn run(
    work: &Work,
    url: &str,
    source: Watched<Arc<dyn Source>>,
    instrument: &Arc<Instrument>,
) -> Result<(), Error> {
    let config: Config = url.parse()?;
    let ledger = Ledger::new(&config.schema);
    let store = PgStore::open(config).await?;
    let stop = CancellationToken::new();
    let booked = Downstream(Watched::new(work.broker.booked().await?, instrument));
    let relay = Relay::new(Watched::new(store.outbox(), instrument))
        .to(BOOKED, booked)
        .lease(LEASE)
        .poll(POLL)
        .shutdown(stop.clone().cancelled_owned());
    let relayed = tokio::spawn(relay.run());
    let builder = Pipeline::transactional(source, Watched::new(store, instrument)).state(ledger);
    settings(builder, work, instrument)?.run(transfer).await?;
    let until = Instant::now() + PATIENCE;
    while left(url).await? > 0 && Instant::now() < until {
        sleep(POLL).await;
    }
    stop.cancel();
    let ended = relayed.await;
    ended.map_err(|error| failed("the relay", error))?.map(drop)
}

/// The handler: it books a transfer, and says so to others.
async fn transfer(
    Json(transfer): Json<Transfer>,
    context: Context,
    State(ledger): State<Ledger>,
    State(instrument): State<Arc<Instrument>>,
    tx: &mut Watched<PgTx>,
) -> Result<(), Failure> {
    let handled = async {
        overcome(&transfer, &context, &instrument).await?;
        let booking = ledger.post(&mut tx.inner, &transfer);
        instrument.watch("handler books", booking).await?;
        let mut message = transfer.message();
        // Its place in the outbox names it.
        message.dedup_id = None;
        let publishing = tx.inner.publish(BOOKED, message);
        instrument.watch("handler publishes", publishing).await?;
        Ok(())
    };
    instrument.watch("handler", handled).await
}
