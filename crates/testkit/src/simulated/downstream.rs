use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use fastrand::Rng;
use onlyonce_core::driver::{Sink, SinkInfo};
use onlyonce_core::{Error, Message};

use super::faults::{Call, Faults};
use super::network::{lost, send};
use super::outgoing::label;
use super::sink::repeat;
use super::store::Storage;

/// Why a queue does not take a message that it has refused so often, if it does not.
type Refuses = dyn Fn(&Message, u32) -> Option<Error> + Send + Sync;

/// A queue that relays publish to, reached over a bad network. What it gets is compared with what was committed in the
/// [`Storage`].
#[derive(Clone)]
pub struct Downstream {
    name: String,
    storage: Storage,
    faults: Faults,
    stops_groups: bool,
    refuses: Arc<Refuses>,
    /// How often each message was refused.
    refused: Arc<Mutex<HashMap<String, u32>>>,
}

impl Downstream {
    /// The destination of this name, which takes everything and stops no group.
    #[must_use]
    pub fn new(name: impl Into<String>, storage: &Storage, faults: &Faults) -> Self {
        Self {
            name: name.into(),
            storage: storage.clone(),
            faults: faults.clone(),
            stops_groups: false,
            refuses: Arc::new(|_, _| None),
            refused: Arc::default(),
        }
    }

    /// Sets whether a call [stops a group](SinkInfo::stops_groups) at its first failure.
    #[must_use]
    pub fn stopping_groups(mut self, stops: bool) -> Self {
        self.stops_groups = stops;
        self
    }

    /// Sets which messages are not taken, and why, by how often they were refused.
    #[must_use]
    pub fn refusing(
        mut self,
        refuses: impl Fn(&Message, u32) -> Option<Error> + Send + Sync + 'static,
    ) -> Self {
        self.refuses = Arc::new(refuses);
        self
    }

    /// The destination's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A relay's way to it, whose second by its own clock is so many seconds.
    #[must_use]
    pub fn connect(&self, relay: u64, second: f64) -> Publisher {
        Publisher {
            downstream: self.clone(),
            relay,
            second,
        }
    }

    /// What the server does with a call. Of an entry that fails, half have taken effect.
    fn take(&self, batch: &[Message], mut partial: Option<Rng>) -> Vec<Result<(), Error>> {
        let mut stopped = HashSet::new();
        let mut take = |message: &Message| {
            let group = message.group.as_deref();
            if self.stops_groups && group.is_some_and(|group| stopped.contains(group)) {
                return Err(lost());
            }
            let fails = partial
                .as_mut()
                .and_then(|rng| rng.bool().then(|| rng.bool()));
            let taken = match fails {
                Some(false) => Err(lost()),
                Some(true) => self.take_one(message).and_then(|()| Err(lost())),
                None => self.take_one(message),
            };
            if taken.is_err() {
                stopped.extend(group.map(str::to_owned));
            }
            taken
        };
        batch.iter().map(&mut take).collect()
    }

    fn take_one(&self, message: &Message) -> Result<(), Error> {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let id = message.dedup_id.clone().unwrap_or_default();
        let times = refused.entry(id).or_default();
        let answer = (self.refuses)(message, *times);
        let (name, label) = (&self.name, label(message));
        (self.faults).log(|| match &answer {
            None => format!("{name} takes {label}"),
            Some(error) => format!("{name} refuses {label}: {error}"),
        });
        if let Some(error) = answer {
            *times += 1;
            if !error.is_retryable() {
                self.storage.outgoing().refused(message);
            }
            return Err(error);
        }
        self.storage.outgoing().arrived(&self.name, message);
        Ok(())
    }
}

impl fmt::Debug for Downstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Downstream")
            .field("name", &self.name)
            .field("stops_groups", &self.stops_groups)
            .finish_non_exhaustive()
    }
}

/// One relay's connection to a [`Downstream`].
#[derive(Debug)]
pub struct Publisher {
    downstream: Downstream,
    relay: u64,
    second: f64,
}

/// A call that a relay makes, until it is answered or dropped.
struct Watched<'a> {
    publisher: &'a Publisher,
}

impl Publisher {
    /// No call begins, and none goes on, after the relay's lease of the destination has ended.
    fn check_lease(&self, what: &str) {
        let Downstream { name, storage, .. } = &self.downstream;
        let mut outgoing = storage.outgoing();
        if self.second <= 1.0 && !outgoing.is_allowed(self.relay, name) {
            let relay = self.relay;
            outgoing.breach(format!(
                "relay {relay} {what} a call to {name} after its lease had ended"
            ));
        }
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.publisher.check_lease("left");
    }
}

#[async_trait]
impl Sink for Publisher {
    fn name(&self) -> &str {
        &self.downstream.name
    }

    async fn sink_info(&self) -> Result<SinkInfo, Error> {
        let mut info = SinkInfo::default();
        info.identity = Some(self.downstream.name.clone());
        info.stops_groups = self.downstream.stops_groups;
        Ok(info)
    }

    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), Error>> {
        self.check_lease("began");
        let _watched = Watched { publisher: self };
        let mut disturbance = self.downstream.faults.on(self.relay, Call::Publish);
        let partial = disturbance.partial.take();
        let (server, messages) = (self.downstream.clone(), batch.to_vec());
        let request = async move { server.take(&messages, partial) };
        match send(&disturbance, request).await {
            Ok(answers) => answers,
            Err(error) => batch.iter().map(|_| Err(repeat(&error))).collect(),
        }
    }

    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}
