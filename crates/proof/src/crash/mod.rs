//! Real processes, killed with SIGKILL at every await boundary.
//!
//! The worker is this program again, an ordinary pipeline whose source, store, transactions, sink and handler are
//! [`watched`]: before a call, at each of its first suspensions, and when its answer is there, the [`instrument`] counts
//! and, at the point that it was told, kills the process. Nothing of this is in the pipeline. A dry run finds the
//! points; [`hunt`] kills a worker at each, then at random; [`audit`] compares the tables with what was sent.

mod audit;
mod book;
mod broker;
mod hunt;
mod instrument;
mod postgres;
mod table;
mod traffic;
mod watched;
mod worker;

use std::path::Path;
use std::time::Instant;

use onlyonce_core::BoxError;
use tokio::runtime::Builder;

use crate::{Verdict, options};
use broker::Broker;
use hunt::{Bag, Hunt};
use worker::Mode;

pub fn run(options: &options::Crash) -> Result<Verdict, String> {
    kill_and_audit(options).map_err(|error| error.to_string())
}

fn kill_and_audit(options: &options::Crash) -> Result<Verdict, BoxError> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    if let Some(work) = &options.worker {
        runtime.block_on(worker::run(&serde_json::from_str(work)?))?;
        return Ok(Verdict::Kept);
    }
    let began = Instant::now();
    let folder = tempfile::tempdir()?;
    let hunts = hunts(options, folder.path())?;
    for hunt in &hunts {
        runtime.block_on(hunt.broker.create())?;
        if let Some(url) = &hunt.postgres {
            runtime.block_on(postgres::create(url))?;
        }
    }
    table::heading(&hunts);
    let bags: Result<Vec<Bag>, BoxError> = hunts.iter().map(|hunt| hunt.run(&runtime)).collect();
    let bags = bags?;
    table::points(&bags);
    table::audits(&bags);
    table::summary(&bags, began.elapsed());
    let kept = |bag: &Bag| bag.audit.is_sound() && bag.unreached().next().is_none();
    match bags.iter().all(kept) {
        true => Ok(Verdict::Kept),
        false => Ok(Verdict::Broken),
    }
}

/// On RabbitMQ and PostgreSQL the mode that promises most; on SQLite that one for two thirds of the kills, and another for the rest.
fn hunts(options: &options::Crash, folder: &Path) -> Result<Vec<Hunt>, BoxError> {
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    let hunt = |name, mode, file: &str, kills| Hunt {
        name,
        mode,
        broker: Broker::Sqlite(folder.join(file)),
        file: folder.join(file),
        postgres: None,
        workers: 8,
        kills,
        seed,
    };
    if let Some(url) = &options.rabbitmq {
        return Ok(vec![Hunt {
            broker: Broker::RabbitMq {
                url: url.clone(),
                queue: format!("crash-{seed}"),
            },
            // The queue has a single active consumer: a second worker would only wait.
            workers: 1,
            ..hunt(
                "RabbitMQ, transactional",
                Mode::Transactional,
                "rabbitmq.db",
                options.kills,
            )
        }]);
    }
    if let Some(url) = &options.postgres {
        let mut url: url::Url = url.parse()?;
        let schema = format!("crash_{seed}");
        url.query_pairs_mut().append_pair("schema", &schema);
        return Ok(vec![Hunt {
            postgres: Some(url.into()),
            // One of them has the outbox at a time.
            workers: 4,
            ..hunt(
                "PostgreSQL, transactional",
                Mode::Transactional,
                "queues.db",
                options.kills,
            )
        }]);
    }
    let third = options.kills / 3;
    Ok(vec![
        hunt(
            "SQLite, transactional",
            Mode::Transactional,
            "transactional.db",
            options.kills - third,
        ),
        hunt(
            "SQLite, idempotent",
            Mode::Idempotent,
            "idempotent.db",
            third,
        ),
    ])
}
