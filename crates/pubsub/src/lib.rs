//! Google Pub/Sub for onlyonce: [`PubSubSource`] pulls from a subscription under explicit leases, [`PubSubSink`] publishes to a
//! topic. Subscriptions with exactly-once delivery and without, with ordering keys and without.
//!
//! ```no_run
//! # async fn f() -> Result<(), onlyonce_core::Error> {
//! use onlyonce_pubsub::{Config, PubSubSink, PubSubSource};
//!
//! let orders: Config = "pubsub://my-project/orders?endpoint=https://europe-west3-pubsub.googleapis.com".parse()?;
//! let source = PubSubSource::new(orders)?;
//! let sink = PubSubSink::new("pubsub://my-project/topics/invoices".parse()?)?;
//! # Ok(()) }
//! ```
//!
//! Pub/Sub's own [exactly-once delivery][eod] is about leases: while a message's ack deadline lasts nobody else gets it, an ack that came
//! too late is told from one that counted, and what was acked does not come again. It ends where the lease ends, and knows a
//! message by the service's id: what a publisher sends twice is two messages. What takes effect once is seen to by onlyonce's
//! store; this crate keeps the leases, the order of keys and the answer to each ack.
//!
//! The source does not use Google's own Rust client, which only [streams][client], tells no ack id, and says nothing of a lease that was
//! lost: it calls `Pull`, `Acknowledge` and `ModifyAckDeadline` by themselves, with Google's credentials. The sink is Google's publisher.
//!
//! # Before the first message
//!
//! ```no_run
//! # async fn f(store: onlyonce_core::memory::MemoryStore) -> Result<(), onlyonce_core::Error> {
//! use std::time::Duration;
//! use onlyonce_core::{DedupKey, Failure, KeyPolicy, Pipeline};
//! use onlyonce_pubsub::{PubSubSink, PubSubSource};
//!
//! async fn ship(order: String, key: DedupKey) -> Result<(), Failure> {
//!     // Calls a service that honours the key.
//!     Ok(())
//! }
//!
//! let source = PubSubSource::new("pubsub://my-project/orders".parse()?)?;
//! let dead = PubSubSink::new("pubsub://my-project/topics/orders-dead".parse()?)?;
//! Pipeline::idempotent(source, store)
//!     .consumer("shipping")
//!     .dedup_key(KeyPolicy::attribute("order-id"))
//!     .dedup_retention(Duration::from_secs(32 * 86_400))
//!     .dead_letter(dead)
//!     .run(ship)
//!     .await?;
//! # Ok(()) }
//! ```
//!
//! **Pub/Sub has no place for a producer's own id**, and a message without a dedup key is dead-lettered in the modes that have a store. Have
//! publishers set the attribute `idempotency-key`; or name the attribute or the field of the payload that makes a message what it is,
//! by `KeyPolicy::attribute` (`ce-id` of [CloudEvents][ce]) or `KeyPolicy::custom`. The service's message id will not do: a publisher's retry has
//! another, and so has a redrive.
//!
//! **Records must outlive the last redelivery.** A [seek][replay] to the past delivers again what was acked, as far back as the subscription
//! (7 days unless it is set, 31 at most) or the topic keeps messages. With a dead-letter topic a redrive can come after the retention of the
//! subscription, that of the dead-letter topic's and its own again. The source reads all three, and the pipeline does not start
//! when `dedup_retention` is shorter.
//!
//! **The subscription**: exactly-once delivery on; message ordering on where keys are to keep their order; an ack deadline of 60 s, so that nothing has to be
//! extended while there is load; delivery type pull. One that pushes, exports or was detached is refused, and so is a dead-letter topic that has no
//! subscription, or only filtered ones, and would lose what is published there.
//!
//! **One region.** Delivery is exactly once [within a region][eod]. Requests to the global endpoint go to the nearest one, so consumers in two places can
//! each get a message: name the [regional endpoint][endpoints] in each consumer's URL. With the global one the log says so at the start.
//!
//! # URLs
//!
//! | form | |
//! |---|---|
//! | `pubsub://PROJECT/SUBSCRIPTION` | a subscription |
//! | `pubsub://PROJECT/topics/TOPIC` | a topic, for a sink |
//! | `projects/PROJECT/subscriptions/SUBSCRIPTION`, `projects/PROJECT/topics/TOPIC` | as Google writes them |
//!
//! | parameter | default | |
//! |---|---|---|
//! | `endpoint` | `http://$PUBSUB_EMULATOR_HOST`, else `https://pubsub.googleapis.com` | where requests go. `http://` is an emulator's: no TLS and no credentials |
//! | `lease` | the subscription's ack deadline | for how long a message is leased: whole seconds, `10s` to `10m` |
//! | `pulls` | 4 | pulls under way at most |
//! | `timeout` | `10s` | for a request, but for pulls, which wait for messages up to 90 s |
//! | `quota_project` | the credentials' | the project that requests are counted for |
//!
//! An unknown parameter is an error. Durations are written like `30s`, `5m`. Credentials are [Application Default Credentials][adc] (a
//! file named by `GOOGLE_APPLICATION_CREDENTIALS`, gcloud's, the machine's service account, workload identity federation,
//! impersonation), read by Google's crate, which renews tokens before they end; they never stand in the URL. When the service refuses them, all is read again;
//! after five minutes without good ones the pipeline ends, at once if none were ever good. Others can be given:
//! [`Config::with_credentials`]. TLS is rustls with ring and the machine's roots; Google's crate asks for the process's
//! provider, so ring is installed as that unless the program has chosen one.
//!
//! A consumer needs the role [`roles/pubsub.subscriber`][roles] and `pubsub.subscriptions.get` (`roles/pubsub.viewer`); a producer
//! `roles/pubsub.publisher`, and `pubsub.topics.get` to be told at the start that its topic is there. With a dead-letter policy the
//! consumer also publishes to that topic, and Pub/Sub's [own service account][dlq] has to, too.
//!
//! # Delivery semantics
//!
//! **Receiving.** Unary pulls, each a task of the source, so that a receive that is dropped loses nothing. Without load one waits for messages, for up to
//! 90 seconds: less than one request a minute. After each that brings 20 or all it asked for there is one more, up to `pulls`; after each that
//! brings few, one less. No more is asked for than the pipeline can take. A pull that no receive has waited for in five to
//! ten seconds is cancelled; what the service gives to a pull in that very moment comes again when its ack deadline ends.
//!
//! **Leases** are counted from before the pull was sent. When that leaves less than two thirds, since the pull had to wait, or
//! since a longer `lease` is wanted, all that it brought is extended at once, and what the service says is somebody else's by then is dropped. On an exactly-once
//! subscription every extension asks for [at least a minute][eod], as Google's own clients do; what was not asked for is not counted on.
//! Only the newest ack id of a message counts: when it is delivered again, the older delivery's handler is cancelled.
//!
//! **Settling.** Acks go one request after another, up to 1,000 ids and 512 KiB each, in the order of delivery; after a failed request nothing
//! more of its keys is acked until it is tried again. On an exactly-once subscription each id has its own answer: done, `PERMANENT_FAILURE_INVALID_ACK_ID` is
//! [`LeaseLost`][SettleResult::LeaseLost], `TRANSIENT_FAILURE_…` can be tried again; an error that names no ids says nothing of any.
//! Nothing is sent for a lease that has ended by our own clock. Each request is sent once, but for one that found its connection closed and was never sent;
//! when the service asks for a pause (`RESOURCE_EXHAUSTED` with a delay), the next request waits for it.
//!
//! **Without exactly-once delivery** acks are [best effort][alo]: the service says yes also when it is too late, and may deliver again what was acked.
//! The pipeline's records make up for that, `at_most_once` is refused.
//!
//! **Nacks** set the ack deadline to the delay, in whole seconds up to ten minutes; a subscription's retry policy adds its own.
//!
//! **Dead letters.** Where the subscription has a dead-letter policy, [`Disposition::DeadLetter`] publishes the message with its reason to that
//! topic, and acks it when Pub/Sub has confirmed that; otherwise give the pipeline a sink. A policy's `maxDeliveryAttempts` (5 to 100) counts every nack and every
//! lease that ended, also of messages that were only given back behind the failed head of their key, or whose worker was
//! stopped: set it to 100. What Pub/Sub [forwards by itself][dlq] says so in attributes of its own, which are read as reason, queue and attempts.
//!
//! **Publishing**: `Ok` means that Pub/Sub has stored the message for every subscription of the topic. Up to 100 messages to a request. A message that fails holds up
//! those behind it of its key in that call; the next call publishes them again.
//!
//! **What becomes of a message**:
//!
//! | Pub/Sub | onlyonce |
//! |---|---|
//! | ordering key | [`Message::group`] |
//! | attributes | attributes; names that begin with `goog`, which publishers may not use, are carried as `onlyonce-carried-…` |
//! | data | body, as it is: what was compressed ([`Json`](onlyonce_core::handler::Json) decodes what `content-encoding` declares) or encoded by a [schema][schema] (`googclient_schemaencoding` says how) is the handler's to read |
//! | `publish_time`, `delivery_attempt` (with a dead-letter policy) | [`Message::published_at`], [`Delivery::attempt`] |
//! | `message_id` | [`Message::broker_id`] |
//! | attribute `onlyonce-dedup-id` | [`Message::dedup_id`] |
//!
//! A message without data and attributes, which Pub/Sub does not take, gets the attribute `onlyonce-body`, of which a source of
//! this crate says nothing.
//!
//! # Order
//!
//! With message ordering a key's messages come in order, and a pull brings none of a key while earlier ones are out:
//! [`Ordering::Group`]. A message that is given back takes along all later ones of its key that the source holds, in one request; Pub/Sub delivers
//! all of them again. Without message ordering keys keep no order.
//!
//! # Limits
//!
//! - [10 MB, 100 attributes, names of 256 bytes, values and ordering keys of 1,024][quotas]: the sink says so before it sends. A dead letter
//!   goes without what does not fit beside its message, its reason last.
//! - [1 MB/s for one ordering key][order]. With unary pulls a key gives one batch at a time.
//! - A lease can be extended without end, but the service forgets a message at the end of its retention, leased or not.
//! - A subscription that nobody uses for 31 days is [deleted][props] unless its expiration policy says never.
//! - A connection that died without a word is noticed after 55 seconds, and by a request that gets no answer within `timeout`; after a pull that
//!   got none in 90 seconds the next goes over a new one.
//! - The service was not asked itself yet: this was run on Google's emulator, and against scripted answers where the emulator does
//!   otherwise (`tests/it/emulator/table.rs`).
//!
//! # Escape hatch
//!
//! [`v1`] has the service's own messages, [`message`] reads and writes what this crate sends, and a handler that asks for `Native<PubSubReceipt>`
//! sees the ack id. [`PubSubSource::with_channel`] takes a channel of your own.
//!
//! [`Message::group`]: onlyonce_core::Message::group
//! [`Message::dedup_id`]: onlyonce_core::Message::dedup_id
//! [`Message::broker_id`]: onlyonce_core::Message::broker_id
//! [`Message::published_at`]: onlyonce_core::Message::published_at
//! [`Delivery::attempt`]: onlyonce_core::driver::Delivery::attempt
//! [`Ordering::Group`]: onlyonce_core::driver::Ordering::Group
//! [`Disposition::DeadLetter`]: onlyonce_core::driver::Disposition::DeadLetter
//! [SettleResult::LeaseLost]: onlyonce_core::driver::SettleResult::LeaseLost
//! [eod]: https://cloud.google.com/pubsub/docs/exactly-once-delivery
//! [client]: https://docs.rs/google-cloud-pubsub/1.7.0/google_cloud_pubsub/client/struct.Subscriber.html
//! [ce]: https://github.com/googleapis/google-cloudevents
//! [replay]: https://cloud.google.com/pubsub/docs/replay-overview
//! [endpoints]: https://cloud.google.com/pubsub/docs/reference/service_apis_overview#pubsub_endpoints
//! [adc]: https://cloud.google.com/docs/authentication/application-default-credentials
//! [roles]: https://cloud.google.com/pubsub/docs/access-control
//! [dlq]: https://cloud.google.com/pubsub/docs/dead-letter-topics
//! [alo]: https://cloud.google.com/pubsub/docs/subscription-overview
//! [schema]: https://cloud.google.com/pubsub/docs/schemas
//! [quotas]: https://cloud.google.com/pubsub/quotas#resource_limits
//! [order]: https://cloud.google.com/pubsub/docs/ordering
//! [props]: https://cloud.google.com/pubsub/docs/subscription-properties

mod config;
mod connection;
mod error;
mod leases;
pub mod message;
mod pulls;
mod settling;
mod sink;
mod source;
mod subscription;

pub use config::Config;
pub use leases::PubSubReceipt;
pub use sink::PubSubSink;
pub use source::PubSubSource;

pub use google_cloud_auth;
/// The service's own messages, as tonic's stubs.
pub use googleapis_tonic_google_pubsub_v1::google::pubsub::v1;
