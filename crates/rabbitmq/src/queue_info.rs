//! What the live queue's settings mean for a pipeline.

use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use onlyonce_core::driver::{Capabilities, Durability, Ordering, QueueInfo};

use crate::Config;
use crate::connection::{Link, answer};
use crate::declared::Declared;
use crate::error::Fault;
use crate::headers::Counts;

/// The delivery limit of a quorum queue for which none is set
/// (<https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling>).
const DEFAULT_LIMIT: u32 = 20;
/// A limit from here on is none: nobody stops or kills workers that often while one message is held.
const ENOUGH: u32 = 1_000;
/// With a lower limit there is no room to act between the first return and the last.
const LEAST_LIMIT: u32 = 4;

/// One queue, as the broker describes it and as the URL says.
#[derive(Debug)]
pub(crate) struct Queue<'a> {
    config: &'a Config,
    name: &'a str,
    /// RabbitMQ's version, where it told one.
    version: Option<(u16, u16)>,
    /// `None`: the broker did not tell.
    declared: Option<Declared>,
    consumers: u32,
}

impl<'a> Queue<'a> {
    /// Looks at the queue, on channels of its own.
    pub(crate) async fn look(
        config: &'a Config,
        name: &'a str,
        link: &Link,
    ) -> Result<Self, Fault> {
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let request = link
            .channel
            .queue_declare(name.into(), passive, FieldTable::default());
        let consumers = answer(config.timeout, request).await?.consumer_count();
        let queue = Self {
            config,
            name,
            version: link.version(),
            declared: Declared::ask(config, link, name).await?,
            consumers,
        };
        queue.check()?;
        Ok(queue)
    }

    /// Refuses what the source cannot work with, or what the URL says otherwise.
    fn check(&self) -> Result<(), Fault> {
        let Some(declared) = &self.declared else {
            return Ok(());
        };
        let unusable = |why: &str| Err(Fault::Unusable(why.to_owned()));
        match declared.queue_type() {
            "classic" if self.config.quorum => {
                return unusable("the URL says quorum=true, but this is a classic queue");
            }
            "classic" | "quorum" => {}
            other => {
                return Err(Fault::Unusable(format!(
                    "this is a {other} queue, which the source cannot consume: it takes classic and quorum queues"
                )));
            }
        }
        let single = declared.is("x-single-active-consumer");
        if self.config.single_active_consumer && !single {
            return unusable(
                "the URL says single_active_consumer=true, but the queue was declared without x-single-active-consumer: a second worker would break the order",
            );
        }
        Ok(())
    }

    /// Whether RabbitMQ is at least this version, or did not tell.
    fn is_at_least(&self, version: (u16, u16)) -> bool {
        self.version.is_none_or(|it| it >= version)
    }

    pub(crate) fn is_quorum(&self) -> bool {
        let declared = self.declared.as_ref();
        declared.map_or(self.config.quorum, |it| it.queue_type() == "quorum")
    }

    /// Which headers count what is delivered again.
    pub(crate) fn counts(&self) -> Counts {
        match self.is_quorum() {
            false => Counts::None,
            true if self.is_at_least((4, 3)) => Counts::Acquisitions,
            true => Counts::Deliveries,
        }
    }

    /// After how many returns of a message the broker gives up on it, whatever the reason of the returns; `None`: never,
    /// or after too many for it to be for this.
    pub(crate) fn delivery_limit(&self) -> Option<u32> {
        if !self.is_quorum() {
            return None;
        }
        let declared = self.declared.as_ref();
        let argument = declared.and_then(|it| it.number("x-delivery-limit"));
        // The lower of the two counts.
        let set = [self.config.delivery_limit, argument];
        let set = set.into_iter().flatten();
        let read = |limit: i64| match u32::try_from(limit) {
            // Below zero means none, but 3.x takes it for a limit that every message has passed.
            Err(_) if limit < 0 && self.is_at_least((4, 0)) => u32::MAX,
            Err(_) if limit < 0 => 0,
            number => number.unwrap_or(u32::MAX),
        };
        let default = match self.is_at_least((4, 0)) {
            true => DEFAULT_LIMIT,
            false => u32::MAX,
        };
        let limit = set.map(read).min().unwrap_or(default);
        (limit < ENOUGH).then_some(limit)
    }

    /// From how many returns on a message is renewed: half of what the broker allows, so that the other half is left for
    /// workers that die meanwhile. `None`: never.
    pub(crate) fn renews_from(&self) -> Option<u32> {
        let limit = self.delivery_limit()?;
        (!self.config.is_grouped() && limit >= LEAST_LIMIT).then_some(limit / 2)
    }

    /// Why the broker can give up on a message that no handler failed.
    fn gives_up(&self) -> Option<String> {
        let limit = self.delivery_limit()?;
        if self.renews_from().is_some() {
            return None;
        }
        let name = self.name;
        let end = match self.dead_letter_exchange() {
            Some(exchange) => format!("moves it to the dead-letter exchange `{exchange}`"),
            None => "deletes it".to_owned(),
        };
        let why = match self.config.is_grouped() {
            true => "groups must stay in order",
            false => "the limit is too low for that",
        };
        let remedy = match self.is_at_least((4, 0)) {
            true => format!(
                "declare the queue with x-delivery-limit=-1, or set a policy (`rabbitmqctl set_policy NAME '^{name}$' '{{\"delivery-limit\":-1}}' --apply-to quorum_queues`) and say delivery_limit=-1 in the URL"
            ),
            false => {
                "declare the queue without x-delivery-limit, which RabbitMQ 3 takes for no limit"
                    .to_owned()
            }
        };
        Some(format!(
            "the quorum queue {name} has a delivery limit of {limit}: RabbitMQ counts each time that a worker stops, crashes or loses its connection against all that it holds, and then {end}, although no handler failed. A copy cannot take its place, since {why}: {remedy}"
        ))
    }

    fn dead_letter_exchange(&self) -> Option<&str> {
        self.declared.as_ref()?.text("x-dead-letter-exchange")
    }

    /// `own`: how many of its consumers are this source's.
    pub(crate) fn queue_info(&self, own: u32) -> QueueInfo {
        let mut info = QueueInfo::default();
        info.identity = Some(identity(self.config, self.name));
        info.gives_up = self.gives_up();
        info.lease = Some(self.config.consumer_timeout).filter(|time| *time > Duration::ZERO);
        info.durability = match &self.declared {
            Some(declared) if !declared.is_durable() => Durability::Machine,
            _ => Durability::Disk,
        };
        info.capabilities = self.capabilities(own);
        if let Some((major, minor)) = self.version {
            let version = ("RabbitMQ".to_owned(), format!("{major}.{minor}"));
            info.settings.push(version);
        }
        let declared = self.declared.as_ref();
        info.settings
            .extend(declared.map(Declared::settings).unwrap_or_default());
        info.unknown = self.unknown();
        info
    }

    fn capabilities(&self, own: u32) -> Capabilities {
        let mut can = Capabilities::default();
        can.timed_lease = !self.config.consumer_timeout.is_zero();
        can.counts_attempts = self.counts() != Counts::None;
        can.delayed_nack = self.config.delays();
        can.close_gives_back = true;
        let other_consumers = self.consumers.saturating_sub(own);
        can.ordering = match self.config.is_grouped() {
            true if self.ordered(other_consumers) != Some(false) => Ordering::Delivery,
            _ => Ordering::None,
        };
        can
    }

    /// `None`: only as long as no other consumer comes.
    fn ordered(&self, other_consumers: u32) -> Option<bool> {
        let one = self.config.single_active_consumer
            || self
                .declared
                .as_ref()
                .is_some_and(|it| it.is("x-single-active-consumer"));
        match (self.config.is_grouped(), one) {
            (true, true) => Some(true),
            (true, false) if other_consumers > 0 => Some(false),
            _ => None,
        }
    }

    fn unknown(&self) -> Vec<String> {
        let mut unknown = Vec::new();
        let mut say = |what: &str| unknown.push(what.to_owned());
        if self.declared.is_none() {
            say(
                "how the queue was declared: the permission `configure` on it is missing, so the URL is believed",
            );
        }
        say(
            "policies: AMQP does not tell them. Where one sets a delivery limit, say delivery_limit=LIMIT in the URL",
        );
        if !self.config.consumer_timeout.is_zero() {
            say("lease: taken from the URL's consumer_timeout; AMQP does not tell the broker's");
        }
        if self.config.is_grouped() && self.ordered(0).is_none() {
            say(
                "ordered: only while this is the queue's one consumer, unless the queue has x-single-active-consumer",
            );
        }
        unknown
    }
}

/// The vhost and the queue. Not the host: a broker moves, and a cluster has many.
pub(crate) fn identity(config: &Config, queue: &str) -> String {
    let part = |text: &str| text.replace('%', "%25").replace('/', "%2f");
    let (vhost, queue) = (part(config.vhost()), part(queue));
    format!("rabbitmq:{vhost}/{queue}")
}
