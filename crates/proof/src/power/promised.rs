//! What had been answered when the power failed.

use std::collections::BTreeSet;

use super::trace::Note;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Promised {
    pub published: BTreeSet<u32>,
    /// The highest that was given.
    pub token: u64,
    pub recorded: BTreeSet<[u8; 16]>,
    pub acked: BTreeSet<i64>,
    pub ran: BTreeSet<i64>,
}

impl Promised {
    /// Notes of all that.
    pub fn notes(&self) -> Vec<Note> {
        let mut notes = vec![
            Note::Published(self.published.iter().copied().collect()),
            Note::Token(self.token),
            Note::Recorded(self.recorded.iter().copied().collect()),
            Note::Acked(self.acked.iter().copied().collect()),
        ];
        notes.extend(self.ran.iter().copied().map(Note::Ran));
        notes
    }

    pub fn add(&mut self, note: &Note) {
        match note {
            Note::Opening | Note::Opened => {}
            Note::Published(ids) => self.published.extend(ids),
            Note::Token(token) => self.token = self.token.max(*token),
            Note::Recorded(keys) => self.recorded.extend(keys),
            Note::Acked(ids) => self.acked.extend(ids),
            Note::Ran(id) => {
                self.ran.insert(*id);
            }
        }
    }
}
