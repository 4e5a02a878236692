//! What was sent, compared with what the tables say.

use crate::audit::{Audit, Entries};
use crate::traffic::Traffic;

#[derive(Debug)]
pub struct Verdict {
    pub applied: u64,
    pub lost: u64,
    pub applied_twice: u64,
    /// Half applied, or with other accounts or amounts than were sent.
    pub wrong: u64,
    /// Transfers in the tables that were never sent.
    pub unknown: u64,
    pub audit: Audit,
}

impl Verdict {
    pub fn new(traffic: &Traffic, mut entries: Entries, audit: Audit) -> Self {
        let mut verdict = Self {
            applied: 0,
            lost: 0,
            applied_twice: 0,
            wrong: 0,
            unknown: 0,
            audit,
        };
        for n in 0..traffic.transfers {
            let transfer = traffic.transfer(n);
            let booked = entries.remove(&transfer.transfer_id).unwrap_or_default();
            let amount = transfer.amount;
            let expected = [(transfer.from, -amount), (transfer.to, amount)];
            *match booked.len() {
                0 => &mut verdict.lost,
                3.. => &mut verdict.applied_twice,
                _ if booked == expected => &mut verdict.applied,
                _ => &mut verdict.wrong,
            } += 1;
        }
        verdict.unknown = entries.len() as u64;
        verdict
    }

    /// Whether each transfer took effect once, and nothing else did.
    pub fn is_fine(&self) -> bool {
        self.lost + self.applied_twice + self.wrong + self.unknown == 0 && self.audit.is_sound()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAFFIC: Traffic = Traffic {
        seed: 3,
        transfers: 5,
        duplicates: 0,
        poison: 0,
        groups: 0,
    };

    fn sound() -> Audit {
        Audit {
            transfers: 0,
            entries: 0,
            applied_twice: 0,
            half_applied: 0,
            examples: Vec::new(),
            sum_of_balances: 0,
            balances_match_entries: true,
        }
    }

    fn all() -> Entries {
        let entries = (0..5).map(|n| {
            let t = TRAFFIC.transfer(n);
            (t.transfer_id, vec![(t.from, -t.amount), (t.to, t.amount)])
        });
        entries.collect()
    }

    fn verdict(entries: Entries) -> Verdict {
        Verdict::new(&TRAFFIC, entries, sound())
    }

    #[test]
    fn every_kind_of_wrong_is_found() {
        let fine = verdict(all());
        assert!(fine.is_fine() && fine.applied == 5);

        let mut entries = all();
        entries.remove("transfer-00000002");
        assert_eq!(verdict(entries).lost, 1);

        let mut entries = all();
        let booked = entries.get_mut("transfer-00000002").unwrap();
        booked.extend(booked.clone());
        assert_eq!(verdict(entries).applied_twice, 1);

        let mut entries = all();
        entries.get_mut("transfer-00000002").unwrap().pop();
        assert_eq!(verdict(entries).wrong, 1);

        let mut entries = all();
        entries.get_mut("transfer-00000002").unwrap()[1].1 += 1;
        assert_eq!(verdict(entries).wrong, 1);

        let mut entries = all();
        entries.insert("transfer-9".into(), vec![("a".into(), 1), ("b".into(), -1)]);
        let unknown = verdict(entries);
        assert!(unknown.unknown == 1 && !unknown.is_fine());

        let unsound = Audit {
            sum_of_balances: 1,
            ..sound()
        };
        assert!(!Verdict::new(&TRAFFIC, all(), unsound).is_fine());
    }
}
