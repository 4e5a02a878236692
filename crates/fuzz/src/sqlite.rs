use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use onlyonce::driver::{
    Claim, Completion, Delivery, Disposition, Fingerprint, HeldClaim, KeyDigest, Owner,
    ReceiveLimits, SettleResult, Settlement, Sink, Source, Store, Token,
};
use onlyonce::sqlite::rusqlite::types::Value;
use onlyonce::sqlite::rusqlite::{self, Connection};
use onlyonce::sqlite::{Config, SqliteQueue, SqliteStore};
use onlyonce::{Error, Message};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::input;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));

/// In memory where there is such a place: every commit is synced.
fn directory() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let directory = directory.expect("a directory");
    let file = directory.path().join("a.db");
    (directory, file)
}

fn config(file: &Path) -> Config {
    Config::new(file).queue("orders")
}

fn limit() -> ReceiveLimits {
    ReceiveLimits::new(10, Duration::ZERO)
}

/// Whatever one message's rows hold, it is delivered, dead-lettered or reported, and the others come all the same.
pub fn sqlite_rows(data: &[u8]) {
    let Ok(changes) = changes(&mut Unstructured::new(data), &QUEUE) else {
        return;
    };
    let (_directory, file) = directory();
    RUNTIME.block_on(async {
        let queue = SqliteQueue::open(config(&file)).await.expect("a new file");
        let message = Message::new("spoilt").with_attribute("a", "b");
        for message in [
            message.clone(),
            message.with_group("g"),
            Message::new("sound"),
        ] {
            queue
                .publish(&[message])
                .await
                .remove(0)
                .expect("it is taken");
        }
        // The first two.
        spoil(
            &file,
            &changes,
            "id < (SELECT max(id) FROM onlyonce_message)",
        );
        let mut sound = false;
        for _ in 0..6 {
            let deliveries = queue
                .receive(limit())
                .await
                .expect("a row spoils itself alone");
            sound |= deliveries.iter().any(|d| d.message.body == "sound");
            for answer in settle(&queue, &deliveries).await {
                // Two heads of one group are delivered twice; the second receipt is worth nothing.
                assert!(!matches!(answer, SettleResult::Unknown(_)), "{answer:?}");
            }
        }
        assert!(sound, "the sound message is held back");
    });
}

async fn settle(queue: &SqliteQueue, deliveries: &[Delivery]) -> Vec<SettleResult> {
    let disposition = |delivery: &Delivery| match &delivery.malformed {
        Some(reason) => Disposition::DeadLetter {
            reason: reason.clone(),
        },
        None => Disposition::Ack,
    };
    let settlement =
        |delivery| Settlement::new(Delivery::clone(delivery).receipt, disposition(delivery));
    let batch: Vec<_> = deliveries.iter().map(settlement).collect();
    queue.settle(&batch).await
}

/// Records and claims with any content: every call answers.
pub fn sqlite_records(data: &[u8]) {
    let Ok(changes) = changes(&mut Unstructured::new(data), &RECORDS) else {
        return;
    };
    let (_directory, file) = directory();
    RUNTIME.block_on(async {
        let store = SqliteStore::open(config(&file)).await.expect("a new file");
        use_store(&store).await.expect("a sound file");
        drop(store);
        let seal = Connection::open(&file).and_then(|conn| conn.execute_batch(SEAL));
        seal.expect("a segment of one record, as nobody has sealed one so far");
        spoil(&file, &changes, "true");
        // Opened anew, so that all of it is read; any answer will do.
        if let Ok(store) = SqliteStore::open(config(&file)).await {
            let _ = use_store(&store).await;
            let _ = store.prune(10).await;
        }
    });
}

const SEAL: &str =
    "INSERT INTO onlyonce_done VALUES (1, x'02020202020202020202020202020202', x'', x'', 1);
    INSERT INTO onlyonce_segment VALUES (1, 9000000000000, x'ffffffffffffffff')";

/// Claims three keys, completes the first and starts the second.
async fn use_store(store: &SqliteStore) -> std::result::Result<(), Error> {
    let (owner, hour) = (Owner(1), Duration::from_secs(3_600));
    let claims = [1, 2, 3].map(|n| Claim::new(KeyDigest([n; 16]), Fingerprint([n; 16])));
    store.claim(owner, &claims, hour).await?;
    let held = |n: usize| HeldClaim::new(claims[n].key, Token(u64::MAX));
    store.renew(&[held(2)], hour).await?;
    store.start(&[held(1)]).await?;
    store.release(&[held(2)]).await?;
    let mut completions = Vec::new();
    if let onlyonce::driver::ClaimResult::Acquired { token, .. } =
        store.claim(owner, &claims, hour).await?[0]
    {
        completions.push(Completion::new(
            HeldClaim::new(claims[0].key, token),
            claims[0].fingerprint,
            Some("done".into()),
            hour,
        ));
    }
    store.complete(&completions).await?;
    Ok(())
}

/// A file of any bytes, or one of ours with any bytes changed: opening and using it gives answers.
pub fn sqlite_files(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else {
        return;
    };
    let mut content = data.to_vec();
    if kind % 4 != 0 {
        content.clone_from(&SOUND);
        for change in data.chunks_exact(3) {
            let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
            let at = at * 7 % content.len();
            content[at] = change[2];
        }
    }
    let (_directory, file) = directory();
    std::fs::write(&file, content).expect("the directory is ours");
    RUNTIME.block_on(async {
        if let Ok(store) = SqliteStore::open(config(&file)).await {
            let _ = use_store(&store).await;
        }
        let Ok(queue) = SqliteQueue::open(config(&file)).await else {
            return;
        };
        let _ = queue.publish(&[Message::new("x").with_group("g")]).await;
        if let Ok(deliveries) = queue.receive(limit()).await {
            settle(&queue, &deliveries).await;
        }
    });
}

/// A file with something in it.
static SOUND: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let (_directory, file) = directory();
    RUNTIME.block_on(async {
        let store = SqliteStore::open(config(&file)).await.expect("a new file");
        use_store(&store).await.expect("a sound file");
        let queue = SqliteQueue::open(config(&file))
            .await
            .expect("a sound file");
        for n in 0..4 {
            let message = Message::new("x")
                .with_attribute("a", "b")
                .with_group(format!("{}", n % 2));
            queue
                .publish(&[message])
                .await
                .remove(0)
                .expect("it is taken");
        }
    });
    // All that is in its log goes into the file.
    let conn = Connection::open(&file).expect("the file");
    let all = "PRAGMA wal_checkpoint(TRUNCATE); PRAGMA journal_mode = DELETE";
    let _ = conn.execute_batch(all);
    drop(conn);
    std::fs::read(&file).expect("the file")
});

/// Settings as a URL gives them, up to their extremes, and a message of any form: it is delivered as it was.
pub fn sqlite_settings(data: &[u8]) {
    let Some((&length, data)) = data.split_first() else {
        return;
    };
    let (query, data) = data.split_at(data.len().min(length.into()));
    let (Ok(query), Ok(message)) = (
        std::str::from_utf8(query),
        input::message(&mut Unstructured::new(data)),
    ) else {
        return;
    };
    let (_directory, file) = directory();
    let mut url = url::Url::from_file_path(&file).expect("an absolute path");
    url.set_query(Some(query));
    let text = url.as_str().replacen("file:", "sqlite:", 1);
    let Ok(config) = text.parse::<Config>() else {
        return;
    };
    assert_eq!(config.path, file);
    RUNTIME.block_on(async {
        let config = config.queue("orders");
        let queue = SqliteQueue::open(config.clone()).await.expect("a new file");
        queue
            .publish(std::slice::from_ref(&message))
            .await
            .remove(0)
            .expect("it is taken");
        let mut deliveries = queue.receive(limit()).await.expect("it works");
        // With a retention of some milliseconds it may have gone to the dead-letter queue.
        let Some(delivery) = deliveries.pop() else {
            assert!(
                config
                    .retention
                    .is_some_and(|most| most < Duration::from_secs(60))
            );
            return;
        };
        assert_eq!(delivery.malformed, None);
        let mut delivered = Message::clone(&delivery.message);
        delivered.broker_id = None;
        delivered.published_at = message.published_at;
        assert_eq!(delivered, message);
        let extended = queue
            .extend(std::slice::from_ref(&delivery.receipt), config.lease)
            .await;
        assert_eq!(extended.len(), 1);
        settle(&queue, &[delivery]).await;
    });
}

/// Tables and columns.
type Columns = [(&'static str, &'static str)];

const QUEUE: [(&str, &str); 12] = [
    ("onlyonce_message", "queue"),
    ("onlyonce_message", "grp"),
    ("onlyonce_message", "head"),
    ("onlyonce_message", "free_at"),
    ("onlyonce_message", "lease"),
    ("onlyonce_message", "attempts"),
    ("onlyonce_message", "published_at"),
    ("onlyonce_message", "queued_at"),
    ("onlyonce_message", "reason"),
    ("onlyonce_body", "dedup_id"),
    ("onlyonce_body", "attributes"),
    ("onlyonce_body", "body"),
];

const RECORDS: [(&str, &str); 19] = [
    ("onlyonce_meta", "value"),
    ("onlyonce_claim", "key"),
    ("onlyonce_claim", "fingerprint"),
    ("onlyonce_claim", "owner"),
    ("onlyonce_claim", "token"),
    ("onlyonce_claim", "until"),
    ("onlyonce_claim", "started"),
    ("onlyonce_recent", "id"),
    ("onlyonce_recent", "key"),
    ("onlyonce_recent", "fingerprint"),
    ("onlyonce_recent", "outcome"),
    ("onlyonce_recent", "expires"),
    ("onlyonce_segment", "id"),
    ("onlyonce_segment", "expires"),
    ("onlyonce_segment", "filter"),
    ("onlyonce_meta", "name"),
    ("onlyonce_time", "time"),
    ("onlyonce_time", "uptime"),
    ("onlyonce_time", "boot"),
];

/// A new value for one column.
#[derive(Clone)]
struct Change {
    table: &'static str,
    column: &'static str,
    value: Value,
    /// Bytes as text, which then need not be UTF-8.
    text: bool,
}

fn changes(input: &mut Unstructured<'_>, columns: &Columns) -> Result<Vec<Change>> {
    let many = input.int_in_range(1..=6)?;
    (0..many)
        .map(|_| {
            let (table, column) = *input.choose(columns)?;
            let (value, text) = value(input)?;
            Ok(Change {
                table,
                column,
                value,
                text,
            })
        })
        .collect()
}

fn value(input: &mut Unstructured<'_>) -> Result<(Value, bool)> {
    let value = match input.int_in_range(0..=4)? {
        0 => Value::Null,
        1 => Value::Integer(*input.choose(&[i64::MIN, -1, 0, 1, i64::MAX])?),
        2 => Value::Integer(input.arbitrary()?),
        3 => Value::Text(input.arbitrary()?),
        _ => return Ok((Value::Blob(input.arbitrary()?), input.arbitrary()?)),
    };
    Ok((value, false))
}

/// Makes those changes that SQLite takes.
fn spoil(file: &Path, changes: &[Change], which: &str) {
    // The store's own connection guards its tables.
    let conn = Connection::open(file).expect("the file is there");
    for change in changes {
        // An error: a value that the column's type refuses, or a second row of one key.
        let _ = change.apply(&conn, which);
    }
}

impl Change {
    fn apply(&self, conn: &Connection, which: &str) -> rusqlite::Result<usize> {
        let Self { table, column, .. } = self;
        let value = if self.text { "CAST(?1 AS TEXT)" } else { "?1" };
        let sql = format!("UPDATE {table} SET {column} = {value} WHERE {which}");
        conn.execute(&sql, [&self.value])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_there_and_changes_are_made() {
        let (_directory, file) = directory();
        std::fs::write(&file, &*SOUND).expect("the directory is ours");
        let conn = Connection::open(&file).expect("the file is there");
        conn.execute_batch(SEAL)
            .expect("no segment is there so far");
        for (table, column) in QUEUE.into_iter().chain(RECORDS) {
            let number = Change {
                table,
                column,
                value: Value::Integer(7),
                text: false,
            };
            let bytes = Change {
                value: Value::Blob(vec![0xff]),
                ..number.clone()
            };
            let text = Change {
                text: true,
                ..bytes.clone()
            };
            let one = format!("rowid = (SELECT min(rowid) FROM {table})");
            let which = match table {
                "onlyonce_meta" => "name = 'token'",
                "onlyonce_claim" => "key = (SELECT min(key) FROM onlyonce_claim)",
                _ => &one,
            };
            let made = [number, bytes, text].map(|change| change.apply(&conn, which));
            let made = made.into_iter().flatten().filter(|rows| *rows > 0);
            assert_ne!(made.count(), 0, "{table}.{column}");
        }
    }
}
