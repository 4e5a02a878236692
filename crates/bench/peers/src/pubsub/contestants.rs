//! Who drains a subscription, each as its authors advise.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use google_cloud_auth::credentials::anonymous;
use google_cloud_pubsub::client::Subscriber;
use google_cloud_pubsub::subscriber::handler::{ExactlyOnce, Handler};
use onlyonce::driver::{Disposition, ReceiveLimits, Settlement, Source as _};
use onlyonce::pubsub::PubSubSource;
use onlyonce::{ConfigRisk, Pipeline, State};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinSet;

use super::subscription::{self, PROJECT};
use crate::Error;
use crate::work::Work;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Contestant {
    /// Google's own client.
    Official,
    /// gcloud-pubsub by its README.
    GcloudSubscribe,
    /// gcloud-pubsub, a batch at a time.
    GcloudPull,
    Bare,
    Pipeline,
}

/// Where the messages are.
pub(crate) struct Setup {
    pub(crate) proxy: SocketAddr,
    pub(crate) subscription: String,
    pub(crate) work: Arc<Work>,
}

impl Contestant {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Official => "google-cloud-pubsub, `confirmed_ack`",
            Self::GcloudSubscribe => "gcloud-pubsub, `subscribe`, ack one by one",
            Self::GcloudPull => "gcloud-pubsub, `pull`, ack of the batch",
            Self::Bare => "onlyonce, the source alone",
            Self::Pipeline => "onlyonce at_least_once",
        }
    }

    /// Until all is acked, and known to be.
    pub(crate) async fn drain(self, setup: &Setup) -> Result<(), Error> {
        match self {
            Self::Official => official(setup).await,
            Self::GcloudSubscribe => gcloud_subscribe(setup).await,
            Self::GcloudPull => gcloud_pull(setup).await,
            Self::Bare => bare(setup).await,
            Self::Pipeline => pipeline(setup).await,
        }
    }
}

/// A task for each key, as the acks of a key have to be in order. Awaiting each in the loop, as the client's own example does,
/// would be ten messages a second: it sends acks every 100 ms.
async fn official(setup: &Setup) -> Result<(), Error> {
    let builder = Subscriber::builder().with_endpoint(format!("http://{}", setup.proxy));
    let credentials = anonymous::Builder::new().build();
    let client = builder.with_credentials(credentials).build().await?;
    let name = format!("projects/{PROJECT}/subscriptions/{}", setup.subscription);
    let mut messages = client.subscribe(name).build();
    let mut tasks = JoinSet::new();
    let mut keys = HashMap::new();
    let mut done = pin!(setup.work.all_done());
    loop {
        let next = tokio::select! {
            next = messages.next() => next,
            () = &mut done => return Ok(()),
        };
        let Some((message, Handler::ExactlyOnce(handler))) = next.transpose()? else {
            return Err("the stream has ended, or is not one with exactly-once delivery".into());
        };
        if message.ordering_key.is_empty() {
            tasks.spawn(ack(handler, setup.work.clone()));
            continue;
        }
        let key = keys.entry(message.ordering_key).or_insert_with(|| {
            let (key, handlers) = unbounded_channel();
            tasks.spawn(ack_in_order(handlers, setup.work.clone()));
            key
        });
        key.send(handler)?;
    }
}

async fn ack_in_order(mut handlers: UnboundedReceiver<ExactlyOnce>, work: Arc<Work>) {
    while let Some(handler) = handlers.recv().await {
        ack(handler, work.clone()).await;
    }
}

/// What could not be acked comes again.
async fn ack(handler: ExactlyOnce, work: Arc<Work>) {
    if handler.confirmed_ack().await.is_ok() {
        work.handled(1);
    }
}

async fn gcloud_subscribe(setup: &Setup) -> Result<(), Error> {
    let client = subscription::client(setup.proxy.to_string()).await?;
    let subscription = client.subscription(&setup.subscription);
    let mut messages = subscription.subscribe(None).await?;
    while !setup.work.is_done() {
        let message = messages.next().await.ok_or("the stream has ended")?;
        if message.ack().await.is_ok() {
            setup.work.handled(1);
        }
    }
    messages.dispose().await;
    Ok(())
}

async fn gcloud_pull(setup: &Setup) -> Result<(), Error> {
    let client = subscription::client(setup.proxy.to_string()).await?;
    let subscription = client.subscription(&setup.subscription);
    while !setup.work.is_done() {
        let messages = subscription.pull(1_000, None).await?;
        let ids: Vec<String> = messages.into_iter().map(|message| message.ack_id).collect();
        let count = ids.len();
        subscription.ack(ids).await?;
        setup.work.handled(count);
    }
    Ok(())
}

fn source(setup: &Setup) -> Result<PubSubSource, Error> {
    let (proxy, subscription) = (setup.proxy, &setup.subscription);
    let url = format!("pubsub://{PROJECT}/{subscription}?endpoint=http://{proxy}");
    Ok(PubSubSource::new(url.parse()?)?)
}

async fn bare(setup: &Setup) -> Result<(), Error> {
    let source = source(setup)?;
    let limits = ReceiveLimits::new(1_000, Duration::from_secs(20));
    while !setup.work.is_done() {
        let received = source.receive(limits).await?;
        let ack = |receipt| Settlement::new(receipt, Disposition::Ack);
        let acks: Vec<_> = received.into_iter().map(|it| ack(it.receipt)).collect();
        let results = source.settle(&acks).await;
        let acked = results.iter().filter(|result| result.is_applied());
        setup.work.handled(acked.count());
    }
    Ok(source.close().await?)
}

async fn pipeline(setup: &Setup) -> Result<(), Error> {
    let pipeline = Pipeline::at_least_once(source(setup)?)
        .allow(ConfigRisk::NoDeadLetter)
        .state(setup.work.clone())
        .shutdown(setup.work.all_done());
    pipeline.run(handle).await?;
    // The last acks come after the last handler.
    setup.work.note_time();
    Ok(())
}

async fn handle(State(work): State<Arc<Work>>) {
    work.handled(1);
}
