//! Transactions that are in each other's way: none of it is a failure of a message.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use onlyonce_core::Failure;
use onlyonce_postgres::PgTx;
use onlyonce_postgres::sqlx::{self, Connection as _};

use crate::support::{Scene, Work, number};

/// The sum of all accounts.
async fn sum(scene: &Scene) -> String {
    let sums = scene
        .texts(&format!(
            "SELECT sum(cents)::text FROM {}",
            scene.name("account")
        ))
        .await;
    sums[0].clone()
}

async fn with_accounts(scene: Scene, accounts: u32) -> Scene {
    let insert = format!(
        "INSERT INTO {} SELECT n, 0 FROM generate_series(0, {accounts} - 1) AS n",
        scene.name("account")
    );
    scene.sql(&insert).await;
    scene
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn serialization_failures_are_no_attempts() {
    let scene = with_accounts(Scene::with("isolation=serializable").await, 2).await;
    let done = Work::of(&scene, 100)
        .attempts(1)
        .run(async |body: String, tx: &mut PgTx| {
            // Read, then written: what the other has read is not what it is any more.
            let id = i32::try_from(number(&body) % 2).unwrap();
            let cents: i64 = sqlx::query_scalar("SELECT cents FROM account WHERE id = $1")
                .bind(id)
                .fetch_one(&mut **tx)
                .await?;
            sqlx::query("UPDATE account SET cents = $2 WHERE id = $1")
                .bind(id)
                .bind(cents + 1)
                .execute(&mut **tx)
                .await?;
            Ok::<_, Failure>(())
        })
        .await;
    assert_eq!(
        (done.set_aside.len(), done.report.failed),
        (0, 0),
        "{:?}",
        done.reasons
    );
    assert!(done.report.conflicts > 0, "there was nothing to see");
    assert_eq!(sum(&scene).await, "100");
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn deadlocks_are_no_attempts() {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    let scene = with_accounts(Scene::new().await, 4).await;
    let done = Work::of(&scene, 60)
        .connections(4)
        .attempts(1)
        .run(async |body: String, tx: &mut PgTx| {
            // Each takes two rows, in either order; the first two messages take the same, each when the other has its first.
            let n = number(&body);
            let second = if n == 1 { 0 } else { (n / 4 + 1 + n) % 4 };
            for id in [n % 4, second] {
                while n < 2 && id == second && TAKEN.load(SeqCst) < 2 {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                let id = i32::try_from(id).unwrap();
                sqlx::query("UPDATE account SET cents = cents + 1 WHERE id = $1")
                    .bind(id)
                    .execute(&mut **tx)
                    .await?;
                TAKEN.fetch_add(u32::from(n < 2), SeqCst);
            }
            Ok::<_, Failure>(())
        })
        .await;
    assert_eq!(
        (done.set_aside.len(), done.report.failed),
        (0, 0),
        "{:?}",
        done.reasons
    );
    assert!(done.report.conflicts > 0, "there was nothing to see");
    assert_eq!(sum(&scene).await, "120");
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_lock_that_somebody_keeps_is_waited_for_no_longer_than_the_time_out() {
    let scene = with_accounts(Scene::with("lock_timeout=200ms").await, 1).await;
    // So that the work begins at once.
    scene.store().await;
    let mut other = scene.connect().await;
    let mut lock = other.begin().await.unwrap();
    let update = format!("UPDATE {} SET cents = 0", scene.name("account"));
    sqlx::raw_sql(sqlx::AssertSqlSafe(update))
        .execute(&mut *lock)
        .await
        .unwrap();
    static GIVEN_UP: AtomicU32 = AtomicU32::new(0);
    // Only after two have given up, so these did not get the lock.
    let release = async {
        let begun = Instant::now();
        while GIVEN_UP.load(SeqCst) < 2 {
            assert!(
                begun.elapsed() < Duration::from_secs(50),
                "they wait for it"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        lock.rollback().await.unwrap();
    };
    let work = Work::of(&scene, 5)
        .attempts(1)
        .run(async |_: String, tx: &mut PgTx| {
            let updated = sqlx::query("UPDATE account SET cents = cents + 1")
                .execute(&mut **tx)
                .await;
            GIVEN_UP.fetch_add(u32::from(updated.is_err()), SeqCst);
            updated?;
            Ok::<_, Failure>(())
        });
    let (done, ()) = tokio::join!(work, release);
    assert_eq!(done.report.failed, 0);
    assert!(done.report.conflicts >= 2);
    assert_eq!(sum(&scene).await, "5");
}
