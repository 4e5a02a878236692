//! Consume, transform, produce: a shop takes orders from one queue, and writes each sale and its receipt in one transaction; a relay
//! publishes the receipts to another queue, and a post room handles each of them once.
//!
//! `cargo run -p events` shows it, `cargo run -p events -- ORDERS RECEIPTS` with the queues of these URLs.
#![allow(missing_docs, unreachable_pub, reason = "a program, not a library")]

mod lossy;

use std::sync::Arc;
use std::time::Duration;

use onlyonce::sqlite::{Config, SqliteStore, SqliteTx, rusqlite};
use onlyonce::{BoxError, Counters, Failure, Json, Message, Pipeline, Relay};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::time::sleep;

use lossy::Lossy;

const ORDERS: u32 = 1_000;
/// A queue that gave nothing for this long is empty.
const IDLE: Duration = Duration::from_millis(300);
/// A receipt that has not come for this long is lost.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Deserialize, Serialize)]
struct Order {
    customer: String,
    cents: i64,
}

/// The shop's handler. The sale, the receipt and the record that this order was handled commit together, or none does.
async fn sell(Json(order): Json<Order>, tx: &mut SqliteTx) -> Result<(), Failure> {
    // The receipts of a customer stay in order. Their dedup ids come from the outbox.
    let receipt = Message::new(serde_json::to_vec(&order)?).with_group(order.customer.as_str());
    let sale = (order.customer, order.cents);
    tx.execute("INSERT INTO sales VALUES (?1, ?2)", sale)
        .await?;
    tx.publish("receipts", receipt).await?;
    Ok(())
}

/// The post room's handler. A receipt that is published again has the same dedup id, and so takes effect once.
async fn post(Json(receipt): Json<Order>, tx: &mut SqliteTx) -> Result<(), Failure> {
    let letter = (receipt.customer, receipt.cents);
    tx.execute("INSERT INTO letters VALUES (?1, ?2)", letter)
        .await?;
    Ok(())
}

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the program's output")]
async fn main() -> Result<(), BoxError> {
    let folder = tempfile::tempdir()?;
    let mut urls = std::env::args().skip(1);
    let orders = urls.next().unwrap_or_else(|| "memory:orders".into());
    let receipts = urls.next().unwrap_or_else(|| "memory:receipts".into());
    order(&orders).await?;

    // Each has a database of its own, as if they were two programs.
    let shop = open(&folder, "sales").await?;
    let post_room = open(&folder, "letters").await?;
    // The first answers of the queue are lost, so that some receipts are published twice.
    let lossy = Lossy::new(onlyonce::sink(&receipts).await?);
    let (running, ended) = oneshot::channel::<()>();
    let relay = Relay::new(shop.outbox())
        .to("receipts", lossy)
        .shutdown(async { drop(ended.await) });
    let selling = Pipeline::transactional(onlyonce::source(&orders).await?, shop.clone())
        .consumer("shop")
        .stop_when_idle(IDLE);
    let posting = Pipeline::transactional(onlyonce::source(&receipts).await?, post_room.clone())
        .consumer("post-room")
        .stop_when_idle(PATIENCE);
    let done = all_applied(posting.counters());
    let posting = async {
        let posted = posting.shutdown(done).run(post).await;
        drop(running);
        Ok(posted?)
    };
    let selling = async { Ok(selling.run(sell).await?) };
    let (sold, relayed, posted) = tokio::try_join!(selling, relay.run(), posting)?;

    println!(
        "orders:   {} sold, {} duplicates suppressed",
        sold.applied, sold.duplicates
    );
    println!("receipts: {} published for certain", relayed.sent);
    println!(
        "letters:  {} posted, {} duplicates suppressed",
        posted.applied, posted.duplicates
    );
    let (sales, letters) = (
        rows(&shop, "sales").await?,
        rows(&post_room, "letters").await?,
    );
    match (sales, letters) {
        (ORDERS, ORDERS) => Ok(()),
        _ => Err(format!("{ORDERS} orders became {sales} sales and {letters} letters").into()),
    }
}

/// Puts the orders into their queue, each of them twice: a producer that was not sure.
async fn order(url: &str) -> Result<(), BoxError> {
    let orders = (0..ORDERS).map(|n| {
        let order = Order {
            customer: format!("customer-{}", n % 20),
            cents: 1_000,
        };
        Ok(Message::new(serde_json::to_vec(&order)?).with_dedup_id(format!("order-{n}")))
    });
    let orders = orders.collect::<Result<Vec<_>, BoxError>>()?;
    let sink = onlyonce::sink(url).await?;
    for answer in [sink.publish(&orders).await, sink.publish(&orders).await].concat() {
        answer?;
    }
    Ok(sink.close().await?)
}

/// Opens a database with one table of customers and cents.
async fn open(folder: &TempDir, table: &str) -> Result<SqliteStore, BoxError> {
    let path = folder.path().join(format!("{table}.db"));
    let store = SqliteStore::open(Config::new(path)).await?;
    let sql = format!("CREATE TABLE {table} (customer TEXT NOT NULL, cents INTEGER NOT NULL)");
    store
        .database()
        .with(move |db| db.execute_batch(&sql))
        .await?;
    Ok(store)
}

/// Resolves when every receipt has come, and a moment later, in which none may take effect again.
async fn all_applied(counters: Arc<Counters>) {
    while counters.report().applied < ORDERS.into() {
        sleep(Duration::from_millis(10)).await;
    }
    sleep(IDLE).await;
}

async fn rows(store: &SqliteStore, table: &str) -> Result<u32, BoxError> {
    let sql = format!("SELECT count(*) FROM {table}");
    let count = move |db: &rusqlite::Connection| db.query_row(&sql, [], |row| row.get(0));
    Ok(store.database().with(count).await?)
}
