//! Random histories against a reference model.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use onlyonce_core::Message;
use onlyonce_core::driver::{
    Acks, Capabilities, Delivery, Disposition, Ordering, SettleResult, Sink, Source,
};
use tokio::time::sleep;

use super::SourceHarness;
use super::tools::*;
use crate::random::histories;

const STEPS: usize = 40;

/// A delivery that was not settled by us, and may have expired.
struct Unsettled {
    delivery: Delivery,
    consumer: usize,
    /// No later delivery of the same message has been seen.
    newest: bool,
    /// Its consumer gave back another one, and may have given back this one with it.
    went_back: bool,
}

struct History<'a> {
    harness: &'a dyn SourceHarness,
    rng: Rng,
    seed: u64,
    sink: Arc<dyn Sink>,
    consumers: Vec<Arc<dyn Source>>,
    able: Capabilities,
    published: usize,
    /// What was published and not acked, in that order, and its group.
    alive: BTreeMap<String, Option<String>>,
    /// What was acked while an older message was not, its group, and who acked it. Where acks are cumulative, it may come
    /// again to another consumer.
    beyond_a_gap: BTreeMap<String, (Option<String>, usize)>,
    held: Vec<Unsettled>,
}

impl History<'_> {
    async fn step(&mut self) {
        match self.rng.u8(..10) {
            0..3 => self.publish().await,
            3..6 => self.receive().await,
            6..9 => self.settle().await,
            _ => self.let_time_pass().await,
        }
    }

    /// A few messages, some of them in one of two groups.
    async fn publish(&mut self) {
        let batch: Vec<Message> = (0..self.rng.usize(1..=4))
            .map(|_| {
                self.published += 1;
                let text = format!("{}-{:04}", self.seed, self.published);
                let mut message = Message::new(text.clone()).with_dedup_id(text.clone());
                let n = self.rng.u8(..3);
                message.group = (n > 0).then(|| format!("{}-g{n}", self.seed));
                self.alive.insert(text, message.group.clone());
                message
            })
            .collect();
        for result in self.sink.publish(&batch).await {
            result.expect("the sink takes it");
        }
    }

    async fn receive(&mut self) {
        let consumer = self.rng.usize(..self.consumers.len());
        let limit = limit(self.rng.usize(1..=4), Duration::ZERO);
        let got = self.consumers[consumer].receive(limit).await;
        let got = got.expect("it is open");
        if self.able.ordering == Ordering::Group {
            self.check_order(&got);
        }
        for delivery in got {
            let text = body(&delivery.message);
            self.revive(&text, consumer);
            assert!(self.alive.contains_key(&text), "{text} had been acked");
            for held in &mut self.held {
                held.newest &= body(&held.delivery.message) != text;
            }
            let newest = true;
            self.held.push(Unsettled {
                delivery,
                consumer,
                newest,
                went_back: false,
            });
        }
    }

    /// What comes again although it was acked is not acked any more, if the position had not reached it.
    fn revive(&mut self, text: &str, consumer: usize) {
        if self.able.acks != Acks::Cumulative {
            return;
        }
        if let Some((group, by)) = self.beyond_a_gap.remove(text) {
            assert_ne!(by, consumer, "{text} came again to who had acked it");
            self.alive.insert(text.to_owned(), group);
        }
    }

    /// A message comes only after, or together with and behind, all earlier ones of its group.
    fn check_order(&self, got: &[Delivery]) {
        let bodies = bodies_of(got);
        for (n, delivery) in got.iter().enumerate() {
            let (before, text) = (&bodies[..n], &bodies[n]);
            let Some(group) = &delivery.message.group else {
                continue;
            };
            let mut earlier = self.alive.range(..text.clone());
            let skipped =
                earlier.find(|(other, g)| g.as_ref() == Some(group) && !before.contains(other));
            assert_eq!(skipped, None, "{text} came before it: {bodies:?}");
        }
    }

    /// Acks one delivery or gives it back, as its own consumer.
    async fn settle(&mut self) {
        if self.held.is_empty() {
            return;
        }
        // Mostly recent ones; old ones are stale.
        let n = self.held.len() - 1 - self.rng.usize(..self.held.len().min(8));
        let held = self.held.swap_remove(n);
        let source = self.consumers[held.consumer].clone();
        let disposition = if self.rng.u8(..3) == 0 {
            NACK
        } else {
            Disposition::Ack
        };
        let answer = settle(&*source, std::slice::from_ref(&held.delivery), &disposition).await;
        let text = body(&held.delivery.message);
        match &answer[0] {
            SettleResult::Applied if self.able.acks.confirms() => {
                assert!(held.newest, "{text} had been delivered again");
            }
            SettleResult::LeaseLost => {
                let timed = self.able.timed_lease;
                assert!(
                    timed || !held.newest || held.went_back,
                    "{text} cannot have expired"
                );
                return;
            }
            SettleResult::Applied => self.goes_back_with(&held, &disposition),
            SettleResult::Unknown(error) if error.is_retryable() && self.is_behind(&text) => {
                return self.held.push(held);
            }
            SettleResult::Unknown(error) => panic!("{disposition:?} of {text}: {error}"),
        }
        if held.newest && disposition == Disposition::Ack {
            let group = self.alive.remove(&text).flatten();
            if self.alive.range(..text.clone()).next().is_some() {
                self.beyond_a_gap.insert(text, (group, held.consumer));
            }
        }
    }

    /// Whether an earlier message of its group is not acked: some brokers take acks only in order, and for now refuse this one.
    fn is_behind(&self, text: &str) -> bool {
        let group = self.alive.get(text).and_then(Option::as_ref);
        let mut earlier = self.alive.range(..text.to_owned());
        group.is_some() && earlier.any(|(_, other)| other.as_ref() == group)
    }

    /// A source that cannot give back one message of a group in its place gives back all that it holds; one that knows only a
    /// position goes back to it, whatever the message is.
    fn goes_back_with(&mut self, given_back: &Unsettled, disposition: &Disposition) {
        let in_its_place =
            self.able.ordering != Ordering::Delivery || given_back.delivery.message.group.is_none();
        let alone = in_its_place && self.able.acks != Acks::Cumulative;
        if *disposition == Disposition::Ack || alone {
            return;
        }
        for held in &mut self.held {
            held.went_back |= held.consumer == given_back.consumer;
        }
    }

    async fn let_time_pass(&mut self) {
        if self.able.timed_lease {
            let part = self.rng.u32(1..=4);
            sleep(self.harness.lease() * part / 3).await;
        }
    }

    /// Everything that was not acked comes, and nothing else.
    async fn finish(self) {
        for consumer in &self.consumers {
            consumer.close().await.expect("it closes");
        }
        let last = self.harness.source().await;
        let again = may_come_again(self.able, self.beyond_a_gap.into_keys().collect());
        let alive = self.alive.into_keys().collect();
        drain_exactly(self.harness, &*last, alive, again).await;
        last.close().await.expect("it closes");
    }
}

async fn history(harness: &dyn SourceHarness, seed: u64) {
    let consumers = vec![harness.source().await, harness.source().await];
    let mut history = History {
        harness,
        rng: Rng::with_seed(seed),
        seed,
        sink: harness.sink().await,
        able: able(&*consumers[0]).await,
        consumers,
        published: 0,
        alive: BTreeMap::new(),
        beyond_a_gap: BTreeMap::new(),
        held: Vec::new(),
    };
    for _ in 0..STEPS {
        history.step().await;
    }
    history.finish().await;
}

/// Random publishing, receiving, settling and waiting by two consumers: nothing that was acked comes again, nothing
/// that was not is lost, no stale receipt is accepted, and no message overtakes another of its group.
pub async fn random_histories_lose_nothing(harness: &dyn SourceHarness) {
    histories(async |seed| history(harness, seed).await).await;
}
