//! Which messages share a commit.

use onlyonce_core::Failure;
use onlyonce_postgres::PgTx;
use onlyonce_postgres::sqlx;

use crate::support::{Scene, Work};

async fn transactions(scene: &Scene) -> u64 {
    let counts = scene
        .texts(&format!(
            "SELECT count(DISTINCT tx)::text FROM {}",
            scene.name("marked")
        ))
        .await;
    counts[0].parse().unwrap()
}

async fn mark(work: Work<'_>) -> crate::support::Done {
    work.run(async |body: String, tx: &mut PgTx| {
        sqlx::query("INSERT INTO marked (text) VALUES ($1)")
            .bind(body)
            .execute(&mut **tx)
            .await?;
        Ok::<_, Failure>(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn messages_that_wait_for_a_connection_share_commits() {
    let scene = Scene::new().await;
    let done = mark(Work::of(&scene, 2_000).connections(2)).await;
    assert_eq!(done.report.applied, 2_000);
    let transactions = transactions(&scene).await;
    assert!(
        transactions <= 400,
        "{transactions} transactions for 2,000 messages"
    );
    let most = scene
        .texts(&format!(
            "SELECT max(n)::text FROM (SELECT count(*) AS n FROM {} GROUP BY tx) AS t",
            scene.name("marked")
        ))
        .await;
    assert!(
        most[0].parse::<u64>().unwrap() <= 64,
        "{most:?} in one transaction"
    );
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn messages_that_do_not_wait_share_nothing() {
    let scene = Scene::new().await;
    let done = mark(Work::of(&scene, 100).connections(64).concurrency(4)).await;
    assert_eq!(done.report.applied, 100);
    assert_eq!(transactions(&scene).await, 100);
}
