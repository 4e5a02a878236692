use std::time::Duration;

use crate::{Capabilities, Error, ErrorKind, Inspection, Ordering};

use super::Mode;
use super::options::Options;

/// A combination of settings under which a message can be lost, doubled or reordered. The pipeline refuses to start with
/// one, unless it was [allowed](crate::Builder::allow).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Hazard {
    /// Dedup records are forgotten while the broker can still deliver the message again.
    ShortRetention,
    /// The lease is shorter than the handler may take, and cannot be extended.
    ShortLease,
    /// The broker gives up on a message before the retry policy does.
    DeliveryLimit,
    /// The broker can give up on a message that no handler failed: it counts workers that stop or crash.
    GivesUp,
    /// There is nowhere to put what cannot be processed.
    NoDeadLetter,
    /// Order within groups was asked for, and the queue does not keep it.
    NoOrder,
    /// `at_most_once` on a broker that never confirms an ack: a lost ack would run the handler twice.
    UnconfirmedAck,
}

/// Refuses unsafe settings, all in one list.
pub(crate) fn check(
    mode: Mode,
    options: &Options,
    capabilities: Capabilities,
    inspection: &Inspection,
    has_sink: bool,
) -> Result<(), Error> {
    let mut found = hazards(mode, options, capabilities, inspection, has_sink);
    found.retain(|(hazard, _)| !options.allowed.contains(hazard));
    if found.is_empty() {
        return Ok(());
    }
    let text = "refusing to start, because of these settings:";
    let list = found
        .into_iter()
        .map(|(hazard, why)| format!("{why} (or allow(Hazard::{hazard:?}))"));
    Err(Error::new(ErrorKind::Unsafe, text).with_list(list.collect()))
}

fn hazards(
    mode: Mode,
    options: &Options,
    capabilities: Capabilities,
    inspection: &Inspection,
    has_sink: bool,
) -> Vec<(Hazard, String)> {
    let mut found = Vec::new();
    found.extend(short_retention(mode, options, inspection));
    if let (Some(lease), Some(longest)) = (inspection.lease, options.handler_timeout)
        && !capabilities.extend
        && lease <= longest
    {
        found.push((
            Hazard::ShortLease,
            format!(
                "the lease of {lease:?} cannot be extended and is not longer than the handler's time-out of {longest:?}: lengthen the lease at the broker"
            ),
        ));
    }
    if let Some(max) = inspection.max_deliveries
        && mode != Mode::AtMostOnce
        && max < options.retry.max_attempts
    {
        found.push((
            Hazard::DeliveryLimit,
            format!(
                "the broker gives up after {max} deliveries, the retry policy after {} attempts: raise the queue's limit or lower max_attempts",
                options.retry.max_attempts
            ),
        ));
    }
    if let Some(why) = &inspection.gives_up {
        found.push((Hazard::GivesUp, why.clone()));
    }
    let at_source = capabilities.dead_letter && inspection.dead_letter.is_some();
    if !has_sink && !at_source && mode != Mode::AtMostOnce {
        found.push((
            Hazard::NoDeadLetter,
            "nowhere to put messages that cannot be processed: give dead_letter() a sink, or the queue a dead-letter queue of its own where the source can use it".into(),
        ));
    }
    let unordered = inspection.ordered == Some(false) || capabilities.ordering == Ordering::None;
    if options.ordered && unordered {
        found.push((
            Hazard::NoOrder,
            "ordered() was asked for, but the queue does not keep groups in order".into(),
        ));
    }
    if mode == Mode::AtMostOnce && !capabilities.confirms_settle {
        found.push((
            Hazard::UnconfirmedAck,
            "this broker never confirms an ack, so at_most_once cannot be kept: use at_least_once or a store".into(),
        ));
    }
    found
}

fn short_retention(
    mode: Mode,
    options: &Options,
    inspection: &Inspection,
) -> Option<(Hazard, String)> {
    let records = matches!(mode, Mode::Transactional | Mode::Idempotent);
    let retention = inspection.retention?;
    (records && options.retention <= retention).then(|| {
        let why = format!(
            "dedup records are kept for {}, but the queue can deliver a message again for {}: set retention() above that",
            days(options.retention),
            days(retention)
        );
        (Hazard::ShortRetention, why)
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

    fn found(inspection: &Inspection, has_sink: bool) -> Vec<Hazard> {
        let capabilities = Capabilities {
            dead_letter: true,
            ..Capabilities::default()
        };
        let options = Options::default();
        let found = hazards(
            Mode::AtLeastOnce,
            &options,
            capabilities,
            inspection,
            has_sink,
        );
        found.into_iter().map(|(hazard, _)| hazard).collect()
    }

    #[test]
    fn a_source_that_could_dead_letter_needs_a_queue_to_do_so() {
        let mut inspection = Inspection::default();
        assert_eq!(found(&inspection, false), [Hazard::NoDeadLetter]);
        assert_eq!(found(&inspection, true), []);
        inspection.dead_letter = Some("orders.dead".into());
        assert_eq!(found(&inspection, false), []);
    }
}
