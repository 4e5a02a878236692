use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::Connection;

use crate::config::millis;
use crate::error::DbError;

/// The file's time is written down when it has moved on by this much.
const STALE: i64 = 1_000;

/// Where time comes from.
#[derive(Clone)]
pub(crate) struct Clock {
    wall: Arc<dyn Fn() -> SystemTime + Send + Sync>,
    uptime: Arc<dyn Fn() -> Duration + Send + Sync>,
    /// Whose uptime it is.
    boot: i64,
}

impl Clock {
    pub(crate) fn new(
        wall: impl Fn() -> SystemTime + Send + Sync + 'static,
        uptime: impl Fn() -> Duration + Send + Sync + 'static,
    ) -> Self {
        Self {
            wall: Arc::new(wall),
            uptime: Arc::new(uptime),
            boot: 0,
        }
    }

    /// Milliseconds since 1970, for people: nothing is decided by it.
    pub(crate) fn wall(&self) -> i64 {
        let since_1970 = (self.wall)().duration_since(UNIX_EPOCH);
        millis(since_1970.unwrap_or_default())
    }

    fn uptime(&self) -> i64 {
        millis((self.uptime)())
    }
}

impl Default for Clock {
    #[expect(clippy::disallowed_methods, reason = "for `published_at`")]
    fn default() -> Self {
        let mut clock = Self::new(SystemTime::now, uptime);
        clock.boot = boot();
        clock
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// How long the machine has been up, without the time that it slept: the same for all its processes, and nobody sets it.
#[cfg(unix)]
fn uptime() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::try_from(time).unwrap_or_default()
}

/// Elsewhere the wall clock stands in: set back it stands still, set forward it is believed.
#[cfg(not(unix))]
#[expect(clippy::disallowed_methods, reason = "there is no other")]
fn uptime() -> Duration {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    since_1970.unwrap_or_default()
}

/// Names this run of the machine; zero where it cannot be told, and an uptime that has fallen is all there is to see.
fn boot() -> i64 {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits = id.chars().filter(char::is_ascii_hexdigit).take(15);
    i64::from_str_radix(&digits.collect::<String>(), 16).unwrap_or_default()
}

/// The time of a file, by which claims, leases and retention end: milliseconds that were seen to pass since it was made.
///
/// It goes on with the machine's uptime, which all processes on the file share, and is written down so that it goes on
/// where it was after a restart. So it never goes faster than time passes, whatever the wall clock does: what the file
/// cannot know to have passed (while the machine was off, or slept) has not.
#[derive(Debug, Default)]
pub(crate) struct FileTime {
    /// What is to be added to the uptime.
    offset: i64,
}

impl FileTime {
    /// Reads what was written down, under the write lock.
    pub(crate) fn refresh(&mut self, conn: &Connection, clock: &Clock) -> Result<(), DbError> {
        let (time, then, boot): (i64, i64, i64) = conn
            .prepare_cached("SELECT time, uptime, boot FROM onlyonce_time")?
            .query_row([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        let uptime = clock.uptime();
        let same_boot = boot == clock.boot && (0..=uptime).contains(&then);
        let passed = if same_boot { uptime - then } else { 0 };
        // Whatever somebody else has written there, sums do not overflow.
        let now = time.clamp(0, i64::MAX / 4) + passed;
        self.offset = now - uptime;
        if !same_boot || passed >= STALE {
            conn.prepare_cached("UPDATE onlyonce_time SET time = ?1, uptime = ?2, boot = ?3")?
                .execute((now, uptime, clock.boot))?;
        }
        Ok(())
    }

    pub(crate) fn now(&self, clock: &Clock) -> i64 {
        self.offset + clock.uptime()
    }
}
