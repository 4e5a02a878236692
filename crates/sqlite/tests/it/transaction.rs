//! Transactions: turns, shared commits, what is rolled back and what is not.

use crate::support::*;
use onlyonce_core::driver::{
    ClaimResult, Fenced, HeldClaim, Owner, Sink, Source, Store, Transaction, TransactionalStore,
};
use onlyonce_core::memory::MemoryQueue;
use onlyonce_core::{Error, ErrorKind, Message, Pipeline, RetryPolicy, State};
use onlyonce_sqlite::{Database, SqliteQueue, SqliteStore, SqliteTx};
use std::sync::Arc;
use std::time::Duration;

struct Stage {
    scene: Scene,
    store: SqliteStore,
    owner: Owner,
}

impl Stage {
    async fn new() -> Self {
        Self::with_turn(Duration::from_secs(30)).await
    }

    async fn with_turn(turn: Duration) -> Self {
        let scene = Scene::new();
        let mut config = scene.config();
        config.turn = turn;
        let store = SqliteStore::open(config).await.unwrap();
        let create = |conn: &rusqlite::Connection| conn.execute_batch("CREATE TABLE effect (n)");
        store.database().with(create).await.unwrap();
        Self {
            scene,
            store,
            owner: Owner::random(),
        }
    }

    async fn claim(&self, n: i64) -> HeldClaim {
        let claimed = self
            .store
            .claim(self.owner, &[claim(n as u64)], LEASE)
            .await;
        HeldClaim::new(key(n as u64), token(&claimed.unwrap()[0]))
    }

    async fn begin(&self) -> SqliteTx {
        self.store.begin().await.unwrap()
    }

    async fn effects(&self) -> Vec<i64> {
        effects(self.store.database()).await
    }

    /// Adds a table whose rows break a deferred key.
    async fn with_orphans(self) -> Self {
        let create = |conn: &rusqlite::Connection| {
            conn.execute_batch(
                "CREATE TABLE parent (n PRIMARY KEY);
                 CREATE TABLE orphan (n REFERENCES parent DEFERRABLE INITIALLY DEFERRED)",
            )
        };
        self.store.database().with(create).await.unwrap();
        self
    }

    async fn is_done(&self, n: i64) -> bool {
        let claimed = self
            .store
            .claim(Owner::random(), &[claim(n as u64)], LEASE)
            .await;
        matches!(claimed.unwrap()[0], ClaimResult::Completed { .. })
    }
}

async fn effects(database: &Database) -> Vec<i64> {
    let read = |conn: &rusqlite::Connection| {
        let mut all = conn.prepare("SELECT n FROM effect ORDER BY n")?;
        let all = all.query_map([], |row| row.get(0))?;
        all.collect::<rusqlite::Result<Vec<i64>>>()
    };
    database.with(read).await.unwrap()
}

async fn effect(tx: &mut SqliteTx, n: i64) {
    let inserted = tx.execute("INSERT INTO effect VALUES (?1)", [n]).await;
    assert_eq!(inserted.unwrap(), 1);
}

async fn complete(tx: &mut SqliteTx, held: HeldClaim) -> Result<(), Fenced> {
    let mut done = completion(0, held.token);
    done.precondition = held.into();
    tx.complete(std::slice::from_ref(&done)).await.unwrap()
}

#[tokio::test]
async fn effect_and_record_are_committed_together() {
    let stage = Stage::new().await;
    let held = stage.claim(1).await;
    let mut tx = stage.begin().await;
    effect(&mut tx, 1).await;
    complete(&mut tx, held).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(stage.effects().await, [1]);
    assert!(stage.is_done(1).await);
    // Without an effect, too; and a transaction that did nothing.
    let held = stage.claim(2).await;
    let mut tx = stage.begin().await;
    complete(&mut tx, held).await.unwrap();
    tx.commit().await.unwrap();
    assert!(stage.is_done(2).await);
    stage.begin().await.commit().await.unwrap();
}

#[tokio::test]
async fn transactions_that_wait_for_their_turn_share_a_commit() {
    let stage = Stage::new().await;
    let (held1, held2) = (stage.claim(1).await, stage.claim(2).await);
    let mut first = stage.begin().await;
    effect(&mut first, 1).await;
    let before = stage.store.database().commits();
    let mut second = stage.begin().await;
    let second = tokio::spawn(async move {
        effect(&mut second, 2).await;
        complete(&mut second, held2).await.unwrap();
        second.commit().await.unwrap();
    });
    // The second gets in line: nothing else runs on this thread.
    tokio::task::yield_now().await;
    complete(&mut first, held1).await.unwrap();
    first.commit().await.unwrap();
    second.await.unwrap();
    assert_eq!(stage.store.database().commits().full, before.full + 1);
    assert_eq!(stage.effects().await, [1, 2]);
}

#[tokio::test]
async fn a_stale_token_is_refused_and_its_effects_rolled_back() {
    let stage = Stage::new().await;
    let zombie = stage.claim(1).await;
    stage.scene.pass(LEASE);
    let owner = Owner::random();
    let taken = stage.store.claim(owner, &[claim(1)], LEASE).await.unwrap();
    let mut tx = stage.begin().await;
    effect(&mut tx, 1).await;
    assert_eq!(complete(&mut tx, zombie).await, Err(Fenced));
    // Another savepoint of the same transaction is not touched by it.
    effect(&mut tx, 2).await;
    let live = HeldClaim::new(key(1), token(&taken[0]));
    complete(&mut tx, live).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(stage.effects().await, [2]);
}

#[tokio::test]
async fn a_savepoint_is_rolled_back_alone() {
    let stage = Stage::new().await;
    let (held1, held3) = (stage.claim(1).await, stage.claim(3).await);
    let mut tx = stage.begin().await;
    effect(&mut tx, 1).await;
    complete(&mut tx, held1).await.unwrap();
    effect(&mut tx, 2).await;
    tx.rollback().await.unwrap();
    effect(&mut tx, 3).await;
    complete(&mut tx, held3).await.unwrap();
    effect(&mut tx, 4).await;
    tx.commit().await.unwrap();
    assert_eq!(stage.effects().await, [1, 3], "4 was never completed");
}

#[tokio::test]
async fn dropping_rolls_back_all_of_it_and_nothing_else() {
    let stage = Stage::new().await;
    let (held1, held2) = (stage.claim(1).await, stage.claim(2).await);
    let mut dropped = stage.begin().await;
    effect(&mut dropped, 1).await;
    complete(&mut dropped, held1).await.unwrap();
    effect(&mut dropped, 10).await;
    let mut other = stage.begin().await;
    let other = tokio::spawn(async move {
        effect(&mut other, 2).await;
        complete(&mut other, held2).await.unwrap();
        other.commit().await.unwrap();
    });
    tokio::task::yield_now().await;
    drop(dropped);
    other.await.unwrap();
    assert_eq!(stage.effects().await, [2]);
    assert!(!stage.is_done(1).await && stage.is_done(2).await);
    // Rolled back, the claim is still held, and the message can be tried again.
    let mut again = stage.begin().await;
    effect(&mut again, 1).await;
    complete(&mut again, held1).await.unwrap();
    again.commit().await.unwrap();
    assert_eq!(stage.effects().await, [1, 2]);
}

#[tokio::test]
async fn after_a_dropped_call_only_a_rollback_is_possible() {
    let stage = Stage::new().await;
    let held = stage.claim(1).await;
    let mut tx = stage.begin().await;
    let slow = tx.with(|conn| {
        std::thread::sleep(Duration::from_millis(50));
        conn.execute("INSERT INTO effect VALUES (1)", [])
    });
    let dropped = tokio::time::timeout(Duration::from_millis(5), slow).await;
    assert!(dropped.is_err());
    let error = tx.complete(&[completion(1, held.token)]).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    tx.rollback().await.unwrap();
    effect(&mut tx, 2).await;
    complete(&mut tx, held).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(stage.effects().await, [2]);
}

#[tokio::test]
async fn a_commit_that_is_refused_gives_the_turn_back() {
    let stage = Stage::new().await;
    let held = stage.claim(1).await;
    for finish in [false, true] {
        let mut tx = stage.begin().await;
        effect(&mut tx, 1).await;
        let slow = tx.with(|_| {
            std::thread::sleep(Duration::from_millis(50));
            Ok(())
        });
        let dropped = tokio::time::timeout(Duration::from_millis(5), slow).await;
        assert!(dropped.is_err());
        let error = match finish {
            true => tx
                .complete_and_commit(&[completion(1, held.token)])
                .await
                .err(),
            false => tx.commit().await.err(),
        };
        assert!(error.expect("it is not known what was done").is_retryable());
        // Well before the turn's own limit of 30 s.
        let effects = tokio::time::timeout(Duration::from_secs(10), stage.effects()).await;
        assert!(effects.expect("the turn is over").is_empty());
    }
}

#[tokio::test]
async fn a_transaction_dropped_while_it_waits_for_its_turn_takes_none() {
    let stage = Stage::new().await;
    let held = stage.claim(1).await;
    let mut first = stage.begin().await;
    effect(&mut first, 1).await;
    let mut second = stage.begin().await;
    let waiting = tokio::spawn(async move { effect(&mut second, 2).await });
    tokio::task::yield_now().await;
    waiting.abort();
    assert!(waiting.await.is_err());
    complete(&mut first, held).await.unwrap();
    // Well before a turn's limit of 30 s, which would end one that nobody uses.
    let committed = tokio::time::timeout(Duration::from_secs(10), first.commit()).await;
    committed.expect("nobody else has a turn").unwrap();
    assert_eq!(stage.effects().await, [1]);
}

#[tokio::test]
async fn renewals_are_answered_during_a_turn_and_last() {
    let stage = Stage::new().await;
    let (held1, held2) = (stage.claim(1).await, stage.claim(2).await);
    let mut tx = stage.begin().await;
    effect(&mut tx, 1).await;
    // Both: the claim of the transaction itself, and a bystander's; a token that was never given is refused.
    let mut wrong = held2;
    wrong.token.0 += 100;
    stage.scene.pass(LEASE - Duration::from_secs(1));
    let verdicts = stage.store.renew(&[held1, held2, wrong], LEASE).await;
    assert_eq!(verdicts.unwrap(), [Ok(()), Ok(()), Err(Fenced)]);
    stage.scene.pass(LEASE - Duration::from_secs(1));
    // A claim waits for the turn to end; then it must find the renewed lease, though the transaction is rolled back.
    let rival = tokio::spawn({
        let store = stage.store.clone();
        async move {
            let batch = [claim(1), claim(2)];
            store.claim(Owner::random(), &batch, LEASE).await.unwrap()
        }
    });
    tokio::task::yield_now().await;
    drop(tx);
    for answer in rival.await.unwrap() {
        assert!(
            matches!(answer, ClaimResult::InProgress { .. }),
            "{answer:?}"
        );
    }
}

#[tokio::test]
async fn a_renewal_during_an_uncommitted_completion_is_not_refused() {
    let stage = Stage::new().await;
    let held = stage.claim(1).await;
    let mut tx = stage.begin().await;
    complete(&mut tx, held).await.unwrap();
    assert_eq!(stage.store.renew(&[held], LEASE).await.unwrap(), [Ok(())]);
    tx.commit().await.unwrap();
    assert_eq!(
        stage.store.renew(&[held], LEASE).await.unwrap(),
        [Err(Fenced)]
    );
}

#[tokio::test]
async fn a_closure_cannot_end_the_transaction_or_touch_the_records() {
    let stage = Stage::new().await;
    let held = stage.claim(1).await;
    let mut tx = stage.begin().await;
    effect(&mut tx, 1).await;
    for sql in [
        "COMMIT",
        "ROLLBACK",
        "BEGIN",
        "SAVEPOINT mine",
        "RELEASE onlyonce_tx",
        "ROLLBACK TO onlyonce_savepoint",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA query_only = 1",
        "PRAGMA foreign_keys = OFF",
        "CREATE TEMP TABLE effect (n)",
        "CREATE TEMP TRIGGER mine AFTER INSERT ON effect BEGIN SELECT RAISE(ROLLBACK, 'mine'); END",
        "CREATE TRIGGER mine AFTER INSERT ON onlyonce_recent BEGIN SELECT 1; END",
        "ATTACH ':memory:' AS other",
        "DELETE FROM onlyonce_claim",
        "DROP TABLE onlyonce_done",
    ] {
        let error = tx.with(move |conn| conn.execute_batch(sql)).await;
        let error = error.expect_err(sql);
        assert!(!error.is_retryable(), "{sql}: {error}");
        assert!(error.to_string().contains("others share"), "{sql}: {error}");
    }
    complete(&mut tx, held).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(stage.effects().await, [1]);
}

#[tokio::test]
async fn a_panic_or_an_error_in_a_closure_is_the_callers_alone() {
    let stage = Stage::new().await;
    let held = stage.claim(1).await;
    let mut tx = stage.begin().await;
    let panicked = tx.with(|_| -> rusqlite::Result<()> { panic!("on purpose") });
    assert_eq!(panicked.await.unwrap_err().kind(), ErrorKind::Other);
    let failed = tx.execute("INSERT INTO nowhere VALUES (1)", []).await;
    let error = failed.unwrap_err();
    let cause = error.cause().unwrap();
    assert!(cause.downcast_ref::<rusqlite::Error>().is_some());
    effect(&mut tx, 1).await;
    complete(&mut tx, held).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(stage.effects().await, [1]);
}

#[tokio::test]
async fn a_turn_that_lasts_too_long_is_rolled_back_and_the_next_one_comes() {
    let stage = Stage::with_turn(Duration::from_millis(50)).await;
    let held = stage.claim(1).await;
    let mut stuck = stage.begin().await;
    effect(&mut stuck, 1).await;
    let mut next = stage.begin().await;
    effect(&mut next, 2).await;
    complete(&mut next, held).await.unwrap();
    next.commit().await.unwrap();
    let error = stuck.execute("INSERT INTO effect VALUES (3)", []).await;
    let error = error.unwrap_err();
    assert_eq!(
        (error.kind(), error.is_retryable()),
        (ErrorKind::Refused, true)
    );
    assert!(stuck.complete(&[completion(1, held.token)]).await.is_err());
    assert!(stuck.commit().await.is_err());
    assert_eq!(stage.effects().await, [2]);
}

#[tokio::test]
async fn enqueueing_in_a_transaction_is_part_of_it() {
    let stage = Stage::new().await;
    let queue = SqliteQueue::open(stage.scene.config()).await.unwrap();
    let held = stage.claim(1).await;
    let mut tx = stage.begin().await;
    tx.enqueue(&queue, &[Message::new("rolled back")])
        .await
        .unwrap();
    tx.rollback().await.unwrap();
    tx.enqueue(&queue, &[Message::new("kept")]).await.unwrap();
    complete(&mut tx, held).await.unwrap();
    tx.commit().await.unwrap();
    let got = queue.receive(limit(10)).await.unwrap();
    assert_eq!(got.len(), 1);
    assert_eq!(got[0].message.body, "kept");
    Sink::close(&queue).await.unwrap();
}

#[tokio::test]
async fn what_only_shared_a_refused_commit_is_done_again_and_the_refused_alone_fails() {
    let stage = Stage::new().await.with_orphans().await;
    let (bad, good) = (stage.claim(1).await, stage.claim(2).await);
    let mut first = stage.begin().await;
    effect(&mut first, 1).await;
    first
        .execute("INSERT INTO orphan VALUES (1)", [])
        .await
        .unwrap();
    let mut second = stage.begin().await;
    let second = tokio::spawn(async move {
        effect(&mut second, 2).await;
        second.complete_and_commit(&[done(good)]).await
    });
    let claim = tokio::spawn({
        let (store, owner) = (stage.store.clone(), stage.owner);
        async move { store.claim(owner, &[claim(3)], LEASE).await }
    });
    // Both get in line: nothing else runs on this thread.
    tokio::task::yield_now().await;
    let error = first.complete_and_commit(&[done(bad)]).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.is_retryable()),
        (ErrorKind::Refused, false)
    );
    // On a busy machine it may have got a commit of its own.
    let second = second.await.unwrap();
    let mut again = vec![(bad, 1, false)];
    if let Err(shared) = &second {
        assert_eq!(shared.kind(), ErrorKind::Refused, "nothing of it happened");
        assert!(stage.effects().await.is_empty());
        again.push((good, 2, true));
    }
    token(&claim.await.unwrap().unwrap()[0]);

    for (held, n, is_good) in again {
        let mut tx = stage.store.begin_alone().await.unwrap();
        effect(&mut tx, n).await;
        if !is_good {
            tx.execute("INSERT INTO orphan VALUES (1)", [])
                .await
                .unwrap();
        }
        let committed = tx.complete_and_commit(&[done(held)]).await;
        assert_eq!(committed.is_ok(), is_good, "{committed:?}");
    }
    assert_eq!(stage.effects().await, [2]);
    assert!(stage.is_done(2).await && !stage.is_done(1).await);
}

fn done(held: HeldClaim) -> onlyonce_core::driver::Completion {
    let mut done = completion(0, held.token);
    done.precondition = held.into();
    done
}

#[tokio::test]
async fn a_transaction_alone_shares_its_commit_with_nobody() {
    let stage = Stage::new().await;
    let (held1, held2) = (stage.claim(1).await, stage.claim(2).await);
    let mut first = stage.begin().await;
    effect(&mut first, 1).await;
    let before = stage.store.database().commits();
    let mut alone = stage.store.begin_alone().await.unwrap();
    let alone = tokio::spawn(async move {
        effect(&mut alone, 2).await;
        alone.complete_and_commit(&[done(held2)]).await
    });
    tokio::task::yield_now().await;
    first
        .complete_and_commit(&[done(held1)])
        .await
        .unwrap()
        .unwrap();
    alone.await.unwrap().unwrap().unwrap();
    assert_eq!(stage.store.database().commits().full, before.full + 2);
}

#[tokio::test]
async fn sql_that_rolls_back_is_refused_and_leaves_nothing() {
    let stage = Stage::new().await;
    let held = stage.claim(1).await;
    let create = "CREATE TABLE taken (n PRIMARY KEY); INSERT INTO taken VALUES (1)";
    let create = |conn: &rusqlite::Connection| conn.execute_batch(create);
    stage.store.database().with(create).await.unwrap();
    let mut tx = stage.begin().await;
    effect(&mut tx, 1).await;
    let swallowed = |conn: &rusqlite::Connection| {
        let rolled_back = conn.execute("INSERT OR ROLLBACK INTO taken VALUES (1)", []);
        assert!(rolled_back.is_err());
        // Nothing holds this back but that there is no transaction any more.
        let late = conn.execute("INSERT INTO effect VALUES (2)", []);
        assert!(late.is_err());
        Ok(())
    };
    let refused = tx.with(swallowed).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert!(refused.to_string().contains("OR ROLLBACK"), "{refused}");
    // The same for whatever follows, until it is rolled back.
    let later = tx.execute("INSERT INTO effect VALUES (3)", []).await;
    assert_eq!(later.unwrap_err().kind(), ErrorKind::Refused);
    let completed = tx.complete(&[done(held)]).await;
    assert_eq!(completed.unwrap_err().kind(), ErrorKind::Refused);
    tx.rollback().await.unwrap();
    effect(&mut tx, 4).await;
    tx.complete_and_commit(&[done(held)])
        .await
        .unwrap()
        .unwrap();
    assert_eq!(stage.effects().await, [4]);
    // So too outside of a handler.
    let outside = stage.store.database().with(swallowed).await.unwrap_err();
    assert_eq!(outside.kind(), ErrorKind::Refused);
    assert_eq!(stage.effects().await, [4]);
}

#[tokio::test]
async fn what_a_closure_sets_is_not_kept_for_the_next() {
    use rusqlite::config::DbConfig;
    let stage = Stage::new().await;
    let mut tx = stage.begin().await;
    let set = |conn: &rusqlite::Connection| {
        conn.busy_timeout(Duration::from_millis(1))?;
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_FKEY, false)
    };
    tx.with(set).await.unwrap();
    let look = |conn: &rusqlite::Connection| {
        let timeout: i64 = conn.query_row("PRAGMA busy_timeout", [], |row| row.get(0))?;
        Ok((
            timeout,
            conn.db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_FKEY)?,
        ))
    };
    // A busy handler of its own has no time-out.
    assert_eq!(tx.with(look).await.unwrap(), (0, true));
}

async fn publish(queue: &SqliteQueue, text: &'static str) -> Result<(), Error> {
    let mut results = Sink::publish(queue, &[Message::new(text)]).await;
    results.pop().unwrap()
}

async fn publish_around_the_first_use(
    State(queue): State<Arc<SqliteQueue>>,
    tx: &mut SqliteTx,
) -> Result<(), Error> {
    publish(&queue, "before").await?;
    tx.execute("INSERT INTO effect VALUES (1)", []).await?;
    publish(&queue, "within").await
}

#[tokio::test]
async fn a_handler_that_would_wait_for_its_own_transaction_is_told_so() {
    let stage = Stage::new().await;
    let queue = Arc::new(SqliteQueue::open(stage.scene.config()).await.unwrap());
    let source = MemoryQueue::new("source");
    let message = Message::new("one").with_dedup_id("1");
    let published = Sink::publish(&source, &[message]).await;
    published.into_iter().for_each(Result::unwrap);
    let pipeline = Pipeline::transactional(source.clone(), stage.store.clone())
        .state(queue.clone())
        .retry(RetryPolicy::default().max_attempts(1))
        .stop_when_idle(Duration::from_millis(200))
        .run(publish_around_the_first_use);
    // Well before a turn's limit of 30 s.
    let report = tokio::time::timeout(Duration::from_secs(10), pipeline).await;
    assert_eq!(report.expect("it does not wait").unwrap().dead_lettered, 1);
    let reason = source.dead_letters()[0].reason.clone();
    assert!(reason.contains("SqliteTx::publish"), "{reason}");
    assert!(stage.effects().await.is_empty());
    let got = queue.receive(limit(10)).await.unwrap();
    assert_eq!(got.len(), 1);
    assert_eq!(got[0].message.body, "before");
}
