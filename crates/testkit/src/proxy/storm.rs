use std::time::Duration;

use fastrand::Rng;
use tokio::time::{Instant, sleep, sleep_until};

use super::{Direction, End, Fault, Proxy, Side};

/// What goes wrong next: one call to the proxy.
#[derive(Debug)]
enum Blow {
    Set(Direction, Fault),
    Cut(End),
    HalfOpen(Side),
    Refuse,
}

/// Every kind of fault, one after another, in the order and for the times that a seed gives.
#[derive(Clone, Debug)]
pub struct Storm(Rng);

impl Storm {
    /// The storm of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Rng::with_seed(seed))
    }

    /// Lets one fault after another act on `proxy` for a moment, up to `longest`, with a calm of the same kind after
    /// each. At the end it heals, and resets the connections, since some are broken for good. It prints what it does.
    pub async fn rage(mut self, proxy: &Proxy, lasting: Duration, longest: Duration) {
        let begun = Instant::now();
        let until = begun + lasting;
        while Instant::now() < until {
            let blow = self.blow();
            eprintln!("{:?} {blow:?}", begun.elapsed());
            strike(proxy, blow).await;
            sleep_until(until.min(Instant::now() + self.moment(longest))).await;
            proxy.heal();
            sleep(self.moment(longest)).await;
        }
        proxy.cut(End::Reset).await;
    }

    fn moment(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.0.f64())
    }

    fn blow(&mut self) -> Blow {
        let end = self.pick([End::Finish, End::Reset]);
        let direction = self.pick([Direction::ToServer, Direction::ToClient]);
        let fault = self.fault();
        match self.0.u8(..8) {
            0 => Blow::Cut(end),
            1 => Blow::HalfOpen(self.pick([Side::Client, Side::Server])),
            2 => Blow::Refuse,
            _ => Blow::Set(direction, fault),
        }
    }

    fn fault(&mut self) -> Fault {
        match self.0.u8(..5) {
            0 => Fault::Delay(Duration::from_millis(self.0.u64(..1_000))),
            1 => Fault::Throttle(self.0.u64(1_000..50_000)),
            2 => Fault::Throttle(0),
            3 => Fault::BlackHole,
            _ => Fault::Truncate(self.0.usize(..10_000)),
        }
    }

    fn pick<T: Copy>(&mut self, from: [T; 2]) -> T {
        from[usize::from(self.0.bool())]
    }
}

async fn strike(proxy: &Proxy, blow: Blow) {
    match blow {
        Blow::Set(direction, fault) => proxy.set(direction, fault),
        Blow::Cut(end) => proxy.cut(end).await,
        Blow::HalfOpen(gone) => proxy.half_open(gone).await,
        Blow::Refuse => proxy.refuse(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn blows(seed: u64) -> Vec<String> {
        let mut storm = Storm::new(seed);
        (0..200).map(|_| format!("{:?}", storm.blow())).collect()
    }

    #[test]
    fn a_seed_gives_the_same_storm_with_everything_in_it() {
        assert_eq!(blows(7), blows(7));
        assert_ne!(blows(7), blows(8));
        let kind = |blow: String| blow.replace(|c: char| c.is_ascii_digit(), "");
        let kinds: BTreeSet<_> = blows(7).into_iter().map(kind).collect();
        for kind in [
            "Refuse",
            "HalfOpen(Client)",
            "HalfOpen(Server)",
            "Cut(Reset)",
            "Cut(Finish)",
        ] {
            assert!(kinds.contains(kind), "{kind}");
        }
        for fault in ["Delay", "Throttle", "BlackHole", "Truncate"] {
            for direction in ["ToServer", "ToClient"] {
                let set = format!("Set({direction}, {fault}");
                assert!(kinds.iter().any(|kind| kind.starts_with(&set)), "{set}");
            }
        }
    }
}
