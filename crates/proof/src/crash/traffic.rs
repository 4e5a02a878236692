//! What is sent: transfers in groups, some of them twice, and messages that nobody can process.

use fastrand::Rng;
use onlyonce_core::Message;
use serde::{Deserialize, Serialize};

const ACCOUNTS: u32 = 100;
const GROUPS: u32 = 8;
/// Transfers in one portion of traffic. Every portion has something of everything.
const PORTION: u32 = 20;

/// Why nobody can process a poisonous message.
pub const POISONED: &str = "poison: no amount makes sense";

/// What the handler meets on its way.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum Obstacle {
    None,
    /// It fails at its first attempt.
    FailsOnce,
    /// It takes long enough that lease and claim must be renewed.
    Slow,
    /// It always fails.
    Poison,
}

/// What a message asks for.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Transfer {
    pub id: u32,
    pub group: Option<u32>,
    pub from: u32,
    pub to: u32,
    pub amount: i64,
    pub obstacle: Obstacle,
}

impl Transfer {
    pub fn message(&self) -> Message {
        // A struct of numbers is always JSON.
        let body = serde_json::to_vec(self).unwrap_or_default();
        let message = Message::new(body).with_dedup_id(format!("transfer-{}", self.id));
        match self.group {
            Some(group) => message.with_group(format!("group-{group}")),
            None => message,
        }
    }
}

/// Everything that was sent so far.
pub struct Traffic {
    rng: Rng,
    pub sent: Vec<Transfer>,
    pub duplicates: u64,
}

impl Traffic {
    pub fn new(seed: u64) -> Self {
        Self {
            rng: Rng::with_seed(seed),
            sent: Vec::new(),
            duplicates: 0,
        }
    }

    /// The next portion, in the order of sending.
    pub fn portion(&mut self) -> Vec<Message> {
        let first = self.sent.len() as u32;
        let mut messages = Vec::new();
        for n in 0..PORTION {
            let obstacle = match n {
                5 => Obstacle::FailsOnce,
                10 => Obstacle::Poison,
                15 => Obstacle::Slow,
                _ => Obstacle::None,
            };
            let transfer = self.transfer(first + n, obstacle);
            messages.push(transfer.message());
            self.sent.push(transfer);
            if self.rng.u8(0..10) == 0 {
                // Of this portion, or of one before.
                let back = self.rng.u32(0..=(first + n).min(2 * PORTION));
                messages.push(self.sent[(first + n - back) as usize].message());
                self.duplicates += 1;
            }
        }
        messages
    }

    fn transfer(&mut self, id: u32, obstacle: Obstacle) -> Transfer {
        let from = self.rng.u32(0..ACCOUNTS);
        Transfer {
            id,
            // What is slow would keep its whole group waiting, and us.
            group: (obstacle != Obstacle::Slow && self.rng.bool()).then(|| self.rng.u32(0..GROUPS)),
            from,
            to: (from + self.rng.u32(1..ACCOUNTS)) % ACCOUNTS,
            amount: self.rng.i64(1..1_000),
            obstacle,
        }
    }

    pub fn poison(&self) -> impl Iterator<Item = &Transfer> {
        let of = |transfer: &&Transfer| transfer.obstacle == Obstacle::Poison;
        self.sent.iter().filter(of)
    }
}
