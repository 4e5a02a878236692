//! A TCP proxy that fails as networks do, when a test tells it to.
//!
//! Put it between an adapter and its broker, then break the network in the moment that matters:
//!
//! ```
//! # use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> std::io::Result<()> {
//! # let broker = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! # let broker_address = broker.local_addr()?.to_string();
//! use onlyonce_testkit::proxy::{Direction, End, Fault, Proxy};
//!
//! let proxy = Proxy::to(broker_address).await?;
//! let mut client = tokio::net::TcpStream::connect(proxy.addr()).await?;
//! proxy.set(Direction::ToServer, Fault::BlackHole);
//! client.write_all(b"the broker never sees this").await?;
//! proxy.heal();
//! proxy.cut(End::Finish).await;
//! assert_eq!(client.read(&mut [0]).await?, 0);
//! # Ok(()) }
//! ```
//!
//! What is buffered is bounded: about 1 MiB a connection and direction, then the sender is held back. Dropping the proxy
//! ends its tasks and connections.

mod connection;
mod faults;
mod pump;
mod storm;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use connection::Connection;
use faults::Lanes;

pub use faults::{Direction, Fault};
pub use storm::Storm;

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// In good order (FIN), after which the peer reads an end of file.
    Finish,
    /// At once (RST): the peer reads an error.
    Reset,
}

/// One end of a connection through the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who connected to the proxy.
    Client,
    /// Whom the proxy connected to.
    Server,
}

/// The proxy. It listens on loopback, on a port of its own, and stops when it is dropped.
///
/// Faults are the proxy's, not a connection's: they act on all connections, also on those to come, until they are
/// [healed](Self::heal).
#[derive(Debug)]
pub struct Proxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    acceptor: JoinHandle<()>,
}

/// What the proxy and its acceptor share; connections know the lanes alone.
#[derive(Debug)]
struct Shared {
    server: String,
    /// Another handle to the acceptor's listener.
    listener: std::net::TcpListener,
    lanes: Arc<Lanes>,
    refusing: AtomicBool,
    connections: Mutex<Vec<Connection>>,
    accepted: AtomicU64,
}

impl Proxy {
    /// A proxy to `server`, which is written `host:port`. It connects there once for every client.
    ///
    /// # Errors
    /// It cannot listen.
    pub async fn to(server: impl Into<String>) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let accepted = TcpListener::from_std(listener.try_clone()?)?;
        let shared = Arc::new(Shared {
            server: server.into(),
            listener,
            lanes: Arc::default(),
            refusing: AtomicBool::new(false),
            connections: Mutex::default(),
            accepted: AtomicU64::new(0),
        });
        let acceptor = tokio::spawn(accept(accepted, shared.clone()));
        Ok(Self {
            addr,
            shared,
            acceptor,
        })
    }

    /// Where clients connect to.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The port of [`addr`](Self::addr).
    #[must_use]
    pub fn port(&self) -> u16 {
        self.addr.port()
    }

    /// Lets `fault` act on what goes in `direction`, in place of the one before, from the next byte on that is not yet
    /// passed.
    pub fn set(&self, direction: Direction, fault: Fault) {
        self.shared.lanes.of(direction).set(Some(fault));
    }

    /// From now on every new connection is reset at once.
    pub fn refuse(&self) {
        self.shared.refusing.store(true, Ordering::SeqCst);
    }

    /// Takes every fault away and lets new connections in. A connection that lost something, or one end, stays as it
    /// is: [cut](Self::cut) it.
    pub fn heal(&self) {
        self.shared.lanes.heal();
        self.shared.refusing.store(false, Ordering::SeqCst);
    }

    /// Ends every connection on both sides, and returns when that is done. New ones are taken.
    pub async fn cut(&self, end: End) {
        let cut = std::mem::take(&mut *self.shared.all());
        for connection in &cut {
            connection.cut(end);
        }
        for connection in cut {
            connection.ended().await;
        }
    }

    /// Resets the `gone` side of every connection, and returns when that is done. The other side is never told: its
    /// connection stays open, and what it sends is swallowed.
    pub async fn half_open(&self, gone: Side) {
        let told: Vec<_> = self
            .shared
            .all()
            .iter()
            .map(|connection| connection.half_open(gone))
            .collect();
        for done in told {
            // An error: the connection had ended.
            let _ = done.await;
        }
    }

    /// How many connections are open, half-open ones included.
    pub fn connections(&self) -> usize {
        let mut connections = self.shared.all();
        connections.retain(Connection::is_open);
        connections.len()
    }

    /// How many connections there were so far, those not counted that were [refused](Self::refuse).
    #[must_use]
    pub fn accepted(&self) -> u64 {
        drop(self.shared.all());
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// How many bytes were passed on in `direction`, over all connections.
    #[must_use]
    pub fn bytes(&self, direction: Direction) -> u64 {
        self.shared.lanes.of(direction).passed()
    }

    /// How many bytes a [black hole](Fault::BlackHole) has swallowed in `direction`.
    #[must_use]
    pub fn swallowed(&self, direction: Direction) -> u64 {
        self.shared.lanes.of(direction).swallowed()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Every connection, with those that the acceptor has not come to: for their clients they are open.
    fn all(&self) -> MutexGuard<'_, Vec<Connection>> {
        while let Ok((client, _)) = self.listener.accept() {
            let client = client
                .set_nonblocking(true)
                .and_then(|()| TcpStream::from_std(client));
            // An error: it is gone again.
            let _ = client.map(|client| self.take(client));
        }
        self.lock()
    }

    fn take(&self, client: TcpStream) {
        if self.refusing.load(Ordering::SeqCst) {
            // An error: it has gone by itself.
            let _ = client.set_zero_linger();
            return;
        }
        self.accepted.fetch_add(1, Ordering::SeqCst);
        let connection = Connection::open(client, self.server.clone(), self.lanes.clone());
        let mut connections = self.lock();
        connections.retain(Connection::is_open);
        connections.push(connection);
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    /// After an error, such as too many open files.
    const PAUSE: Duration = Duration::from_millis(20);
    loop {
        match listener.accept().await {
            Ok((client, _)) => shared.take(client),
            Err(_) => sleep(PAUSE).await,
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.acceptor.abort();
        self.shared.lock().clear();
    }
}
