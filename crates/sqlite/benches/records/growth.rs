//! What a record costs where there are many already.
//!
//! The same work is done on an empty file and on one of each size in turn, several rounds, so that whatever else the
//! machine does meets all of them; a ratio is taken within its round. Every measurement is a process of its own, so that
//! time and memory are those of one file.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use onlyonce_core::Error;
use onlyonce_core::driver::{Owner, Store};
use onlyonce_sqlite::rusqlite::{self, Connection};
use onlyonce_sqlite::{Config, SqliteStore};

use crate::measure::spread;
use crate::{LEASE, memory, records};

const ROUNDS: usize = 5;
const SAMPLE: usize = 500_000;

/// How many records the store seals at once.
const SEGMENT: usize = 32_768;
/// None of the records expires meanwhile. Milliseconds.
const RETENTION: i64 = 365 * 86_400_000;

/// What a measurement says: the numbers that its process prints.
#[derive(Clone, Copy, Default)]
struct Figures {
    per_second: f64,
    cpu: f64,
    written: f64,
    slowest: f64,
    memory: f64,
    opened: f64,
}

/// Fills files, which stay in `dir` for the next run, and compares them.
pub(crate) async fn compare(dir: &Path, sizes: &[usize]) -> Result<(), Error> {
    for size in sizes {
        fill(&file(dir, *size), *size).await?;
    }
    let mut rounds = Vec::new();
    for round in 1..=ROUNDS {
        // Absent at the first time.
        std::fs::remove_dir_all(dir.join("0")).ok();
        let all = [0].iter().chain(sizes);
        let round_of: Vec<Figures> = all.map(|size| measure(&file(dir, *size))).collect();
        for (size, figures) in [0].iter().chain(sizes).zip(&round_of) {
            println!("round {round}, {size} before: {}", figures.to_line());
        }
        rounds.push(round_of);
    }
    print(sizes, &rounds);
    Ok(())
}

fn file(dir: &Path, size: usize) -> PathBuf {
    let dir = dir.join(size.to_string());
    std::fs::create_dir_all(&dir).expect("a directory for the files");
    dir.join("bench.db")
}

/// Appends to the log as another process would, for the store to seal, until the file has at least `size` records. That
/// leaves the file which claims would have made, but without a claim and a sync for each batch.
async fn fill(path: &Path, size: usize) -> Result<(), Error> {
    let began = Instant::now();
    let store = SqliteStore::open(Config::new(path)).await?;
    let mut conn = Connection::open(path).expect("a second connection");
    conn.execute_batch("PRAGMA synchronous = OFF; PRAGMA wal_autocheckpoint = 0")
        .expect("settings of that connection");
    let there: u32 = conn
        .query_row("SELECT count(*) FROM onlyonce_segment", [], |row| {
            row.get(0)
        })
        .expect("the number of segments");
    let there = there as usize * SEGMENT;
    for _ in (there..size).step_by(SEGMENT) {
        append(&mut conn).expect("room for more records");
        store.claim(Owner::random(), &[], LEASE).await?;
    }
    let added = size.saturating_sub(there);
    println!(
        "{path:?}: {added} added to {there} in {:.0?}",
        began.elapsed()
    );
    Ok(())
}

fn append(conn: &mut Connection) -> rusqlite::Result<()> {
    let tx = conn.transaction()?;
    {
        let mut insert = tx.prepare_cached(
            "INSERT INTO onlyonce_recent (key, fingerprint, expires) VALUES (?1, ?2, ?3)",
        )?;
        for _ in 0..SEGMENT {
            let random = || fastrand::u128(..).to_le_bytes();
            insert.execute((random(), random(), RETENTION))?;
        }
    }
    tx.commit()
}

/// Has a process of its own measure one file.
fn measure(path: &Path) -> Figures {
    let this = std::env::current_exe().expect("the path of this program");
    let mut command = Command::new(this);
    let output = command.arg("--measure").arg(path).output();
    let output = output.expect("this program runs");
    let printed = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    Figures::from_line(printed.trim()).unwrap_or_else(|| panic!("no figures: {complaint}"))
}

/// What that process does.
pub(crate) async fn measure_here(path: &Path) -> Result<(), Error> {
    let before = memory().unwrap_or_default();
    let began = Instant::now();
    let store = SqliteStore::open(Config::new(path)).await?;
    let opened = began.elapsed();
    let (cost, slowest) = records(&store, SAMPLE, 4, 128).await?;
    let figures = Figures {
        per_second: SAMPLE as f64 / cost.took.as_secs_f64(),
        cpu: cost.cpu.as_secs_f64() * 1e6 / SAMPLE as f64,
        written: cost
            .written
            .map_or(f64::NAN, |bytes| bytes as f64 / SAMPLE as f64),
        slowest: millis(slowest),
        memory: (memory().unwrap_or_default() - before) / 1e6,
        opened: millis(opened),
    };
    println!("{}", figures.to_line());
    Ok(())
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Figures {
    fn to_line(self) -> String {
        let Self {
            per_second,
            cpu,
            written,
            slowest,
            memory,
            opened,
        } = self;
        format!("{per_second:.0} {cpu:.3} {written:.0} {slowest:.1} {memory:.1} {opened:.0}")
    }

    fn from_line(line: &str) -> Option<Self> {
        let numbers: Result<Vec<f64>, _> = line.split(' ').map(str::parse).collect();
        let [per_second, cpu, written, slowest, memory, opened] = numbers.ok()?[..] else {
            return None;
        };
        Some(Self {
            per_second,
            cpu,
            written,
            slowest,
            memory,
            opened,
        })
    }
}

fn print(sizes: &[usize], rounds: &[Vec<Figures>]) {
    println!(
        "\n{SAMPLE} new random keys, claim and complete, 4 callers with batches of 128, {ROUNDS} rounds: median (least–most)\n"
    );
    println!(
        "| records before | records/s | × empty | CPU µs/record | × empty | bytes written/record | slowest call, ms | memory, MB | opened in, ms |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (at, size) in [0].iter().chain(sizes).enumerate() {
        let each = |of: &dyn Fn(Figures) -> f64| rounds.iter().map(|r| of(r[at])).collect();
        let ratio =
            |of: &dyn Fn(Figures) -> f64| rounds.iter().map(|r| of(r[at]) / of(r[0])).collect();
        let columns = [
            spread(each(&|f| f.per_second), 0),
            spread(ratio(&|f| f.per_second), 2),
            spread(each(&|f| f.cpu), 1),
            spread(ratio(&|f| f.cpu), 2),
            spread(each(&|f| f.written), 0),
            spread(each(&|f| f.slowest), 0),
            spread(each(&|f| f.memory), 0),
            spread(each(&|f| f.opened), 0),
        ];
        println!("| {size} | {} |", columns.join(" | "));
    }
}
