use std::time::Duration;

use crate::driver::{Durability, Ordering, QueueInfo, SinkInfo, StoreInfo};
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
    /// The lease is shorter than the handler may take, and cannot be extended.
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
    /// `at_most_once` on a broker that never confirms an ack: a lost ack would run the handler twice.
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

fn risks(mode: Mode, options: &Options, all: &Found) -> Vec<(ConfigRisk, String)> {
    let (info, sink) = (&all.queue, all.sink.as_ref());
    let capabilities = info.capabilities;
    let mut found = Vec::new();
    found.extend(short_retention(mode, options, info));
    if let (Some(lease), Some(longest)) = (info.lease, options.handler_timeout)
        && !capabilities.extend
        && lease <= longest
    {
        found.push((
            ConfigRisk::ShortLease,
            format!(
                "the lease of {lease:?} cannot be extended and is not longer than the handler's time-out of {longest:?}: lengthen the lease at the broker"
            ),
        ));
    }
    if let Some(max) = info.max_deliveries
        && mode != Mode::AtMostOnce
        && max < options.retry.max_attempts
    {
        found.push((
            ConfigRisk::DeliveryLimit,
            format!(
                "the broker gives up after {max} deliveries, the retry policy after {} attempts: raise the queue's limit or lower max_attempts",
                options.retry.max_attempts
            ),
        ));
    }
    if let Some(why) = &info.gives_up {
        found.push((ConfigRisk::GivesUp, why.clone()));
    }
    if sink.is_some_and(|sink| sink.identity.is_some() && sink.identity == info.identity) {
        found.push((
            ConfigRisk::OwnDeadLetters,
            "dead_letter() was given the queue that is consumed: what cannot be processed would come again without end; give it another queue".into(),
        ));
    }
    found.extend(dead_letter_queue(mode, options, info));
    if sink.is_none() && !capabilities.dead_letter && mode != Mode::AtMostOnce {
        found.push((
            ConfigRisk::NoDeadLetter,
            "nowhere to put messages that cannot be processed: give dead_letter() a sink, or the queue a dead-letter queue of its own where the source can use it".into(),
        ));
    }
    if options.require_ordering && capabilities.ordering == Ordering::None {
        found.push((
            ConfigRisk::NoOrder,
            "require_ordering() was asked for, but the queue does not keep groups in order".into(),
        ));
    }
    if mode == Mode::AtMostOnce && !capabilities.confirms_settle {
        found.push((
            ConfigRisk::UnconfirmedAck,
            "this broker never confirms an ack, so at_most_once cannot be kept: use at_least_once or a store".into(),
        ));
    }
    let forgets = all
        .store
        .as_ref()
        .and_then(|store| forgets(store, info.durability));
    found.extend(forgets.map(|why| (ConfigRisk::StoreForgets, why)));
    found
}

/// Why the store can lose a record while the queue still has the message.
fn forgets(store: &StoreInfo, queue: Durability) -> Option<String> {
    let name = &store.name;
    let lost = match store.durability {
        Durability::Disk => None,
        // Both end together.
        Durability::Process if queue == Durability::Process => None,
        Durability::Process => Some("when this process ends"),
        Durability::Machine => Some("when the machine that has them fails"),
    };
    let lost = lost.map(|when| {
        format!("the store {name} loses its records {when}, but the queue keeps its messages, which would run again: use a store on disk")
    });
    let evicts = store.evicts.as_ref();
    let evicts =
        evicts.map(|why| format!("the store {name} can drop a record before its retention: {why}"));
    let lags = store.lags.as_ref();
    let lags = lags.map(|why| format!("a failover of the store {name} can lose records: {why}"));
    let all: Vec<String> = [lost, evicts, lags].into_iter().flatten().collect();
    (!all.is_empty()).then(|| all.join("; "))
}

fn short_retention(
    mode: Mode,
    options: &Options,
    info: &QueueInfo,
) -> Option<(ConfigRisk, String)> {
    let records = matches!(mode, Mode::Transactional | Mode::Idempotent);
    let retention = info.retention?;
    (records && options.dedup_retention <= retention).then(|| {
        let why = format!(
            "dedup records are kept for {}, but the queue can deliver a message again for {}: set dedup_retention() above that",
            days(options.dedup_retention),
            days(retention)
        );
        (ConfigRisk::ShortRetention, why)
    })
}

fn dead_letter_queue(
    mode: Mode,
    options: &Options,
    info: &QueueInfo,
) -> Option<(ConfigRisk, String)> {
    let records = matches!(mode, Mode::Transactional | Mode::Idempotent);
    let shared = options.identity.is_some();
    let sources = &info.dead_letters_of;
    (records && !shared && !sources.is_empty()).then(|| {
        let why = format!(
            "this is the dead-letter queue of {}: a message that took effect there would run here again, since each queue has its own dedup records; put it back there instead (a redrive), or share the records by identity(…)",
            sources.join(", ")
        );
        (ConfigRisk::DeadLetterQueue, why)
    })
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
