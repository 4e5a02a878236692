//! What it costs that each message takes effect once in PostgreSQL, beside the loop that people write by hand.

mod by_hand;
mod counted;
mod pipelines;
mod records;
mod told;

use std::time::{Duration, Instant};

use onlyonce::driver::Sink as _;
use onlyonce::memory::MemoryQueue;
use onlyonce::postgres::sqlx::{self, AssertSqlSafe, Connection as _, PgConnection};
use onlyonce::{Message, postgres};

use crate::Error;
use crate::measure::{Summary, ratio};
use counted::Counted;
use told::Told;

/// Benchmarks onlyonce against loops by hand on one PostgreSQL server.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// postgres://USER:PASSWORD@HOST:PORT/DATABASE
    #[arg(long, env = "ONLYONCE_POSTGRES_URL")]
    url: String,
    /// Messages per variant and round.
    #[arg(long, default_value_t = 20_000)]
    messages: usize,
    /// Rounds; each runs every variant once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Handlers at the same time.
    #[arg(long, default_value_t = 64)]
    concurrency: usize,
    /// Connections of the loop by hand: as many as handlers, if it is not said.
    #[arg(long)]
    pool: Option<usize>,
    /// Accounts where they are random.
    #[arg(long, default_value_t = 10_000)]
    accounts: usize,
    /// Tries of a message that comes alone.
    #[arg(long, default_value_t = 101)]
    alone: usize,
}

#[derive(clap::Subcommand)]
enum What {
    /// A store that has many records already: claims, messages, pruning, size.
    Records(records::Args),
}

#[derive(Clone, Copy, PartialEq)]
enum Variant {
    OneByOne,
    Onlyonce,
    BatchByHand,
    OnlyonceBatch,
}

const VARIANTS: [(Variant, &str); 4] = [
    (Variant::OneByOne, "by hand, a transaction a message"),
    (Variant::Onlyonce, "onlyonce transactional"),
    (Variant::BatchByHand, "by hand, a transaction for 100"),
    (
        Variant::OnlyonceBatch,
        "onlyonce transactional, batches of 100",
    ),
];

/// What one run took, and did to the server.
struct Sample {
    per_second: f64,
    commits: f64,
    wal: f64,
    round_trips: f64,
}

/// Runs everything.
pub(crate) async fn compare_all(args: &Args) -> Result<(), Error> {
    if let Some(What::Records(records)) = &args.what {
        return records::measure_all(args, records).await;
    }
    for accounts in [args.accounts, 10] {
        compare(args, accounts).await?;
    }
    alone(args).await
}

#[expect(clippy::print_stdout, reason = "the benchmark's output")]
async fn compare(args: &Args, accounts: usize) -> Result<(), Error> {
    let mut samples: Vec<Vec<Sample>> = VARIANTS.iter().map(|_| Vec::new()).collect();
    for _ in 0..args.rounds {
        for (n, (variant, _)) in VARIANTS.iter().enumerate() {
            samples[n].push(sample(args, *variant, accounts).await?);
        }
    }
    println!(
        "\n{} messages on {accounts} accounts, {} rounds: median (least–most)\n",
        args.messages, args.rounds
    );
    println!(
        "| | messages/s | × by hand | commits/message | round trips/message | WAL bytes/message |\n|---|---|---|---|---|---|"
    );
    let rates = |n: usize| samples[n].iter().map(|s| s.per_second).collect::<Vec<_>>();
    for (n, (variant, name)) in VARIANTS.iter().enumerate() {
        let beside = match variant {
            Variant::OneByOne | Variant::Onlyonce => 0,
            Variant::BatchByHand | Variant::OnlyonceBatch => 2,
        };
        let of = |figure: fn(&Sample) -> f64| Summary::of(samples[n].iter().map(figure));
        println!(
            "| {name} | {:.0} | {} | {:.3} | {:.2} | {:.0} |",
            of(|s| s.per_second).median,
            ratio(&rates(n), &rates(beside)),
            of(|s| s.commits).median,
            of(|s| s.round_trips).median,
            of(|s| s.wal).median,
        );
    }
    Ok(())
}

async fn sample(args: &Args, variant: Variant, accounts: usize) -> Result<Sample, Error> {
    let bench = Bench::new(args, accounts).await?;
    let queue = bench.queue(args.messages).await;
    let before = bench.counts().await?;
    let began = Instant::now();
    match variant {
        Variant::OneByOne => by_hand::one_by_one(&bench, queue, args).await?,
        Variant::BatchByHand => by_hand::batches(&bench, queue, args).await?,
        Variant::Onlyonce => pipelines::one_by_one(&bench, queue, args).await?,
        Variant::OnlyonceBatch => pipelines::batches(&bench, queue, args).await?,
    }
    let took = began.elapsed();
    let after = bench.counts().await?;
    bench.check(args.messages).await?;
    let per_message = |n: i64| n as f64 / args.messages as f64;
    Ok(Sample {
        per_second: args.messages as f64 / took.as_secs_f64(),
        commits: per_message(after.0 - before.0),
        wal: per_message(after.1 - before.1),
        round_trips: bench.counted.round_trips() as f64 / args.messages as f64,
    })
}

/// From the moment that a message is in the queue of an idle consumer until its effect is committed.
#[expect(clippy::print_stdout, reason = "the benchmark's output")]
async fn alone(args: &Args) -> Result<(), Error> {
    let mut times: Vec<(&str, Vec<f64>)> = Vec::new();
    for (variant, name) in [VARIANTS[0], VARIANTS[1]] {
        let bench = Bench::new(args, args.accounts).await?;
        let queue = MemoryQueue::new("bench");
        let (sender, mut done) = tokio::sync::mpsc::unbounded_channel();
        let (messages, all) = (queue.clone(), args.alone);
        let feed = tokio::spawn(async move {
            let mut took = Vec::new();
            for n in 0..all {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let began = Instant::now();
                messages.publish(&[Bench::message(n)]).await;
                let _ = done.recv().await;
                took.push(began.elapsed().as_secs_f64() * 1e3);
            }
            took
        });
        let told = Told { queue, sender };
        match variant {
            Variant::OneByOne => by_hand::alone(&bench, told, args).await?,
            _ => pipelines::alone(&bench, told, args).await?,
        }
        times.push((name, feed.await?));
    }
    println!(
        "\nA message that comes alone, milliseconds until it is settled: median (least–most) of {}\n",
        args.alone
    );
    for (name, took) in &times {
        println!(
            "| {name} | {} | {} |",
            Summary::of(took.iter().copied()),
            ratio(took, &times[0].1)
        );
    }
    Ok(())
}

/// A schema with accounts, reached by a way that counts round trips.
pub(crate) struct Bench {
    direct: String,
    pub(crate) url: String,
    pub(crate) schema: String,
    accounts: usize,
    counted: Counted,
}

impl Bench {
    async fn new(args: &Args, accounts: usize) -> Result<Self, Error> {
        static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let schema = format!("bench_{}_{n}", std::process::id());
        let config: postgres::Config = args.url.parse()?;
        let server = format!(
            "{}:{}",
            config.connect.get_host(),
            config.connect.get_port()
        );
        let counted = Counted::to(server).await?;
        let at = format!(":{}/", config.connect.get_port());
        let bench = Self {
            direct: args.url.clone(),
            url: args.url.replace(&at, &format!(":{}/", counted.port())),
            schema,
            accounts,
            counted,
        };
        let tables = format!(
            "CREATE SCHEMA {0}; CREATE TABLE {0}.account (id integer PRIMARY KEY, cents bigint NOT NULL) WITH (fillfactor = 50);
             CREATE TABLE {0}.seen (id text PRIMARY KEY);
             INSERT INTO {0}.account SELECT n, 0 FROM generate_series(0, {accounts} - 1) AS n",
            bench.schema
        );
        let mut conn = PgConnection::connect(&bench.direct).await?;
        sqlx::raw_sql(AssertSqlSafe(tables))
            .execute(&mut conn)
            .await?;
        sqlx::raw_sql("CHECKPOINT").execute(&mut conn).await.ok();
        Ok(bench)
    }

    fn message(n: usize) -> Message {
        Message::new(n.to_string()).with_dedup_id(format!("message-{n}"))
    }

    async fn queue(&self, messages: usize) -> MemoryQueue {
        let queue = MemoryQueue::new("bench");
        let all: Vec<Message> = (0..messages).map(Self::message).collect();
        queue.publish(&all).await;
        queue
    }

    /// Spread over the accounts, without a pattern that locks rows in turn.
    pub(crate) fn account(&self, body: &str) -> i32 {
        account(body, self.accounts)
    }

    /// How many commits there were, and how long the write-ahead log is.
    async fn counts(&self) -> Result<(i64, i64), Error> {
        let mut conn = PgConnection::connect(&self.direct).await?;
        // The server's processes tell what they did when they are idle for a moment.
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        let counts = sqlx::query_as(
            "SELECT xact_commit, (pg_current_wal_insert_lsn() - '0/0')::bigint FROM pg_stat_database WHERE datname = current_database()",
        );
        Ok(counts.fetch_one(&mut conn).await?)
    }

    /// Drops all of it.
    async fn end(&self, conn: &mut PgConnection) -> Result<(), Error> {
        let drop = format!("DROP SCHEMA {} CASCADE", self.schema);
        sqlx::raw_sql(AssertSqlSafe(drop)).execute(conn).await?;
        Ok(())
    }

    /// Whether each message took effect once.
    async fn check(&self, messages: usize) -> Result<(), Error> {
        let mut conn = PgConnection::connect(&self.direct).await?;
        let sum = format!("SELECT sum(cents)::bigint FROM {}.account", self.schema);
        let sum: i64 = sqlx::query_scalar(AssertSqlSafe(sum))
            .fetch_one(&mut conn)
            .await?;
        self.end(&mut conn).await?;
        match usize::try_from(sum) == Ok(messages) {
            true => Ok(()),
            false => Err(format!("{sum} effects of {messages} messages").into()),
        }
    }
}

pub(crate) fn account(body: &str, accounts: usize) -> i32 {
    let n: u64 = body.parse().unwrap_or_default();
    let spread = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    i32::try_from(spread % accounts as u64).unwrap_or_default()
}
