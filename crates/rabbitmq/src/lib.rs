//! RabbitMQ for onlyonce, over AMQP 0-9-1: [`RabbitSource`] consumes a queue with manual acks, [`RabbitSink`] publishes
//! with confirms. RabbitMQ 3.10 or later, classic and quorum queues; no streams.
//!
//! ```no_run
//! # async fn f() -> Result<(), onlyonce_core::Error> {
//! use onlyonce_rabbitmq::{Config, RabbitSink, RabbitSource};
//!
//! let orders: Config = "amqps://user:secret@mq.example/shop?queue=orders".parse()?;
//! let source = RabbitSource::new(orders)?;
//! let dead = RabbitSink::new("amqps://user:secret@mq.example/shop?queue=orders.dead".parse()?)?;
//! # Ok(()) }
//! ```
//!
//! # URLs
//!
//! `amqp://user:password@host:port/vhost?queue=NAME&…`, or `amqps` for TLS. User and password are `guest` unless given,
//! the port is 5672 (5671), the vhost is `/`; a slash within its name is written `%2f`, an `@` in a parameter `%40`. An
//! unknown parameter is an error. Durations are written like `500ms`, `30s`, `5m`.
//!
//! | parameter | default | |
//! |---|---|---|
//! | `failover` | none | further hosts of the cluster, `host:port,host:port`, see below |
//! | `auth_mechanism` | `plain` | `external`: the broker knows the client by its certificate, see below |
//! | `certfile`, `keyfile` | none | PEM files of the client's certificate and its private key, for `amqps` |
//! | `cacertfile` | none | a PEM file of certificates to trust besides the system's, for `amqps` |
//! | `queue` | | the queue; required for a source. Nothing is declared but delay queues |
//! | `exchange`, `routing_key` | | for a sink, instead of `queue` |
//! | `quorum` | `false` | it is a quorum queue, which counts deliveries ([`Delivery::attempt`]): needed only where the broker does not tell, because the permission `configure` on the queue is missing |
//! | `delivery_limit` | none | the limit that a policy sets for a quorum queue, `-1` for no limit: AMQP does not tell policies |
//! | `wait_for_queue` | `false` | a queue that does not exist, or is deleted, is waited for; otherwise that is an error |
//! | `group_header` | none | the header that carries [`Message::group`], read and written. Give a dead-letter sink the same |
//! | `single_active_consumer` | `false` | the queue has [`x-single-active-consumer`][sac]; without `group_header` it is one group |
//! | `prefetch` | 500 | [deliveries out at once][prefetch], and so held in memory; 1 to 65535 |
//! | `consumer_priority` | none | a source's [priority]; [`Config::consumer_arguments`] takes other arguments of `basic.consume` |
//! | `consumer_timeout` | `30m` | the broker's [acknowledgement time-out][timeout]; `0s` if it is switched off there |
//! | `delayed_retry` | `true` | nacks with a delay use delay queues, see below |
//! | `heartbeat` | `20s` | a silent connection is given up after twice as long |
//! | `timeout` | `30s` | for connecting to one host, a request, the confirmation of a batch |
//!
//! The source asks how the queue was declared, and refuses a stream, and a URL that says otherwise. The question is a
//! declaration that cannot succeed: it needs the permission `configure` on the queue, and changes nothing. Without the
//! permission the URL is believed, as it always is for policies and `consumer_timeout`. The broker and the client log each
//! refusal as an error (`PRECONDITION_FAILED … onlyonce-asks`, target `lapin::channel`): three or more for each connection.
//!
//! **Several hosts**: every connection is made to the URL's own host, or if that does not answer within `timeout`, to the
//! next in `failover`, in the order given. All are asked with the same user and vhost; when one refuses these, no other
//! is asked. Nothing goes back to the first host by itself. Give workers the hosts in different orders to spread them.
//!
//! For TLS the system's certificates are trusted, and those in `cacertfile`, of a private authority, say; `SSL_CERT_FILE`
//! names others in place of the system's. A client that shows a certificate may have no password, with
//! `auth_mechanism=external` and the broker's plugin [`rabbitmq_auth_mechanism_ssl`][external]; the user is then the
//! certificate's. The files are read at every connection, so they can be renewed while a worker runs.
//! Over plain `amqp` the password is readable on the way: a warning says so, unless the host is this machine.
//!
//! # Delivery semantics
//!
//! **Consuming** is at least once. A delivery belongs to the channel it came by, and its lease ends with that channel, or
//! after `consumer_timeout` if that is sooner. When the channel ends, for whatever reason, its leases' tokens are
//! cancelled, its receipts answer [`LeaseLost`][SettleResult::LeaseLost] for ever, and a task of the source opens another one,
//! after a pause with jitter that grows to 30 s. No tag is ever sent on another channel than its own. `receive` returns
//! the error of each failed attempt; after one that is not retryable (no such queue, access refused) it is the next
//! `receive` that tries again.
//!
//! **Acks** of one `settle` leave as one `multiple` ack, as far as every older delivery is settled, and one by one above
//! that: no ack waits for a slow message. AMQP [confirms no ack][acks], so `Applied` means that it was written to the
//! channel; if the connection dies before the broker reads it, the message comes again, and the deduplication sees to it.
//! After `close` returns `Ok`, the broker has read all of them.
//!
//! **A nack** is `basic.nack` with requeue; a message with a group stays unsettled instead, and the source closes the
//! channel, which gives back all that it holds, in order. A pipeline that stops nacks nothing: [`close`][onlyonce_core::driver::Source::close]
//! gives back.
//!
//! **A worker that stops, crashes or loses its connection** counts against everything that it holds, on a quorum queue of
//! RabbitMQ 4: at the 21st time such a message is deleted, or moved to the queue's dead-letter exchange, even if no handler
//! has ever seen it ([delivery limit][poison]; measured on 4.0.5 and 4.3.6). So the source *renews* a message when half of
//! the limit is used up, before it hands it out: a copy at the end of the queue is confirmed, then the original is acked.
//! Nothing has to be set for that. Where it cannot be done, since a message of a group would lose its place, or the limit
//! is below 4, the pipeline refuses to start (`ConfigRisk::GivesUp`) and says what to set: `x-delivery-limit=-1`, by the
//! declaration or by a policy (a limit of 1,000 or more is as good). Not on RabbitMQ 3, which has no such default: 3.10 takes
//! -1 for a limit that every message has passed, and deletes what is given back (measured).
//!
//! **A message that is not settled within `consumer_timeout`** comes again, and so does all else that the source holds: a
//! warning says so. RabbitMQ closes the channel, but for classic queues of 4.3, which let it be, and quorum queues of 4.3,
//! which cancel the consumer (measured on 3.10.8, 4.0.5, 4.3.6). The source closes the channel itself, a tenth of the time
//! sooner, at most a second.
//!
//! **A nack with a delay**: AMQP has none. A copy of the message, with its id, headers, properties and the header
//! `x-onlyonce-attempt`, is published to a queue `NAME.delay.MILLISECONDS` whose messages expire into the original
//! queue; only when the broker has confirmed the copy is the original acked. If that ack is lost there are two messages
//! with one `message_id`: the deduplication takes care of them, but a message without an id is doubled. The delay is
//! rounded up to one of 17 steps from 100 ms to a day, the longest. The copy goes to the end of the queue, without the
//! original's `expiration` and `x-death`. Delay queues are [quorum queues with at-least-once dead-lettering][alo], and
//! go away by themselves; declaring them needs the permission `configure` on that name. With `group_header` or
//! `single_active_consumer` there is no delayed nack, since it would break the order.
//!
//! **Dead letters** are for a sink: AMQP's `basic.reject` neither carries a reason nor is confirmed. A sink takes every dead
//! letter whose body the broker takes. Headers and properties of a message share one frame (128 KiB), and may have grown:
//! by the reason, or as JSON. What does not fit is left out, the largest attribute first; the group and the dedup id go
//! last, and what the pipeline says of the dead letter stays. The attribute `onlyonce-left-out` names what is missing, in
//! up to 1,000 bytes. A dead letter from another broker may have what AMQP has no place for: a dedup id of more than 255
//! bytes travels in the header `onlyonce-dedup-id` and is read back from there; an attribute that would be read as
//! something else, or is too long for the property of its name, gets another name (`header-amqp-type`). A body over the
//! broker's `max_message_size`, which only another broker can deliver, cannot be dead-lettered: the pipeline logs an error
//! that names the message, keeps it and tries again after the longest delay of its retry policy.
//! Where delayed retries are off, it takes up prefetch meanwhile. Raise `max_message_size`, or give the pipeline another sink.
//!
//! **Publishing**: `Ok` means [confirmed][acks], persistent and in a queue. Messages are `mandatory`: one that no queue takes is
//! [`Unroutable`](onlyonce_core::ErrorKind::Unroutable), alone in its batch. A nack by the broker (queue full, node in
//! trouble) is retryable. A message that the broker refuses (over its `max_message_size`) closes the channel: it fails
//! for good, the others of its batch are retryable.
//!
//! **Alarms**: a broker that is short of memory or disk [blocks connections that publish][blocked], which are those of
//! sinks and of delayed retries, never a source's. What was sent is published when the alarm is over, even if the connection is closed
//! by then; so it is waited for as long as the alarm lasts, and published once. `timeout` does not run meanwhile,
//! heartbeats do. What was not sent fails after `timeout` as [`Throttled`](onlyonce_core::ErrorKind::Throttled), with
//! "the broker blocks publishers". Delayed retries wait without holding up other settlements, and
//! [`close`](onlyonce_core::driver::Sink::close) waits for `timeout` at most. A connection that *breaks* during an alarm may leave
//! a copy behind that comes besides the repeated one.
//!
//! **What becomes of a message**:
//!
//! | AMQP | onlyonce |
//! |---|---|
//! | `message_id` | [`Message::dedup_id`], at most 255 bytes (dead letters: see above) |
//! | the header `group_header` | [`Message::group`] |
//! | `timestamp` | [`Message::published_at`], in seconds |
//! | `content_type`, `content_encoding`, `correlation_id`, `reply_to`, `type`, `app_id`, `priority` | attributes `amqp-content-type` …, and back |
//! | other headers | attributes (a header `amqp-type` is `header-amqp-type`, and so with the other names above); a sink writes text. Numbers become decimal text, tables and arrays JSON, bytes that are not UTF-8 `hex:…`, and a sink writes these as bytes |
//! | exchange and routing key, `CC` | attributes `amqp-exchange`, `amqp-routing-key`, `amqp-cc`; a sink routes by none of them |
//! | `x-delivery-count` (from 4.3 on `x-acquired-count`) of a quorum queue's redelivery, `x-onlyonce-attempt`, `x-death` of this queue by rejection | [`Delivery::attempt`]; anywhere else the first two are what a producer wrote, and not believed |
//! | `user_id`, which the broker [has validated][user-id] | the attribute `amqp-user-id`, for a key policy, say. Delayed copies keep it while the worker's user stays the same. A sink writes it if it is the sink's own user; that of another becomes a header and is read as `header-amqp-user-id` |
//! | `expiration`, `delivery_mode` | nothing; a sink writes persistent messages that do not expire |
//!
//! # Order
//!
//! RabbitMQ delivers a queue's messages in order to its consumer and knows no groups: [`Ordering::Delivery`], with
//! `group_header` or `single_active_consumer`. It holds while there is *one* consumer, so declare the queue with
//! `x-single-active-consumer`: then a second one waits until the first is gone. A lone worker needs it, too: when its
//! connection breaks without word to the broker, the broker keeps the old consumer, and what it holds, until the
//! heartbeats are missed, while the worker's new one gets what comes after (measured).
//! [`queue_info`](onlyonce_core::driver::Source::queue_info) finds other consumers. What a closing source holds goes back in order; for that it closes the
//! channel and does not cancel the consumer, which with a single active consumer would reorder or break the queue.
//!
//! # Limits
//!
//! - Memory: of each message up to `prefetch`, 24 times the bytes of its headers and properties, twice its body, and
//!   64 KiB, at most; a few times its bytes, usually. Beside that, 9 MiB for each connection. AMQP bounds no bytes: lower
//!   `prefetch` for large messages.
//! - A body may be as large as the broker's `max_message_size` (16 MiB by default in RabbitMQ 4, 128 MiB before); headers
//!   and properties of a message share one frame (128 KiB).
//! - A property, exchange or routing key that is not UTF-8 becomes `hex:` and its bytes in hexadecimal, cut to 255 bytes.
//!   A `message_id` of more than 125 such bytes makes the message [malformed](onlyonce_core::driver::Delivery::malformed): cut, two ids could be
//!   one.
//! - Headers that the client cannot take make the message malformed, so that it becomes a dead letter, with its id, its other
//!   properties, the reason, and the first 2 KiB of its headers as the attribute `amqp-unreadable-headers`. They are those
//!   nested more than 32 deep, with a name that is not UTF-8, that would take more than 20 times their bytes and 64 KiB in
//!   memory (an array of 3,000 booleans does), or that exceed a frame, with what the broker adds. See [`filter`].
//! - AMQP tells nothing of policies: see what [`queue_info`](onlyonce_core::driver::Source::queue_info) calls unknown.
//! - A group whose head fails is retried in place, and what follows it is held. When one such group fills `prefetch`, the
//!   other groups of the queue wait for it: AMQP cannot give back one group and keep its order. A warning says so. Raise
//!   `prefetch` above what may pile up of a group, or lower the retries.
//! - The client logs a returned message, body included, at level WARN under the target `lapin`.
//!
//! # Escape hatch
//!
//! [`Config::connect`] opens a plain [`lapin`] connection to the same vhost, to declare queues and for all else that is
//! not here. What it receives comes through the [`filter`] as well. A handler that asks for `Native<RabbitReceipt>` sees channel,
//! delivery tag, exchange and routing key.
//!
//! [`Message::group`]: onlyonce_core::Message::group
//! [`Message::dedup_id`]: onlyonce_core::Message::dedup_id
//! [`Message::published_at`]: onlyonce_core::Message::published_at
//! [`Delivery::attempt`]: onlyonce_core::driver::Delivery::attempt
//! [Delivery::malformed]: onlyonce_core::driver::Delivery::malformed
//! [`Ordering::Delivery`]: onlyonce_core::driver::Ordering::Delivery
//! [SettleResult::LeaseLost]: onlyonce_core::driver::SettleResult::LeaseLost
//! [sac]: https://www.rabbitmq.com/docs/consumers#single-active-consumer
//! [prefetch]: https://www.rabbitmq.com/docs/consumer-prefetch
//! [timeout]: https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout
//! [acks]: https://www.rabbitmq.com/docs/confirms
//! [poison]: https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling
//! [external]: https://www.rabbitmq.com/docs/access-control#mechanisms
//! [priority]: https://www.rabbitmq.com/docs/consumer-priority
//! [user-id]: https://www.rabbitmq.com/docs/validated-user-id
//! [blocked]: https://www.rabbitmq.com/docs/connection-blocked
//! [alo]: https://www.rabbitmq.com/docs/quorum-queues#activating-at-least-once-dead-lettering

mod acks;
mod config;
mod connection;
mod copies;
mod declared;
mod error;
pub mod filter;
pub mod headers;
mod publisher;
mod queue_info;
mod sink;
mod source;

pub use lapin;

pub use config::Config;
pub use sink::RabbitSink;
pub use source::{RabbitReceipt, RabbitSource};
