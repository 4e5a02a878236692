use std::num::NonZeroU64;

/// How many keys a segment has, as a rule.
pub(crate) const KEYS: usize = 32_768;

/// How many bits a filter has per key, and how many of them each key sets. One in 24,000 keys that are not there looks as
/// if it were. More bits set would make it fewer at first, but a seal sets each of them in memory, and more rows would
/// have to be read until no segment is left.
const BITS_PER_KEY: usize = 24;
const HASHES: usize = 8;

/// All filters have the same size, so that a key has the same bits in each. A segment with more keys is looked into more
/// often than need be.
const BITS: usize = KEYS * BITS_PER_KEY;
const WORDS: usize = BITS / 64;

/// The last byte of a stored filter: which bits a key has. What changes these needs another number, since a filter with
/// other bits would hide keys.
const FORMAT: u8 = 1;

/// Words per row of a table at most: a cache line.
const WIDEST: usize = 8;

type Key = [u8; 16];

/// A Bloom filter over the keys of one segment, which are digests already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Filter {
    words: Vec<u64>,
}

impl Filter {
    pub(crate) fn new<'a>(keys: impl Iterator<Item = &'a Key>) -> Self {
        let mut words = vec![0; WORDS];
        for bit in keys.flat_map(bits) {
            words[bit / 64] |= 1 << (bit % 64);
        }
        Self { words }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let words = self.words.iter().flat_map(|w| w.to_le_bytes());
        words.chain([FORMAT]).collect()
    }

    /// `None` if these are not a filter's bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks();
        (rest == [FORMAT] && words.len() == WORDS).then(|| Self {
            words: words.iter().map(|w| u64::from_le_bytes(*w)).collect(),
        })
    }
}

/// The bits of a key, by double hashing.
fn bits(key: &Key) -> [usize; HASHES] {
    let whole = u128::from_le_bytes(*key);
    let (first, step) = (whole as u64, (whole >> 64) as u64 | 1);
    std::array::from_fn(|i| {
        let hash = first.wrapping_add((i as u64).wrapping_mul(step));
        // Scales the hash to the number of bits; cheaper than a remainder.
        ((u128::from(hash) * BITS as u128) >> 64) as usize
    })
}

/// The filters of all segments, asked at once.
///
/// They are the columns of a table with a row per bit. So one row tells which segments have that bit, and a key is in none
/// of those that miss one of its bits. Five or six rows are read until no segment is left, whereas hundreds of filters one
/// by one take longer than everything else that is done with a record.
#[derive(Debug, Default)]
pub(crate) struct Filters {
    tables: Vec<Table>,
}

/// Some of the columns.
#[derive(Debug)]
struct Table {
    /// Words per row: 1, 2, 4 or 8, so that a row is within one cache line.
    width: usize,
    lines: Vec<Line>,
    /// The segment of each column. The columns of nobody are empty.
    segments: Vec<Option<i64>>,
}

#[derive(Clone, Debug)]
#[repr(align(64))]
struct Line([u64; WIDEST]);

impl Filters {
    /// Adds those of segments that are not there yet. Many at once cost less than one by one.
    pub(crate) fn add(&mut self, filters: &[(i64, Filter)]) {
        let places: Vec<_> = filters.iter().map(|(id, _)| self.place(*id)).collect();
        // Word by word for all of them, while the rows that it stands for are in the processor's cache.
        for word in 0..WORDS {
            for ((table, column), (_, filter)) in places.iter().zip(filters) {
                self.tables[*table].set(*column, word * 64, filter.words[word]);
            }
        }
    }

    /// An empty column for a segment: of which table, and which one.
    fn place(&mut self, segment: i64) -> (usize, usize) {
        let free = |table: &Table| table.segments.iter().position(Option::is_none);
        let mut places = self.tables.iter().enumerate();
        let found = places.find_map(|(at, table)| Some((at, free(table)?)));
        let (at, column) = found.unwrap_or_else(|| self.grow());
        self.tables[at].segments[column] = Some(segment);
        (at, column)
    }

    /// Makes room when all columns are taken; returns the first of the new ones.
    fn grow(&mut self) -> (usize, usize) {
        let narrow = self.tables.iter().position(|table| table.width < WIDEST);
        let Some(at) = narrow else {
            self.tables.push(Table::new(1));
            return (self.tables.len() - 1, 0);
        };
        let column = self.tables[at].segments.len();
        self.tables[at].widen();
        (at, column)
    }

    /// Removes those of all other segments.
    pub(crate) fn retain(&mut self, keep: impl Fn(i64) -> bool) {
        for table in &mut self.tables {
            table.retain(&keep);
        }
        self.tables.retain(|table| !table.is_empty());
    }

    /// The segments in which a key may be; it is in no other.
    pub(crate) fn candidates(&self, key: &Key) -> impl Iterator<Item = i64> {
        let rows = bits(key);
        self.tables
            .iter()
            .flat_map(move |table| table.candidates(&rows))
    }
}

impl Table {
    fn new(width: usize) -> Self {
        Self {
            width,
            lines: vec![Line([0; WIDEST]); BITS * width / WIDEST],
            segments: vec![None; width * 64],
        }
    }

    fn is_empty(&self) -> bool {
        self.segments.iter().all(Option::is_none)
    }

    fn row(&self, row: usize) -> &[u64] {
        let start = row * self.width;
        &self.lines[start / WIDEST].0[start % WIDEST..][..self.width]
    }

    fn row_mut(&mut self, row: usize) -> &mut [u64] {
        let start = row * self.width;
        &mut self.lines[start / WIDEST].0[start % WIDEST..][..self.width]
    }

    /// Doubles the number of columns.
    fn widen(&mut self) {
        let mut wide = Self::new(self.width * 2);
        for row in 0..BITS {
            wide.row_mut(row)[..self.width].copy_from_slice(self.row(row));
        }
        wide.segments[..self.segments.len()].copy_from_slice(&self.segments);
        *self = wide;
    }

    /// Sets those bits of a column that are set in `bits`, which begins at `row`.
    fn set(&mut self, column: usize, row: usize, bits: u64) {
        for bit in ones(bits) {
            self.row_mut(row + bit)[column / 64] |= 1 << (column % 64);
        }
    }

    /// Empties the columns of all other segments, in one pass.
    fn retain(&mut self, keep: impl Fn(i64) -> bool) {
        let mut kept = [u64::MAX; WIDEST];
        for (column, segment) in self.segments.iter_mut().enumerate() {
            if segment.take_if(|segment| !keep(*segment)).is_some() {
                kept[column / 64] &= !(1 << (column % 64));
            }
        }
        // An empty table is dropped.
        if self.is_empty() || kept == [u64::MAX; WIDEST] {
            return;
        }
        // A line holds more than one narrow row.
        let mask: [u64; WIDEST] = std::array::from_fn(|word| kept[word % self.width]);
        for line in &mut self.lines {
            for (word, mask) in line.0.iter_mut().zip(mask) {
                *word &= mask;
            }
        }
    }

    /// The segments that have all of these bits.
    fn candidates<'a>(&'a self, rows: &[usize; HASHES]) -> impl Iterator<Item = i64> + use<'a> {
        let mut found = [u64::MAX; WIDEST];
        found[self.width..].fill(0);
        for row in rows {
            if found == [0; WIDEST] {
                break;
            }
            for (found, row) in found.iter_mut().zip(self.row(*row)) {
                *found &= row;
            }
        }
        let columns = (0..)
            .zip(found)
            .flat_map(|(word, found)| ones(found).map(move |c| word * 64 + c));
        columns.filter_map(move |column| self.segments[column])
    }
}

/// Which bits are set.
fn ones(bits: u64) -> impl Iterator<Item = usize> {
    let rest = |bits: &NonZeroU64| NonZeroU64::new(bits.get() & (bits.get() - 1));
    std::iter::successors(NonZeroU64::new(bits), rest).map(|bits| bits.trailing_zeros() as usize)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn keys(random: &mut fastrand::Rng, n: usize) -> Vec<Key> {
        (0..n).map(|_| random.u128(..).to_le_bytes()).collect()
    }

    #[test]
    fn what_is_in_it_is_found_and_little_else() {
        let mut random = fastrand::Rng::with_seed(7);
        let (inside, outside) = (keys(&mut random, KEYS), keys(&mut random, KEYS));
        let filter = Filter::new(inside.iter());
        let filter = Filter::from_bytes(&filter.to_bytes()).unwrap();
        let mut filters = Filters::default();
        filters.add(&[(1, filter)]);
        let may_contain = |key: &&Key| filters.candidates(key).next().is_some();
        assert!(inside.iter().all(|key| may_contain(&key)));
        let wrong = outside.iter().filter(may_contain).count();
        assert!(wrong < 5, "{wrong} of 32,768");
        filters.retain(|_| false);
        assert!(filters.tables.is_empty());
    }

    #[test]
    fn other_bytes_are_no_filter() {
        assert_eq!(Filter::from_bytes(&[]), None);
        assert_eq!(Filter::from_bytes(&[1, 2, 3]), None);
        assert_eq!(Filter::from_bytes(&[0; WORDS * 8]), None);
        assert_eq!(Filter::from_bytes(&[FORMAT + 1; WORDS * 8 + 1]), None);
    }

    /// Tables of every width, with columns that are given again.
    #[test]
    fn every_key_is_found_in_its_own_segment_only() {
        let mut random = fastrand::Rng::with_seed(8);
        let mut filters = Filters::default();
        let mut segments = BTreeMap::new();
        let mut widths = BTreeSet::new();
        for round in 0..20 {
            let first = round * 80;
            let new: Vec<(i64, Vec<Key>)> = (first..first + random.i64(40..=80))
                .map(|id| (id, keys(&mut random, 2)))
                .collect();
            let batch = new.iter().map(|(id, keys)| (*id, Filter::new(keys.iter())));
            filters.add(&batch.collect::<Vec<_>>());
            segments.extend(new);
            let gone: BTreeSet<i64> = (0..4).map(|_| random.i64(..first + 80)).collect();
            filters.retain(|id| !gone.contains(&id));
            segments.retain(|id, _| !gone.contains(id));
            for (id, key) in segments
                .iter()
                .flat_map(|(id, k)| k.iter().map(move |k| (id, k)))
            {
                assert_eq!(filters.candidates(key).collect::<Vec<_>>(), [*id]);
            }
            widths.extend(filters.tables.iter().map(|table| table.width));
        }
        assert_eq!(widths, BTreeSet::from([1, 2, 4, 8]));
        assert!(filters.tables.len() > 1);
    }
}
