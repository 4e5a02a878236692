//! Deletes, visibility timeouts and dead letters: ten entries to a request, an answer to each.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_sqs::types::{
    ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry,
};
use futures_util::future::join3;
use onlyonce_core::attributes::{DEAD_LETTER_QUEUE, DEAD_LETTER_REASON};
use onlyonce_core::driver::{
    Disposition, ExtendResult, Receipt, SettleResult, Settlement, Sink as _,
};
use onlyonce_core::{Error, ErrorKind, Message};
use tokio::time::Instant;

use crate::batch::{Outcome, entries, outcomes};
use crate::error::{self, impossible};
use crate::leases::{self, Leases};
use crate::queue::{BATCH, all_of};
use crate::settings::Settings;
use crate::source::{Shared, whole};
use crate::{SqsReceipt, SqsSink};

impl Shared {
    pub(crate) async fn settle(&self, batch: &[Settlement]) -> Vec<SettleResult> {
        let (mut acks, mut nacks, mut dead) = (Vec::new(), Vec::new(), Vec::new());
        for (at, settlement) in batch.iter().enumerate() {
            let receipt = &settlement.receipt;
            match &settlement.disposition {
                Disposition::Ack => acks.push((at, receipt, ())),
                Disposition::Nack { delay } => nacks.push((at, receipt, *delay)),
                Disposition::DeadLetter { reason } => dead.push((at, receipt, reason.as_str())),
            }
        }
        let followers = self.followers(&nacks);
        let places = batch.len()..;
        nacks.extend(
            places
                .zip(&followers)
                .map(|(at, receipt)| (at, receipt, Duration::ZERO)),
        );
        // Last first: a group stays closed until its head is given back.
        nacks.sort_by_cached_key(|(_, receipt, _)| Reverse(self.arrival(receipt)));
        let side_by_side = !self.queue.is_fifo();
        let (acks, nacks, dead) = join3(
            all_of(requests(acks, |chunk| self.delete(chunk)), true),
            all_of(requests(nacks, |chunk| self.give_back(chunk)), side_by_side),
            all_of(requests(dead, |chunk| self.dead_letter(chunk)), false),
        )
        .await;
        in_places(batch.len(), acks.into_iter().chain(nacks).chain(dead))
    }

    /// What has come of the groups of messages that are given back, and nobody has received yet: it would overtake them.
    fn followers(&self, nacks: &[(usize, &Receipt, Duration)]) -> Vec<Receipt> {
        if !self.queue.is_fifo() {
            return Vec::new();
        }
        let mut state = self.state();
        let lasting = nacks
            .iter()
            .filter_map(|(_, receipt, _)| state.leases.lasting(receipt));
        let leases: Vec<_> = lasting.map(|(_, lease)| lease).collect();
        let groups = leases
            .iter()
            .filter_map(|lease| lease.message.group.as_deref());
        state.polls.ready.withdraw(&groups.collect())
    }

    fn arrival(&self, receipt: &Receipt) -> Option<u64> {
        let lasting = self.state().leases.lasting(receipt);
        lasting.map(|(_, lease)| lease.seq)
    }

    /// Those of a chunk whose leases last; the others are answered.
    fn lasting<'a, T>(&self, chunk: Chunk<'a, T>) -> (Vec<Wanted<T>>, Vec<(usize, SettleResult)>) {
        let state = self.state();
        let (mut held, mut lost) = (Vec::new(), Vec::new());
        for (at, receipt, wanted) in chunk {
            match state.leases.lasting(receipt) {
                Some((handle, lease)) => held.push(Wanted {
                    at,
                    handle,
                    lease,
                    wanted,
                }),
                None => lost.push((at, SettleResult::LeaseLost)),
            }
        }
        (held, lost)
    }

    async fn delete(&self, chunk: Chunk<'_, ()>) -> Vec<(usize, SettleResult)> {
        let (held, mut answers) = self.lasting(chunk);
        let deleted = self.delete_batch(&held).await;
        self.conclude(held, deleted, "cannot delete", &mut answers, end);
        answers
    }

    async fn delete_batch<T>(&self, held: &[Wanted<T>]) -> Result<Vec<Outcome>, Error> {
        if held.is_empty() {
            return Ok(Vec::new());
        }
        let entries = entries(held, |id, held| {
            DeleteMessageBatchRequestEntry::builder()
                .id(id)
                .receipt_handle(&*held.handle)
                .build()
                .map_err(impossible)
        });
        let request = self
            .queue
            .client()
            .await?
            .delete_message_batch()
            .queue_url(self.queue.url().await?)
            .set_entries(Some(entries?));
        let limit = self.until_first_end(held);
        let answer = self.queue.call("cannot delete", limit, request.send());
        let answer = answer.await?;
        let done = answer.successful().iter().map(|entry| entry.id());
        Ok(outcomes(held.len(), done, answer.failed()))
    }

    /// Makes messages visible again, now or after their delays.
    async fn give_back(&self, chunk: Chunk<'_, Duration>) -> Vec<(usize, SettleResult)> {
        let (held, mut answers) = self.lasting(chunk);
        let delay = |held: &Wanted<Duration>| rounded_up(held.wanted).min(held.lease.rest());
        let limit = self.until_first_end(&held);
        let changed = self.change_visibility(&held, delay, limit).await;
        self.conclude(held, changed, "cannot give back", &mut answers, end);
        answers
    }

    pub(crate) async fn extend(&self, batch: &[Receipt], lease: Duration) -> Vec<ExtendResult> {
        let sent = Instant::now();
        let wanted = batch.iter().enumerate();
        let wanted = wanted.map(|(at, receipt)| (at, receipt, lease)).collect();
        let answers = all_of(requests(wanted, |chunk| self.extend_chunk(chunk)), true).await;
        let answers = in_places(batch.len(), answers).into_iter();
        // More than this SQS refuses.
        let until = sent + lease.min(leases::LONGEST);
        answers.map(|answer| answer.extended(until)).collect()
    }

    async fn extend_chunk(&self, chunk: Chunk<'_, Duration>) -> Vec<(usize, SettleResult)> {
        let (held, mut answers) = self.lasting(chunk);
        let (held, ended): (Vec<_>, Vec<_>) = held
            .into_iter()
            .partition(|held| rounded_up(held.wanted) <= held.lease.rest());
        answers.extend(ended.into_iter().map(|held| {
            let text = "cannot extend: SQS ends a lease 12 hours after the receive";
            let error = Error::new(ErrorKind::Other, text).on_queue(self.queue.name());
            (
                held.at,
                SettleResult::Unknown(error.on_message(&held.lease.message)),
            )
        }));
        let sent = Instant::now();
        let lease = |held: &Wanted<Duration>| rounded_up(held.wanted);
        // Should it hang, there is time for another.
        let limit = self.until_first_end(&held) / 3;
        let changed = self.change_visibility(&held, lease, limit).await;
        self.conclude(
            held,
            changed,
            "cannot extend",
            &mut answers,
            |leases, held| {
                leases.extended(&held.handle, sent + held.wanted);
            },
        );
        answers
    }

    async fn change_visibility(
        &self,
        held: &[Wanted<Duration>],
        seconds: impl Fn(&Wanted<Duration>) -> u64,
        limit: Duration,
    ) -> Result<Vec<Outcome>, Error> {
        if held.is_empty() {
            return Ok(Vec::new());
        }
        let entries = entries(held, |id, held| {
            ChangeMessageVisibilityBatchRequestEntry::builder()
                .id(id)
                .receipt_handle(&*held.handle)
                .visibility_timeout(whole(seconds(held)))
                .build()
                .map_err(impossible)
        });
        let request = self
            .queue
            .client()
            .await?
            .change_message_visibility_batch()
            .queue_url(self.queue.url().await?)
            .set_entries(Some(entries?));
        let what = "cannot change the visibility timeout";
        let answer = self.queue.call(what, limit, request.send()).await?;
        let done = answer.successful().iter().map(|entry| entry.id());
        Ok(outcomes(held.len(), done, answer.failed()))
    }

    /// How long a request may take. What SQS says of a handle whose lease has ended means nothing: on a standard queue it
    /// says yes, and may have done nothing.
    /// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_DeleteMessage.html>
    fn until_first_end<T>(&self, held: &[Wanted<T>]) -> Duration {
        let first = held.iter().map(|held| held.lease.until).min();
        let left = first.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = self.queue.config.timeout;
        left.map_or(timeout, |left| left.min(timeout))
    }

    /// Turns what SQS said of each message into its answer, and keeps the leases in step.
    fn conclude<T>(
        &self,
        held: Vec<Wanted<T>>,
        said: Result<Vec<Outcome>, Error>,
        what: &str,
        answers: &mut Vec<(usize, SettleResult)>,
        done: impl Fn(&mut Leases, &Wanted<T>),
    ) {
        let mut state = self.state();
        let mut said = said.map(Vec::into_iter);
        for held in held {
            let message = &held.lease.message;
            let unknown = |error: Error| {
                SettleResult::Unknown(error.on_queue(self.queue.name()).on_message(message))
            };
            let answer = match &mut said {
                Err(error) => unknown(error.clone()),
                Ok(outcomes) => match outcomes.next() {
                    Some(Outcome::Done) => {
                        done(&mut state.leases, &held);
                        SettleResult::Applied
                    }
                    Some(Outcome::Refused(entry)) if error::is_lease_lost(&entry) => {
                        state.leases.end(&held.handle);
                        SettleResult::LeaseLost
                    }
                    Some(Outcome::Refused(entry)) => unknown(error::of_entry(what, &entry)),
                    Some(Outcome::Unmentioned) | None => unknown(error::of_silence(what)),
                },
            };
            answers.push((held.at, answer));
        }
        drop(state);
        // What waited behind these may be received now.
        self.changed.notify_waiters();
    }

    /// Sends messages to the queue that the redrive policy names, then deletes them here.
    async fn dead_letter(&self, chunk: Chunk<'_, &str>) -> Vec<(usize, SettleResult)> {
        let (held, mut answers) = self.lasting(chunk);
        if held.is_empty() {
            return answers;
        }
        let letters: Vec<Message> = held.iter().map(|held| self.letter(held)).collect();
        let published = match self.dead_letters().await {
            Ok(sink) => sink.publish(&letters).await,
            Err(error) => letters
                .iter()
                .map(|letter| Err(error.clone().on_message(letter)))
                .collect(),
        };
        let mut moved = Vec::new();
        for (held, published) in held.into_iter().zip(published) {
            match published {
                Ok(()) => {
                    let receipt = SqsReceipt {
                        handle: held.handle,
                    };
                    moved.push((held.at, Receipt::new(receipt)));
                }
                Err(error) => answers.push((held.at, SettleResult::Unknown(error))),
            }
        }
        let acks = moved.iter().map(|(at, receipt)| (*at, receipt, ()));
        answers.extend(self.delete(acks.collect()).await);
        answers
    }

    fn letter(&self, held: &Wanted<&str>) -> Message {
        let message = Message::clone(&held.lease.message);
        message
            .with_attribute(DEAD_LETTER_REASON, held.wanted)
            .with_attribute(DEAD_LETTER_QUEUE, self.queue.name())
    }

    async fn dead_letters(&self) -> Result<&SqsSink, Error> {
        let open = || async {
            let settings = Settings::read(&self.queue).await?;
            let target = match settings.redrive() {
                Some(policy) => policy.target(),
                None => Err(Error::config(
                    "the queue has no redrive policy, so it has no dead-letter queue; give it one, or give the pipeline's dead_letter() a sink",
                )),
            };
            let target = target.map_err(|error| error.on_queue(self.queue.name()))?;
            Ok(SqsSink::to(self.queue.beside(target)?))
        };
        self.dead_letters.get_or_try_init(open).await
    }
}

/// A message whose lease lasts, and what is wanted of it.
struct Wanted<T> {
    /// Its place among the answers.
    at: usize,
    handle: Arc<str>,
    lease: leases::Visibility,
    wanted: T,
}

/// It is settled.
fn end<T>(leases: &mut Leases, held: &Wanted<T>) {
    leases.end(&held.handle);
}

/// What fits into one request: places among the answers, messages, and what is wanted of them.
type Chunk<'a, T> = Vec<(usize, &'a Receipt, T)>;

/// The requests, not yet begun, that are made of as many full chunks as there are and a rest.
fn requests<'a, T, F>(
    all: Vec<(usize, &'a Receipt, T)>,
    request: impl Fn(Chunk<'a, T>) -> F,
) -> Vec<F> {
    let count = all.len().div_ceil(BATCH);
    let mut all = all.into_iter();
    (0..count)
        .map(|_| request(all.by_ref().take(BATCH).collect()))
        .collect()
}

fn in_places(
    count: usize,
    answers: impl IntoIterator<Item = (usize, SettleResult)>,
) -> Vec<SettleResult> {
    let mut placed: Vec<(usize, SettleResult)> = answers.into_iter().collect();
    placed.sort_by_key(|(at, _)| *at);
    placed.truncate(count);
    debug_assert_eq!(placed.len(), count, "one answer each");
    placed.into_iter().map(|(_, answer)| answer).collect()
}

/// In whole seconds, as SQS takes it.
fn rounded_up(time: Duration) -> u64 {
    let more = u64::from(time.subsec_nanos() > 0);
    time.as_secs().saturating_add(more)
}
