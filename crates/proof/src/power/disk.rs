//! A disk of which it is known what was synced: what can be on it after the power has failed.
//!
//! A sync makes everything that was done to a file before, or to the folder, safe. The rest is a list of changes, of which
//! any may have reached the disk and any may not, whatever their order was, a write also in part. Parts end where sectors
//! do: what is beside a write in its sector is not harmed, which SQLite assumes too (<https://www.sqlite.org/psow.html>).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use super::luck::Luck;
use super::trace::Event;

const SECTOR: usize = 512;

/// The files of a folder, by name.
pub type Image = BTreeMap<String, Vec<u8>>;

#[derive(Debug, Default)]
pub struct Disk {
    /// All files that ever were; one that was removed may come back.
    files: Vec<File>,
    /// Which file a name stands for as long as there is power.
    names: BTreeMap<String, usize>,
    synced_names: BTreeMap<String, usize>,
    name_changes: Vec<NameChange>,
}

#[derive(Debug, Default)]
struct File {
    synced: Vec<u8>,
    changes: Vec<Change>,
}

#[derive(Clone, Debug)]
struct NameChange {
    name: String,
    /// `None`: removed.
    file: Option<usize>,
}

#[derive(Clone, Debug)]
enum Change {
    Write { at: usize, data: Arc<[u8]> },
    Truncate(usize),
}

/// What became of a change that was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Lost,
    Kept,
    /// Some of its sectors.
    Torn,
}

impl Disk {
    pub fn apply(&mut self, event: &Event) -> Result<(), String> {
        match event {
            Event::Create(name) => {
                self.files.push(File::default());
                self.rename(name, Some(self.files.len() - 1));
            }
            Event::Unlink(name) => self.rename(name, None),
            Event::Write { file, at, data } => {
                let (at, data) = (*at, Arc::clone(data));
                self.file(file)?.changes.push(Change::Write { at, data });
            }
            Event::Truncate { file, size } => {
                self.file(file)?.changes.push(Change::Truncate(*size));
            }
            Event::Sync(file) => self.file(file)?.sync(),
            Event::SyncFolder => {
                self.synced_names.clone_from(&self.names);
                self.name_changes.clear();
            }
            Event::Note(_) => {}
        }
        Ok(())
    }

    fn rename(&mut self, name: &str, file: Option<usize>) {
        let name = name.to_owned();
        match file {
            Some(file) => self.names.insert(name.clone(), file),
            None => self.names.remove(&name),
        };
        self.name_changes.push(NameChange { name, file });
    }

    fn file(&mut self, name: &str) -> Result<&mut File, String> {
        let file = self.names.get(name);
        let file = file.and_then(|file| self.files.get_mut(*file));
        file.ok_or_else(|| format!("{name} was changed and never created"))
    }

    /// How many changes are not synced, of files that can still be there.
    pub fn unsynced(&self) -> usize {
        let changes = |file: &usize| self.files[*file].changes.len();
        self.name_changes.len() + self.reachable().iter().map(changes).sum::<usize>()
    }

    /// The files that any choice can leave.
    fn reachable(&self) -> BTreeSet<usize> {
        let created = self.name_changes.iter().filter_map(|change| change.file);
        self.synced_names.values().copied().chain(created).collect()
    }

    /// What is there if the power fails now, and `luck` decides about what was not synced.
    pub fn image(&self, luck: &mut Luck) -> Image {
        let mut names = self.synced_names.clone();
        for change in &self.name_changes {
            if luck.next() == Fate::Lost {
                continue;
            }
            match change.file {
                Some(file) => names.insert(change.name.clone(), file),
                None => names.remove(&change.name),
            };
        }
        let contents = |file: usize| (file, self.files[file].after(luck));
        let contents: BTreeMap<_, _> = self.reachable().into_iter().map(contents).collect();
        let image = names
            .into_iter()
            .map(|(name, file)| (name, &contents[&file]));
        image.map(|(name, bytes)| (name, bytes.clone())).collect()
    }
}

impl File {
    fn sync(&mut self) {
        for change in self.changes.drain(..) {
            match change {
                Change::Write { at, data } => put(&mut self.synced, at, &data),
                Change::Truncate(size) => self.synced.resize(size, 0),
            }
        }
    }

    fn after(&self, luck: &mut Luck) -> Vec<u8> {
        let mut bytes = self.synced.clone();
        for change in &self.changes {
            let fate = luck.next();
            match change {
                Change::Truncate(_) if fate == Fate::Lost => {}
                Change::Truncate(size) => bytes.resize(*size, 0),
                Change::Write { at, data } => write(&mut bytes, *at, data, fate, luck),
            }
        }
        bytes
    }
}

/// Makes the files of an image.
pub fn write_all(image: &Image, folder: &Path) -> io::Result<()> {
    let mut files = image.iter();
    files.try_for_each(|(name, bytes)| fs::write(folder.join(name), bytes))
}

fn write(bytes: &mut Vec<u8>, at: usize, data: &[u8], fate: Fate, luck: &mut Luck) {
    if fate == Fate::Kept {
        return put(bytes, at, data);
    }
    // The file may have become longer before what was written there arrived.
    let end = at + data.len();
    if end > bytes.len() && luck.grows() {
        bytes.resize_with(end, || luck.rubbish());
    }
    for part in sectors(at, data.len()) {
        if fate == Fate::Torn && luck.keeps_sector() {
            put(bytes, at + part.start, &data[part]);
        }
    }
}

fn put(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
    let end = at + data.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[at..end].copy_from_slice(data);
}

/// The parts of a write of `size` bytes at `at` that are each in one sector.
fn sectors(at: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    let first = (SECTOR - at % SECTOR).min(size);
    let rest = (first..size).step_by(SECTOR);
    let rest = rest.map(move |start| start..(start + SECTOR).min(size));
    std::iter::once(0..first).chain(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(events: &[Event]) -> Disk {
        let mut disk = Disk::default();
        for event in events {
            disk.apply(event).unwrap();
        }
        disk
    }

    fn create(file: &str) -> Event {
        Event::Create(file.into())
    }

    fn write(at: usize, byte: u8, size: usize) -> Event {
        Event::Write {
            file: "a".into(),
            at,
            data: vec![byte; size].into(),
        }
    }

    fn sync() -> Event {
        Event::Sync("a".into())
    }

    /// Everything that the disk can hold, as far as 2,000 tries show it.
    fn images(disk: &Disk) -> BTreeSet<Image> {
        let image = |seed| disk.image(&mut Luck::draw(seed, disk.unsynced()));
        (0..2_000).map(image).collect()
    }

    fn contents(disk: &Disk) -> BTreeSet<Vec<u8>> {
        let images = images(disk).into_iter();
        images.map(|mut image| image.remove("a").unwrap()).collect()
    }

    #[test]
    fn what_is_synced_is_there() {
        let disk = disk(&[create("a"), write(0, 1, 700), sync(), Event::SyncFolder]);
        assert_eq!(disk.unsynced(), 0);
        assert_eq!(contents(&disk), BTreeSet::from([vec![1; 700]]));
    }

    #[test]
    fn an_unsynced_write_is_lost_or_there_or_torn_between_sectors() {
        let synced = [create("a"), write(0, 1, 1_024), sync(), Event::SyncFolder];
        let mut disk = disk(&synced);
        disk.apply(&write(100, 2, 900)).unwrap();
        let halves = [(1, 1), (1, 2), (2, 1), (2, 2)];
        let image = |(first, second)| {
            let mut bytes = vec![1; 1_024];
            bytes[100..512].fill(first);
            bytes[512..1_000].fill(second);
            bytes
        };
        assert_eq!(contents(&disk), halves.map(image).into());
    }

    #[test]
    fn a_later_write_may_be_there_without_an_earlier_one() {
        let synced = [create("a"), write(0, 1, 1_024), sync(), Event::SyncFolder];
        let mut disk = disk(&synced);
        disk.apply(&write(0, 2, 512)).unwrap();
        disk.apply(&write(512, 3, 512)).unwrap();
        let second_alone = [vec![1; 512], vec![3; 512]].concat();
        assert!(contents(&disk).contains(&second_alone));
        assert_eq!(contents(&disk).len(), 4);
    }

    #[test]
    fn a_file_that_grew_may_end_in_rubbish() {
        let disk = disk(&[create("a"), Event::SyncFolder, write(0, 1, 8)]);
        let contents = contents(&disk);
        assert!(contents.contains(&vec![]) && contents.contains(&vec![1; 8]));
        assert!(contents.iter().any(|c| c.len() == 8 && c != &[1; 8]));
    }

    #[test]
    fn a_truncation_may_not_have_happened() {
        let mut disk = disk(&[create("a"), write(0, 1, 8), sync(), Event::SyncFolder]);
        let cut = Event::Truncate {
            file: "a".into(),
            size: 3,
        };
        disk.apply(&cut).unwrap();
        assert_eq!(contents(&disk), [vec![1; 3], vec![1; 8]].into());
    }

    #[test]
    fn without_a_sync_of_the_folder_a_new_file_may_be_gone_and_an_old_one_back() {
        let unsynced = disk(&[create("a"), write(0, 1, 8), sync()]);
        let there = Image::from([("a".into(), vec![1; 8])]);
        assert_eq!(images(&unsynced), [Image::new(), there.clone()].into());

        let removed = [Event::SyncFolder, Event::Unlink("a".into()), create("a")];
        let mut disk = unsynced;
        removed.iter().for_each(|event| disk.apply(event).unwrap());
        let anew = Image::from([("a".into(), vec![])]);
        assert_eq!(images(&disk), [Image::new(), there, anew.clone()].into());
        disk.apply(&Event::SyncFolder).unwrap();
        assert_eq!(images(&disk), [anew].into());
    }
}
