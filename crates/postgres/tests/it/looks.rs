//! What the store finds of its server.

use onlyonce_core::driver::{Durability, Store as _};

use crate::support::Scene;

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_server_that_syncs_is_durable_and_tells_its_settings() {
    let scene = Scene::new().await;
    let info = scene.store().await.store_info().await.unwrap();
    assert_eq!(
        (info.durability, info.transactions),
        (Durability::Disk, Some(8))
    );
    let names: Vec<&str> = info.settings.iter().map(|(name, _)| &**name).collect();
    for name in ["server_version", "synchronous_commit", "fsync", "clock"] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert!(!info.name.contains("onlyonce:"), "{}", info.name);
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn commits_that_nobody_waits_for_are_not_durable() {
    let scene = Scene::new().await;
    let mut config = scene.config();
    config.connect = config
        .connect
        .clone()
        .options([("synchronous_commit", "off")]);
    let store = onlyonce_postgres::PgStore::open(config).await.unwrap();
    assert_eq!(
        store.store_info().await.unwrap().durability,
        Durability::Machine
    );
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn more_connections_than_the_server_has_are_refused_with_what_to_change() {
    let scene = Scene::with("connections=999").await;
    let error = scene
        .store()
        .await
        .store_info()
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`connections` lower") && error.contains("max_connections"),
        "{error}"
    );
}
