use std::collections::BTreeSet;

use onlyonce_core::driver::AckWindow;

/// Deliveries given back are remembered up to this many, to answer a repeated settlement.
const REMEMBERED: usize = 10_000;

/// What is wanted for one delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Ack,
    Requeue,
    /// It stays unsettled until the channel is closed, which gives it back in its place.
    Return,
    /// A copy of it was queued to come back later, so this one is acked; but it counts as given back.
    Moved,
}

/// What to send to the broker, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// `multiple`: this tag and every unsettled one below.
    Ack {
        tag: u64,
        multiple: bool,
    },
    Requeue {
        tag: u64,
    },
}

/// A delivery that the broker takes for unsettled.
#[derive(Debug)]
struct Unsettled<T> {
    kept: T,
    /// It was given back, but the broker does not know it yet.
    returned: bool,
}

/// Which deliveries of one channel are settled; turns settlements in any order into as few frames as are safe.
///
/// Each call leaves nothing unsent, so between calls every tag is either settled at the broker or unsettled there: open, or
/// returned. A `multiple` ack goes only as far as every tag is settled, and requeues go out before it: so it never covers a
/// delivery that is still out or that was given back.
#[derive(Debug)]
pub(crate) struct Acks<T> {
    /// Its numbers are the channel's tags, from 1.
    window: AckWindow<Unsettled<T>>,
    given_back: BTreeSet<u64>,
}

impl<T> Acks<T> {
    pub(crate) fn new() -> Self {
        Self {
            window: AckWindow::starting_at(1),
            given_back: BTreeSet::new(),
        }
    }

    /// Takes note of the next delivery of the channel, with what belongs to it. The broker numbers them from 1.
    pub(crate) fn delivered(&mut self, kept: T) {
        let returned = false;
        self.window.push(Unsettled { kept, returned });
    }

    /// The tag of the last delivery.
    pub(crate) fn last(&self) -> u64 {
        self.window.next_number() - 1
    }

    pub(crate) fn any_settled(&self) -> bool {
        self.unsettled() < self.last()
    }

    /// What was kept for `tag`, if it is open.
    pub(crate) fn kept(&self, tag: u64) -> Option<&T> {
        let unsettled = self.window.get(tag)?;
        (!unsettled.returned).then_some(&unsettled.kept)
    }

    /// How many deliveries the broker takes for unsettled.
    pub(crate) fn unsettled(&self) -> u64 {
        self.window.unsettled() as u64
    }

    /// What was kept for the oldest delivery that the broker takes for unsettled.
    pub(crate) fn oldest(&self) -> Option<&T> {
        self.window.oldest().map(|(_, unsettled)| &unsettled.kept)
    }

    /// Settles; says for each whether it is done as wanted, and what to send.
    pub(crate) fn settle(
        &mut self,
        wanted: impl IntoIterator<Item = (u64, Verdict)>,
    ) -> (Vec<bool>, Vec<Frame>) {
        let mut frames = Vec::new();
        let mut acked = Vec::new();
        let mut done = Vec::new();
        for (tag, verdict) in wanted {
            let open = self.end(tag, verdict);
            done.push(open || self.was(tag, verdict));
            if !open {
                continue;
            }
            match verdict {
                Verdict::Return => {}
                Verdict::Requeue => frames.push(Frame::Requeue { tag }),
                Verdict::Ack | Verdict::Moved => acked.push(tag),
            }
            if verdict != Verdict::Ack {
                self.remember(tag);
            }
        }
        acked.sort_unstable();
        let open = self.window.position();
        let (below, above) = acked.split_at(acked.partition_point(|tag| *tag < open));
        frames.extend(below.last().map(|tag| Frame::Ack {
            tag: *tag,
            multiple: below.len() > 1,
        }));
        frames.extend(above.iter().map(|tag| Frame::Ack {
            tag: *tag,
            multiple: false,
        }));
        (done, frames)
    }

    /// Ends an open delivery; false if it is not open.
    fn end(&mut self, tag: u64, verdict: Verdict) -> bool {
        match self.window.get_mut(tag) {
            Some(unsettled) if !unsettled.returned => unsettled.returned = true,
            _ => return false,
        }
        if verdict != Verdict::Return {
            self.window.settle(tag);
        }
        true
    }

    /// Whether `tag` was settled this way before.
    fn was(&self, tag: u64, verdict: Verdict) -> bool {
        let acked = !self.given_back.contains(&tag);
        (1..=self.last()).contains(&tag) && acked == (verdict == Verdict::Ack)
    }

    fn remember(&mut self, tag: u64) {
        self.given_back.insert(tag);
        if self.given_back.len() > REMEMBERED {
            self.given_back.pop_first();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Verdict::{Ack, Moved, Requeue, Return};
    use std::collections::BTreeMap;

    fn acks(deliveries: usize) -> Acks<()> {
        let mut acks = Acks::new();
        (0..deliveries).for_each(|_| acks.delivered(()));
        acks
    }

    fn ack(tag: u64, multiple: bool) -> Frame {
        Frame::Ack { tag, multiple }
    }

    #[test]
    fn a_contiguous_batch_is_one_frame() {
        let mut acks = acks(5);
        assert_eq!(
            acks.settle([(3, Ack), (1, Ack), (2, Ack)]).1,
            [ack(3, true)]
        );
        assert_eq!(acks.settle([(4, Ack)]).1, [ack(4, false)]);
    }

    #[test]
    fn an_older_delivery_holds_no_ack_back() {
        let mut acks = acks(6);
        assert_eq!(
            acks.settle([(2, Ack), (3, Ack)]).1,
            [ack(2, false), ack(3, false)]
        );
        // 2 and 3 were sent before: nothing but 1 is left to cover.
        assert_eq!(acks.settle([(1, Ack)]).1, [ack(1, false)]);
        assert_eq!(
            acks.settle([(6, Ack), (4, Ack), (5, Ack)]).1,
            [ack(6, true)]
        );
    }

    #[test]
    fn requeues_go_out_first_and_in_order() {
        let mut acks = acks(4);
        let frames = acks
            .settle([(3, Requeue), (1, Ack), (2, Requeue), (4, Ack)])
            .1;
        assert_eq!(
            frames,
            [
                Frame::Requeue { tag: 3 },
                Frame::Requeue { tag: 2 },
                ack(4, true)
            ]
        );
    }

    #[test]
    fn what_is_returned_stays_unsettled_and_is_covered_by_no_ack() {
        let mut acks = acks(4);
        assert_eq!(
            acks.settle([(1, Return), (2, Ack), (4, Ack)]),
            (vec![true; 3], vec![ack(2, false), ack(4, false)])
        );
        assert_eq!(acks.settle([(3, Ack)]).1, [ack(3, false)]);
        assert!(acks.oldest().is_some());
        assert_eq!(acks.unsettled(), 1);
        assert_eq!(
            acks.settle([(1, Return), (1, Requeue), (1, Ack)]),
            (vec![true, true, false], vec![])
        );
    }

    #[test]
    fn repeating_is_harmless_and_contradicting_is_refused() {
        let mut acks = acks(3);
        assert_eq!(
            acks.settle([(1, Ack), (2, Requeue), (3, Moved)]).0,
            [true; 3]
        );
        let (done, frames) = acks.settle([(1, Ack), (2, Requeue), (3, Requeue), (3, Moved)]);
        assert_eq!((done, frames), (vec![true; 4], vec![]));
        let (done, frames) = acks.settle([(1, Requeue), (2, Ack), (3, Ack), (0, Ack), (4, Ack)]);
        assert_eq!((done, frames), (vec![false; 5], vec![]));
    }

    /// The broker's side: applies frames by AMQP's rules and knows what is unsettled there.
    #[derive(Default)]
    struct Broker(BTreeMap<u64, Option<Verdict>>);

    impl Broker {
        fn apply(&mut self, frame: Frame) {
            let mut end = |tag, verdict| {
                let state = self.0.get_mut(&tag).unwrap();
                // RabbitMQ closes the channel over a tag that is settled or was never given.
                assert_eq!(*state, None, "tag {tag} settled twice");
                *state = Some(verdict);
            };
            match frame {
                Frame::Requeue { tag } => end(tag, Requeue),
                Frame::Ack { tag, multiple } => {
                    end(tag, Ack);
                    if multiple {
                        let below = self.0.range_mut(..tag).filter(|(_, state)| state.is_none());
                        below.for_each(|(_, state)| *state = Some(Ack));
                    }
                }
            }
        }
    }

    #[test]
    fn any_interleaving_settles_what_was_wanted_and_nothing_else() {
        for seed in 0..1_000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut acks, mut broker) = (Acks::new(), Broker::default());
            let mut wanted: BTreeMap<u64, Verdict> = BTreeMap::new();
            for _ in 0..40 {
                for _ in 0..random.usize(..8) {
                    acks.delivered(());
                    broker.0.insert(acks.last(), None);
                }
                let bias = random.f64();
                let mut chosen: Vec<_> = (1..=acks.last()).collect();
                chosen.retain(|_| random.f64() < bias);
                let mut batch: Vec<_> = chosen
                    .into_iter()
                    .map(|tag| {
                        let verdict = random
                            .choice([Ack, Ack, Ack, Requeue, Moved, Return])
                            .unwrap();
                        (tag, *wanted.entry(tag).or_insert(verdict))
                    })
                    .collect();
                random.shuffle(&mut batch);
                let (done, frames) = acks.settle(batch);
                assert!(done.into_iter().all(|done| done));
                frames.into_iter().for_each(|frame| broker.apply(frame));
                for (tag, state) in &broker.0 {
                    let expected = wanted.get(tag).and_then(|verdict| match verdict {
                        Moved => Some(Ack),
                        Return => None,
                        other => Some(*other),
                    });
                    assert_eq!(*state, expected, "seed {seed}, tag {tag}");
                }
            }
            let unsettled = |tag: &u64| matches!(wanted.get(tag), None | Some(Return));
            let open: Vec<_> = (1..=acks.last()).filter(unsettled).collect();
            assert_eq!(
                acks.window.position(),
                open.first().copied().unwrap_or(acks.last() + 1)
            );
        }
    }
}
