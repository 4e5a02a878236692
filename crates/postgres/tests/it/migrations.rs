//! Tables are made once, by a worker that has the right, and are of the version that it knows.

use onlyonce_core::driver::{Claim, Fingerprint, KeyDigest, LookUp, TransactionalStore as _};
use onlyonce_core::{ErrorKind, State};
use onlyonce_postgres::sqlx::{self, AssertSqlSafe};
use onlyonce_postgres::{Config, PgStore, PgTx, migration};

use crate::support::{ADMIN, Scene, Work, environment};

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn ten_workers_may_make_the_tables_at_once() {
    let scene = Scene::new().await;
    let opened = (0..10).map(|_| PgStore::open(scene.config()));
    for store in futures_util::future::join_all(opened).await {
        let key = Claim::new(KeyDigest([1; 16]), Fingerprint::of(b"x"));
        let answers = store.unwrap().look_up(&[key]).await.unwrap();
        assert!(matches!(answers[0], LookUp::New(_)));
    }
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_worker_that_meets_newer_tables_says_so_and_stops() {
    let scene = Scene::new().await;
    scene.store().await;
    scene
        .sql(&format!(
            "UPDATE {} SET version = 1000",
            scene.name("onlyonce_store")
        ))
        .await;
    let error = PgStore::open(scene.config()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("version 1000"), "{error}");
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_user_that_may_not_make_tables_works_once_an_administrator_has() {
    let scene = Scene::new().await;
    let role = format!("worker_{}", scene.schema);
    let url =
        environment(crate::support::URL).replace("onlyonce:onlyonce@", &format!("{role}:secret@"));
    let config = |more: &str| -> Config {
        format!("{url}?schema={}{more}", scene.schema)
            .parse()
            .unwrap()
    };
    Scene::sql_at(
        &environment(ADMIN),
        &format!("CREATE ROLE {role} LOGIN PASSWORD 'secret'"),
    )
    .await;

    scene
        .sql(&format!("GRANT USAGE ON SCHEMA {} TO {role}", scene.schema))
        .await;
    let error = PgStore::open(config("")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
    assert!(
        error.to_string().contains("onlyonce_postgres::migration"),
        "{error}"
    );
    let error = PgStore::open(config("&migrate=false")).await.unwrap_err();
    assert!(error.to_string().contains("no tables"), "{error}");
    assert!(!format!("{error} {error:?}").contains("secret"));

    scene.sql(&migration(&scene.config())).await;
    let grants = format!(
        "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA {0} TO {role};
         GRANT SELECT, USAGE, UPDATE ON ALL SEQUENCES IN SCHEMA {0} TO {role}",
        scene.schema
    );
    scene.sql(&grants).await;
    let mut config = config("&migrate=false");
    config.connect = config
        .connect
        .clone()
        .options([("search_path", &scene.schema)]);
    let done = Work::of(&scene, 50)
        .config(config)
        .run(crate::support::write_effect)
        .await;
    assert_eq!(done.effects.len(), 50);
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn schema_and_prefix_are_the_users_and_search_path_may_be_anything() {
    let scene = Scene::with("prefix=dedup_").await;
    let mut config = scene.config();
    config.connect = config
        .connect
        .clone()
        .options([("search_path", "pg_temp, nowhere")]);
    let insert = format!("INSERT INTO {} VALUES ($1)", scene.name("effect"));
    let handler = async |State(insert): State<String>, body: String, tx: &mut PgTx| {
        sqlx::query(AssertSqlSafe(insert))
            .bind(body)
            .execute(&mut **tx)
            .await
            .map(drop)
    };
    let done = Work::of(&scene, 30)
        .config(config)
        .state(&insert)
        .run(handler)
        .await;
    assert_eq!(done.effects.len(), 30);
    let tables = format!(
        "SELECT tablename FROM pg_tables WHERE schemaname = '{}' AND tablename LIKE 'dedup_%'",
        scene.schema
    );
    assert!(scene.texts(&tables).await.len() > 5);
}
