use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{
    Fenced, Fetch, FetchResult, Outbox, OutboxDisposition, OutboxSettlement, Outgoing, OutgoingId,
    Owner, SetAside, Verdicts,
};
use onlyonce_core::{Attributes, Error, ErrorKind, Message};
use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgListener, PgPoolOptions, PgRow};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::claims::millis;
use crate::config::Config;
use crate::connections::{Connections, run};
use crate::error::{of_call, of_end};
use crate::literal;
use crate::names::Names;

/// What PostgreSQL takes as one value is less than 1 GiB, and here each byte is two digits.
const LARGEST: usize = 256 << 20;
/// A transaction that was open when a relay found nothing does not notify: so it looks again, at first so soon, then each time after
/// twice as long, up to the longest.
const FIRST_LOOK: Duration = Duration::from_millis(20);
const LONGEST_LOOK: Duration = Duration::from_secs(1);
/// How long until the server is asked again for notifications.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

/// The outbox of a [`PgStore`](crate::PgStore), in the table `onlyonce_outbox`.
///
/// A relay is woken by `LISTEN`/`NOTIFY`, on a connection of its own, and looks by itself at least once a second. Notifications do
/// not pass a pooler in transaction mode: give the relay a store with an address of the server itself if a second is too long.
#[derive(Clone, Debug)]
pub struct PgOutbox {
    name: String,
    names: Names,
    connections: Connections,
    listener: Arc<Listener>,
    /// After how long each destination that was found to be empty is looked at again.
    empty: Arc<Mutex<HashMap<String, Duration>>>,
}

impl PgOutbox {
    pub(crate) fn new(config: &Config, connections: Connections) -> Self {
        Self {
            name: config.name(),
            names: config.names(),
            connections,
            listener: Arc::new(Listener::new(config)),
            empty: Arc::default(),
        }
    }

    /// Publishes through a connection of the caller's, as part of the transaction that is begun on it, if one is: for code
    /// outside of any pipeline, as a web handler.
    ///
    /// ```no_run
    /// # async fn handler(outbox: onlyonce_postgres::PgOutbox, conn: &mut onlyonce_postgres::sqlx::PgConnection)
    /// # -> Result<(), Box<dyn std::error::Error>> {
    /// use onlyonce_core::Message;
    /// use onlyonce_postgres::sqlx::{self, Connection as _};
    ///
    /// let mut tx = conn.begin().await?;
    /// sqlx::query("INSERT INTO orders VALUES ($1)").bind(7_i64).execute(&mut *tx).await?;
    /// outbox.publish(&mut tx, "orders", &Message::new("order 7").with_group("customer-3")).await?;
    /// tx.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`OutboxTransaction::publish`](onlyonce_core::driver::OutboxTransaction::publish).
    pub async fn publish(
        &self,
        conn: &mut PgConnection,
        destination: &str,
        message: &Message,
    ) -> Result<OutgoingId, Error> {
        publish(&self.names, conn, destination, message).await
    }

    async fn call(&self, doing: &str, sql: &str) -> Result<Vec<PgRow>, Error> {
        let rows = self.connections.transact(sql, false).await;
        rows.map_err(|error| of_call(doing, error))
    }

    fn empty(&self) -> MutexGuard<'_, HashMap<String, Duration>> {
        self.empty.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes a message through this connection, in one round trip.
pub(crate) async fn publish(
    names: &Names,
    conn: &mut PgConnection,
    destination: &str,
    message: &Message,
) -> Result<OutgoingId, Error> {
    check(destination, message)?;
    let id = OutgoingId::random();
    let attributes: BTreeMap<&str, &str> = message.attributes.iter().collect();
    let attributes = match attributes.is_empty() {
        true => None,
        false => Some(serde_json::to_string(&attributes).map_err(|error| {
            Error::new(ErrorKind::Message, "the attributes cannot be written").caused_by(error)
        })?),
    };
    let sql = format!(
        "SELECT {}('{id}', {}, {}, {}, {}, {}, {}::jsonb)",
        names.of("outbox_publish"),
        literal::text(destination),
        literal::optional_text(message.group.as_deref()),
        literal::text(message.attributes.get("type").unwrap_or_default()),
        literal::bytes(&message.body),
        literal::optional_text(message.dedup_id.as_deref()),
        literal::optional_text(attributes.as_deref()),
    );
    let written = run(conn, sql).await;
    written.map_err(|failed| {
        of_end("write a message to the outbox", failed.error).on_message(message)
    })?;
    Ok(id)
}

/// What the server would refuse spoils a transaction, so it is refused before.
fn check(destination: &str, message: &Message) -> Result<(), Error> {
    let wrong = |what: &str| Err(Error::new(ErrorKind::Message, what).on_message(message));
    let pairs = message
        .attributes
        .iter()
        .flat_map(|(name, value)| [name, value]);
    let mut texts = pairs
        .chain(message.group.as_deref())
        .chain(message.dedup_id.as_deref())
        .chain([destination]);
    if texts.any(|text| text.contains('\0')) {
        return wrong("PostgreSQL keeps no text with a NUL character in it");
    }
    match message.body.len() > LARGEST {
        true => wrong("the message is larger than 256 MiB"),
        false => Ok(()),
    }
}

fn read(row: &PgRow) -> Result<Outgoing, sqlx::Error> {
    let unexpected = || sqlx::Error::Protocol("a row that is not the outbox's".into());
    let id: OutgoingId = row
        .try_get::<&str, _>("id")?
        .parse()
        .map_err(|_| unexpected())?;
    let body = literal::unhex(row.try_get("payload")?).ok_or_else(unexpected)?;
    let mut message = Message::new(body);
    message.group = row.try_get("grp")?;
    message.dedup_id = row.try_get("dedup_id")?;
    if let Some(attributes) = row.try_get::<Option<&str>, _>("attributes")? {
        let attributes: BTreeMap<String, String> =
            serde_json::from_str(attributes).map_err(|_| unexpected())?;
        message.attributes = attributes.into_iter().collect::<Attributes>();
    }
    let attempts = row.try_get::<i32, _>("attempts")?.unsigned_abs();
    Ok(Outgoing::new(id, message, attempts))
}

fn fetched(rows: &[PgRow], mark: u64) -> Result<FetchResult, sqlx::Error> {
    let wait = |row: &PgRow| {
        let millis = row.try_get::<Option<i64>, _>("wait_for")?;
        Ok::<_, sqlx::Error>(millis.map(|ms| Duration::from_millis(ms.unsigned_abs())))
    };
    let first = rows
        .first()
        .map(|row| Ok::<_, sqlx::Error>((row.try_get::<&str, _>("answer")?, row)));
    Ok(match first.transpose()? {
        Some(("busy", row)) => FetchResult::Busy {
            retry_in: wait(row)?.unwrap_or_default(),
        },
        Some(("empty", row)) => FetchResult::Fetched {
            messages: Vec::new(),
            ready_in: wait(row)?,
            mark,
        },
        _ => FetchResult::Fetched {
            messages: rows.iter().map(read).collect::<Result<_, _>>()?,
            ready_in: None,
            mark,
        },
    })
}

fn settle(names: &Names, relay: Owner, destination: &str, batch: &[OutboxSettlement]) -> String {
    let kind = |settlement: &OutboxSettlement| match settlement.disposition {
        OutboxDisposition::Sent => "sent",
        OutboxDisposition::Failed { .. } => "failed",
        OutboxDisposition::SetAside { .. } => "aside",
    };
    let reason = |settlement: &OutboxSettlement| match &settlement.disposition {
        OutboxDisposition::Sent => None,
        OutboxDisposition::Failed { reason, .. } | OutboxDisposition::SetAside { reason } => {
            Some(reason.replace('\0', "\u{fffd}").into_bytes())
        }
    };
    let delay = |settlement: &OutboxSettlement| match settlement.disposition {
        OutboxDisposition::Failed { retry_in, .. } => Some(millis(retry_in)),
        _ => None,
    };
    let reasons: Vec<Option<Vec<u8>>> = batch.iter().map(reason).collect();
    format!(
        "SELECT unnest({}({}, {}, {}, {}, {}, {})) AS counts",
        names.of("outbox_settle"),
        literal::text(destination),
        relay.0.cast_signed(),
        ids(batch.iter().map(|settlement| settlement.id)),
        literal::array(batch, |text, one| text.push_str(kind(one))),
        literal::optional_bytes(reasons.iter().map(Option::as_deref)),
        literal::optional_numbers(batch.iter().map(delay)),
    )
}

fn ids(ids: impl IntoIterator<Item = OutgoingId>) -> String {
    let bytes: Vec<[u8; 16]> = ids.into_iter().map(|id| id.0.to_be_bytes()).collect();
    literal::uuids(&bytes)
}

#[async_trait]
impl Outbox for PgOutbox {
    fn name(&self) -> &str {
        &self.name
    }

    async fn fetch(&self, destination: &str, fetch: Fetch) -> Result<FetchResult, Error> {
        let mark = self.listener.mark();
        let limit = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let sql = format!(
            "SELECT * FROM {}({}, {}, {}, {}, {}, {})",
            self.names.of("outbox_fetch"),
            literal::text(destination),
            fetch.relay.0.cast_signed(),
            millis(fetch.lease),
            limit(fetch.messages),
            limit(fetch.bytes),
            fetch.waits_for_set_aside,
        );
        let rows = self.call("fetch from the outbox", &sql).await?;
        let answer =
            fetched(&rows, mark).map_err(|error| of_call("fetch from the outbox", error))?;
        let is_empty =
            matches!(&answer, FetchResult::Fetched { messages, .. } if messages.is_empty());
        if !is_empty {
            self.empty().remove(destination);
        }
        Ok(answer)
    }

    async fn settle(
        &self,
        relay: Owner,
        destination: &str,
        batch: &[OutboxSettlement],
    ) -> Result<Verdicts, Error> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let sql = settle(&self.names, relay, destination, batch);
        let rows = self.call("settle what was published", &sql).await?;
        let verdict = |row: &PgRow| {
            let counts = row.try_get::<bool, _>("counts")?;
            Ok(if counts { Ok(()) } else { Err(Fenced) })
        };
        let verdicts = rows.iter().map(verdict).collect::<Result<_, _>>();
        verdicts.map_err(|error| of_call("settle what was published", error))
    }

    async fn wait(&self, destination: &str, mark: u64, longest: Duration) -> Result<(), Error> {
        let next = {
            let mut empty = self.empty();
            let next = empty.entry(destination.to_owned()).or_insert(FIRST_LOOK);
            std::mem::replace(next, (*next * 2).min(LONGEST_LOOK))
        };
        let told = self.listener.told_since(mark);
        // It is over at the latest then.
        let _ = tokio::time::timeout(longest.min(next), told).await;
        Ok(())
    }

    async fn release(&self, relay: Owner, destination: &str) -> Result<(), Error> {
        let sql = format!(
            "DELETE FROM {} WHERE destination = {} AND owner = {}",
            self.names.of("relay"),
            literal::text(destination),
            relay.0.cast_signed(),
        );
        self.call("give up a lease of the outbox", &sql)
            .await
            .map(drop)
    }

    async fn set_aside(&self, destination: &str, limit: usize) -> Result<Vec<SetAside>, Error> {
        let doing = "tell what was set aside";
        let sql = format!(
            "SELECT id::text AS id, aggregateid AS grp, encode(payload, 'hex') AS payload, dedup_id, attributes::text AS attributes, \
             attempts, coalesce(reason, '') AS reason FROM {} WHERE aggregatetype = {} AND set_aside ORDER BY seq LIMIT {}",
            self.names.of("outbox"),
            literal::text(destination),
            i64::try_from(limit).unwrap_or(i64::MAX),
        );
        let rows = self.call(doing, &sql).await?;
        let one = |row: &PgRow| {
            let reason: String = row.try_get("reason")?;
            Ok(SetAside::new(read(row)?, reason))
        };
        let all = rows.iter().map(one).collect::<Result<_, sqlx::Error>>();
        all.map_err(|error| of_call(doing, error))
    }

    async fn requeue(&self, destination: &str, requeued: &[OutgoingId]) -> Result<usize, Error> {
        let sql = format!(
            "SELECT {}({}, {}) AS count",
            self.names.of("outbox_requeue"),
            literal::text(destination),
            ids(requeued.iter().copied()),
        );
        let rows = self.call("requeue what was set aside", &sql).await?;
        let count = rows
            .first()
            .map(|row| row.try_get::<i64, _>("count"))
            .transpose();
        let count = count.map_err(|error| of_call("requeue what was set aside", error))?;
        Ok(count.map_or(0, |count| usize::try_from(count).unwrap_or_default()))
    }
}

/// Hears of new messages, once somebody wants to know.
#[derive(Debug)]
struct Listener {
    options: sqlx::postgres::PgConnectOptions,
    channel: String,
    /// Whoever has the connection next would be told.
    transaction_pooler: bool,
    told: watch::Sender<u64>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Listener {
    fn new(config: &Config) -> Self {
        Self {
            options: config.connect(),
            channel: config.names().channel(),
            transaction_pooler: config.transaction_pooler,
            told: watch::Sender::new(0),
            task: Mutex::new(None),
        }
    }

    /// Stands for what was told so far.
    fn mark(&self) -> u64 {
        let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.transaction_pooler && task.as_ref().is_none_or(JoinHandle::is_finished) {
            let listen = listen(
                self.options.clone(),
                self.channel.clone(),
                self.told.clone(),
            );
            *task = Some(tokio::spawn(listen));
        }
        *self.told.borrow()
    }

    async fn told_since(&self, mark: u64) {
        let mut told = self.told.subscribe();
        // The sender is ours, so it does not end.
        let _ = told.wait_for(|told| *told > mark).await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let task = self
            .task
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(task) = task {
            task.abort();
        }
    }
}

/// Counts notifications. Whatever may have been missed counts as one.
async fn listen(
    options: sqlx::postgres::PgConnectOptions,
    channel: String,
    told: watch::Sender<u64>,
) {
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .connect_lazy_with(options);
    loop {
        if let Err(error) = follow(&pool, &channel, &told).await {
            tracing::debug!(%error, "not told of new messages in the outbox; looking for them instead");
        }
        tokio::time::sleep(LISTEN_AGAIN).await;
    }
}

async fn follow(
    pool: &sqlx::PgPool,
    channel: &str,
    told: &watch::Sender<u64>,
) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(channel).await?;
    loop {
        told.send_modify(|count| *count += 1);
        // `None`: the connection broke, and was made anew.
        listener.try_recv().await?;
    }
}
