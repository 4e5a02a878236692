//! The ledger in PostgreSQL, in the schema of the store's tables.

use std::sync::Arc;

use onlyonce::postgres::Config;
use onlyonce::postgres::sqlx::{self, AssertSqlSafe, Connection as _, PgConnection};

use crate::audit::Audit;
use crate::worker::Transfer;

/// Makes the tables. One worker at a time, since two that make the same table would both find it missing.
///
/// `entries` has no key on purpose: a transfer that is applied twice must show.
fn tables(schema: &str) -> String {
    format!(
        r#"
    SELECT pg_advisory_xact_lock(hashtextextended('ledger', 0));
    CREATE TABLE IF NOT EXISTS "{schema}".entries (
        transfer_id text NOT NULL, account text NOT NULL, amount bigint NOT NULL
    );
    CREATE TABLE IF NOT EXISTS "{schema}".balances (
        account text PRIMARY KEY, balance bigint NOT NULL, sent bigint NOT NULL
    );
"#
    )
}

/// The statements of a handler, with the schema in them.
#[derive(Clone, Debug)]
pub struct Book {
    entries: Arc<str>,
    balance: Arc<str>,
}

impl Book {
    /// Makes the tables; the store has made the schema.
    pub async fn open(config: &Config) -> sqlx::Result<Self> {
        let mut db = PgConnection::connect_with(&config.connect).await?;
        let mut tx = db.begin().await?;
        sqlx::raw_sql(AssertSqlSafe(tables(&config.schema)))
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        db.close().await?;
        let schema = &config.schema;
        let entries =
            format!(r#"INSERT INTO "{schema}".entries VALUES ($1, $2, $3), ($1, $4, $5)"#);
        let balance = format!(
            r#"INSERT INTO "{schema}".balances AS b VALUES ($1, $2, $3)
               ON CONFLICT (account) DO UPDATE SET balance = b.balance + excluded.balance, sent = b.sent + excluded.sent
               RETURNING sent"#
        );
        Ok(Self {
            entries: entries.into(),
            balance: balance.into(),
        })
    }

    /// Books a transfer: two entries and two balances. Returns its number among those that its account has sent.
    pub async fn post(&self, db: &mut PgConnection, transfer: &Transfer) -> sqlx::Result<i64> {
        let Transfer {
            transfer_id,
            from,
            to,
            amount,
        } = transfer;
        sqlx::query(AssertSqlSafe(Arc::clone(&self.entries)))
            .bind(transfer_id)
            .bind(from)
            .bind(-amount)
            .bind(to)
            .bind(amount)
            .execute(&mut *db)
            .await?;
        // Always in the order of the accounts: a transfer there and one back at the same time would each hold the balance that
        // the other waits for. The pipeline would do one of them again, but only when the database has given up waiting.
        let mut changes = [(from, -amount, 1), (to, *amount, 0)];
        changes.sort_unstable();
        let mut number = 0;
        for (account, amount, sends) in changes {
            let sent = sqlx::query_scalar(AssertSqlSafe(Arc::clone(&self.balance)))
                .bind(account)
                .bind(amount)
                .bind(sends)
                .fetch_one(&mut *db)
                .await?;
            if sends == 1 {
                number = sent;
            }
        }
        Ok(number)
    }
}

/// What the tables say, all of it at one moment.
pub async fn audit(config: &Config) -> sqlx::Result<Audit> {
    let mut db = PgConnection::connect_with(&config.connect).await?;
    let mut tx = db
        .begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        .await?;
    let (entries, balances) = (
        format!(r#""{}".entries"#, config.schema),
        format!(r#""{}".balances"#, config.schema),
    );
    let transfers = format!(
        "SELECT transfer_id, count(*) AS n, sum(amount) AS sum FROM {entries} GROUP BY transfer_id"
    );
    let wrong = "n <> 2 OR sum <> 0";
    let (count, entry_count, applied_twice, half_applied) = sqlx::query_as(AssertSqlSafe(format!(
        "SELECT count(*), coalesce(sum(n), 0)::bigint,
                count(*) FILTER (WHERE n > 2), count(*) FILTER (WHERE n <= 2 AND ({wrong}))
         FROM ({transfers}) AS t"
    )))
    .fetch_one(&mut *tx)
    .await?;
    let examples = sqlx::query_scalar(AssertSqlSafe(format!(
        "SELECT transfer_id FROM ({transfers}) AS t WHERE {wrong} LIMIT 10"
    )))
    .fetch_all(&mut *tx)
    .await?;
    let booked = format!("SELECT account, sum(amount) FROM {entries} GROUP BY account");
    let kept = format!("SELECT account, balance FROM {balances}");
    let (sum_of_balances, differing): (i64, i64) = sqlx::query_as(AssertSqlSafe(format!(
        "SELECT (SELECT coalesce(sum(balance), 0)::bigint FROM {balances}),
                (SELECT count(*) FROM (({booked} EXCEPT {kept}) UNION ALL ({kept} EXCEPT {booked})) AS d)"
    )))
    .fetch_one(&mut *tx)
    .await?;
    Ok(Audit {
        transfers: count,
        entries: entry_count,
        applied_twice,
        half_applied,
        examples,
        sum_of_balances,
        balances_match_entries: differing == 0,
    })
}
