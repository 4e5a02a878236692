use std::pin::pin;
use std::time::Duration;

use async_trait::async_trait;
use onlyonce_core::driver::{
    Fetch, FetchResult, Outbox, OutboxSettlement, OutgoingId, Owner, SetAside, Verdicts,
};
use onlyonce_core::{Error, Message};
use rusqlite::Connection;
use tokio::time::Instant;

use crate::config::{Config, after};
use crate::database::Database;
use crate::error::{DbError, user};
use crate::messages::{MAX_SIZE, too_large};
use crate::outgoing;

/// How often an idle relay looks whether another process, or another connection of this one, has written to the file. What goes
/// through this process's [`Database`] wakes it at once.
const LOOK: Duration = Duration::from_millis(200);

/// The outbox of a SQLite file: what [`SqliteTx::publish`](crate::SqliteTx::publish) has written there, for a
/// [`Relay`](onlyonce_core::Relay).
///
/// Any number of processes may write to it and run relays. The table is `onlyonce_outbox`; its columns are named as Debezium's
/// outbox event router expects them.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), onlyonce_core::Error> {
/// # let dir = tempfile::tempdir().expect("a directory");
/// # let path = dir.path().join("app.db");
/// # let url = format!("sqlite:{}?queue=mails", path.display());
/// use onlyonce_core::{Message, Relay};
/// use onlyonce_sqlite::{SqliteOutbox, SqliteQueue};
///
/// // let url = "sqlite:app.db?queue=mails";
/// let outbox = SqliteOutbox::open(url.parse()?).await?;
/// outbox.publish("mails", Message::new("one mail").with_group("customer-7")).await?;
///
/// let relay = Relay::new(outbox).to("mails", SqliteQueue::open(url.parse()?).await?);
/// # let relay = relay.shutdown(tokio::time::sleep(std::time::Duration::from_millis(300)));
/// assert_eq!(relay.run().await?.sent, 1);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct SqliteOutbox {
    database: Database,
    name: String,
}

impl SqliteOutbox {
    /// Opens the outbox in the file of `config`; its queue, if any, is not looked at.
    ///
    /// # Errors
    /// As [`Database::open`].
    pub async fn open(config: Config) -> Result<Self, Error> {
        Ok(Self::of(Database::open(config).await?))
    }

    pub(crate) fn of(database: Database) -> Self {
        let name = database.path().display().to_string();
        Self { database, name }
    }

    /// The file it is in.
    #[must_use]
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// Publishes one message in a transaction of its own, durably.
    ///
    /// # Errors
    /// Of kind [`Message`](onlyonce_core::ErrorKind::Message): it is too large. Otherwise it is unknown whether it was written.
    pub async fn publish(&self, destination: &str, message: Message) -> Result<OutgoingId, Error> {
        check_size(&message)?;
        let destination = destination.to_owned();
        let write = move |session: &mut crate::session::Session| {
            Ok(outgoing::write(&session.conn, &destination, &message)?)
        };
        let id = self.database.work(true, write).await?;
        self.database.announce();
        Ok(id)
    }

    /// Publishes one message in *your own* transaction, on a connection of your own to the same file, in any process: it is
    /// published if and only if you commit. A relay finds it within a fifth of a second.
    ///
    /// The file must have been opened by this crate before, which makes the tables. In a handler, and with [`Database::with`], the
    /// connection is shared with others and does not write to them: use [`SqliteTx::publish`](crate::SqliteTx::publish) and
    /// [`publish`](Self::publish).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("app.db");
    /// # onlyonce_sqlite::SqliteOutbox::open(onlyonce_sqlite::Config::new(&path)).await?;
    /// use onlyonce_core::Message;
    /// use onlyonce_sqlite::{SqliteOutbox, rusqlite};
    ///
    /// let mut conn = rusqlite::Connection::open(&path)?;
    /// let tx = conn.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    /// tx.execute_batch("CREATE TABLE customer (id INTEGER); INSERT INTO customer VALUES (7)")?;
    /// SqliteOutbox::publish_in(&tx, "mails", &Message::new("welcome").with_group("customer-7"))?;
    /// tx.commit()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Of kind [`Message`](onlyonce_core::ErrorKind::Message): it is too large. Otherwise what SQLite says, as the source; nothing
    /// was written.
    pub fn publish_in(
        conn: &Connection,
        destination: &str,
        message: &Message,
    ) -> Result<OutgoingId, Error> {
        check_size(message)?;
        outgoing::write(conn, destination, message).map_err(user)
    }
}

/// No message is written that could not be read again.
pub(crate) fn check_size(message: &Message) -> Result<(), Error> {
    match message.size() > MAX_SIZE {
        true => Err(Error::from(too_large(message)).on_message(message)),
        false => Ok(()),
    }
}

#[async_trait]
impl Outbox for SqliteOutbox {
    fn name(&self) -> &str {
        &self.name
    }

    async fn fetch(&self, destination: &str, fetch: Fetch) -> Result<FetchResult, Error> {
        let announced = self.database.announced();
        let destination = destination.to_owned();
        let work = self.database.work(false, move |session| {
            let mark = mark(announced, session.version()?);
            outgoing::fetch(session, &destination, fetch, mark)
        });
        Ok(work.await?)
    }

    async fn settle(
        &self,
        relay: Owner,
        destination: &str,
        batch: &[OutboxSettlement],
    ) -> Result<Verdicts, Error> {
        let (destination, batch) = (destination.to_owned(), batch.to_vec());
        let work = self.database.work(false, move |session| {
            outgoing::settle(session, relay, &destination, &batch)
        });
        Ok(work.await?)
    }

    async fn wait(&self, _: &str, seen: u64, longest: Duration) -> Result<(), Error> {
        let deadline = after(longest);
        loop {
            // Before the look, so that nothing is announced unnoticed between it and the wait.
            let mut announcement = pin!(self.database.announcements().notified());
            announcement.as_mut().enable();
            let announced = self.database.announced();
            let version = self.database.read(|session| session.version());
            // Where it cannot be read at once, something may have changed.
            if version.is_none_or(|version| mark(announced, version) != seen) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            tokio::select! {
                () = announcement => {}
                () = tokio::time::sleep(left.min(LOOK)) => {}
            }
        }
    }

    async fn release(&self, relay: Owner, destination: &str) -> Result<(), Error> {
        let destination = destination.to_owned();
        let work = self.database.work(false, move |session| {
            outgoing::release(session, relay, &destination)
        });
        Ok(work.await?)
    }

    async fn set_aside(&self, destination: &str, limit: usize) -> Result<Vec<SetAside>, Error> {
        let destination = destination.to_owned();
        let work = self.database.work(false, move |session| {
            outgoing::set_aside(session, &destination, limit)
        });
        Ok(work.await?)
    }

    async fn requeue(&self, destination: &str, ids: &[OutgoingId]) -> Result<usize, Error> {
        let (destination, ids) = (destination.to_owned(), ids.to_vec());
        let work = self.database.work(true, move |session| {
            outgoing::requeue(session, &destination, &ids)
        });
        let requeued = work.await?;
        self.database.announce();
        Ok(requeued)
    }
}

/// What this process has announced, and what the file says of others.
fn mark(announced: u32, version: i64) -> u64 {
    let [.., a, b, c, d] = version.to_be_bytes();
    u64::from(announced) << 32 | u64::from(u32::from_be_bytes([a, b, c, d]))
}

impl crate::session::Session {
    fn version(&self) -> Result<i64, DbError> {
        crate::records::version(&self.conn)
    }
}
