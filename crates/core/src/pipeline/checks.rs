use std::time::Duration;

use crate::driver::{Acks, Durability, Ordering, QueueInfo, SinkInfo, StoreInfo};
use crate::{Error, ErrorKind};

use super::Mode;
use super::options::Options;

/// A combination of settings under which a message can be lost, doubled or reordered. The pipeline refuses to start with
/// one, unless it was [allowed](crate::Builder::allow).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConfigRisk {
    /// Dedup records are forgotten while the broker can still deliver the message again.
    ShortRetention,
    /// The lease is shorter than the handler may take, with the wait for its batch, and cannot be extended.
    ShortLease,
    /// The broker gives up on a message before the retry policy does.
    DeliveryLimit,
    /// The broker can give up on a message that no handler failed: it counts workers that stop or crash.
    GivesUp,
    /// The dead-letter queue given to the pipeline is the queue that is consumed.
    OwnDeadLetters,
    /// The queue is the dead-letter queue of another: what took effect there would run here again, since each queue has its
    /// own dedup records.
    DeadLetterQueue,
    /// There is nowhere to put what cannot be processed.
    NoDeadLetter,
    /// Order within groups was asked for, and the queue does not keep it.
    NoOrder,
    /// `at_most_once` on a broker that does not confirm each ack by itself: an ack that is lost, or that is waiting for those
    /// before it, would run the handler twice.
    UnconfirmedAck,
    /// The store can lose the record that a message took effect while the queue can still deliver it: it is in memory only, drops
    /// what it has no room for, or fails over to a replica that lags.
    StoreForgets,
}

/// What a pipeline has found before it starts.
#[derive(Default)]
pub(crate) struct Found {
    pub(crate) queue: QueueInfo,
    pub(crate) sink: Option<SinkInfo>,
    pub(crate) store: Option<StoreInfo>,
}

/// Refuses unsafe settings, all in one list.
pub(crate) fn check(mode: Mode, options: &Options, found: &Found) -> Result<(), Error> {
    let mut found = risks(mode, options, found);
    found.retain(|(risk, _)| !options.allowed.contains(risk));
    if found.is_empty() {
        return Ok(());
    }
    let text = "refusing to start, because of these settings:";
    let list = found
        .into_iter()
        .map(|(risk, why)| format!("{why} (or allow(ConfigRisk::{risk:?}))"));
    Err(Error::new(ErrorKind::Unsafe, text).with_list(list.collect()))
}

type Risk = (ConfigRisk, String);

/// Everything that a check may look at.
struct Checks<'a> {
    mode: Mode,
    options: &'a Options,
    queue: &'a QueueInfo,
    sink: Option<&'a SinkInfo>,
    store: Option<&'a StoreInfo>,
}

fn risks(mode: Mode, options: &Options, found: &Found) -> Vec<Risk> {
    let checks = Checks {
        mode,
        options,
        queue: &found.queue,
        sink: found.sink.as_ref(),
        store: found.store.as_ref(),
    };
    let all = [
        checks.short_retention(),
        checks.short_lease(),
        checks.delivery_limit(),
        checks.gives_up(),
        checks.own_dead_letters(),
        checks.dead_letter_queue(),
        checks.no_dead_letter(),
        checks.no_order(),
        checks.unconfirmed_ack(),
        checks.store_forgets(),
    ];
    all.into_iter().flatten().collect()
}

impl Checks<'_> {
    fn has_records(&self) -> bool {
        matches!(self.mode, Mode::Transactional | Mode::Idempotent)
    }

    fn short_retention(&self) -> Option<Risk> {
        let (kept, again) = (self.options.dedup_retention, self.queue.retention?);
        let why = format!(
            "dedup records are kept for {}, but the queue can deliver a message again for {}: set dedup_retention() above that",
            days(kept),
            days(again)
        );
        (self.has_records() && kept <= again).then_some((ConfigRisk::ShortRetention, why))
    }

    fn short_lease(&self) -> Option<Risk> {
        let wait = self.options.batch.wait;
        let timeout = self.options.handler_timeout.unwrap_or_default();
        let (lease, longest) = (self.queue.lease?, wait.saturating_add(timeout));
        let why = format!(
            "the lease of {lease:?} cannot be extended and is not longer than the handler's time-out of {timeout:?} and a batch's wait of {wait:?}: lengthen the lease at the broker"
        );
        let short = !self.queue.capabilities.extend && !longest.is_zero() && lease <= longest;
        short.then_some((ConfigRisk::ShortLease, why))
    }

    fn delivery_limit(&self) -> Option<Risk> {
        let (max, attempts) = (self.queue.max_deliveries?, self.options.retry.max_attempts);
        let why = format!(
            "the broker gives up after {max} deliveries, the retry policy after {attempts} attempts: raise the queue's limit or lower max_attempts"
        );
        let low = self.mode != Mode::AtMostOnce && max < attempts;
        low.then_some((ConfigRisk::DeliveryLimit, why))
    }

    fn gives_up(&self) -> Option<Risk> {
        Some((ConfigRisk::GivesUp, self.queue.gives_up.clone()?))
    }

    fn own_dead_letters(&self) -> Option<Risk> {
        let own = self.sink?.identity.is_some() && self.sink?.identity == self.queue.identity;
        let why = "dead_letter() was given the queue that is consumed: what cannot be processed would come again without end; give it another queue";
        own.then(|| (ConfigRisk::OwnDeadLetters, why.into()))
    }

    fn dead_letter_queue(&self) -> Option<Risk> {
        let sources = &self.queue.dead_letters_of;
        let own_records = self.has_records() && self.options.identity.is_none();
        (own_records && !sources.is_empty()).then(|| {
            let why = format!(
                "this is the dead-letter queue of {}: a message that took effect there would run here again, since each queue has its own dedup records; put it back there instead (a redrive), or share the records by identity(…)",
                sources.join(", ")
            );
            (ConfigRisk::DeadLetterQueue, why)
        })
    }

    fn no_dead_letter(&self) -> Option<Risk> {
        let nowhere = self.sink.is_none() && !self.queue.capabilities.dead_letter;
        let why = "nowhere to put messages that cannot be processed: give dead_letter() a sink, or the queue a dead-letter queue of its own where the source can use it";
        (nowhere && self.mode != Mode::AtMostOnce).then(|| (ConfigRisk::NoDeadLetter, why.into()))
    }

    fn no_order(&self) -> Option<Risk> {
        let unordered = self.queue.capabilities.ordering == Ordering::None;
        let why = "require_ordering() was asked for, but the queue does not keep groups in order";
        (self.options.require_ordering && unordered).then(|| (ConfigRisk::NoOrder, why.into()))
    }

    /// The handler may run although the broker does not know of the ack.
    fn unconfirmed_ack(&self) -> Option<Risk> {
        let acks = self.queue.capabilities.acks;
        let why = match acks {
            Acks::Cumulative => {
                "this broker confirms an ack only together with all before it, and delivers the message again where one of them is missing"
            }
            _ => "this broker never confirms an ack",
        };
        (self.mode == Mode::AtMostOnce && !acks.confirms()).then(|| {
            let why =
                format!("{why}, so at_most_once cannot be kept: use at_least_once or a store");
            (ConfigRisk::UnconfirmedAck, why)
        })
    }

    /// The store can lose a record while the queue still has the message.
    fn store_forgets(&self) -> Option<Risk> {
        let store = self.store?;
        let name = &store.name;
        let lost = match store.durability {
            Durability::Disk => None,
            // Both end together.
            Durability::Process if self.queue.durability == Durability::Process => None,
            Durability::Process => Some("when this process ends"),
            Durability::Machine => Some("when the machine that has them fails"),
        };
        let lost = lost.map(|when| {
            format!("the store {name} loses its records {when}, but the queue keeps its messages, which would run again: use a store on disk")
        });
        let evicts = store.evicts.as_ref().map(|why| {
            format!("the store {name} can drop a record before its retention has passed: {why}")
        });
        let lags = store
            .lags
            .as_ref()
            .map(|why| format!("a failover of the store {name} can lose records: {why}"));
        let all: Vec<String> = [lost, evicts, lags].into_iter().flatten().collect();
        (!all.is_empty()).then(|| (ConfigRisk::StoreForgets, all.join("; ")))
    }
}

fn days(duration: Duration) -> String {
    let hours = duration.as_secs_f64() / 3_600.0;
    if hours >= 48.0 {
        format!("{:.1} days", hours / 24.0)
    } else {
        format!("{hours:.1} hours")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(all: &Found) -> Vec<ConfigRisk> {
        let found = risks(Mode::AtLeastOnce, &Options::default(), all);
        found.into_iter().map(|(risk, _)| risk).collect()
    }

    #[test]
    fn dead_letters_need_a_sink_or_a_source_that_takes_them() {
        let mut all = Found::default();
        assert_eq!(found(&all), [ConfigRisk::NoDeadLetter]);
        // Where the broker itself puts what it gives up on is not enough.
        all.queue.dead_letter = Some("orders.dead".into());
        assert_eq!(found(&all), [ConfigRisk::NoDeadLetter]);
        all.queue.capabilities.dead_letter = true;
        assert_eq!(found(&all), []);
        all.queue.capabilities.dead_letter = false;
        all.sink = Some(SinkInfo::default());
        assert_eq!(found(&all), []);
    }

    #[test]
    fn a_batch_waits_for_less_than_a_lease_that_cannot_be_extended() {
        let mut all = Found {
            sink: Some(SinkInfo::default()),
            ..Found::default()
        };
        let mut options = Options::default();
        let secs = Duration::from_secs;
        for (extend, lease, timeout, wait, safe) in [
            (false, secs(30), None, secs(0), true),
            (false, secs(30), None, secs(29), true),
            (false, secs(30), None, secs(30), false),
            (false, secs(30), Some(secs(20)), secs(9), true),
            (false, secs(30), Some(secs(20)), secs(10), false),
            (false, secs(30), Some(secs(30)), secs(0), false),
            (true, secs(30), Some(secs(60)), secs(60), true),
        ] {
            all.queue.lease = Some(lease);
            all.queue.capabilities.extend = extend;
            options.handler_timeout = timeout;
            options.batch.wait = wait;
            let found = risks(Mode::AtLeastOnce, &options, &all);
            assert_eq!(found.is_empty(), safe, "{timeout:?}, {wait:?}: {found:?}");
        }
    }

    #[test]
    fn at_most_once_needs_a_broker_that_confirms_each_ack() {
        let mut all = Found::default();
        for (acks, why) in [
            (Acks::Unconfirmed, Some("never confirms an ack")),
            (Acks::Cumulative, Some("only together with all before it")),
            (Acks::Confirmed, None),
        ] {
            all.queue.capabilities.acks = acks;
            let found = risks(Mode::AtMostOnce, &Options::default(), &all);
            let told = found
                .iter()
                .find(|(risk, _)| *risk == ConfigRisk::UnconfirmedAck);
            assert_eq!(told.is_some(), why.is_some(), "{acks:?}");
            assert!(told.is_none_or(|(_, text)| text.contains(why.unwrap_or_default())));
        }
    }

    #[test]
    fn a_store_keeps_its_records_for_as_long_as_the_queue_its_messages() {
        use Durability::{Disk, Machine, Process};
        let mut all = Found {
            sink: Some(SinkInfo::default()),
            ..Found::default()
        };
        for (queue, store, safe) in [
            (Disk, Disk, true),
            (Process, Process, true),
            (Process, Disk, true),
            (Disk, Process, false),
            (Disk, Machine, false),
            // Not one machine, for all that is known.
            (Machine, Machine, false),
        ] {
            all.queue.durability = queue;
            all.store = Some(StoreInfo::new("redis", store));
            assert_eq!(found(&all).is_empty(), safe, "{queue:?}, {store:?}");
        }
        for weakness in [
            |store: &mut StoreInfo| store.evicts = Some("maxmemory-policy".into()),
            |store: &mut StoreInfo| store.lags = Some("one replica".into()),
        ] {
            let mut store = StoreInfo::new("redis", Disk);
            weakness(&mut store);
            all.store = Some(store);
            assert_eq!(found(&all), [ConfigRisk::StoreForgets]);
        }
    }
}
