//! The file itself: who may read it, and what happens when it goes away.
#![cfg(unix)]

use std::os::unix::fs::PermissionsExt;

use onlyonce_core::ErrorKind;
use onlyonce_core::driver::{Owner, Store, Transaction, TransactionalStore};
use onlyonce_sqlite::SqliteStore;

use crate::support::*;

#[tokio::test]
async fn the_files_are_their_owners_alone() {
    let scene = Scene::new();
    let store = SqliteStore::open(scene.config()).await.unwrap();
    let claimed = store.claim(Owner::random(), &[claim(1)], LEASE).await;
    claimed.unwrap();
    for end in ["", "-wal", "-shm"] {
        let path = scene.dir.path().join(format!("test.db{end}"));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{path:?}");
    }
}

#[tokio::test]
async fn a_file_that_exists_keeps_its_mode() {
    let scene = Scene::new();
    let path = scene.config().path;
    std::fs::write(&path, "").unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    let _store = SqliteStore::open(scene.config()).await.unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
}

#[tokio::test]
async fn a_file_that_is_deleted_or_replaced_is_noticed_and_nothing_more_is_done() {
    for replaced in [false, true] {
        let scene = Scene::new();
        let path = scene.config().path;
        let store = SqliteStore::open(scene.config()).await.unwrap();
        let create = |conn: &rusqlite::Connection| conn.execute_batch("CREATE TABLE effect (n)");
        store.database().with(create).await.unwrap();
        let claimed = store.claim(Owner::random(), &[claim(1)], LEASE).await;
        let token = token(&claimed.unwrap()[0]);
        let mut tx = store.begin().await.unwrap();
        tx.execute("INSERT INTO effect VALUES (1)", [])
            .await
            .unwrap();

        std::fs::rename(&path, scene.dir.path().join("moved.db")).unwrap();
        if replaced {
            std::fs::write(&path, "").unwrap();
        }
        let error = tx.complete_and_commit(&[completion(1, token)]).await;
        let error = error.unwrap_err();
        assert_eq!(
            (error.kind(), error.is_retryable()),
            (ErrorKind::NotFound, false)
        );
        assert!(error.to_string().contains("deleted or replaced"), "{error}");
        // So a pipeline stops, with the reason.
        let later = store.claim(Owner::random(), &[claim(2)], LEASE).await;
        assert_eq!(later.unwrap_err().to_string(), error.to_string());
        // Opened anew, it is the file that is there now.
        let store = SqliteStore::open(scene.config()).await.unwrap();
        let claimed = store.claim(Owner::random(), &[claim(1)], LEASE).await;
        crate::support::token(&claimed.unwrap()[0]);
    }
}
