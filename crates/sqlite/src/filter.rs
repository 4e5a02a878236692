use std::num::NonZeroU64;

/// How many keys a segment has, as a rule.
pub(crate) const KEYS: usize = 32_768;

/// How many bits a filter has per key, and how many of them each key sets. One in 24,000 keys that are not there looks as
/// if it were. More bits set would make it fewer, but a seal sets each of them in memory, and a row is read for each.
const BITS_PER_KEY: usize = 24;
const HASHES: usize = 8;

/// All filters have the same size, so that a key has the same bits in each. A segment with more keys is looked into more
/// often than need be.
const BITS: usize = KEYS * BITS_PER_KEY;
const WORDS: usize = BITS / 64;

/// The last byte of a stored filter: which bits a key has. What changes these needs another number, since a filter with
/// other bits would hide keys.
const FORMAT: u8 = 1;

/// How many filters make the table one word wider.
const COLUMNS: usize = 64;

/// Rows are kept in blocks, since all in one piece would take too long to move when the table gets wider.
const ROWS: usize = 4_096;
const BLOCKS: usize = BITS / ROWS;

/// How many words of a row are looked at together: about a cache line.
const STRIDE: usize = 8;

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
/// of those that miss one of its bits. A row for each of its bits is read, whereas hundreds of filters one by one take
/// longer than everything else that is done with a record.
#[derive(Debug)]
pub(crate) struct Filters {
    blocks: Vec<Block>,
    columns: Vec<Column>,
}

/// A table's rows one after another. All blocks have a word for every column at least.
#[derive(Clone, Debug, Default)]
struct Block {
    /// Words per row.
    width: usize,
    words: Vec<u64>,
}

/// Whose filter a column is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    /// All zeros.
    Empty,
    Of(i64),
    /// That of a segment which is gone. To clear it is a pass over all rows, so it waits until the column is given again.
    Dropped,
}

impl Default for Filters {
    fn default() -> Self {
        Self {
            blocks: vec![Block::default(); BLOCKS],
            columns: Vec::new(),
        }
    }
}

impl Filters {
    /// Makes room for that many more at once.
    pub(crate) fn reserve(&mut self, more: usize) {
        let lacking = more.saturating_sub(self.free());
        if lacking > 0 {
            self.resize(self.width() + lacking.div_ceil(COLUMNS));
        }
    }

    /// Adds those of segments that are not there yet. Many at once cost less than one by one.
    pub(crate) fn add(&mut self, filters: &[(i64, Filter)]) {
        let columns: Vec<_> = filters.iter().map(|(id, _)| self.place(*id)).collect();
        // Word by word for all of them, while the rows that it stands for are in the processor's cache.
        for word in 0..WORDS {
            for (column, (_, filter)) in columns.iter().zip(filters) {
                self.set(*column, word, filter.words[word]);
            }
        }
        self.widen_ahead();
    }

    /// An empty column for a segment.
    fn place(&mut self, segment: i64) -> usize {
        let free = self.columns.iter().position(|column| column.is_free());
        let column = free.unwrap_or_else(|| {
            self.resize(self.width() + 1);
            self.columns.len() - COLUMNS
        });
        if self.columns[column] == Column::Dropped {
            self.clear(column);
        }
        self.columns[column] = Column::Of(segment);
        column
    }

    fn free(&self) -> usize {
        self.columns
            .iter()
            .filter(|column| column.is_free())
            .count()
    }

    /// Words per row that are in use.
    fn width(&self) -> usize {
        self.columns.len() / COLUMNS
    }

    fn resize(&mut self, width: usize) {
        let shrinks = width < self.width();
        // Those that were widened ahead are wide enough already.
        let others = self.blocks.iter_mut();
        let others = others.filter(|block| shrinks || block.width < width);
        others.for_each(|block| block.resize(width));
        self.columns.resize(width * COLUMNS, Column::Empty);
    }

    /// Widens more blocks the fewer columns are free, so that when none is, all blocks are wide enough for the next.
    fn widen_ahead(&mut self) {
        let due = BLOCKS * COLUMNS.saturating_sub(self.free()) / COLUMNS;
        let width = self.width() + 1;
        let narrow = self.blocks[..due].iter_mut();
        let narrow = narrow.filter(|block| block.width < width);
        narrow.for_each(|block| block.resize(width));
    }

    /// Sets those bits of a column that are set in the filter's word.
    fn set(&mut self, column: usize, word: usize, bits: u64) {
        let row = word * 64;
        let block = &mut self.blocks[row / ROWS];
        for bit in ones(bits) {
            let at = (row % ROWS + bit) * block.width + column / COLUMNS;
            block.words[at] |= 1 << (column % COLUMNS);
        }
    }

    fn clear(&mut self, column: usize) {
        for block in &mut self.blocks {
            for row in block.words.chunks_exact_mut(block.width) {
                row[column / COLUMNS] &= !(1 << (column % COLUMNS));
            }
        }
    }

    /// Removes those of all other segments.
    pub(crate) fn retain(&mut self, keep: impl Fn(i64) -> bool) {
        for column in &mut self.columns {
            if matches!(column, Column::Of(segment) if !keep(*segment)) {
                *column = Column::Dropped;
            }
        }
        let last = self.columns.iter().rposition(|column| !column.is_free());
        let width = last.map_or(0, |last| last / COLUMNS + 1);
        // Not whenever a word is free: a smaller table has to be copied.
        if width * 2 <= self.width() && width < self.width() {
            self.resize(width);
        }
    }

    /// The segments in which a key may be; it is in no other.
    ///
    /// Reads all rows even where the first few leave no segment: the processor then waits for memory once, and not for each.
    pub(crate) fn candidates(&self, key: &Key) -> Vec<i64> {
        let rows = bits(key).map(|row| self.row(row).as_chunks::<STRIDE>());
        let mut found = Vec::new();
        let [(strides, rest), ..] = rows;
        for stride in 0..strides.len() {
            let mut common = [u64::MAX; STRIDE];
            for (row, _) in &rows {
                let words = &row[stride];
                common = std::array::from_fn(|word| common[word] & words[word]);
            }
            if common != [0; STRIDE] {
                let words = (stride * STRIDE..).zip(common);
                words.for_each(|(word, bits)| self.collect(word, bits, &mut found));
            }
        }
        for word in 0..rest.len() {
            let common = rows
                .iter()
                .fold(u64::MAX, |bits, (_, row)| bits & row[word]);
            self.collect(strides.len() * STRIDE + word, common, &mut found);
        }
        found
    }

    fn collect(&self, word: usize, bits: u64, found: &mut Vec<i64>) {
        for bit in ones(bits) {
            if let Column::Of(segment) = self.columns[word * COLUMNS + bit] {
                found.push(segment);
            }
        }
    }

    /// The words of a row that are in use.
    fn row(&self, row: usize) -> &[u64] {
        let block = &self.blocks[row / ROWS];
        &block.words[row % ROWS * block.width..][..self.width()]
    }
}

impl Column {
    fn is_free(self) -> bool {
        !matches!(self, Self::Of(_))
    }
}

impl Block {
    fn resize(&mut self, width: usize) {
        let mut words = vec![0; ROWS * width];
        let kept = width.min(self.width);
        if kept > 0 {
            let old = self.words.chunks_exact(self.width);
            for (new, old) in words.chunks_exact_mut(width).zip(old) {
                new[..kept].copy_from_slice(&old[..kept]);
            }
        }
        *self = Self { width, words };
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
        let may_contain = |key: &&Key| !filters.candidates(key).is_empty();
        assert!(inside.iter().all(|key| may_contain(&key)));
        let wrong = outside.iter().filter(may_contain).count();
        assert!(wrong < 5, "{wrong} of 32,768");
        filters.retain(|_| false);
        assert_eq!(filters.width(), 0);
    }

    #[test]
    fn other_bytes_are_no_filter() {
        assert_eq!(Filter::from_bytes(&[]), None);
        assert_eq!(Filter::from_bytes(&[1, 2, 3]), None);
        assert_eq!(Filter::from_bytes(&[0; WORDS * 8]), None);
        assert_eq!(Filter::from_bytes(&[FORMAT + 1; WORDS * 8 + 1]), None);
    }

    fn found_in_their_own_only(filters: &Filters, segments: &BTreeMap<i64, Vec<Key>>) {
        let keys = segments
            .iter()
            .flat_map(|(id, k)| k.iter().map(move |k| (id, k)));
        for (id, key) in keys {
            assert_eq!(filters.candidates(key), [*id]);
        }
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
            found_in_their_own_only(&filters, &segments);
            widths.insert(filters.width());
            // The next one that finds no free column has none to widen.
            let wider = filters
                .blocks
                .iter()
                .filter(|block| block.width > filters.width());
            assert!(filters.free() > 0 || wider.count() == BLOCKS);
        }
        assert!(widths.len() > STRIDE, "{widths:?}");
        let most = *widths.last().unwrap();
        segments.retain(|id, _| *id < 300);
        filters.retain(|id| id < 300);
        assert!(filters.width() < most, "{} of {most}", filters.width());
        found_in_their_own_only(&filters, &segments);
    }
}
