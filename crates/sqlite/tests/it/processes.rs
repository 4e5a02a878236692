//! Several processes on one file, and processes that are killed. The children are this test binary itself.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use onlyonce_core::Message;
use onlyonce_core::driver::{
    ClaimResult, Disposition, Owner, Settlement, Sink, Source, Store, Transaction,
    TransactionalStore,
};
use onlyonce_sqlite::{Config, SqliteQueue, SqliteStore};

use crate::support::*;

const ROLE: &str = "ONLYONCE_SQLITE_ROLE";
const FILE: &str = "ONLYONCE_SQLITE_FILE";
const KEYS: u64 = 150;

fn spawn(role: &str, file: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["processes::child", "--exact", "--ignored", "--nocapture"])
        .env(ROLE, role)
        .env(FILE, file)
        .stdout(Stdio::piped());
    command.spawn().unwrap()
}

/// What a child says about its work, line by line.
fn said(child: &mut Child) -> impl Iterator<Item = u64> + use<> {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.filter_map(|line| line.unwrap().strip_prefix("did ")?.parse().ok())
}

fn say(n: u64) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\ndid {n}").unwrap();
    out.flush().unwrap();
}

#[tokio::test]
#[ignore = "the other tests of this module run it, as another process"]
async fn child() {
    let file = std::env::var(FILE).expect("only the other tests run this");
    let config = config(Path::new(&file));
    match std::env::var(ROLE).unwrap().as_str() {
        "work" => work(config).await,
        "race" => race(config).await,
        "consume" => consume(config).await,
        "publish" => {
            let queue = SqliteQueue::open(config).await.unwrap();
            queue
                .publish(&[Message::new("hello")])
                .await
                .pop()
                .unwrap()
                .unwrap();
        }
        role => panic!("no role {role}"),
    }
}

fn config(file: &Path) -> Config {
    let mut config = Config::new(file).queue("orders");
    config.lease = Duration::from_secs(2);
    config
}

/// Does one message after another, as long as it lives.
async fn work(config: Config) {
    let store = SqliteStore::open(config).await.unwrap();
    for n in 0.. {
        assert!(take_effect(&store, Owner::random(), n).await);
        say(n);
    }
}

/// Does what nobody else has done.
async fn race(config: Config) {
    let store = SqliteStore::open(config).await.unwrap();
    let owner = Owner::random();
    for n in 0..KEYS {
        let did = until(async || {
            let claimed = store.claim(owner, &[claim(n)], LEASE).await.unwrap();
            match &claimed[0] {
                ClaimResult::InProgress { .. } => None,
                ClaimResult::Completed { .. } => Some(false),
                new => Some(effect(&store, n, new).await),
            }
        });
        if did.await {
            say(n);
        }
    }
}

async fn take_effect(store: &SqliteStore, owner: Owner, n: u64) -> bool {
    let claimed = store.claim(owner, &[claim(n)], LEASE).await.unwrap();
    effect(store, n, &claimed[0]).await
}

async fn effect(store: &SqliteStore, n: u64, claimed: &ClaimResult) -> bool {
    let mut tx = store.begin().await.unwrap();
    tx.execute("INSERT INTO effect VALUES (?1)", [n as i64])
        .await
        .unwrap();
    let done = completion(n, token(claimed));
    tx.complete(std::slice::from_ref(&done))
        .await
        .unwrap()
        .unwrap();
    tx.commit().await.unwrap();
    true
}

/// Receives and acknowledges, as long as it lives.
async fn consume(config: Config) {
    let queue = SqliteQueue::open(config).await.unwrap();
    loop {
        let deliveries = queue.receive(limit(3)).await.unwrap();
        for delivery in deliveries {
            let text = String::from_utf8(delivery.message.body.to_vec()).unwrap();
            let ack = Settlement::new(delivery.receipt, Disposition::Ack);
            assert!(queue.settle(&[ack]).await[0].is_applied());
            say(text.parse().unwrap());
        }
    }
}

async fn stage(file: &Path) -> SqliteStore {
    let store = SqliteStore::open(config(file)).await.unwrap();
    let create = |conn: &rusqlite::Connection| conn.execute_batch("CREATE TABLE effect (n)");
    store.database().with(create).await.unwrap();
    store
}

async fn effects(store: &SqliteStore) -> Vec<u64> {
    let read = |conn: &rusqlite::Connection| {
        let mut all = conn.prepare("SELECT n FROM effect ORDER BY n")?;
        let all = all.query_map([], |row| row.get::<_, i64>(0))?;
        all.map(|n| Ok(n? as u64)).collect()
    };
    store.database().with(read).await.unwrap()
}

#[tokio::test]
async fn processes_that_race_take_effect_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("race.db");
    let store = stage(&file).await;
    let mut children = [spawn("race", &file), spawn("race", &file)];
    let did = children.each_mut().map(|child| said(child).count());
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(did[0] + did[1], KEYS as usize, "{did:?}");
    assert_eq!(effects(&store).await, Vec::from_iter(0..KEYS));
}

#[tokio::test]
async fn what_was_answered_survives_a_kill_with_its_effect() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kill.db");
    let store = stage(&file).await;
    let mut worker = spawn("work", &file);
    let last = said(&mut worker).nth(99).unwrap();
    worker.kill().unwrap();
    worker.wait().unwrap();
    let effects = effects(&store).await;
    assert_eq!(
        effects,
        Vec::from_iter(0..effects.len() as u64),
        "each once"
    );
    assert!(effects.len() as u64 > last, "{last} was answered");
    // A record for each effect, and none without.
    let claims: Vec<_> = (0..effects.len() as u64 + 2).map(claim).collect();
    let claimed = store.claim(Owner::random(), &claims, LEASE).await.unwrap();
    let is_done = |c: &&ClaimResult| matches!(c, ClaimResult::Completed { .. });
    assert_eq!(claimed.iter().filter(is_done).count(), effects.len());
}

#[tokio::test]
async fn what_was_acked_stays_acked_after_a_kill_and_the_rest_comes_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kill.db");
    let queue = SqliteQueue::open(config(&file)).await.unwrap();
    let all: Vec<Message> = (0..300).map(|n| Message::new(n.to_string())).collect();
    for result in queue.publish(&all).await {
        result.unwrap();
    }
    let mut consumer = spawn("consume", &file);
    let mut said = said(&mut consumer);
    let mut acked: BTreeSet<u64> = said.by_ref().take(50).collect();
    consumer.kill().unwrap();
    consumer.wait().unwrap();
    acked.extend(said);
    let mut rest = BTreeSet::new();
    // The last one may have been acked and not said.
    while rest.len() + acked.len() < 299 {
        let mut waiting = limit(100);
        waiting.wait = Duration::from_secs(10);
        let deliveries = queue.receive(waiting).await.unwrap();
        assert!(
            !deliveries.is_empty(),
            "{} of 300 are missing",
            300 - rest.len() - acked.len()
        );
        let text = |d: &onlyonce_core::driver::Delivery| {
            String::from_utf8(d.message.body.to_vec()).unwrap()
        };
        rest.extend(deliveries.iter().map(|d| text(d).parse::<u64>().unwrap()));
    }
    assert!(acked.is_disjoint(&rest));
}

#[tokio::test]
async fn a_waiting_receive_notices_what_another_process_publishes() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("wait.db");
    let queue = SqliteQueue::open(config(&file)).await.unwrap();
    let mut publisher = spawn("publish", &file);
    let mut waiting = limit(1);
    waiting.wait = Duration::from_secs(60);
    let got = queue.receive(waiting).await.unwrap();
    assert_eq!(got[0].message.body, "hello");
    assert!(publisher.wait().unwrap().success());
}
