//! Records expire with their partition, and a key is recorded once although partitions change.

use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, Fingerprint, HeldClaim, KeyDigest, LookUp, Owner, Store,
    Transaction, TransactionalStore,
};
use onlyonce_postgres::PgStore;
use onlyonce_postgres::sqlx;

use crate::support::Scene;

fn claim(n: u64) -> Claim {
    let digest = Fingerprint::of(&n.to_be_bytes());
    Claim::new(KeyDigest(digest.0), digest)
}

fn completion(
    precondition: impl Into<onlyonce_core::driver::Precondition>,
    n: u64,
    retention: Duration,
) -> Completion {
    Completion::new(precondition, claim(n).fingerprint, None, retention)
}

/// Records what is new among these, without an effect.
async fn record(store: &PgStore, keys: std::ops::Range<u64>, retention: Duration) {
    let claims: Vec<Claim> = keys.clone().map(claim).collect();
    let answers = store.look_up(&claims).await.unwrap();
    let completions: Vec<Completion> = keys
        .zip(answers)
        .filter_map(|(n, answer)| match answer {
            LookUp::New(looked_up) => Some(completion(looked_up, n, retention)),
            _ => None,
        })
        .collect();
    let verdicts = store.complete(&completions).await.unwrap();
    assert!(verdicts.iter().all(Result::is_ok));
}

async fn partitions(scene: &Scene) -> Vec<String> {
    let sql = format!(
        "SELECT tableoid::regclass::text || ' ' || count(*) FROM {} GROUP BY tableoid ORDER BY 1",
        scene.name("onlyonce_record")
    );
    scene.texts(&sql).await
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn partitions_are_emptied_when_all_of_their_records_have_expired() {
    const RETENTION: Duration = Duration::from_millis(1_500);
    let scene = Scene::new().await;
    let store = scene.store().await;
    let mut most = 0;
    for round in 0..60 {
        record(&store, round * 100..(round + 1) * 100, RETENTION).await;
        store.prune(1_000).await.unwrap();
        let records = scene
            .texts(&format!(
                "SELECT count(*)::text FROM {}",
                scene.name("onlyonce_record")
            ))
            .await;
        most = most.max(records[0].parse::<u64>().unwrap());
        // What is recorded is known for as long as it has to be.
        let known = store.look_up(&[claim(round * 100)]).await.unwrap();
        assert!(matches!(known[0], LookUp::Completed { .. }));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(partitions(&scene).await.len() > 1, "they did not change");
    assert!(
        most < 4_000,
        "{most} of 6,000 records at once, of which 1,500 were alive"
    );
    tokio::time::sleep(RETENTION * 2).await;
    for _ in 0..3 {
        store.prune(1_000).await.unwrap();
    }
    let new = store.look_up(&[claim(0), claim(5_999)]).await.unwrap();
    assert!(
        new.iter().all(|answer| matches!(answer, LookUp::New(_))),
        "{new:?}"
    );
}

/// The present partition has had its time.
async fn change_partition(scene: &Scene, store: &PgStore) {
    let age = "UPDATE {slot} SET opened_at = '-infinity' WHERE closed_at IS NULL AND opened_at IS NOT NULL";
    scene
        .sql(&age.replace("{slot}", &scene.name("onlyonce_slot")))
        .await;
    store.prune(1_000).await.unwrap();
}

/// Takes a key's effect once, by a look-up or by a claim.
async fn run_once(scene: &Scene, store: &PgStore, n: u64, claims: bool) {
    let precondition = if claims {
        match store
            .claim(Owner::random(), &[claim(n)], Duration::from_secs(30))
            .await
            .as_deref()
        {
            Ok([ClaimResult::Acquired { token, .. }]) => {
                HeldClaim::new(claim(n).key, *token).into()
            }
            _ => return,
        }
    } else {
        match store.look_up(&[claim(n)]).await.as_deref() {
            Ok([LookUp::New(looked_up)]) => onlyonce_core::driver::Precondition::from(*looked_up),
            _ => return,
        }
    };
    let Ok(mut tx) = store.begin().await else {
        return;
    };
    let insert = format!("INSERT INTO {} VALUES ($1)", scene.name("effect"));
    let written = sqlx::query(sqlx::AssertSqlSafe(insert))
        .bind(n.to_string())
        .execute(&mut *tx)
        .await;
    if written.is_ok() {
        let retention = Duration::from_secs(3_600);
        let _ = tx
            .complete_and_commit(&[completion(precondition, n, retention)])
            .await;
    }
}

async fn a_key_takes_effect_once(scene: Scene) {
    const KEYS: u64 = 600;
    let scene = Arc::new(scene);
    let store = scene.store().await;
    // So that the partition has a retention.
    record(&store, 1_000_000..1_000_001, Duration::from_secs(3_600)).await;
    let racers = (0..6_u64).map(|racer| {
        let (scene, store) = (Arc::clone(&scene), store.clone());
        tokio::spawn(async move {
            for n in 0..KEYS {
                run_once(&scene, &store, n, (n + racer) % 5 == 0).await;
            }
        })
    });
    let racers: Vec<_> = racers.collect();
    let mut changes = 0;
    while !racers.iter().all(tokio::task::JoinHandle::is_finished) {
        if changes < 7 {
            change_partition(&scene, &store).await;
            changes += 1;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for racer in racers {
        racer.await.unwrap();
    }
    for n in 0..KEYS {
        // What was in somebody's way is done now.
        run_once(&scene, &store, n, false).await;
    }
    let twice = scene
        .texts(&format!(
            "SELECT text FROM {} GROUP BY text HAVING count(*) > 1",
            scene.name("effect")
        ))
        .await;
    assert!(twice.is_empty(), "{twice:?} took effect twice");
    let once = scene
        .texts(&format!(
            "SELECT DISTINCT text FROM {}",
            scene.name("effect")
        ))
        .await;
    let (claim, record) = (scene.name("onlyonce_claim"), scene.name("onlyonce_record"));
    let claimed = format!(
        "SELECT key::text FROM {claim} AS c WHERE NOT EXISTS (SELECT FROM {record} AS r WHERE r.key = c.key)"
    );
    let claimed = scene.texts(&claimed).await;
    assert_eq!(once.len() + claimed.len(), usize::try_from(KEYS).unwrap());
    assert!(
        partitions(&scene).await.len() > 3,
        "partitions did not change meanwhile"
    );
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_key_takes_effect_once_while_partitions_change() {
    a_key_takes_effect_once(Scene::new().await).await;
}

#[tokio::test]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_key_takes_effect_once_while_partitions_change_in_serializable_transactions() {
    a_key_takes_effect_once(Scene::with("isolation=serializable").await).await;
}
