//! A way to the server that counts round trips: what asks the server for an answer, and is waited for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

pub(crate) struct Counted {
    port: u16,
    round_trips: Arc<AtomicU64>,
    acceptor: JoinHandle<()>,
}

impl Counted {
    pub(crate) async fn to(server: String) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let round_trips = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&round_trips);
        let acceptor = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass(client, server.clone(), Arc::clone(&count)));
            }
        });
        Ok(Self {
            port,
            round_trips,
            acceptor,
        })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn round_trips(&self) -> u64 {
        self.round_trips.load(Ordering::Relaxed)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

async fn pass(client: TcpStream, server: String, count: Arc<AtomicU64>) -> io::Result<()> {
    let server = TcpStream::connect(server).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
    let mut messages = Messages::default();
    let mut buffer = vec![0; 16 << 10];
    loop {
        let n = from_client.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        count.fetch_add(messages.pass(&buffer[..n]), Ordering::Relaxed);
        to_server.write_all(&buffer[..n]).await?;
    }
}

/// Where in the client's messages the bytes are: <https://www.postgresql.org/docs/current/protocol-message-formats.html>.
#[derive(Default)]
struct Messages {
    /// The first ones have no type.
    begun: bool,
    head: Vec<u8>,
    left: usize,
}

impl Messages {
    /// How many of these bytes' messages end a request: `Query` and `Sync`.
    fn pass(&mut self, mut bytes: &[u8]) -> u64 {
        let mut requests = 0;
        while let Some((first, rest)) = bytes.split_first() {
            if self.left > 0 {
                let skipped = self.left.min(bytes.len());
                self.left -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            self.head.push(*first);
            bytes = rest;
            let typed = usize::from(self.begun);
            if self.head.len() < typed + 4 {
                continue;
            }
            let length = self.head[typed..]
                .iter()
                .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
            requests += u64::from(self.begun && matches!(self.head[0], b'Q' | b'S'));
            // A request for TLS is as long as this, and comes before the begin.
            self.begun |= length != 8;
            self.left = length.saturating_sub(4);
            self.head.clear();
        }
        requests
    }
}
