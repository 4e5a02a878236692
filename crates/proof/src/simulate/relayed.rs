//! What must be true of the messages that relays have published, once the outbox is empty.
//!
//! That each is what was committed, and comes in the order of its group, is seen when it arrives; that what is set aside was
//! refused, when it is set aside: see [`Downstream`](onlyonce_testkit::simulated::Downstream).

use std::collections::BTreeMap;
use std::ops::AddAssign;

use onlyonce_core::Message;
use onlyonce_testkit::simulated::Committed;

use super::world::World;

/// How much was relayed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Relayed {
    pub committed: u64,
    pub repetitions: u64,
    pub set_aside: u64,
}

impl AddAssign for Relayed {
    fn add_assign(&mut self, other: Self) {
        self.committed += other.committed;
        self.repetitions += other.repetitions;
        self.set_aside += other.set_aside;
    }
}

pub fn count(world: &World) -> Relayed {
    let mut all = Relayed::default();
    for message in world.storage.outgoing_messages() {
        all.committed += 1;
        all.repetitions += u64::from(message.published.saturating_sub(1));
        all.set_aside += u64::from(message.set_aside);
    }
    all
}

/// Which message of the plan had it published, and as which of its own.
pub fn origin(message: &Message) -> Option<(usize, usize)> {
    let body = std::str::from_utf8(&message.body).ok()?;
    let mut parts = body.split('/').map(str::parse);
    match (parts.next(), parts.next()) {
        (Some(Ok(index)), Some(Ok(place))) => Some((index, place)),
        _ => None,
    }
}

/// Says which promises were broken, and how.
pub fn broken(world: &World, effects: &[usize]) -> Vec<String> {
    let messages = world.storage.outgoing_messages();
    let mut broken = belongs_to_effects(world, &messages, effects);
    for Committed {
        message,
        published,
        set_aside,
        ..
    } in &messages
    {
        let label = String::from_utf8_lossy(&message.body);
        if *published == 0 && !set_aside {
            broken.push(format!("{label} was committed and never published"));
        }
    }
    broken
}

/// With each effect, each of its messages was committed once; without one, none.
fn belongs_to_effects(world: &World, messages: &[Committed], effects: &[usize]) -> Vec<String> {
    let mut times: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    for origin in messages.iter().filter_map(|one| origin(&one.message)) {
        *times.entry(origin).or_default() += 1;
    }
    let mut broken = Vec::new();
    for (index, planned) in world.plan.messages.iter().enumerate() {
        let effects = effects.iter().filter(|effect| **effect == index).count();
        for place in 0..planned.publishes.len() {
            let committed = times.get(&(index, place)).copied().unwrap_or_default();
            if committed != effects {
                broken.push(format!(
                    "message {index} had {effects} effects, and {committed} of its message {place} to publish"
                ));
            }
        }
    }
    broken
}
