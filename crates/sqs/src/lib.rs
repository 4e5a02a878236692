//! AWS SQS for onlyonce: [`SqsSource`] receives from a queue under visibility timeouts, [`SqsSink`] sends to one. FIFO and
//! standard queues.
//!
//! ```no_run
//! # async fn f() -> Result<(), onlyonce_core::Error> {
//! use onlyonce_sqs::{Config, SqsSink, SqsSource};
//!
//! let orders: Config = "https://sqs.eu-central-1.amazonaws.com/123456789012/orders.fifo".parse()?;
//! let source = SqsSource::new(orders)?;
//! let sink = SqsSink::new("sqs://invoices.fifo?region=eu-central-1".parse()?)?;
//! # Ok(()) }
//! ```
//!
//! SQS's own "exactly-once processing" is about sending: a FIFO queue drops what was sent before within
//! [five minutes][dedup]. On the other side a message is delivered again whenever its visibility timeout ends before it is
//! deleted. What takes effect once is seen to by onlyonce's store; this crate keeps the leases, the order and the bill small.
//!
//! # Before the first message
//!
//! ```no_run
//! # async fn f(store: onlyonce_core::memory::MemoryStore) -> Result<(), onlyonce_core::Error> {
//! use std::time::Duration;
//! use onlyonce_core::{DedupKey, Failure, KeyPolicy, Pipeline};
//! use onlyonce_sqs::SqsSource;
//!
//! async fn ship(order: String, key: DedupKey) -> Result<(), Failure> {
//!     // Calls a service that honours the key.
//!     Ok(())
//! }
//!
//! let source = SqsSource::new("sqs://orders?region=eu-central-1".parse()?)?;
//! Pipeline::idempotent(source, store)
//!     .consumer("shipping")
//!     .dedup_key(KeyPolicy::attribute("order-id"))
//!     .dedup_retention(Duration::from_secs(45 * 86_400))
//!     .run(ship)
//!     .await?;
//! # Ok(()) }
//! ```
//!
//! **Most messages on SQS have no dedup key**, and what has none is dead-lettered, since nobody can tell whether it is new. There is none
//! on standard queues, in whatever S3, SNS or EventBridge send, and on FIFO queues with [content-based deduplication][content], their own
//! or that of an [SNS topic][topic] in front of them. What a topic's publisher sets as an attribute arrives as one only with raw message
//! delivery; else it is in the payload, which is SNS's notification. An id that a topic makes of a message with `MessageStructure` `json` cannot be
//! told from a producer's: it is a digest of the texts for all protocols, and the queue gets only its own. Two such messages with equal
//! texts would be one: choose the key by `KeyPolicy::attribute` there.
//! Have the producer set the attribute `idempotency-key`; or name the attribute or the field of the payload that makes a message
//! what it is, by `KeyPolicy::attribute` or `KeyPolicy::custom`; or say by `KeyPolicy::or_content` that equal payloads are one message.
//! The message's own id will not do: a producer's retry has another, and so has a redrive.
//!
//! **Records must outlive the last redelivery.** A [redrive][redrive] from the dead-letter queue makes a new message of an old one, which
//! may be one that took effect: its acks failed until SQS moved it. On a FIFO queue that can be its retention, that of its
//! [dead-letter queue][retention] and its retention again after it was sent, 42 days at most; on a standard queue the longer of
//! the two and its own again, 28 days. The source reads both, and the pipeline does not start when `retention` is shorter.
//!
//! **SQS deletes what is not processed in time**: after four days, unless the queue's retention is set to more. Set it to 14 days,
//! that of the dead-letter queue too, and its `MaximumMessageSize` to no less than the queue's and 64 KiB: a dead letter grows by its
//! reason, and what does not fit comes back until SQS moves it without one.
//!
//! # URLs
//!
//! | form | |
//! |---|---|
//! | `https://sqs.REGION.amazonaws.com/ACCOUNT/NAME` | the queue URL, as the console shows it. Another host (an emulator, a VPC endpoint) is where requests go |
//! | `sqs://NAME?region=REGION` | by name; its URL is asked for |
//! | `arn:aws:sqs:REGION:ACCOUNT:NAME` | by ARN; its URL is asked for |
//!
//! | parameter | default | |
//! |---|---|---|
//! | `region` | that of the address, else `AWS_REGION` or the profile's | |
//! | `account` | the caller's | for `sqs://`: who owns the queue |
//! | `endpoint` | the region's, else `AWS_ENDPOINT_URL_SQS` or `AWS_ENDPOINT_URL` | where requests go |
//! | `visibility_timeout` | the queue's | the lease, asked for with each receive: whole seconds, up to `12h` |
//! | `polls` | 10 | long polls under way at most |
//! | `timeout` | `10s` | for a request, beyond the wait of a long poll |
//!
//! An unknown parameter is an error. Durations are written like `30s`, `5m`. Credentials come from the
//! [usual chain][chain] and never stand in the URL. When AWS refuses them, the whole chain is read again: a profile's file may have been
//! renewed. After five minutes without good ones the pipeline ends; at once, if none were ever good. The credentials of a client of
//! one's own are its own affair. TLS is rustls with ring (feature `rustls-ring`, on by default); for
//! another stack switch it off and bring a client: [`SqsSource::with_client`].
//!
//! A producer needs the permission `sqs:SendMessage`, by name or ARN `sqs:GetQueueUrl`. A consumer needs `sqs:ReceiveMessage`, `sqs:DeleteMessage`, `sqs:ChangeMessageVisibility`,
//! `sqs:GetQueueAttributes` and `sqs:ListDeadLetterSourceQueues`, by name or ARN `sqs:GetQueueUrl`, and on the queue of the redrive policy `sqs:SendMessage`,
//! `sqs:GetQueueUrl` and `sqs:GetQueueAttributes`; for encrypted queues [those of the key][kms], too.
//!
//! # Delivery semantics
//!
//! **Receiving.** Long polls, each a task of the source, so that a receive that is dropped loses nothing. Without load there is
//! one, of 20 seconds: three requests a minute. After each that comes back full there is one more, up to `polls`; after each
//! that brings less than half, one less. No more is asked for than the pipeline can take, and from a FIFO queue, which
//! [fills a receive from one group first][groups], no more than can start one after another before their leases would have to
//! be extended. When the answer to a FIFO queue's receive is lost, the next one repeats its
//! [`ReceiveRequestAttemptId`][receive], for which SQS gives the same messages again instead of holding them back, as long as it
//! may hold them back. AWS bills each 64 KB of a request's payload as a request.
//!
//! **Leases** are counted from before the request was sent. How long after that SQS gave the message out nobody tells, so a
//! poll waits for two thirds of the visibility timeout at most: with a timeout of less than 30 seconds polls are shorter, and an idle
//! queue costs more requests. Leases are extended ten to a request, which may take a third of what is left. A lease ends for good [12 hours][visibility] after the receive;
//! an extension beyond that is refused here, and the handler is cancelled when the lease ends.
//!
//! **Settling.** Acks are deletes, nacks change the visibility timeout, ten to a request and several requests side by side;
//! each entry has its own answer. A stale handle is [`LeaseLost`][SettleResult::LeaseLost], and nothing is sent, nor an answer waited for, past
//! a lease's end by our own clock: whether SQS would take it [depends][delete]. Throttling, a fault of SQS and an entry that the answer does not mention
//! can be tried again; whatever else SQS refuses cannot. The client itself sends each request once.
//!
//! **Nacks with a delay** are rounded up to seconds, and shortened to what is left of the 12 hours.
//!
//! **`at_most_once`**: a standard queue may [on rare occasions][atleastonce] deliver again what it has deleted. Use a FIFO queue where that
//! matters.
//!
//! **Dead letters.** Where the queue has a redrive policy, [`Disposition::DeadLetter`] sends the message with its reason to the queue
//! that the policy names, and deletes it when SQS has confirmed that; otherwise give the pipeline a sink. SQS drops what is sent twice under one id, so dead letters and
//! redrives (whatever has the attribute `onlyonce-reason`) go under the id of the message that they were, as
//! [SQS's own dead letters][redrive] do; their dedup id travels in an attribute.
//!
//! **A policy's `maxReceiveCount`** counts every receive, also of messages that were only given back behind the failed
//! head of their group, or whose worker was stopped. Set it well above the pipeline's attempts: 100, say. What SQS moves by itself
//! has no reason, and has lost its deduplication id: let producers set the attribute `idempotency-key`.
//!
//! **Publishing**: `Ok` means that SQS has stored the message, or on a FIFO queue one with this dedup id within five minutes.
//! Up to ten messages and 1 MiB to a request. On a FIFO queue requests go one after another, and after a failure nothing more of
//! that group is sent; but within one request SQS may refuse an entry and take a later one of its group. A FIFO queue without
//! content-based deduplication refuses a message that has no dedup id.
//!
//! **What becomes of a message**:
//!
//! | SQS | onlyonce |
//! |---|---|
//! | `MessageDeduplicationId` | [`Message::dedup_id`], unless SQS or an [SNS topic][topic] [made it of the content][content], or SQS of the message's id [in a dead-letter queue][redrive]: neither is the producer's word that two messages are one |
//! | `MessageGroupId` of a FIFO queue | [`Message::group`] |
//! | `MessageGroupId` of a standard queue | the attribute `sqs-message-group-id`, read and written: a tenant of a [fair queue][fair], and no order |
//! | message attributes | attributes; numbers as text, bytes that are not UTF-8 as `hex:…`. A sink writes text |
//! | body | body; bytes that are not text as base64, with the attribute `onlyonce-body` |
//! | `AWSTraceHeader` | the attribute `AWSTraceHeader`, read and written, so that a [trace][xray] goes on behind dead letters and sinks |
//! | `SentTimestamp`, `ApproximateReceiveCount` | [`Message::published_at`], [`Delivery::attempt`] |
//! | `MessageId` | [`Message::broker_id`] |
//! | `SenderId` | [`Message::sender`]: the user's or role's unique id, for which AWS vouches |
//!
//! What SQS has no place for goes as an attribute of our own, and becomes what it was at the other end: `onlyonce-dedup-id` (on
//! standard queues, in dead letters, and where the id is longer than 128 characters or has others than letters, digits and
//! punctuation), `onlyonce-group` (the same), `onlyonce-attributes` (those of a dead letter that SQS would refuse).
//! A message without a group gets one of its own on a FIFO queue, of which a source of this crate says nothing.
//!
//! # Order
//!
//! A FIFO queue withholds a group while one of its messages is in flight: [`Ordering::Group`]. What is given back goes last first, so
//! that the group stays closed until its head is back. Standard queues keep no order.
//!
//! # Limits
//!
//! - [1 MiB][quotas] for body and attributes, ten attributes, XML's characters: the sink says so before it sends. What the
//!   [extended client][extended], the npm packages sqs-extended-client and sns-sqs-big-payload or NServiceBus put into S3 is not
//!   read: such a message is dead-lettered with a reason that names who put it there.
//! - [120,000 messages in flight][quotas]; beyond it a queue returns nothing, without a word (a standard queue answers `OverLimit`, but to
//!   short polls only).
//!   A FIFO queue looks for groups among its [first 120,000 messages][backlog] only.
//! - FIFO queues without [high throughput][throughput] take 300 requests of a kind a second: 3,000 messages, in batches of ten.
//! - [`close`](onlyonce_core::driver::Source::close) waits for the long polls under way, up to 20 seconds. What SQS gives to a poll that was aborted
//!   nobody gets before its visibility timeout ends. Before that the pipeline drains. So give a process that is to stop the
//!   pipeline's `drain_timeout` and 30 seconds.
//! - Up to `polls` × 10 messages may be received and not taken yet. No poll is sent while those that wait have the bytes that a
//!   receive may take; but each under way may bring ten of 1 MiB, and SQS has no bound for that but fewer `polls`.
//!
//! # Escape hatch
//!
//! [`Config::connect`] makes a plain [`aws_sdk_sqs::Client`], to create queues and for all else that is not here;
//! [`message`] reads and writes what this crate sends. A handler that asks for `Native<SqsReceipt>` sees the receipt handle.
//!
//! [`Message::group`]: onlyonce_core::Message::group
//! [`Message::dedup_id`]: onlyonce_core::Message::dedup_id
//! [`Message::broker_id`]: onlyonce_core::Message::broker_id
//! [`Message::sender`]: onlyonce_core::Message::sender
//! [`Message::published_at`]: onlyonce_core::Message::published_at
//! [`Delivery::attempt`]: onlyonce_core::driver::Delivery::attempt
//! [`Ordering::Group`]: onlyonce_core::driver::Ordering::Group
//! [`Disposition::DeadLetter`]: onlyonce_core::driver::Disposition::DeadLetter
//! [SettleResult::LeaseLost]: onlyonce_core::driver::SettleResult::LeaseLost
//! [dedup]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/using-messagededuplicationid-property.html
//! [chain]: https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html
//! [kms]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-key-management.html
//! [groups]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/FIFO-queues-understanding-logic.html
//! [receive]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ReceiveMessage.html
//! [visibility]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-visibility-timeout.html
//! [delete]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_DeleteMessage.html
//! [redrive]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-configure-dead-letter-queue-redrive.html
//! [content]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html
//! [topic]: https://docs.aws.amazon.com/sns/latest/dg/fifo-message-dedup.html
//! [retention]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/setting-up-dead-letter-queue-retention.html
//! [atleastonce]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/standard-queues-at-least-once-delivery.html
//! [xray]: https://docs.aws.amazon.com/xray/latest/devguide/xray-services-sqs.html
//! [fair]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-fair-queues.html
//! [quotas]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html
//! [extended]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-managing-large-messages.html
//! [backlog]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/avoid-backlog-with-the-same-message-group-id.html
//! [throughput]: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/high-throughput-fifo.html

mod batch;
mod config;
mod connection;
mod error;
mod foreign;
mod leases;
pub mod message;
mod polls;
mod queue;
mod settings;
mod settling;
mod sink;
mod source;

pub use aws_sdk_sqs;

pub use config::Config;
pub use leases::SqsReceipt;
pub use sink::SqsSink;
pub use source::SqsSource;
