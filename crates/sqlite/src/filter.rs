/// How many bits per key, and how many of them each key sets: one in a thousand keys that are not there looks as if it
/// were.
const BITS_PER_KEY: usize = 14;
const HASHES: u64 = 10;

/// A Bloom filter over keys that are digests already.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Filter {
    words: Vec<u64>,
}

impl Filter {
    pub(crate) fn new<'a>(keys: impl ExactSizeIterator<Item = &'a [u8; 16]>) -> Self {
        let words = (keys.len() * BITS_PER_KEY).div_ceil(64).max(1);
        let mut filter = Self {
            words: vec![0; words],
        };
        for key in keys {
            for (word, bit) in places(key, words) {
                filter.words[word] |= bit;
            }
        }
        filter
    }

    /// `false`: certainly not there.
    pub(crate) fn may_contain(&self, key: &[u8; 16]) -> bool {
        places(key, self.words.len()).all(|(word, bit)| self.words[word] & bit != 0)
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    /// `None` if these are not a filter's bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks();
        (rest.is_empty() && !words.is_empty()).then(|| Self {
            words: words.iter().map(|w| u64::from_le_bytes(*w)).collect(),
        })
    }
}

/// The bits of a key: word and mask, by double hashing.
fn places(key: &[u8; 16], words: usize) -> impl Iterator<Item = (usize, u64)> {
    let whole = u128::from_le_bytes(*key);
    let (first, step) = (whole as u64, (whole >> 64) as u64 | 1);
    let bits = words as u128 * 64;
    (0..HASHES).map(move |i| {
        let hash = first.wrapping_add(i.wrapping_mul(step));
        // Scales the hash to the number of bits; cheaper than a remainder.
        let at = ((u128::from(hash) * bits) >> 64) as usize;
        (at / 64, 1 << (at % 64))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_it_is_found_and_little_else() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut keys =
            || -> Vec<[u8; 16]> { (0..10_000).map(|_| random.u128(..).to_le_bytes()).collect() };
        let (inside, outside) = (keys(), keys());
        let filter = Filter::new(inside.iter());
        let filter = Filter::from_bytes(&filter.to_bytes()).unwrap();
        assert!(inside.iter().all(|key| filter.may_contain(key)));
        let wrong = outside.iter().filter(|key| filter.may_contain(key)).count();
        assert!(wrong < 50, "{wrong} of 10,000");
    }

    #[test]
    fn other_bytes_are_no_filter() {
        assert_eq!(Filter::from_bytes(&[]), None);
        assert_eq!(Filter::from_bytes(&[1, 2, 3]), None);
    }
}
