use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, UNIX_EPOCH};

use onlyonce_core::Message;
use onlyonce_core::driver::{
    Claim, ClaimResult, Completion, Fingerprint, HeldClaim, KeyDigest, ReceiveLimits, Token,
};
use onlyonce_sqlite::Config;
use tempfile::TempDir;

/// A directory for one test's file, and clocks that move when told.
pub(crate) struct Scene {
    pub(crate) dir: TempDir,
    wall: Arc<AtomicI64>,
    uptime: Arc<AtomicU64>,
}

impl Scene {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            wall: Arc::new(AtomicI64::new(1_700_000_000_000)),
            uptime: Arc::new(AtomicU64::new(3_600_000)),
        }
    }

    pub(crate) fn config(&self) -> Config {
        let (wall, uptime) = (Arc::clone(&self.wall), Arc::clone(&self.uptime));
        let wall = move || {
            let millis = u64::try_from(wall.load(SeqCst)).unwrap_or_default();
            UNIX_EPOCH + Duration::from_millis(millis)
        };
        Config::new(self.dir.path().join("test.db"))
            .queue("orders")
            .clock(wall, move || Duration::from_millis(uptime.load(SeqCst)))
    }

    pub(crate) fn pass(&self, time: Duration) {
        self.step(time.as_millis() as i64);
        self.uptime.fetch_add(time.as_millis() as u64, SeqCst);
    }

    /// Somebody sets the clock.
    pub(crate) fn step(&self, millis: i64) {
        self.wall.fetch_add(millis, SeqCst);
    }

    /// The machine starts anew.
    pub(crate) fn reboot(&self) {
        self.uptime.store(5_000, SeqCst);
    }
}

pub(crate) const LEASE: Duration = Duration::from_secs(30);
pub(crate) const DAY: Duration = Duration::from_secs(86_400);

pub(crate) fn key(n: u64) -> KeyDigest {
    let mut key = [7; 16];
    key[..8].copy_from_slice(&n.to_be_bytes());
    KeyDigest(key)
}

pub(crate) fn claim(n: u64) -> Claim {
    Claim::new(key(n), Fingerprint::of(b"payload"))
}

pub(crate) fn token(claimed: &ClaimResult) -> Token {
    match claimed {
        ClaimResult::Acquired { token, .. } => *token,
        other => panic!("not new: {other:?}"),
    }
}

pub(crate) fn completion(n: u64, token: Token) -> Completion {
    Completion::new(
        HeldClaim::new(key(n), token),
        Fingerprint::of(b"payload"),
        None,
        DAY,
    )
}

pub(crate) fn limit(messages: usize) -> ReceiveLimits {
    ReceiveLimits::new(messages, Duration::ZERO).with_bytes(1 << 20)
}

pub(crate) fn messages(texts: &[&str], group: Option<&str>) -> Vec<Message> {
    let message = |text: &&str| {
        let message = Message::new(text.as_bytes().to_vec());
        match group {
            Some(group) => message.with_group(group),
            None => message,
        }
    };
    texts.iter().map(message).collect()
}

/// Asks again until it is so, for ten seconds.
pub(crate) async fn until<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(value) = ask().await {
            return value;
        }
        assert!(tokio::time::Instant::now() < deadline, "it never came");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
