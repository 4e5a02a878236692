//! The demo in small, and the audit that it relies on.

use crate::common::{Folder, ledger, transfers};

#[test]
fn killed_workers_apply_every_transfer_once() {
    let output = ledger()
        .args(["--transfers", "5000", "--kills", "2", "--seed", "42"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    let count = |name: &str| {
        let line = text
            .lines()
            .find(|line| line.trim().starts_with(name))
            .unwrap();
        line.split_whitespace()
            .last()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    assert_eq!(count("applied once"), 5_000, "{text}");
    assert_eq!(count("worker killed"), 2, "{text}");
    assert_eq!(count("dead-lettered"), 5, "{text}");
    assert_eq!(count("applied twice") + count("lost"), 0, "{text}");
    assert!(
        count("duplicates suppressed") >= count("sent twice"),
        "{text}"
    );
}

#[tokio::test]
async fn an_audit_finds_what_is_wrong() {
    let folder = Folder::new();
    folder.publish(&transfers(50)).await;
    folder.worker(&["--drain-when-empty", "0.5"]).report();
    folder.assert_each_once(50);
    let db = folder.sql("ledger.db");
    let repeat = "INSERT INTO entries SELECT * FROM entries WHERE transfer_id = 'transfer-3'";
    for (damage, finding, count) in [
        (repeat, "applied_twice", 1),
        (
            "DELETE FROM entries WHERE transfer_id = 'transfer-5' AND account = 'b'",
            "half_applied",
            1,
        ),
        (
            "UPDATE balances SET balance = balance + 1 WHERE account = 'b'",
            "sum_of_balances",
            1,
        ),
    ] {
        db.execute(damage, []).unwrap();
        let (audit, sound) = folder.audit();
        assert!(!sound && audit[finding] == count, "{damage}: {audit}");
        assert_eq!(audit["balances_match_entries"], false, "{damage}: {audit}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn sigterm_drains_and_loses_nothing() {
    let folder = Folder::new();
    folder.publish(&transfers(400)).await;
    let first = folder.worker(&["--delay-before", "0.05", "--concurrency", "4"]);
    crate::common::until("some work", || (first.count("applied") >= 20).then_some(()));
    first.signal("-TERM");
    let first = first.report();
    let applied = first.count("applied");
    assert!((20..400).contains(&applied), "{first:?}");
    assert_eq!(first.count("cancelled"), 0, "{first:?}");
    let second = folder.worker(&["--drain-when-empty", "1"]).report();
    assert_eq!(second.count("applied"), 400 - applied, "{second:?}");
    // What the first gave back came at once, and nothing of what it applied came again.
    assert_eq!(second.count("duplicates"), 0, "{second:?}");
    folder.assert_each_once(400);
}
