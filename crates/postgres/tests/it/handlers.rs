//! What handlers may do with their transaction, and what becomes of a message whose handler did something else.

use std::time::Duration;

use onlyonce_core::{Batch, Failure, RetryPolicy, State};
use onlyonce_postgres::PgTx;
use onlyonce_postgres::sqlx::{self, AssertSqlSafe, Connection as _, PgConnection};

use crate::support::{Scene, Work, number};

/// Writes an effect as any function that takes a connection does.
async fn write(conn: &mut PgConnection, text: &str) -> Result<(), sqlx::Error> {
    let insert = sqlx::query("INSERT INTO effect VALUES ($1)").bind(text);
    insert.execute(conn).await.map(drop)
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_handler_that_commits_or_rolls_back_is_found_out_and_its_neighbours_pass() {
    for ending in ["COMMIT", "ROLLBACK", "COMMIT AND CHAIN", "COMMIT; BEGIN"] {
        let scene = Scene::new().await;
        let work = Work::of(&scene, 20).connections(2);
        let done = work
            .state(ending)
            .run(
                async |State(ending): State<String>, body: String, tx: &mut PgTx| {
                    write(tx, &body).await?;
                    if body == "7" {
                        sqlx::raw_sql(AssertSqlSafe(ending))
                            .execute(&mut **tx)
                            .await?;
                    }
                    Ok::<_, Failure>(())
                },
            )
            .await;
        assert_eq!(done.set_aside, ["7"], "{ending}");
        assert!(
            done.reasons[0].contains("COMMIT or ROLLBACK"),
            "{:?}",
            done.reasons
        );
        let mut effects = done.effects;
        // What it has committed by itself is its own doing, and there once for each attempt.
        effects.retain(|effect| effect != "7");
        let others: Vec<String> = (0..20).filter(|n| *n != 7).map(|n| n.to_string()).collect();
        assert_eq!(effects, crate::support::sorted(others), "{ending}");
    }
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_deferred_constraint_sets_one_message_aside_and_its_neighbours_pass() {
    let scene = Scene::new().await;
    let done = Work::of(&scene, 40)
        .connections(2)
        .run(async |body: String, tx: &mut PgTx| {
            write(tx, &body).await?;
            if body == "11" {
                sqlx::query("INSERT INTO child VALUES (1)")
                    .execute(&mut **tx)
                    .await?;
            }
            Ok::<_, Failure>(())
        })
        .await;
    assert_eq!(done.set_aside, ["11"]);
    assert!(done.reasons[0].contains("23503"), "{:?}", done.reasons);
    assert_eq!(done.effects.len(), 39);
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_poison_effect_is_rolled_back_alone() {
    let scene = Scene::new().await;
    let done = Work::of(&scene, 60)
        .connections(2)
        .run(async |body: String, tx: &mut PgTx| {
            write(tx, &body).await?;
            if number(&body) % 10 == 3 {
                sqlx::query("SELECT 1 / 0").execute(&mut **tx).await?;
            }
            Ok::<_, Failure>(())
        })
        .await;
    assert_eq!(done.set_aside, ["13", "23", "3", "33", "43", "53"]);
    assert_eq!(done.effects.len(), 54);
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn an_error_that_the_handler_keeps_to_itself_fails_its_message() {
    let scene = Scene::new().await;
    let done = Work::of(&scene, 10)
        .connections(1)
        .run(async |body: String, tx: &mut PgTx| {
            write(tx, &body).await?;
            if body == "4" {
                let _ = sqlx::query("SELECT 1 / 0").execute(&mut **tx).await;
            }
            Ok::<_, Failure>(())
        })
        .await;
    assert_eq!(done.set_aside, ["4"]);
    assert!(done.reasons[0].contains("went on"), "{:?}", done.reasons);
    assert_eq!(done.effects.len(), 9);
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_transaction_begun_by_the_handler_is_a_savepoint() {
    let scene = Scene::new().await;
    let done = Work::of(&scene, 12)
        .connections(2)
        .run(async |body: String, tx: &mut PgTx| {
            let mut kept = tx.begin().await?;
            write(&mut kept, &format!("kept {body}")).await?;
            kept.commit().await?;
            let mut dropped = tx.begin().await?;
            write(&mut dropped, &format!("dropped {body}")).await?;
            let _ = sqlx::query("SELECT 1 / 0").execute(&mut *dropped).await;
            drop(dropped);
            write(tx, &format!("last {body}")).await?;
            Ok::<_, Failure>(())
        })
        .await;
    assert!(done.set_aside.is_empty(), "{:?}", done.reasons);
    assert_eq!(done.effects.len(), 24);
    assert!(
        !done
            .effects
            .iter()
            .any(|effect| effect.starts_with("dropped"))
    );
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_handler_that_is_cut_off_leaves_nothing_and_frees_its_connection() {
    let scene = Scene::new().await;
    let done = Work::of(&scene, 6)
        .connections(1)
        .timeout(Duration::from_millis(300))
        .run(async |body: String, tx: &mut PgTx| {
            write(tx, &body).await?;
            if body == "2" {
                sqlx::query("SELECT pg_sleep(1)").execute(&mut **tx).await?;
            }
            Ok::<_, Failure>(())
        })
        .await;
    assert_eq!(done.set_aside, ["2"]);
    assert_eq!(done.effects, ["0", "1", "3", "4", "5"]);
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_batch_writes_with_one_statement() {
    let scene = Scene::new().await;
    let work = Work::of(&scene, 500).duplicates(50);
    let (pipeline, after) = work.pipeline(RetryPolicy::default()).await;
    let handler = async |texts: Batch<String>, tx: &mut PgTx| {
        let texts: Vec<String> = texts.iter().map(|text| text.to_string()).collect();
        sqlx::query("INSERT INTO effect SELECT unnest($1::text[])")
            .bind(texts)
            .execute(&mut **tx)
            .await?;
        Ok::<_, Failure>(())
    };
    let report = pipeline
        .batch(100, 1 << 20, Duration::from_millis(20))
        .run(handler)
        .await
        .unwrap();
    let done = after.look(report).await;
    assert_eq!(done.effects.len(), 500);
    assert_eq!(done.report.applied, 500);
    assert_eq!(done.report.duplicates, 50);
}
