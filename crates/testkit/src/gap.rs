use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use tokio::time::timeout;

/// A check that a service or its emulator is known to fail.
///
/// It is not skipped: the check runs and must fail, so that a gap which was closed is noticed.
#[derive(Clone, Copy, Debug)]
pub struct Gap {
    /// The check's name.
    pub check: &'static str,
    /// What happens, and what the real service does instead.
    pub why: &'static str,
}

/// No check takes this long unless something hangs.
const TOO_LONG: Duration = Duration::from_secs(180);

/// Runs one check, or asserts that it fails where a gap says so.
pub(crate) async fn run(
    checks: &[&str],
    name: &str,
    gaps: &[Gap],
    check: impl Future<Output = ()>,
) {
    for gap in gaps {
        let known = checks.contains(&gap.check);
        assert!(known, "a gap names `{}`, which is no check", gap.check);
    }
    let check = async {
        let begun = Instant::now();
        let mut check = pin!(check);
        // By the wall's clock: a paused one runs ahead.
        while timeout(TOO_LONG, &mut check).await.is_err() {
            assert!(begun.elapsed() < TOO_LONG, "`{name}` hangs");
        }
    };
    let Some(gap) = gaps.iter().find(|gap| gap.check == name) else {
        return check.await;
    };
    let failed = AssertUnwindSafe(check).catch_unwind().await.is_err();
    assert!(
        failed,
        "`{name}` passes although a gap is declared; remove the gap: {}",
        gap.why
    );
    eprintln!("`{name}` fails, as is known: {}", gap.why);
}
