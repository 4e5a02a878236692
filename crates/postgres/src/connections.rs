use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgRow};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, Either};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// For how long a connection may take to be opened: as long as TCP may take to notice that the server is back.
const OPENING: Duration = Duration::from_secs(30);

/// Connections to one database, at most so many; they are opened when they are needed, and kept.
///
/// Not sqlx's pool: that asks the server after each use whether the connection is still there, which is a round trip for each
/// message, and does not know a transaction that several share.
#[derive(Clone, Debug)]
pub(crate) struct Connections {
    options: Arc<PgConnectOptions>,
    most: usize,
    permits: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<PgConnection>>>,
}

/// A connection that is lent. If it is dropped it is closed: something on it was not waited for.
#[derive(Debug)]
pub(crate) struct Lent {
    pub(crate) conn: PgConnection,
    idle: Arc<Mutex<Vec<PgConnection>>>,
    permit: OwnedSemaphorePermit,
}

impl Connections {
    pub(crate) fn new(options: PgConnectOptions, most: usize) -> Self {
        // Our statements have outcomes in them, and are no news.
        let options = options.disable_statement_logging();
        Self {
            options: Arc::new(options),
            most,
            permits: Arc::new(Semaphore::new(most)),
            idle: Arc::default(),
        }
    }

    /// How many there are at most.
    pub(crate) fn most(&self) -> usize {
        self.most
    }

    /// Waits for the right to use one. Dropping the future is harmless.
    pub(crate) async fn permit(&self) -> Result<OwnedSemaphorePermit, sqlx::Error> {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        permit.map_err(|_| sqlx::Error::PoolClosed)
    }

    /// A connection that nobody uses, or a new one.
    pub(crate) async fn open(&self, permit: OwnedSemaphorePermit) -> Result<Lent, sqlx::Error> {
        let kept = lock(&self.idle).pop();
        match kept {
            Some(conn) => Ok(self.lent(conn, permit)),
            None => self.open_new(permit).await,
        }
    }

    /// A new connection. It is opened to the end even if the future is dropped, for whoever comes next: callers that give up sooner
    /// than a busy server answers would otherwise keep it busy with connections of which none is ever used.
    async fn open_new(&self, permit: OwnedSemaphorePermit) -> Result<Lent, sqlx::Error> {
        let (sender, opened) = oneshot::channel();
        let this = self.clone();
        tokio::spawn(async move {
            let conn = tokio::time::timeout(OPENING, this.connect()).await;
            let conn = conn.unwrap_or_else(|late| Err(sqlx::Error::Io(late.into())));
            let lent = conn.map(|conn| this.lent(conn, permit));
            if let Err(Ok(unwanted)) = sender.send(lent) {
                unwanted.give_back();
            }
        });
        opened.await.unwrap_or(Err(sqlx::Error::PoolClosed))
    }

    fn lent(&self, conn: PgConnection, permit: OwnedSemaphorePermit) -> Lent {
        Lent {
            conn,
            idle: Arc::clone(&self.idle),
            permit,
        }
    }

    pub(crate) async fn lend(&self) -> Result<Lent, sqlx::Error> {
        let permit = self.permit().await?;
        self.open(permit).await
    }

    /// A handler that begins a transaction through sqlx shall get a savepoint, since it is in one already. So sqlx believes for as
    /// long as the connection lasts that there is one.
    async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        let mut conn = PgConnection::connect_with(&self.options).await?;
        std::mem::forget(conn.begin().await?);
        run(&mut conn, "ROLLBACK".into())
            .await
            .map_err(|failed| failed.error)?;
        Ok(conn)
    }

    /// Runs one statement, on any connection.
    pub(crate) async fn ask(&self, sql: String) -> Result<Vec<PgRow>, sqlx::Error> {
        self.run(sql, false).await
    }

    /// Runs one statement in a transaction of its own, in one round trip. It sees what was committed before it, whatever the
    /// database's settings are. Nobody waits for its commit to be on disk, unless it is `durable`.
    pub(crate) async fn transact(
        &self,
        sql: &str,
        durable: bool,
    ) -> Result<Vec<PgRow>, sqlx::Error> {
        let lazily = match durable {
            true => "",
            false => "SET LOCAL synchronous_commit TO off; ",
        };
        let sql = format!("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {lazily}{sql}; COMMIT");
        self.run(sql, true).await
    }

    async fn run(&self, sql: String, begins: bool) -> Result<Vec<PgRow>, sqlx::Error> {
        let mut lent = self.lend().await?;
        match run(&mut lent.conn, sql).await {
            Ok(rows) => {
                lent.give_back();
                Ok(rows)
            }
            Err(Failed { error, .. }) => {
                let goes_on = error.as_database_error().is_some();
                if !goes_on {
                    self.forget_idle();
                } else if !begins || run(&mut lent.conn, "ROLLBACK".into()).await.is_ok() {
                    lent.give_back();
                }
                Err(error)
            }
        }
    }

    /// A connection has broken: those that nobody uses may have, too.
    pub(crate) fn forget_idle(&self) {
        lock(&self.idle).clear();
    }
}

impl Lent {
    /// Keeps the connection for another time: it is in no transaction.
    pub(crate) fn give_back(self) {
        lock(&self.idle).push(self.conn);
        drop(self.permit);
    }
}

/// What failed, and how many of the statements before it were done.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) done: usize,
    pub(crate) error: sqlx::Error,
}

/// Runs these statements in one round trip; returns their rows.
pub(crate) async fn run(conn: &mut PgConnection, sql: String) -> Result<Vec<PgRow>, Failed> {
    let mut rows = Vec::new();
    let mut done = 0;
    let mut answers = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_many(conn);
    while let Some(answer) = answers.next().await {
        match answer {
            Ok(Either::Left(_)) => done += 1,
            Ok(Either::Right(row)) => rows.push(row),
            Err(error) => return Err(Failed { done, error }),
        }
    }
    Ok(rows)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
