//! Acks, ack deadlines and dead letters: up to a thousand ids to a request, an answer to each.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, join3};
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::{
    AcknowledgeRequest, ModifyAckDeadlineRequest,
};
use onlyonce_core::attributes::{DEAD_LETTER_QUEUE, DEAD_LETTER_REASON};
use onlyonce_core::driver::{
    Delivery, Disposition, ExtendResult, Lease, Receipt, SettleResult, Settlement, Sink as _,
};
use onlyonce_core::{Error, ErrorKind, Message};
use tokio::time::Instant;

use crate::config::LONGEST_LEASE;
use crate::connection::{ACKNOWLEDGE, MODIFY_ACK_DEADLINE};
use crate::error::{Outcome, Outcomes};
use crate::leases::{Held, Leases};
use crate::source::Shared;
use crate::subscription::{BATCH, Settings, Traits};
use crate::{PubSubReceipt, PubSubSink};

/// Bytes of the ids of one request, which may have 512 KiB with what else is in it:
/// <https://cloud.google.com/pubsub/quotas#resource_limits>
const MAX_ID_BYTES: usize = 500_000;

/// A settlement of a message whose lease lasts: its place among the answers, and what is wanted.
struct Wanted<T> {
    at: usize,
    held: Held,
    wanted: T,
}

type Answers = Vec<(usize, SettleResult)>;

impl Shared {
    pub(crate) async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let (mut acks, mut nacks, mut dead) = (Vec::new(), Vec::new(), Vec::new());
        let mut answers = Answers::new();
        {
            let state = self.state();
            for (at, settlement) in batch.iter().enumerate() {
                let Some(held) = state.leases.lasting(&settlement.receipt) else {
                    answers.push((at, SettleResult::LeaseLost));
                    continue;
                };
                let held = held.clone();
                match &settlement.disposition {
                    Disposition::Ack => acks.push(Wanted {
                        at,
                        held,
                        wanted: (),
                    }),
                    Disposition::Nack { delay } => {
                        let wanted = *delay;
                        nacks.push(Wanted { at, held, wanted });
                    }
                    Disposition::DeadLetter { reason } => {
                        let wanted = reason.as_str();
                        dead.push(Wanted { at, held, wanted });
                    }
                }
            }
        }
        let (acked, given_back, moved) = join3(
            self.ack(acks),
            self.give_back(nacks),
            self.dead_letter(dead),
        )
        .await;
        answers.extend(acked.into_iter().chain(given_back).chain(moved));
        // What waited behind these may be received now.
        self.changed.notify_waiters();
        in_places(batch.len(), answers)
    }

    /// One request after another, each in the order of arrival. After one that failed nothing more of its keys is acked: the
    /// acks of a key stay in order.
    async fn ack(&self, mut all: Vec<Wanted<()>>) -> Answers {
        const WHAT: &str = "cannot ack";
        let mut answers = Answers::new();
        if all.is_empty() {
            return answers;
        }
        let _turn = self.acking.lock().await;
        all.sort_by_key(|wanted| wanted.held.seq);
        let mut stopped: HashSet<String> = HashSet::new();
        for chunk in chunks(all, |wanted| &wanted.held.ack_id) {
            // It may have waited for its turn.
            let (chunk, ended) = self.lasting(chunk);
            answers.extend(ended);
            let stops = |held: &Held| held.group().is_some_and(|group| stopped.contains(group));
            let (behind, chunk): (Vec<_>, Vec<_>) =
                chunk.into_iter().partition(|wanted| stops(&wanted.held));
            answers.extend(
                behind
                    .into_iter()
                    .map(|wanted| (wanted.at, self.held_up(&wanted.held))),
            );
            let outcomes = self.acknowledge(WHAT, &chunk).await;
            let mut state = self.state();
            for Wanted { at, held, .. } in chunk {
                let answer = self.conclude(&mut state.leases, WHAT, &outcomes, &held);
                if let (SettleResult::Unknown(_), Some(group)) = (&answer, held.group()) {
                    stopped.insert(group.to_owned());
                }
                answers.push((at, answer));
            }
        }
        answers
    }

    async fn acknowledge(&self, what: &str, chunk: &[Wanted<()>]) -> Outcomes {
        if chunk.is_empty() {
            return Outcomes::of(what, Ok(()));
        }
        let request = AcknowledgeRequest {
            subscription: self.resource.clone(),
            ack_ids: chunk
                .iter()
                .map(|wanted| wanted.held.ack_id.to_string())
                .collect(),
        };
        let limit = self.config.timeout;
        let call = self
            .connection
            .call(&ACKNOWLEDGE, &self.resource, request, limit);
        Outcomes::of(what, call.await)
    }

    /// Makes messages deliverable again, now or after their delays. What has come of a key behind the first that is given back
    /// goes with it, whoever has it: Pub/Sub delivers all of them again.
    async fn give_back(&self, all: Vec<Wanted<Duration>>) -> Answers {
        let mut back: Vec<Back> = Vec::new();
        {
            let mut state = self.state();
            let mut heads: HashMap<&str, u64> = HashMap::new();
            let mut delays: HashMap<&str, Duration> = HashMap::new();
            for Wanted { held, wanted, .. } in &all {
                if let Some(group) = held.group().filter(|_| self.keeps_order()) {
                    let head = heads.entry(group).or_insert(held.seq);
                    *head = held.seq.min(*head);
                    let delay = delays.entry(group).or_default();
                    *delay = (*delay).max(*wanted);
                }
            }
            let given: HashSet<&str> = all.iter().map(|wanted| &*wanted.held.ack_id).collect();
            let followers = state.leases.followers(&heads, &given);
            let delay_of = |held: &Held, own: Duration| {
                let of_group = held.group().and_then(|group| delays.get(group));
                of_group.copied().unwrap_or(own)
            };
            for Wanted { at, held, wanted } in &all {
                let delay = delay_of(held, *wanted);
                back.push(Back {
                    at: Some(*at),
                    held: held.clone(),
                    delay,
                });
            }
            for held in followers {
                let delay = delay_of(&held, Duration::ZERO);
                back.push(Back {
                    at: None,
                    held,
                    delay,
                });
            }
            state.pulls.ready.withdraw(&heads.keys().copied().collect());
        }
        self.give_back_in_order(back).await
    }

    /// A request for each delay and each thousand ids; a key's ids stand in the order of arrival, its last thousand go first.
    async fn give_back_in_order(&self, back: Vec<Back>) -> Answers {
        const WHAT: &str = "cannot give back";
        let mut by_delay: BTreeMap<u64, Vec<Back>> = BTreeMap::new();
        for one in back {
            by_delay.entry(seconds(one.delay)).or_default().push(one);
        }
        let mut answers = Answers::new();
        for (seconds, mut back) in by_delay {
            back.sort_by_key(|back| back.held.seq);
            let mut requests = chunks(back, |back| &back.held.ack_id);
            requests.reverse();
            for chunk in requests {
                let limit = self.config.timeout;
                let ids = chunk.iter().map(|back| &back.held.ack_id);
                let outcomes = self.modify(WHAT, ids, seconds, limit).await;
                let mut state = self.state();
                for Back { at, held, .. } in chunk {
                    match (at, outcomes.of_id(WHAT, &held.ack_id)) {
                        (Some(at), _) => {
                            let answer = self.conclude(&mut state.leases, WHAT, &outcomes, &held);
                            answers.push((at, answer));
                        }
                        (None, Outcome::Unknown(_)) => {}
                        // Whoever has it has to know that it comes again.
                        (None, _) => state.leases.lose(&held.ack_id),
                    }
                }
            }
        }
        answers
    }

    /// Gives back all that the source holds, when it closes. Whoever has it has to end.
    pub(crate) async fn give_back_all(&self, held: Vec<Held>) -> Result<(), Error> {
        held.iter().for_each(Held::lose);
        let back = held.into_iter().enumerate().map(|(at, held)| Back {
            at: Some(at),
            held,
            delay: Duration::ZERO,
        });
        let back: Vec<Back> = back.collect();
        let ends: Vec<Instant> = back.iter().map(|back| back.held.until).collect();
        let answers = self.give_back_in_order(back).await;
        // What has ended meanwhile comes again in any case.
        let failed = answers.into_iter().find_map(|(at, answer)| match answer {
            SettleResult::Unknown(error) if ends[at] > Instant::now() => Some(error),
            _ => None,
        });
        failed.map_or(Ok(()), Err)
    }

    pub(crate) async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        const WHAT: &str = "cannot extend";
        let traits = match self.traits().await {
            Ok(traits) => traits,
            Err(error) => {
                return batch
                    .iter()
                    .map(|_| ExtendResult::Unknown(error.clone()))
                    .collect();
            }
        };
        let lease = lease.min(LONGEST_LEASE);
        let asked = seconds(lease.max(traits.least_extension()));
        let sent = Instant::now();
        let mut answers = Answers::new();
        let mut all = Vec::new();
        {
            let state = self.state();
            for (at, receipt) in batch.iter().enumerate() {
                match state.leases.lasting(receipt) {
                    Some(held) => all.push(Wanted {
                        at,
                        held: held.clone(),
                        wanted: (),
                    }),
                    None => answers.push((at, SettleResult::LeaseLost)),
                }
            }
        }
        let requests = chunks(all, |wanted| &wanted.held.ack_id)
            .into_iter()
            .map(async |chunk| {
                // Should it hang, there is time for another.
                let limit = self.third_of_rest(chunk.iter().map(|wanted| &wanted.held));
                let ids = chunk.iter().map(|wanted| &wanted.held.ack_id);
                let outcomes = self.modify(WHAT, ids, asked, limit).await;
                let mut state = self.state();
                let answer = |wanted: Wanted<()>| {
                    let held = &wanted.held;
                    let answer = match outcomes.of_id(WHAT, &held.ack_id) {
                        Outcome::Done => {
                            state.leases.extended(&held.ack_id, sent + lease);
                            SettleResult::Applied
                        }
                        other => self.answer(&mut state.leases, other, held),
                    };
                    (wanted.at, answer)
                };
                chunk.into_iter().map(answer).collect::<Answers>()
            });
        answers.extend(join_all(requests).await.into_iter().flatten());
        let answers = in_places(batch.len(), answers).into_iter();
        answers
            .map(|answer| answer.extended(sent + lease))
            .collect()
    }

    /// Extends what a pull has brought, before anybody has it, and drops what is somebody else's already.
    pub(crate) async fn lease_anew(
        &self,
        deliveries: Vec<Delivery>,
        lease: Duration,
        traits: Traits,
    ) -> Vec<Delivery> {
        const WHAT: &str = "cannot extend";
        let asked = seconds(lease.max(traits.least_extension()));
        let mut kept = Vec::with_capacity(deliveries.len());
        for chunk in chunks(deliveries, |delivery| ack_id(&delivery.receipt)) {
            let sent = Instant::now();
            let ids = chunk.iter().map(|delivery| ack_id(&delivery.receipt));
            let outcomes = self.modify(WHAT, ids, asked, self.config.timeout).await;
            for mut delivery in chunk {
                match outcomes.of_id(WHAT, ack_id(&delivery.receipt)) {
                    Outcome::Done => delivery.lease = Lease::until(sent + lease),
                    Outcome::LeaseLost => continue,
                    // It has what the pull gave.
                    Outcome::Unknown(_) => {}
                }
                kept.push(delivery);
            }
        }
        kept
    }

    async fn modify<'a>(
        &self,
        what: &str,
        ids: impl Iterator<Item = &'a Arc<str>>,
        seconds: u64,
        limit: Duration,
    ) -> Outcomes {
        let request = ModifyAckDeadlineRequest {
            subscription: self.resource.clone(),
            ack_ids: ids.map(ToString::to_string).collect(),
            ack_deadline_seconds: i32::try_from(seconds).unwrap_or(i32::MAX),
        };
        let call = self
            .connection
            .call(&MODIFY_ACK_DEADLINE, &self.resource, request, limit);
        Outcomes::of(what, call.await)
    }

    /// Those of a chunk whose leases last; the others are answered.
    fn lasting(&self, chunk: Vec<Wanted<()>>) -> (Vec<Wanted<()>>, Answers) {
        let state = self.state();
        let lasts = |wanted: &Wanted<()>| state.leases.of_id(&wanted.held.ack_id).is_some();
        let (lasting, ended): (Vec<_>, Vec<_>) = chunk.into_iter().partition(lasts);
        let lost = |wanted: Wanted<()>| (wanted.at, SettleResult::LeaseLost);
        (lasting, ended.into_iter().map(lost).collect())
    }

    /// A third of what is left of the lease that ends first.
    fn third_of_rest<'a>(&self, held: impl Iterator<Item = &'a Held>) -> Duration {
        let first = held.map(|held| held.until).min();
        let left = first.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = self.config.timeout;
        left.map_or(timeout, |left| timeout.min(left / 3))
    }

    /// Turns what the service said of a message into its answer; what was done has ended its lease.
    fn conclude(
        &self,
        leases: &mut Leases,
        what: &str,
        outcomes: &Outcomes,
        held: &Held,
    ) -> SettleResult {
        match outcomes.of_id(what, &held.ack_id) {
            Outcome::Done => {
                leases.end(&held.ack_id);
                SettleResult::Applied
            }
            other => self.answer(leases, other, held),
        }
    }

    /// The answer of what was not done.
    fn answer(&self, leases: &mut Leases, outcome: Outcome, held: &Held) -> SettleResult {
        match outcome {
            Outcome::Done => SettleResult::Applied,
            Outcome::LeaseLost => {
                leases.lose(&held.ack_id);
                SettleResult::LeaseLost
            }
            Outcome::Unknown(error) => {
                SettleResult::Unknown(error.on_queue(self.config.name()).on_message(&held.message))
            }
        }
    }

    fn held_up(&self, held: &Held) -> SettleResult {
        let text = "not acked, because an earlier ack of its key is not known to be done";
        let error = Error::new(ErrorKind::Other, text).retryable(true);
        SettleResult::Unknown(error.on_queue(self.config.name()).on_message(&held.message))
    }

    /// Publishes messages to the topic that the dead-letter policy names, then acks them here.
    async fn dead_letter(&self, all: Vec<Wanted<&str>>) -> Answers {
        if all.is_empty() {
            return Answers::new();
        }
        let letters: Vec<Message> = all.iter().map(|wanted| self.letter(wanted)).collect();
        let published = match self.dead_letters().await {
            Ok(sink) => sink.publish(&letters).await,
            Err(error) => letters
                .iter()
                .map(|letter| Err(error.clone().on_message(letter)))
                .collect(),
        };
        let (mut moved, mut answers) = (Vec::new(), Answers::new());
        for (Wanted { at, held, .. }, published) in all.into_iter().zip(published) {
            match published {
                Ok(()) => moved.push(Wanted {
                    at,
                    held,
                    wanted: (),
                }),
                Err(error) => answers.push((at, SettleResult::Unknown(may_publish(error)))),
            }
        }
        answers.extend(self.ack(moved).await);
        answers
    }

    fn letter(&self, wanted: &Wanted<&str>) -> Message {
        let message = Message::clone(&wanted.held.message);
        message
            .with_attribute(DEAD_LETTER_REASON, wanted.wanted)
            .with_attribute(DEAD_LETTER_QUEUE, self.resource.clone())
    }

    async fn dead_letters(&self) -> Result<&PubSubSink, Error> {
        let open = || async {
            let settings = Settings::read(&self.connection, &self.config).await?;
            let topic = settings.dead_letter_topic().and_then(|topic| {
                topic.ok_or_else(|| {
                    Error::config(
                        "the subscription has no dead-letter policy; give it one, or give the pipeline's dead_letter() a sink",
                    )
                })
            });
            let topic = topic.map_err(|error| error.on_queue(self.config.name()))?;
            PubSubSink::new(self.config.beside(topic))
        };
        self.dead_letters.get_or_try_init(open).await
    }
}

/// A message that is given back: its place among the answers, if it was asked for.
struct Back {
    at: Option<usize>,
    held: Held,
    delay: Duration,
}

/// What to do where a dead letter may not be published.
fn may_publish(error: Error) -> Error {
    if error.kind() != ErrorKind::Permission {
        return error;
    }
    let text = "a dead letter cannot be published: grant roles/pubsub.publisher on the topic of the dead-letter policy to \
         this worker, and to Pub/Sub's own service account (service-PROJECT_NUMBER@gcp-sa-pubsub.iam.gserviceaccount.com)";
    Error::new(ErrorKind::Permission, text)
        .retryable(error.is_retryable())
        .caused_by(error)
}

/// A receipt of ours has one.
fn ack_id(receipt: &Receipt) -> &Arc<str> {
    static NONE: std::sync::LazyLock<Arc<str>> = std::sync::LazyLock::new(|| "".into());
    receipt
        .get()
        .map_or(&*NONE, |PubSubReceipt { ack_id }| ack_id)
}

/// As many as fit into one request, by number and by bytes.
fn chunks<T>(all: Vec<T>, id: impl Fn(&T) -> &Arc<str>) -> Vec<Vec<T>> {
    let mut chunks: Vec<Vec<T>> = Vec::new();
    let mut bytes = 0;
    for one in all {
        let size = id(&one).len();
        match chunks.last_mut() {
            Some(chunk) if chunk.len() < BATCH && bytes + size <= MAX_ID_BYTES => {
                bytes += size;
                chunk.push(one);
            }
            _ => {
                bytes = size;
                chunks.push(vec![one]);
            }
        }
    }
    chunks
}

fn in_places(count: usize, answers: Answers) -> Vec<SettleResult> {
    let mut placed = answers;
    placed.sort_by_key(|(at, _)| *at);
    debug_assert_eq!(placed.len(), count, "one answer each");
    placed.into_iter().map(|(_, answer)| answer).collect()
}

/// In whole seconds, as Pub/Sub takes it: no more than ten minutes.
fn seconds(time: Duration) -> u64 {
    let more = u64::from(time.subsec_nanos() > 0);
    let seconds = time.as_secs().saturating_add(more);
    seconds.min(LONGEST_LEASE.as_secs())
}
