//! Workers that are killed and whose connections are cut, and what became of their messages.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio::process::{Child, Command};
use tokio::time::sleep;

use crate::Error;
use crate::peers::Peer;
use crate::queue::{Kind, Queue};
use crate::store;
use crate::work::Effect;

/// Kills and cuts workers of each peer, and counts missing and doubled effects.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The broker, with its vhost: amqp://user:password@host:port/vhost
    #[arg(long, env = "ONLYONCE_RABBITMQ_URL")]
    url: String,
    /// The type of the queues; see `throughput`.
    #[arg(long, value_enum)]
    kind: Kind,
    /// Messages per peer.
    #[arg(long, default_value_t = 5_000)]
    messages: usize,
    /// How often each worker is killed.
    #[arg(long, default_value_t = 10)]
    kills: usize,
    /// How often its connections are cut. The last fault is a cut: nobody starts the worker again after it but the worker itself.
    #[arg(long, default_value_t = 3)]
    cuts: usize,
    /// The command that cuts all connections of the vhost: `rabbitmqctl close_all_connections --vhost VHOST cut`
    #[arg(long)]
    cut_cmd: String,
    /// How long each effect takes, in milliseconds: a sleep in its transaction.
    #[arg(long, default_value_t = 3)]
    slow: u64,
    /// How many effects are waited for between two faults.
    #[arg(long, default_value_t = 200)]
    between: usize,
    /// For how many seconds it is waited for `between` effects, and after the last fault for all.
    #[arg(long, default_value_t = 120)]
    limit: u64,
    /// Only these peers.
    #[arg(long, value_enum)]
    only: Vec<Peer>,
    /// Keep what the workers print in this directory.
    #[arg(long)]
    logs: Option<PathBuf>,
}

/// With the least that a user has to do, and with all that a careful one does.
const RUNS: [(Peer, Effect); 19] = [
    (Peer::OneByOne, Effect::Row),
    (Peer::OneByOne, Effect::RowAndInbox),
    (Peer::Hundreds, Effect::Row),
    (Peer::Hundreds, Effect::RowAndInbox),
    (Peer::Apalis, Effect::Row),
    (Peer::Apalis, Effect::RowAndInbox),
    (Peer::RuststreamWorkers, Effect::Row),
    (Peer::RuststreamWorkers, Effect::RowAndInbox),
    (Peer::RuststreamBatches, Effect::Row),
    (Peer::RuststreamBatches, Effect::RowAndInbox),
    (Peer::MqBridge, Effect::Row),
    (Peer::MqBridge, Effect::RowAndInbox),
    (Peer::OmniqueueReceive, Effect::Row),
    (Peer::OmniqueueReceive, Effect::RowAndInbox),
    (Peer::OmniqueueReceiveAll, Effect::Row),
    (Peer::OmniqueueReceiveAll, Effect::RowAndInbox),
    (Peer::AtLeastOnce, Effect::Row),
    (Peer::Transactional, Effect::Row),
    (Peer::TransactionalBatches, Effect::Row),
];

/// For how long nothing must happen before it is over. Some peers wait for seconds before they connect again.
const QUIET: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Cut,
}

/// The cuts in equal distances among the kills, the last of all a cut.
fn faults(kills: usize, cuts: usize) -> Vec<Fault> {
    let all = kills + cuts;
    let is_cut = |n: usize| (n + 1) * cuts / all > n * cuts / all;
    (0..all)
        .map(|n| match is_cut(n) {
            true => Fault::Cut,
            false => Fault::Kill,
        })
        .collect()
}

pub(crate) async fn compare(args: &Args) -> Result<(), Error> {
    println!(
        "{:?} queue, {} messages, effects of {} ms\n",
        args.kind, args.messages, args.slow
    );
    println!(
        "| | effect | kills | cuts | ended by itself | stood still | missing | doubled | left in the queue | s until done | of these after the last cut |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for (peer, effect) in RUNS {
        if args.only.is_empty() || args.only.contains(&peer) {
            println!("{}", Run::of(peer, effect, args).await?);
        }
    }
    Ok(())
}

/// One peer under faults.
struct Run<'a> {
    args: &'a Args,
    peer: Peer,
    effect: Effect,
    queue: Queue,
    dead: Queue,
    database: PathBuf,
    rows: Connection,
    worker: Child,
    /// How often the worker ended without being killed.
    ended: usize,
    /// How often nothing happened until the limit, or too little.
    stalls: usize,
    kills: usize,
    cuts: usize,
}

impl<'a> Run<'a> {
    async fn of(peer: Peer, effect: Effect, args: &'a Args) -> Result<String, Error> {
        let dir = tempfile::tempdir()?;
        let database = dir.path().join("effects.db");
        let rows = store::open(&database)?;
        let name = format!("peers-recover-{}", std::process::id());
        let queue = Queue::declare(&args.url, args.kind, name.clone()).await?;
        let dead = Queue::declare(&args.url, args.kind, format!("{name}.dead")).await?;
        queue.fill(args.messages).await?;
        let worker = start(peer, effect, args, &queue, &dead, &database)?;
        let mut run = Self {
            args,
            peer,
            effect,
            queue,
            dead,
            database,
            rows,
            worker,
            ended: 0,
            stalls: 0,
            kills: 0,
            cuts: 0,
        };
        run.until_done().await
    }

    async fn until_done(&mut self) -> Result<String, Error> {
        let began = Instant::now();
        let mut last_fault = None;
        for (n, fault) in faults(self.args.kills, self.args.cuts)
            .into_iter()
            .enumerate()
        {
            let seen = self.distinct()?;
            let wanted = (seen + self.args.between).min(self.args.messages);
            if !self.reach(wanted).await? {
                self.stalls += 1;
            }
            // Not always in the same moment after a commit.
            sleep(Duration::from_millis((n as u64 * 37) % 50)).await;
            self.strike(fault).await?;
            last_fault = Some(Instant::now());
        }
        let done = self.reach(self.args.messages).await?;
        let took = began.elapsed();
        let after = last_fault
            .map(|at: Instant| at.elapsed())
            .unwrap_or_default();
        self.settle().await?;
        self.worker.kill().await?;
        self.reconnect().await?;
        self.report(done, took, after).await
    }

    /// Waits for so many different effects; false after the limit.
    async fn reach(&mut self, wanted: usize) -> Result<bool, Error> {
        let limit = Instant::now() + Duration::from_secs(self.args.limit);
        while self.distinct()? < wanted {
            if Instant::now() > limit {
                return Ok(false);
            }
            self.supervise().await?;
            sleep(Duration::from_millis(5)).await;
        }
        Ok(true)
    }

    /// Waits until nothing has happened for a while, or for the limit: what is delivered again late must show too, and acks be
    /// sent. A worker may only find out now that it was cut.
    async fn settle(&mut self) -> Result<(), Error> {
        let limit = Instant::now() + Duration::from_secs(self.args.limit);
        let mut last = (self.ended, self.all()?, Instant::now());
        while last.2.elapsed() < QUIET && Instant::now() < limit {
            self.supervise().await?;
            sleep(Duration::from_millis(5)).await;
            let (ended, all) = (self.ended, self.all()?);
            if (ended, all) != (last.0, last.1) {
                last = (ended, all, Instant::now());
            }
        }
        Ok(())
    }

    /// Starts the worker again if it has ended, as whatever supervises it would do.
    async fn supervise(&mut self) -> Result<(), Error> {
        if self.worker.try_wait()?.is_some() {
            self.ended += 1;
            sleep(Duration::from_millis(500)).await;
            self.restart()?;
        }
        Ok(())
    }

    async fn strike(&mut self, fault: Fault) -> Result<(), Error> {
        match fault {
            Fault::Kill => {
                self.worker.kill().await?;
                self.kills += 1;
                self.restart()?;
            }
            Fault::Cut => {
                let cut = Command::new("sh")
                    .args(["-c", &self.args.cut_cmd])
                    .stdout(Stdio::null())
                    .status()
                    .await?;
                if !cut.success() {
                    return Err(format!("{}: {cut}", self.args.cut_cmd).into());
                }
                // It may be about another vhost; ours shows whether it hit.
                sleep(Duration::from_millis(200)).await;
                if self.queue.is_connected() {
                    return Err(format!("{} did not cut this connection", self.args.cut_cmd).into());
                }
                self.queue
                    .connect_again(&self.args.url, self.args.kind)
                    .await?;
                self.cuts += 1;
            }
        }
        Ok(())
    }

    fn restart(&mut self) -> Result<(), Error> {
        self.worker = start(
            self.peer,
            self.effect,
            self.args,
            &self.queue,
            &self.dead,
            &self.database,
        )?;
        Ok(())
    }

    /// Our own connections were cut too.
    async fn reconnect(&mut self) -> Result<(), Error> {
        // What the killed worker held comes back a moment later, and is counted some seconds later.
        sleep(Duration::from_secs(7)).await;
        let Args { url, kind, .. } = self.args;
        self.queue = Queue::declare(url, *kind, self.queue.name.clone()).await?;
        self.dead = Queue::declare(url, *kind, self.dead.name.clone()).await?;
        Ok(())
    }

    fn distinct(&self) -> Result<usize, Error> {
        self.number("SELECT count(DISTINCT id) FROM effects")
    }

    fn all(&self) -> Result<usize, Error> {
        self.number("SELECT count(*) FROM effects")
    }

    fn number(&self, sql: &str) -> Result<usize, Error> {
        let mut query = self.rows.prepare_cached(sql)?;
        let number: i64 = query.query_row([], |row| row.get(0))?;
        Ok(usize::try_from(number)?)
    }

    async fn report(&self, done: bool, took: Duration, after: Duration) -> Result<String, Error> {
        let distinct = self.distinct()?;
        let all = self.all()?;
        let waiting = self.queue.left().await?;
        let dead = self.dead.left().await?;
        let effect = match (self.effect, self.peer) {
            (_, Peer::Transactional | Peer::TransactionalBatches) => "row, its own record",
            (Effect::RowAndInbox, _) => "row and inbox",
            (Effect::Row, _) => "row",
            (Effect::Nothing, _) => "none",
        };
        let seconds = |time: Duration| match done {
            true => format!("{:.1}", time.as_secs_f64()),
            false => format!("not within {}", self.args.limit),
        };
        let dead = match dead {
            0 => String::new(),
            dead => format!(" and {dead} dead letters"),
        };
        self.forget().await?;
        Ok(format!(
            "| {} | {effect} | {} | {} | {} | {} | {} | {} | {waiting}{dead} | {} | {} |",
            self.peer.name(),
            self.kills,
            self.cuts,
            self.ended,
            self.stalls,
            self.args.messages.saturating_sub(distinct),
            all - distinct,
            seconds(took),
            seconds(after),
        ))
    }

    async fn forget(&self) -> Result<(), Error> {
        self.queue.remove().await?;
        self.dead.remove().await
    }
}

fn start(
    peer: Peer,
    effect: Effect,
    args: &Args,
    queue: &Queue,
    dead: &Queue,
    database: &Path,
) -> Result<Child, Error> {
    let log = || match &args.logs {
        None => Ok(Stdio::null()),
        Some(dir) => log_file(&dir.join(format!("{}-{effect:?}.log", value(peer)?))),
    };
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("worker")
        .args(["--url", &args.url, "--queue", &queue.name])
        .args(["--dead-letters", &dead.name])
        .args(["--kind", &value(args.kind)?, "--peer", &value(peer)?])
        .args(["--effect", &value(effect)?])
        .args(["--slow", &args.slow.to_string()])
        .arg("--database")
        .arg(database)
        .stdin(Stdio::null())
        .stdout(log()?)
        .stderr(log()?)
        .kill_on_drop(true);
    Ok(command.spawn()?)
}

fn log_file(path: &Path) -> Result<Stdio, Error> {
    let mut options = std::fs::OpenOptions::new();
    Ok(options.create(true).append(true).open(path)?.into())
}

/// As the worker's command line names it.
fn value(of: impl clap::ValueEnum) -> Result<String, Error> {
    let value = of.to_possible_value().ok_or("it has no name")?;
    Ok(value.get_name().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_fault_is_a_cut_and_none_is_left_out() {
        let faults = faults(10, 3);
        assert_eq!(faults.iter().filter(|f| **f == Fault::Kill).count(), 10);
        assert_eq!(faults.iter().filter(|f| **f == Fault::Cut).count(), 3);
        assert!(faults.last() == Some(&Fault::Cut));
    }
}
