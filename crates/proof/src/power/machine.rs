//! A machine that does again what was recorded, until its power fails.

use super::disk::{Disk, Image};
use super::luck::Luck;
use super::promised::Promised;
use super::trace::{Event, Note};

pub struct Machine<'a> {
    events: &'a [Event],
    /// How many of them have happened.
    at: usize,
    disk: Disk,
    promised: Promised,
}

/// One power failure.
#[derive(Debug)]
pub struct Case {
    /// After this number of events.
    pub at: usize,
    /// How many changes chance has decided about.
    pub unsynced: usize,
    pub image: Image,
    pub promised: Promised,
}

impl<'a> Machine<'a> {
    pub fn new(events: &'a [Event]) -> Self {
        Self {
            events,
            at: 0,
            disk: Disk::default(),
            promised: Promised::default(),
        }
    }

    /// Goes on until this number of events have happened.
    pub fn run(&mut self, until: usize) -> Result<(), String> {
        let events = self.events.get(self.at..until).unwrap_or_default();
        for event in events {
            self.disk.apply(event)?;
            if let Event::Note(note) = event {
                self.promised.add(note);
            }
        }
        self.at += events.len();
        Ok(())
    }

    /// What is left if the power fails now.
    pub fn fail(&self, seed: u64) -> Case {
        let unsynced = self.disk.unsynced();
        Case {
            at: self.at,
            unsynced,
            image: self.disk.image(&mut Luck::draw(seed, unsynced)),
            promised: self.promised.clone(),
        }
    }
}

impl Case {
    /// What leads to the same state without a failure: where a machine begins that is switched on again.
    pub fn events(&self) -> Vec<Event> {
        let mut events: Vec<_> = self.promised.notes().into_iter().map(Event::Note).collect();
        for (file, bytes) in &self.image {
            let (file, data) = (file.clone(), bytes.as_slice().into());
            events.push(Event::Create(file.clone()));
            events.push(Event::Write { file, at: 0, data });
        }
        events.extend(self.image.keys().cloned().map(Event::Sync));
        events.push(Event::SyncFolder);
        events
    }
}

/// How many events there are before anything is published.
pub fn prelude(events: &[Event]) -> usize {
    let is_published = |event: &Event| matches!(event, Event::Note(Note::Published(_)));
    events
        .iter()
        .take_while(|event| !is_published(event))
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_goes_on_where_the_power_failed() {
        let write = Event::Write {
            file: "a".into(),
            at: 0,
            data: vec![1; 3].into(),
        };
        let before = [
            Event::Create("a".into()),
            Event::SyncFolder,
            write,
            Event::Sync("a".into()),
            Event::Note(Note::Published(vec![1, 2])),
            Event::Note(Note::Token(7)),
        ];
        let mut machine = Machine::new(&before);
        machine.run(before.len()).unwrap();
        let case = machine.fail(1);
        let after = case.events();
        let mut machine = Machine::new(&after);
        machine.run(after.len()).unwrap();
        let again = machine.fail(2);
        assert_eq!((again.unsynced, &again.image), (0, &case.image));
        assert_eq!(again.promised, case.promised);
    }
}
