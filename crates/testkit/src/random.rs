use std::env;
use std::time::{Duration, Instant};

/// Histories are made until this much of the wall's clock is used: many for a fast adapter, a few for a slow one.
const BUDGET: Duration = Duration::from_secs(5);
const MOST: usize = 200;

/// Says how to see a failure again.
struct Replay(u64);

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to replay this history: ONLYONCE_SEED={}", self.0);
        }
    }
}

/// Plays random histories, or the one whose seed `ONLYONCE_SEED` gives.
pub(crate) async fn histories(play: impl AsyncFn(u64)) {
    if let Ok(seed) = env::var("ONLYONCE_SEED") {
        return play(seed.parse().expect("ONLYONCE_SEED is a number")).await;
    }
    let begun = Instant::now();
    for _ in 0..MOST {
        let replay = Replay(fastrand::u64(..));
        play(replay.0).await;
        if begun.elapsed() > BUDGET {
            break;
        }
    }
}
