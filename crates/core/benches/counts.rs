//! Counts what one message costs in memory, in each mode: allocations, and under valgrind instructions.
//!
//! `cargo bench -p onlyonce-core --bench counts` prints the table. Each row is the difference between a run of many messages
//! and one of few, so what a start costs is not in it. What the queue itself costs is the row `by hand`.
//!
//! With a mode and a number of messages (`counts at_least_once 10000`) it makes one run, for a profiler.

use std::alloc::System;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::driver::{
    Delivery, Disposition, ReceiveLimits, Settlement, Sink, Source, Transaction,
};
use onlyonce_core::handler::Handler;
use onlyonce_core::memory::{MemoryQueue, MemoryStore, MemoryTx};
use onlyonce_core::{Batch, Builder, Error, Message, Pipeline};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const FEW: usize = 10_000;
const MANY: usize = 60_000;
/// By hand, this many are received and acked at once.
const BATCH: usize = 100;
static BODY: [u8; 256] = [7; 256];

type Run = fn(MemoryQueue) -> Result<(), Error>;

/// By hand first: the others are compared with it.
const MODES: [(&str, Run); 7] = [
    ("by hand", |queue| wait_for(by_hand(queue))),
    ("at_most_once", |queue| {
        run(Pipeline::at_most_once(queue), no_op)
    }),
    ("at_least_once", |queue| {
        run(Pipeline::at_least_once(queue), no_op)
    }),
    ("idempotent", |queue| {
        run(Pipeline::idempotent(queue, MemoryStore::new()), no_op)
    }),
    ("transactional", |queue| {
        run(Pipeline::transactional(queue, MemoryStore::new()), no_op_tx)
    }),
    ("idempotent, batches", |queue| {
        run(Pipeline::idempotent(queue, MemoryStore::new()), no_op_all)
    }),
    ("transactional, batches", |queue| {
        run(
            Pipeline::transactional(queue, MemoryStore::new()),
            no_op_all_tx,
        )
    }),
];

/// What a run has cost.
#[derive(Clone, Copy)]
struct Cost {
    allocations: f64,
    bytes: f64,
    /// None without valgrind.
    instructions: Option<f64>,
}

fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [mode, messages] = &args[..]
        && let Some((_, run)) = MODES.iter().find(|(name, _)| name == mode)
        && let Ok(messages) = messages.parse()
    {
        return once(*run, messages).map(drop);
    }
    println!("| | allocations | of the pipeline | bytes | instructions | of the pipeline |");
    println!("|---|---|---|---|---|---|");
    let mut by_hand = None;
    for (name, run) in MODES {
        let cost = per_message(name, run)?;
        print(name, cost, *by_hand.get_or_insert(cost));
    }
    Ok(())
}

fn print(name: &str, cost: Cost, by_hand: Cost) {
    let instructions = |what: Option<f64>| what.map_or("?".into(), |what| format!("{what:.0}"));
    let of_the_pipeline = cost.instructions.zip(by_hand.instructions);
    println!(
        "| {name} | {:.2} | {:.2} | {:.0} | {} | {} |",
        cost.allocations,
        cost.allocations - by_hand.allocations,
        cost.bytes,
        instructions(cost.instructions),
        instructions(of_the_pipeline.map(|(all, queue)| all - queue)),
    );
}

fn per_message(name: &str, run: Run) -> Result<Cost, Error> {
    let (few, many) = (once(run, FEW)?, once(run, MANY)?);
    let more = |few: f64, many: f64| (many - few) / (MANY - FEW) as f64;
    let instructions = instructions(name, FEW).zip(instructions(name, MANY));
    Ok(Cost {
        allocations: more(few.allocations, many.allocations),
        bytes: more(few.bytes, many.bytes),
        instructions: instructions.map(|(few, many)| more(few, many)),
    })
}

/// Consumes this number of messages, which wait in the queue when the counts begin.
fn once(run: Run, messages: usize) -> Result<Cost, Error> {
    let queue = MemoryQueue::new("counts");
    wait_for(publish(&queue, messages))?;
    let before = ALLOCATOR.stats();
    counted_run(run, queue.clone())?;
    let spent = ALLOCATOR.stats() - before;
    assert_eq!((queue.depth(), queue.in_flight()), (0, 0), "all are done");
    Ok(Cost {
        allocations: (spent.allocations + spent.reallocations) as f64,
        bytes: spent.bytes_allocated as f64,
        instructions: None,
    })
}

/// Valgrind knows it by its name.
#[inline(never)]
fn counted_run(run: Run, queue: MemoryQueue) -> Result<(), Error> {
    run(queue)
}

/// How many instructions such a run executes, as valgrind tells, if it is there.
fn instructions(mode: &str, messages: usize) -> Option<f64> {
    let program = std::env::current_exe().ok()?;
    let valgrind = Command::new("valgrind")
        .args(["--tool=callgrind", "--toggle-collect=*counted_run*"])
        .arg("--callgrind-out-file=/dev/null")
        .arg(program)
        .args([mode, &messages.to_string()])
        .output()
        .ok()?;
    let said = String::from_utf8_lossy(&valgrind.stderr);
    let (_, collected) = said.split_once("Collected : ")?;
    collected.split_whitespace().next()?.parse().ok()
}

/// On one thread, so that no counts depend on the scheduler.
fn wait_for<T, E: Into<Error>>(work: impl Future<Output = Result<T, E>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    runtime.block_on(work).map_err(Into::into)
}

async fn publish(queue: &MemoryQueue, messages: usize) -> Result<(), Error> {
    for first in (0..messages).step_by(BATCH) {
        let message = |n: usize| Message::new(&BODY[..]).with_dedup_id(n.to_string());
        let batch: Vec<_> = (first..first + BATCH).map(message).collect();
        for published in queue.publish(&batch).await {
            published?;
        }
    }
    Ok(())
}

/// Receives and acks, with no pipeline.
async fn by_hand(queue: MemoryQueue) -> Result<(), Error> {
    let limits = ReceiveLimits::new(BATCH, Duration::ZERO);
    loop {
        let deliveries = queue.receive(limits).await?;
        if deliveries.is_empty() {
            return Ok(());
        }
        let ack = |delivery: Delivery| Settlement::new(delivery.receipt, Disposition::Ack);
        let acks: Vec<_> = deliveries.into_iter().map(ack).collect();
        queue.settle(&acks).await;
    }
}

fn run<Tx, H, Args>(pipeline: Builder<Tx>, handler: H) -> Result<(), Error>
where
    Tx: Transaction,
    H: Handler<Tx, Args>,
    Args: 'static,
{
    let until_idle = pipeline.stop_when_idle(Duration::from_millis(100));
    wait_for(until_idle.run(handler)).map(drop)
}

async fn no_op() {}

async fn no_op_tx(_: &mut MemoryTx) {}

async fn no_op_all(_: Batch<Arc<Message>>) {}

async fn no_op_all_tx(_: Batch<Arc<Message>>, _: &mut MemoryTx) {}
