//! The loops that people write.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use onlyonce::driver::{Delivery, Disposition, ReceiveLimits, Settlement, Source};
use onlyonce::memory::MemoryQueue;
use onlyonce::postgres::sqlx::{self, AssertSqlSafe, Connection as _, PgConnection};
use tokio::sync::Mutex;

use super::pipelines::update;
use super::{Args, Bench, Told};
use crate::Error;

/// A connection for each handler, as a pool of that size has.
async fn connections(bench: &Bench, count: usize) -> Result<Vec<Arc<Mutex<PgConnection>>>, Error> {
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(Arc::new(Mutex::new(
            PgConnection::connect(&bench.url).await?,
        )));
    }
    Ok(all)
}

fn text(delivery: &Delivery) -> (String, String) {
    let message = &delivery.message;
    let body = String::from_utf8_lossy(&message.body).into_owned();
    (message.dedup_id.clone().unwrap_or_default(), body)
}

/// `INSERT … ON CONFLICT DO NOTHING`, the effect, commit, ack.
async fn apply(
    bench: &Bench,
    conn: &mut PgConnection,
    id: &str,
    account: i32,
) -> Result<(), Error> {
    let mut tx = conn.begin().await?;
    let seen = format!(
        "INSERT INTO {}.seen VALUES ($1) ON CONFLICT DO NOTHING",
        bench.schema
    );
    let new = sqlx::query(AssertSqlSafe(seen))
        .bind(id)
        .execute(&mut *tx)
        .await?;
    if new.rows_affected() == 1 {
        sqlx::query(AssertSqlSafe(update(bench)))
            .bind(account)
            .execute(&mut *tx)
            .await?;
    }
    tx.commit().await?;
    Ok(())
}

async fn ack(queue: &impl Source, deliveries: Vec<Delivery>) {
    let acks: Vec<Settlement> = deliveries
        .into_iter()
        .map(|delivery| Settlement::new(delivery.receipt, Disposition::Ack))
        .collect();
    queue.settle(&acks).await;
}

fn limits(messages: usize) -> ReceiveLimits {
    ReceiveLimits::new(messages, Duration::from_millis(50))
}

async fn handle(
    bench: &Bench,
    conn: &Mutex<PgConnection>,
    queue: &impl Source,
    delivery: Delivery,
) -> Result<(), Error> {
    let (id, body) = text(&delivery);
    apply(bench, &mut *conn.lock().await, &id, bench.account(&body)).await?;
    ack(queue, vec![delivery]).await;
    Ok(())
}

pub(crate) async fn one_by_one(
    bench: &Bench,
    queue: MemoryQueue,
    args: &Args,
) -> Result<(), Error> {
    let count = args.pool.unwrap_or(args.concurrency);
    let connections = connections(bench, count).await?;
    let workers = connections.into_iter().map(|conn| {
        let queue = queue.clone();
        async move {
            loop {
                let deliveries = queue.receive(limits(1)).await?;
                let Some(delivery) = deliveries.into_iter().next() else {
                    return Ok::<_, Error>(());
                };
                handle(bench, &conn, &queue, delivery).await?;
            }
        }
    });
    let mut workers = stream::iter(workers).buffer_unordered(count);
    while let Some(done) = workers.next().await {
        done?;
    }
    Ok(())
}

pub(crate) async fn batches(bench: &Bench, queue: MemoryQueue, _: &Args) -> Result<(), Error> {
    const CONNECTIONS: usize = 8;
    let connections = connections(bench, CONNECTIONS).await?;
    let workers = connections.into_iter().map(|conn| {
        let queue = queue.clone();
        async move {
            loop {
                let deliveries = queue.receive(limits(100)).await?;
                if deliveries.is_empty() {
                    return Ok::<_, Error>(());
                }
                apply_batch(bench, &mut *conn.lock().await, &deliveries).await?;
                ack(&queue, deliveries).await;
            }
        }
    });
    let mut workers = stream::iter(workers).buffer_unordered(CONNECTIONS);
    while let Some(done) = workers.next().await {
        done?;
    }
    Ok(())
}

async fn apply_batch(
    bench: &Bench,
    conn: &mut PgConnection,
    deliveries: &[Delivery],
) -> Result<(), Error> {
    let (ids, bodies): (Vec<_>, Vec<_>) = deliveries.iter().map(text).unzip();
    let accounts: Vec<i32> = bodies.iter().map(|body| bench.account(body)).collect();
    let mut tx = conn.begin().await?;
    let new: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!(
        "INSERT INTO {}.seen SELECT unnest($1::text[]) ON CONFLICT DO NOTHING RETURNING id",
        bench.schema
    )))
    .bind(&ids)
    .fetch_all(&mut *tx)
    .await?;
    let new: std::collections::HashSet<String> = new.into_iter().collect();
    let accounts = ids.iter().zip(accounts).filter(|(id, _)| new.contains(*id));
    let accounts: Vec<i32> = accounts.map(|(_, account)| account).collect();
    sqlx::query(AssertSqlSafe(update_all(&bench.schema)))
        .bind(accounts)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(())
}

/// Rows are locked in one order, so that two batches do not wait for each other.
pub(crate) fn update_all(schema: &str) -> String {
    format!(
        "WITH more AS (SELECT id, count(*) AS n FROM unnest($1::integer[]) AS id GROUP BY id),
         locked AS (SELECT a.id FROM {schema}.account AS a JOIN more USING (id) ORDER BY a.id FOR UPDATE OF a)
         UPDATE {schema}.account AS a SET cents = cents + n FROM more JOIN locked USING (id) WHERE a.id = more.id"
    )
}

pub(crate) async fn alone(bench: &Bench, told: Told, args: &Args) -> Result<(), Error> {
    let conn = connections(bench, 1).await?.remove(0);
    let mut left = args.alone;
    while left > 0 {
        let deliveries = told
            .receive(ReceiveLimits::new(1, Duration::from_secs(1)))
            .await?;
        for delivery in deliveries {
            handle(bench, &conn, &told, delivery).await?;
            left -= 1;
        }
    }
    Ok(())
}
