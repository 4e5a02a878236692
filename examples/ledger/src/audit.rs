//! What the tables say, and nothing but the tables.

use std::collections::HashMap;

use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct Audit {
    /// Different transfers that have entries.
    pub transfers: i64,
    pub entries: i64,
    /// Transfers with more than their two entries.
    pub applied_twice: i64,
    /// Transfers with fewer, or whose entries do not cancel out.
    pub half_applied: i64,
    /// Some of the transfers that are wrong.
    pub examples: Vec<String>,
    /// Money is moved, never made: 0.
    pub sum_of_balances: i64,
    pub balances_match_entries: bool,
}

impl Audit {
    /// Whether every transfer in the tables is there once and whole.
    pub fn is_sound(&self) -> bool {
        self.applied_twice == 0
            && self.half_applied == 0
            && self.sum_of_balances == 0
            && self.balances_match_entries
    }

    /// Whether it has as many transfers as were expected, if something was.
    pub fn has(&self, expected: Option<u64>) -> bool {
        expected.is_none_or(|expected| i64::try_from(expected) == Ok(self.transfers))
    }
}

/// The entries of each transfer: account and amount.
pub type Entries = HashMap<String, Vec<(String, i64)>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_number_of_transfers_is_noticed() {
        let audit = Audit {
            transfers: 3,
            entries: 6,
            applied_twice: 0,
            half_applied: 0,
            examples: Vec::new(),
            sum_of_balances: 0,
            balances_match_entries: true,
        };
        assert!(audit.has(None) && audit.has(Some(3)));
        assert!(!audit.has(Some(2)) && !audit.has(Some(4)) && !audit.has(Some(u64::MAX)));
    }
}
