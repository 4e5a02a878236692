//! A worker that stands still for longer than its leases, and then goes on as if nothing had happened.

use std::time::Duration;

use crate::common::{Folder, Worker, transfers, until};

const MESSAGES: u64 = 200;

impl Folder {
    /// Whether the ledger could be written now.
    fn can_write(&self, file: &str) -> bool {
        let db = self.sql(file);
        db.busy_timeout(Duration::from_millis(50)).unwrap();
        db.execute_batch("BEGIN IMMEDIATE; ROLLBACK").is_ok()
    }

    /// Stops `worker` at a moment when `fits`.
    fn stop_when(&self, worker: &Worker, fits: impl Fn() -> bool) {
        until("a worker in the middle of its work", || {
            (worker.count("applied") >= 20).then_some(())
        });
        until("a moment to stop it", || {
            worker.signal("-STOP");
            if fits() {
                return Some(());
            }
            worker.signal("-CONT");
            None
        });
    }

    /// Every message has its record: what comes again is a duplicate.
    async fn assert_all_recorded(&self, mode: &str) {
        self.publish(&transfers(MESSAGES)).await;
        let report = self
            .worker(&["--mode", mode, "--drain-when-empty", "0.5"])
            .report();
        let counts = (report.count("applied"), report.count("duplicates"));
        assert_eq!(counts, (0, MESSAGES), "{report:?}");
    }
}

/// Stops a worker in the middle of its handlers, lets another take over and finish, and lets the first go on.
async fn a_stale_worker_changes_nothing(mode: &str, delay: &str) -> Folder {
    let folder = Folder::new();
    folder.publish(&transfers(MESSAGES)).await;
    let idle = ["--mode", mode, "--drain-when-empty", "3"];
    let slow = ["--concurrency", "16", "--prefetch", "64", delay, "0.3"];
    let stale = folder.worker(&[&idle[..], &slow].concat());
    // A process that stops while it writes keeps SQLite's lock, and nobody can take over before it goes on.
    folder.stop_when(&stale, || {
        folder.can_write("ledger.db") && folder.can_write("queue.db")
    });
    let successor = folder.worker(&idle).report();
    folder.assert_each_once(MESSAGES);
    stale.signal("-CONT");
    let stale = stale.report();
    folder.assert_each_once(MESSAGES);
    assert!(
        stale.count("cancelled") + stale.count("fenced") > 0,
        "{stale:?}"
    );
    assert!(successor.count("applied") > 0, "{successor:?}");
    let applied = stale.count("applied") + successor.count("applied");
    assert_eq!(
        applied, MESSAGES,
        "one completion each: {stale:?} {successor:?}"
    );
    folder.assert_all_recorded(mode).await;
    folder
}

#[tokio::test]
async fn no_stale_write_lands_in_transactional_mode() {
    a_stale_worker_changes_nothing("transactional", "--delay-before").await;
}

#[tokio::test]
async fn no_stale_completion_lands_in_idempotent_mode() {
    let folder = a_stale_worker_changes_nothing("idempotent", "--delay-after").await;
    // The stale worker had called the bank for messages that the other then handled again, with the same key.
    let repeated = "SELECT COUNT(*) FROM (SELECT key FROM calls GROUP BY key HAVING COUNT(DISTINCT worker) > 1)";
    let repeated: i64 = folder
        .sql("ledger.db")
        .query_row(repeated, [], |row| row.get(0))
        .unwrap();
    assert!(repeated > 0, "nobody was stopped between effect and record");
}

#[tokio::test]
async fn a_worker_that_stops_inside_its_transaction_commits_nothing_of_it() {
    let folder = Folder::new();
    folder.publish(&transfers(MESSAGES)).await;
    let arguments = ["--drain-when-empty", "4"];
    let slow = ["--prefetch", "64", "--delay-after", "0.02"];
    let stale = folder.worker(&[&arguments[..], &slow].concat());
    folder.stop_when(&stale, || !folder.can_write("ledger.db"));
    let stopped = std::time::Instant::now();
    let successor = folder.worker(&arguments);
    until("the end of its leases", || {
        (stopped.elapsed() > Duration::from_secs(3)).then_some(())
    });
    stale.signal("-CONT");
    let (stale, successor) = (stale.report(), successor.report());
    assert!(
        stale.count("cancelled") + stale.count("fenced") > 0,
        "{stale:?}"
    );
    assert!(successor.count("applied") > 0, "{successor:?}");
    folder.assert_each_once(MESSAGES);
    folder.assert_all_recorded("transactional").await;
}
