use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use lapin::tcp::OwnedTLSConfig;
use lapin::uri::AMQPUri;
use lapin::{Channel, Connection, ConnectionProperties, ConnectionStatus};
use tokio::time::{Instant, timeout};

use crate::Config;
use crate::error::Fault;
use crate::filter::{self, Broker};

/// A connection and the one channel on it. Never recovered by lapin: what dies is replaced by a new one, so that no
/// delivery tag of the old ever reaches it.
pub(crate) struct Link {
    pub(crate) connection: Connection,
    pub(crate) channel: Channel,
    broker: Arc<Broker>,
    patience: Duration,
}

impl Link {
    pub(crate) async fn open(config: &Config, role: &str) -> Result<Self, Fault> {
        let (connection, broker) = connect(config, role).await?;
        let channel = answer(config.timeout, connection.create_channel()).await?;
        let link = Self {
            connection,
            channel,
            broker,
            patience: config.timeout,
        };
        tracing::debug!(role, version = ?link.version(), "connected");
        Ok(link)
    }

    pub(crate) fn is_open(&self) -> bool {
        self.channel.status().connected() && self.connection.status().connected()
    }

    /// The broker's version, major and minor number, if it told.
    pub(crate) fn version(&self) -> Option<(u16, u16)> {
        self.broker.version()
    }

    /// Whether the broker has said that it reads nothing more from this connection for now.
    pub(crate) fn is_blocked(&self) -> bool {
        is_blocked(self.connection.status())
    }

    /// The most bytes that the headers and properties of a message may take.
    pub(crate) fn frame_max(&self) -> usize {
        match self.connection.configuration().frame_max() {
            0 => usize::MAX,
            bytes => bytes as usize,
        }
    }

    /// Closes the channel, which gives back what is not settled, in order; then the connection. The channel first and
    /// never the consumer: cancelling one that holds messages breaks classic queues with a single active consumer.
    pub(crate) async fn close(&self) -> Result<(), Fault> {
        let mut closed = Ok(());
        if self.channel.status().connected() {
            closed = answer(self.patience, self.channel.close(200, "closing".into())).await;
        }
        if self.connection.status().connected() {
            let closing = self.connection.close(200, "closing".into());
            closed = closed.and(answer(self.patience, closing).await);
        }
        closed
    }
}

pub(crate) fn is_blocked(status: &ConnectionStatus) -> bool {
    status.connected() && status.blocked()
}

/// Connects to the first host that answers. What one refuses, the others would refuse too.
pub(crate) async fn connect(
    config: &Config,
    role: &str,
) -> Result<(Connection, Arc<Broker>), Fault> {
    let tls = config.tls().map_err(Fault::Certificate)?;
    let mut failed: Option<Fault> = None;
    for uri in config.uris() {
        if let Some(fault) = &failed {
            let (host, error) = (&uri.authority.host, fault.error("cannot connect", ""));
            tracing::warn!(host, %error, "trying the next host");
        }
        match answer(config.timeout, connect_to(uri, tls.clone(), role)).await {
            Err(fault) if fault.error("", "").is_retryable() => failed = Some(fault),
            outcome => return outcome,
        }
    }
    Err(failed.unwrap_or(Fault::Closed))
}

async fn connect_to(
    uri: AMQPUri,
    tls: OwnedTLSConfig,
    role: &str,
) -> lapin::Result<(Connection, Arc<Broker>)> {
    let name = format!("onlyonce {role}");
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    filter::connector(uri, tls, properties).await
}

/// `duration` from now, or a century where that cannot be told.
pub(crate) fn after(duration: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(36_500 * 86_400);
    let now = Instant::now();
    now.checked_add(duration).unwrap_or(now + CENTURY)
}

/// Waits for the broker's answer, but not for ever.
pub(crate) async fn answer<T>(
    patience: Duration,
    request: impl Future<Output = lapin::Result<T>>,
) -> Result<T, Fault> {
    match timeout(patience, request).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Fault::Silence(patience)),
    }
}

/// Pauses between attempts to connect: doubled each time up to 30 s, with jitter so that many clients do not come back
/// at the same moment.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(30);

    pub(crate) fn pause(&mut self) -> Duration {
        let whole = Self::FIRST
            .saturating_mul(1 << self.failures.min(16))
            .min(Self::LONGEST);
        self.failures = self.failures.saturating_add(1);
        whole.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_time_is_a_time() {
        assert!(after(Duration::MAX) > after(Duration::from_secs(86_400)));
    }

    #[test]
    fn pauses_grow_to_a_bound_and_start_again() {
        let mut backoff = Backoff::default();
        let pauses: Vec<_> = (0..100).map(|_| backoff.pause()).collect();
        assert!(pauses[0] <= Backoff::FIRST && pauses[0] >= Backoff::FIRST / 2);
        assert!(pauses.iter().all(|pause| *pause <= Backoff::LONGEST));
        assert!(
            pauses[20..]
                .iter()
                .all(|pause| *pause >= Backoff::LONGEST / 2)
        );
        backoff.reset();
        assert!(backoff.pause() <= Backoff::FIRST);
    }
}
