//! Faults that the audit must notice: a disk that lies about syncs, and a setting that promises less.

use super::broken::Broken;
use super::trace::{Event, Note};

/// What is wrong, in short, and what must be noticed.
#[derive(Clone, Copy)]
pub struct Fault {
    pub name: &'static str,
    pub breaks: Broken,
}

/// Nothing but a durable ack keeps a message from running twice where there is no store.
pub const ACKS_NOT_DURABLE: Fault = Fault {
    name: "acks not durable",
    breaks: Broken::RunsAgain,
};

/// Goes over the events in their order, and says which syncs are left out.
type LeftOut = Box<dyn FnMut(&Event) -> bool>;

/// Syncs that a disk has confirmed and not carried out.
pub struct Lie {
    pub fault: Fault,
    left_out: fn() -> LeftOut,
}

pub const LIES: [Lie; 4] = [
    Lie {
        fault: Fault {
            name: "nothing synced",
            breaks: Broken::MessageLost,
        },
        left_out: || Box::new(is_sync),
    },
    Lie {
        fault: Fault {
            name: "every other sync",
            breaks: Broken::RecordLost,
        },
        left_out: || {
            let mut odd = false;
            Box::new(move |event| {
                let is_sync = matches!(event, Event::Sync(_));
                odd ^= is_sync;
                is_sync && odd
            })
        },
    },
    Lie {
        fault: Fault {
            name: "folder not synced",
            breaks: Broken::MessageLost,
        },
        left_out: || Box::new(|event| *event == Event::SyncFolder),
    },
    Lie {
        fault: Fault {
            name: "epoch not synced",
            breaks: Broken::TokenFell,
        },
        left_out: || {
            let mut opening = false;
            Box::new(move |event| {
                match event {
                    Event::Note(Note::Opening) => opening = true,
                    Event::Note(Note::Opened) => opening = false,
                    _ => {}
                }
                opening && matches!(event, Event::Sync(_))
            })
        },
    },
];

/// A recording of a disk that lies.
pub struct Spoilt {
    pub events: Vec<Event>,
    /// Where a sync is missing that no later one makes up for: the number of events that have happened by then.
    pub points: Vec<usize>,
}

impl Lie {
    pub fn tell(&self, truth: &[Event]) -> Spoilt {
        let mut left_out = (self.left_out)();
        let (mut files, mut folder) = (false, false);
        let (mut events, mut points) = (Vec::new(), Vec::new());
        for event in truth {
            let is_left_out = left_out(event);
            match event {
                Event::Sync(_) => files = is_left_out,
                Event::SyncFolder => folder = is_left_out,
                _ => {}
            }
            if !is_left_out {
                events.push(event.clone());
            }
            if files || folder {
                points.push(events.len());
            }
        }
        Spoilt { events, points }
    }
}

fn is_sync(event: &Event) -> bool {
    matches!(event, Event::Sync(_) | Event::SyncFolder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lie_matters_until_the_next_sync() {
        let sync = || Event::Sync("a".into());
        let create = || Event::Create("a".into());
        let truth = [sync(), create(), create(), sync(), create()];
        let spoilt = LIES[1].tell(&truth);
        assert_eq!(spoilt.events, [create(), create(), sync(), create()]);
        assert_eq!(spoilt.points, [0, 1, 2]);
    }
}
