use std::collections::HashMap;

use onlyonce_core::driver::Receipt;

/// Which deliveries have one lease: all of a group that a channel holds.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    /// The newest session of each channel and group.
    newest: HashMap<(u64, String), u64>,
    numbers: HashMap<Receipt, u64>,
    sessions: HashMap<u64, Session>,
}

#[derive(Debug, Default)]
struct Session {
    held: Vec<Receipt>,
    settled: Vec<Receipt>,
}

impl Sessions {
    /// `receipt` joins what the channel holds of the group, where that lease `lasts`, and another of it is returned. Otherwise
    /// it begins a session.
    pub(super) fn join(
        &mut self,
        place: (u64, String),
        receipt: &Receipt,
        lasts: impl Fn(&Receipt) -> bool,
    ) -> Option<Receipt> {
        let newest = self.newest.get(&place).copied();
        let session = newest.and_then(|number| self.sessions.get(&number));
        let other = session.and_then(|session| session.held.first());
        let other = other.filter(|other| lasts(other)).cloned();
        let next = self.sessions.len() as u64 + 1;
        let number = newest.filter(|_| other.is_some()).unwrap_or(next);
        self.newest.insert(place, number);
        self.numbers.insert(receipt.clone(), number);
        let session = self.sessions.entry(number).or_default();
        session.held.push(receipt.clone());
        other
    }

    pub(super) fn number(&self, receipt: &Receipt) -> Option<u64> {
        self.numbers.get(receipt).copied()
    }

    /// What is held of the session of `receipt`; without one, `receipt` alone.
    pub(super) fn held_with(&self, receipt: &Receipt) -> Vec<Receipt> {
        match self.session(receipt) {
            Some(session) => session.held.clone(),
            None => vec![receipt.clone()],
        }
    }

    /// The same with what is settled already: whoever lost the answer takes it for held.
    pub(super) fn all_with(&self, receipt: &Receipt) -> Vec<Receipt> {
        match self.session(receipt) {
            Some(Session { held, settled }) => [held.as_slice(), settled].concat(),
            None => vec![receipt.clone()],
        }
    }

    fn session(&self, receipt: &Receipt) -> Option<&Session> {
        self.sessions.get(self.numbers.get(receipt)?)
    }

    pub(super) fn settled(&mut self, receipt: &Receipt) {
        let number = self.numbers.get(receipt);
        if let Some(session) = number.and_then(|number| self.sessions.get_mut(number)) {
            let settled = session.held.extract_if(.., |other| other == receipt);
            session.settled.extend(settled);
        }
    }
}
