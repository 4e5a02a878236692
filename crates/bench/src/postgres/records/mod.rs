//! What a PostgreSQL store costs that has many records already, and how large it gets.

mod latency;
mod pruning;
mod waves;

use std::time::Duration;

use onlyonce::driver::{
    Claim, Completion, Fingerprint, KeyDigest, LookUp, Precondition, Transaction as _,
    TransactionalStore as _,
};
use onlyonce::postgres::sqlx::{self, AssertSqlSafe, Connection as _, PgConnection};
use onlyonce::postgres::{Config, PgStore};

use super::pipelines::update;
use super::{Args as Server, Bench};
use crate::Error;

/// The partitions that have records, of which each was written to for a third of the retention; the last one still is.
const FULL: [usize; 4] = [0, 1, 2, 3];
/// For how long what is filled in is kept.
const RETENTION: Duration = Duration::from_hours(7 * 24);

/// Measures a store with many records beside one without. What has no rounds or waves is left out.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Records that are there already, and records that are written in waves.
    #[arg(long, default_value_t = 10_000_000)]
    records: usize,
    /// Rounds; each measures both stores.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Rounds of pruning, for each of which three quarters of the records are written anew.
    #[arg(long, default_value_t = 3)]
    prunings: usize,
    /// Claims, and messages, per store and round.
    #[arg(long, default_value_t = 2_000)]
    tries: usize,
    /// Waves in which records are written and expire.
    #[arg(long, default_value_t = 10)]
    waves: usize,
    /// How long a wave's records are kept, in seconds.
    #[arg(long, default_value_t = 10)]
    retention: u64,
}

pub(crate) async fn measure_all(server: &Server, args: &Args) -> Result<(), Error> {
    if args.rounds > 0 {
        latency::compare(server, args).await?;
    }
    if args.prunings > 0 {
        pruning::compare(server, args).await?;
    }
    if args.waves > 0 {
        waves::write(server, args).await?;
    }
    Ok(())
}

/// A store beside a table for effects.
struct Stored {
    bench: Bench,
    store: PgStore,
}

impl Stored {
    async fn new(args: &Server) -> Result<Self, Error> {
        let mut bench = Bench::new(args, args.accounts).await?;
        // Nothing is counted, so nothing is in between.
        bench.url.clone_from(&bench.direct);
        let mut config: Config = bench.url.parse()?;
        config.schema.clone_from(&bench.schema);
        let store = PgStore::open(config).await?;
        Ok(Self { bench, store })
    }

    async fn connect(&self) -> Result<PgConnection, Error> {
        Ok(PgConnection::connect(&self.bench.direct).await?)
    }

    /// Runs statements in which `{}` stands for how the names of the store's tables begin.
    async fn run(&self, sql: &str) -> Result<(), Error> {
        let sql = sql.replace("{}", &format!("{}.onlyonce_", self.bench.schema));
        let mut conn = self.connect().await?;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut conn).await?;
        Ok(())
    }

    /// As it is in the middle of its life: all of its records are alive, in the partition that is written to and in the three before.
    async fn fill(&self, records: usize) -> Result<(), Error> {
        for slot in FULL {
            self.fill_slot(slot, records / FULL.len()).await?;
        }
        self.stand_at_the_last().await
    }

    /// Records of which none expires meanwhile.
    async fn fill_slot(&self, slot: usize, records: usize) -> Result<(), Error> {
        let seconds = RETENTION.as_secs();
        let third = seconds / 3;
        let after = FULL.len() - 1 - slot;
        self.run(&format!(
            "INSERT INTO {{}}record_{slot} (key, fingerprint, expires, slot)
             SELECT gen_random_uuid(), gen_random_uuid(),
                 now() + ({seconds} - {after} * {third} + 3600 + {third} * random()) * interval '1 second', {slot}
             FROM generate_series(1, {records})"
        ))
        .await
    }

    async fn stand_at_the_last(&self) -> Result<(), Error> {
        let (last, retention) = (FULL.len() - 1, RETENTION.as_millis());
        let third = RETENTION.as_secs() / 3;
        self.run(&format!(
            "UPDATE {{}}store SET generation = {last};
             UPDATE {{}}slot SET opened_at = NULL, closed_at = NULL, retention = 0 WHERE id > {last};
             UPDATE {{}}slot SET opened_at = now() - ({last} - id) * {third} * interval '1 second',
                 closed_at = CASE WHEN id < {last} THEN now() - ({last} - id - 1) * {third} * interval '1 second' END,
                 retention = {retention} WHERE id <= {last};
             ANALYZE {{}}record"
        ))
        .await?;
        // Only some may.
        self.run("CHECKPOINT").await.ok();
        Ok(())
    }

    /// Takes message `n` as a pipeline does: look-up, effect, record, commit.
    async fn message(&self, n: u64) -> Result<(), Error> {
        let answer = self.store.look_up(&[claim_of(n)]).await?;
        let [LookUp::New(looked_up)] = *answer.as_slice() else {
            return Err(format!("the key is not new: {answer:?}").into());
        };
        let mut tx = self.store.begin().await?;
        let account = self.bench.account(&n.to_string());
        sqlx::query(AssertSqlSafe(update(&self.bench)))
            .bind(account)
            .execute(&mut *tx)
            .await?;
        let record = completion(looked_up, RETENTION);
        let verdict = tx.complete_and_commit(&[record]).await?;
        verdict.map_err(|fenced| format!("it was recorded by somebody else: {fenced:?}").into())
    }

    /// How large the tables and indexes of records are.
    async fn size(&self) -> Result<Size, Error> {
        let sql = format!(
            "SELECT sum(pg_table_size(c.oid))::bigint, sum(pg_indexes_size(c.oid))::bigint FROM pg_class AS c
             WHERE c.relnamespace = '{}'::regnamespace AND c.relname ~ '^onlyonce_record_[0-7]$'",
            self.bench.schema
        );
        let mut conn = self.connect().await?;
        let (tables, indexes) = sqlx::query_as(AssertSqlSafe(sql))
            .fetch_one(&mut conn)
            .await?;
        Ok(Size { tables, indexes })
    }

    async fn count(&self) -> Result<i64, Error> {
        let sql = format!("SELECT count(*) FROM {}.onlyonce_record", self.bench.schema);
        let mut conn = self.connect().await?;
        Ok(sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_one(&mut conn)
            .await?)
    }

    async fn end(self) -> Result<(), Error> {
        self.bench.end(&mut self.connect().await?).await
    }
}

#[derive(Clone, Copy)]
struct Size {
    tables: i64,
    indexes: i64,
}

impl Size {
    fn per(self, records: i64) -> (f64, f64) {
        let per = |bytes: i64| bytes as f64 / records as f64;
        (per(self.tables), per(self.indexes))
    }
}

/// What is claimed or looked up for message `n`, which no other message has.
fn claim_of(n: u64) -> Claim {
    let digest = Fingerprint::of(&n.to_be_bytes());
    Claim::new(KeyDigest(digest.0), digest)
}

fn completion(precondition: impl Into<Precondition>, retention: Duration) -> Completion {
    let precondition = precondition.into();
    Completion::new(
        precondition,
        Fingerprint(precondition.key().0),
        None,
        retention,
    )
}

fn millis(took: Duration) -> f64 {
    took.as_secs_f64() * 1e3
}

/// The value below which this share of the values is.
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let at = (values.len() as f64 * share) as usize;
    values
        .get(at.min(values.len().saturating_sub(1)))
        .copied()
        .unwrap_or(f64::NAN)
}
