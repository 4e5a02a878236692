//! What is sent: transfers, some of them again, and messages that nobody can process. A seed gives the same each time.

use fastrand::Rng;
use onlyonce::Message;
use onlyonce::attributes::IDEMPOTENCY_KEY;

use crate::worker::Transfer;

/// A repeated message comes at most this number of transfers after the first.
const REPEAT_WITHIN: u64 = 2_000;
const ACCOUNTS: u64 = 1_000;

#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    pub seed: u64,
    pub transfers: u64,
    /// How many transfers are sent twice, in percent.
    pub duplicates: u8,
    pub poison: u64,
    /// Every second transfer belongs to one of this number of groups.
    pub groups: u64,
}

/// One message to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    Transfer(u64),
    Duplicate(u64),
    Poison(u64),
}

impl Traffic {
    /// Everything, in the order of sending.
    pub fn items(&self) -> Vec<Item> {
        let mut rng = Rng::with_seed(self.seed);
        let mut items = Vec::new();
        for n in 0..self.transfers {
            items.push((n, Item::Transfer(n)));
            if rng.u8(0..100) < self.duplicates {
                items.push((n + rng.u64(0..REPEAT_WITHIN), Item::Duplicate(n)));
            }
        }
        for n in 0..self.poison {
            items.push((rng.u64(0..=self.transfers), Item::Poison(n)));
        }
        // Stable: a duplicate that is due at once still comes after its transfer.
        items.sort_by_key(|(due, _)| *due);
        items.into_iter().map(|(_, item)| item).collect()
    }

    pub fn message(&self, item: Item) -> Message {
        match item {
            Item::Transfer(n) => self.transfer_message(n),
            Item::Duplicate(n) => again(self.transfer_message(n)),
            Item::Poison(n) => poison(n),
        }
    }

    /// Transfer number `n`.
    pub fn transfer(&self, n: u64) -> Transfer {
        let mut rng = Rng::with_seed(
            self.seed
                .wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        );
        let from = rng.u64(0..ACCOUNTS);
        let to = (from + rng.u64(1..ACCOUNTS)) % ACCOUNTS;
        Transfer {
            transfer_id: format!("transfer-{n:08}"),
            from: format!("account-{from:04}"),
            to: format!("account-{to:04}"),
            amount: rng.i64(1..100_000),
        }
    }

    fn transfer_message(&self, n: u64) -> Message {
        let transfer = self.transfer(n);
        let message = Message::new(json(&transfer)).with_dedup_id(transfer.transfer_id);
        match n {
            _ if self.groups == 0 || n % 2 == 1 => message,
            _ => message.with_group(format!("group-{}", n / 2 % self.groups)),
        }
    }
}

/// The message as of a producer that does not know whether it was sent: it has another id for the broker, since SQS would
/// drop it otherwise, and the same key.
fn again(message: Message) -> Message {
    let key = message.dedup_id.clone().unwrap_or_default();
    let id = format!("{key}-again");
    message
        .with_attribute(IDEMPOTENCY_KEY, key)
        .with_dedup_id(id)
}

fn json(transfer: &Transfer) -> Vec<u8> {
    // A struct of texts and a number is always JSON.
    serde_json::to_vec(transfer).unwrap_or_default()
}

/// A message that can never be processed, of one kind or another.
fn poison(n: u64) -> Message {
    let id = format!("poison-{n}");
    let transfer = |amount| {
        json(&Transfer {
            transfer_id: id.clone(),
            from: "account-0000".into(),
            to: "account-0001".into(),
            amount,
        })
    };
    match n % 5 {
        0 => Message::new(vec![0xff, 0xfe, 0x00, 0x80]).with_dedup_id(id),
        1 => Message::new(transfer(1)[..20].to_vec()).with_dedup_id(id),
        2 => Message::new(r#"{"transfer_id": 7}"#).with_dedup_id(id),
        3 => Message::new(transfer(-1)).with_dedup_id(id),
        // It would be fine, but a redelivery of it could not be told from another transfer.
        _ => Message::new(transfer(1)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use onlyonce::KeyPolicy;

    use super::*;

    #[test]
    fn every_transfer_comes_first_once_and_then_perhaps_again() {
        let traffic = Traffic {
            seed: 7,
            transfers: 5_000,
            duplicates: 10,
            poison: 9,
            groups: 3,
        };
        let items = traffic.items();
        let mut seen = HashSet::new();
        let (mut duplicates, mut poison) = (0, 0);
        for item in &items {
            match item {
                Item::Transfer(n) => assert!(seen.insert(*n)),
                Item::Duplicate(n) => {
                    assert!(seen.contains(n), "{n} is repeated before it came");
                    duplicates += 1;
                }
                Item::Poison(_) => poison += 1,
            }
        }
        assert_eq!((seen.len(), poison), (5_000, 9));
        assert!((400..600).contains(&duplicates), "{duplicates}");
        assert_eq!(items, traffic.items());
    }

    #[test]
    fn a_duplicate_has_the_same_key_and_another_id() {
        let traffic = Traffic {
            seed: 7,
            transfers: 1,
            duplicates: 100,
            poison: 0,
            groups: 1,
        };
        let [first, again] = [Item::Transfer(0), Item::Duplicate(0)].map(|it| traffic.message(it));
        let key = |message| KeyPolicy::default().choose(message);
        assert!(key(&first).is_some() && key(&first) == key(&again));
        assert_ne!(first.dedup_id, again.dedup_id);
        assert_eq!((first.body, first.group), (again.body, again.group));
    }

    #[test]
    fn transfers_move_money_between_two_accounts() {
        let traffic = Traffic {
            seed: 1,
            transfers: 0,
            duplicates: 0,
            poison: 0,
            groups: 0,
        };
        for n in 0..10_000 {
            let transfer = traffic.transfer(n);
            assert!(
                transfer.from != transfer.to && transfer.amount > 0,
                "{transfer:?}"
            );
        }
    }
}
