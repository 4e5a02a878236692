use std::collections::BTreeMap;

/// Which deliveries are settled, and up to where all of them are.
///
/// For brokers that know a position and no single acks: a Kafka partition's offset, the `multiple` of an AMQP channel.
/// Deliveries are numbered in the order in which they come and are settled in any order; [`position`](Self::position) is the
/// first that is not. A value is kept for each until it is settled: what the adapter has to know of it.
///
/// It holds no more than what is unsettled. What a number means is the adapter's matter: a tag, an offset.
///
/// ```
/// use onlyonce_core::driver::AckWindow;
///
/// // A partition that was committed up to offset 7.
/// let mut window = AckWindow::starting_at(7);
/// for offset in [7, 8, 12, 13] {
///     window.skip_to(offset); // 9 to 11 are not there any more: the log was compacted.
///     assert_eq!(window.push("what belongs to it"), offset);
/// }
/// assert!(window.settle(8).is_some());
/// assert_eq!(window.position(), 7, "the first is still out");
/// assert!(window.settle(7).is_some());
/// assert_eq!(window.position(), 12, "so far it can be committed");
/// assert_eq!(window.oldest(), Some((12, &"what belongs to it")));
/// assert_eq!((window.unsettled(), window.is_settled(8), window.is_settled(13)), (2, true, false));
/// ```
#[derive(Clone, Debug)]
pub struct AckWindow<T> {
    /// The number of the next delivery.
    next: u64,
    unsettled: BTreeMap<u64, T>,
}

impl<T> AckWindow<T> {
    /// The first delivery will have this number. All below it count as settled.
    #[must_use]
    pub fn starting_at(first: u64) -> Self {
        Self {
            next: first,
            unsettled: BTreeMap::new(),
        }
    }

    /// Takes note of the next delivery, with what belongs to it, and returns its number.
    pub fn push(&mut self, value: T) -> u64 {
        let number = self.next;
        self.unsettled.insert(number, value);
        self.next += 1;
        number
    }

    /// The next delivery will have this number: those between belong to no delivery and count as settled. A number that was
    /// given already changes nothing.
    pub fn skip_to(&mut self, number: u64) {
        self.next = self.next.max(number);
    }

    /// Settles a delivery and returns what was kept for it; `None` if it is settled or was never there.
    pub fn settle(&mut self, number: u64) -> Option<T> {
        self.unsettled.remove(&number)
    }

    /// What is kept for a delivery; `None` if it is settled or was never there.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<&T> {
        self.unsettled.get(&number)
    }

    /// As [`get`](Self::get), to be changed.
    pub fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        self.unsettled.get_mut(&number)
    }

    /// The first number that is not settled: all below it are. The next one to be given, when nothing is out. It never
    /// goes back.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.oldest().map_or(self.next, |(number, _)| number)
    }

    /// The number of the next delivery.
    #[must_use]
    pub fn next_number(&self) -> u64 {
        self.next
    }

    /// Whether this number was given (or skipped) and is not out.
    #[must_use]
    pub fn is_settled(&self, number: u64) -> bool {
        number < self.next && !self.unsettled.contains_key(&number)
    }

    /// The oldest delivery that is not settled.
    #[must_use]
    pub fn oldest(&self) -> Option<(u64, &T)> {
        self.iter().next()
    }

    /// How many deliveries are not settled.
    #[must_use]
    pub fn unsettled(&self) -> usize {
        self.unsettled.len()
    }

    /// All that are not settled, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.unsettled
            .iter()
            .map(|(number, value)| (*number, value))
    }

    /// All from this number on that are not settled, in order, to be changed.
    pub fn iter_from(&mut self, number: u64) -> impl Iterator<Item = (u64, &mut T)> {
        let rest = self.unsettled.range_mut(number..);
        rest.map(|(number, value)| (*number, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_settled_twice_or_was_never_there_changes_nothing() {
        let mut window = AckWindow::starting_at(1);
        assert_eq!((window.position(), window.oldest()), (1, None));
        assert_eq!((window.push("a"), window.push("b")), (1, 2));
        for never in [0, 3, u64::MAX] {
            assert_eq!(window.settle(never), None);
        }
        assert_eq!((window.settle(1), window.settle(1)), (Some("a"), None));
        assert_eq!((window.position(), window.unsettled()), (2, 1));
        window.skip_to(1);
        assert_eq!(window.push("c"), 3, "no number is given twice");
    }

    #[test]
    fn the_position_passes_what_was_skipped() {
        let mut window = AckWindow::starting_at(0);
        window.push(());
        window.skip_to(10);
        assert_eq!((window.position(), window.is_settled(9)), (0, true));
        window.settle(0);
        assert_eq!((window.position(), window.is_settled(10)), (10, false));
    }

    /// Every number that was given or skipped, and what was kept where it is not settled.
    fn check(window: &AckWindow<u64>, model: &[Option<u64>], first: u64, seed: u64) {
        let out = |(at, kept): (usize, &Option<u64>)| kept.map(|kept| (first + at as u64, kept));
        let open: Vec<_> = model.iter().enumerate().filter_map(out).collect();
        let end = first + model.len() as u64;
        assert_eq!(window.next_number(), end, "seed {seed}");
        let position = open.first().map_or(end, |(number, _)| *number);
        assert_eq!(window.position(), position, "seed {seed}");
        let all: Vec<_> = window
            .iter()
            .map(|(number, kept)| (number, *kept))
            .collect();
        assert_eq!(all, open, "seed {seed}");
        assert_eq!(window.unsettled(), open.len(), "seed {seed}");
        for number in first..end {
            let settled = model[(number - first) as usize].is_none();
            assert_eq!(window.is_settled(number), settled, "seed {seed}");
        }
        assert!(!window.is_settled(end), "seed {seed}");
    }

    #[test]
    fn any_interleaving_agrees_with_a_list() {
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            let first = random.u64(..5);
            let mut window = AckWindow::starting_at(first);
            let mut model: Vec<Option<u64>> = Vec::new();
            for step in 0..100 {
                let before = window.position();
                match random.u8(..5) {
                    0..2 => {
                        assert_eq!(window.push(step), first + model.len() as u64);
                        model.push(Some(step));
                    }
                    2 => {
                        let gap = random.usize(..3);
                        window.skip_to(first + (model.len() + gap) as u64);
                        model.extend(vec![None; gap]);
                    }
                    _ => {
                        let at = random.usize(..=model.len());
                        let kept = model.get_mut(at).and_then(Option::take);
                        assert_eq!(window.settle(first + at as u64), kept, "seed {seed}");
                    }
                }
                assert!(window.position() >= before, "seed {seed}");
                check(&window, &model, first, seed);
            }
        }
    }
}
