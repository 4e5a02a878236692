//! How large a store gets whose records are written and expire in waves, if nothing is vacuumed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use onlyonce::driver::{Claim, LookUp, Store as _, TransactionalStore as _};

use super::{Args, Server, Size, Stored, claim_of, completion};
use crate::Error;

const WRITERS: usize = 4;
const BATCH: u64 = 500;
/// As a pipeline does every ten seconds, for records that are kept that much longer.
const PRUNE_EVERY: Duration = Duration::from_millis(500);

/// Of one wave: the largest size while it was written, with the records that were there then, and the size when all had expired.
struct Wave {
    took: Duration,
    most: Size,
    records: i64,
    after: Size,
}

pub(super) async fn write(server: &Server, args: &Args) -> Result<(), Error> {
    let stored = Arc::new(Stored::new(server).await?);
    stored.run(&without_vacuum()).await?;
    let (written, done) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let pruner = {
        let (stored, done) = (Arc::clone(&stored), Arc::clone(&done));
        tokio::spawn(async move {
            while !done.load(Relaxed) {
                stored.store.prune(1_000).await?;
                tokio::time::sleep(PRUNE_EVERY).await;
            }
            Ok::<_, Error>(())
        })
    };
    tell_head(args);
    for n in 0..args.waves {
        let wave = one(&stored, args, &written).await?;
        tell(n, args.records / args.waves, &wave);
    }
    done.store(true, Relaxed);
    pruner.await??;
    Arc::into_inner(stored)
        .ok_or("somebody still uses the store")?
        .end()
        .await
}

fn without_vacuum() -> String {
    let mut tables = vec!["store".to_owned(), "slot".to_owned(), "claim".to_owned()];
    tables.extend((0..8).map(|slot| format!("record_{slot}")));
    let off = |table: &String| format!("ALTER TABLE {{}}{table} SET (autovacuum_enabled = off);");
    tables.iter().map(off).collect()
}

async fn one(stored: &Arc<Stored>, args: &Args, written: &Arc<AtomicU64>) -> Result<Wave, Error> {
    let began = Instant::now();
    let retention = Duration::from_secs(args.retention);
    let end = written.load(Relaxed) + (args.records / args.waves) as u64;
    let writers = (0..WRITERS).map(|_| {
        let (stored, written) = (Arc::clone(stored), Arc::clone(written));
        tokio::spawn(async move { write_until(&stored, &written, end, retention).await })
    });
    let writers: Vec<_> = writers.collect();
    let mut most = stored.size().await?;
    while !writers.iter().all(tokio::task::JoinHandle::is_finished) {
        tokio::time::sleep(Duration::from_millis(200)).await;
        most = larger(most, stored.size().await?);
    }
    for writer in writers {
        writer.await??;
    }
    written.store(end, Relaxed);
    let took = began.elapsed();
    let records = stored.count().await?;
    while stored.count().await? > 0 {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let after = stored.size().await?;
    Ok(Wave {
        took,
        most,
        records,
        after,
    })
}

fn larger(one: Size, other: Size) -> Size {
    if one.tables + one.indexes >= other.tables + other.indexes {
        one
    } else {
        other
    }
}

/// Writes records in batches until this number has been reached by all writers together.
async fn write_until(
    stored: &Stored,
    written: &AtomicU64,
    end: u64,
    retention: Duration,
) -> Result<(), Error> {
    loop {
        let first = written.fetch_add(BATCH, Relaxed);
        if first >= end {
            return Ok(());
        }
        let claims: Vec<Claim> = (first..end.min(first + BATCH)).map(claim_of).collect();
        let mut records = Vec::with_capacity(claims.len());
        for answer in stored.store.look_up(&claims).await? {
            match answer {
                LookUp::New(looked_up) => records.push(completion(looked_up, retention)),
                other => return Err(format!("the key is not new: {other:?}").into()),
            }
        }
        let verdicts = stored.store.complete(&records).await?;
        if verdicts.iter().any(Result::is_err) {
            return Err("a record was refused".into());
        }
    }
}

#[expect(clippy::print_stdout, reason = "the benchmark's output")]
fn tell_head(args: &Args) {
    println!(
        "\n{} records in {} waves, kept for {} s, autovacuum off, MB of tables + indexes\n",
        args.records, args.waves, args.retention
    );
    println!(
        "| wave | written so far | s | largest size | records at its end | size when all were emptied |\n|---|---|---|---|---|---|"
    );
}

#[expect(clippy::print_stdout, reason = "the benchmark's output")]
fn tell(n: usize, records: usize, wave: &Wave) {
    let size = |size: Size| {
        format!(
            "{:.1} + {:.1}",
            size.tables as f64 / 1e6,
            size.indexes as f64 / 1e6
        )
    };
    println!(
        "| {} | {} | {:.0} | {} | {} | {} |",
        n + 1,
        (n + 1) * records,
        wave.took.as_secs_f64(),
        size(wave.most),
        wave.records,
        size(wave.after)
    );
}
