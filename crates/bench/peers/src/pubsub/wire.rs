//! A proxy on loopback that counts what clients and the service say in HTTP/2.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader, BufWriter};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// What a client says before its first frame.
const PREFACE: usize = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
const DATA: u8 = 0;
const HEADERS: u8 = 1;

/// What has gone over the wire.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    /// Streams that the client has opened.
    pub(crate) rpcs: usize,
    /// gRPC messages of the client: one for each unary call, any number in a stream.
    pub(crate) there: usize,
    /// The same of the service.
    pub(crate) back: usize,
}

#[derive(Default)]
struct Shared {
    rpcs: AtomicUsize,
    there: AtomicUsize,
    back: AtomicUsize,
}

/// Ends with all its connections when it is dropped.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    _connections: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn to(service: String) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let mut connections = JoinSet::new();
        connections.spawn(accept(listener, service, shared.clone()));
        Ok(Self {
            address,
            shared,
            _connections: connections,
        })
    }

    pub(crate) fn counts(&self) -> Counts {
        let read = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        Counts {
            rpcs: read(&self.shared.rpcs),
            there: read(&self.shared.there),
            back: read(&self.shared.back),
        }
    }
}

async fn accept(listener: TcpListener, service: String, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let Ok(service) = TcpStream::connect(&service).await else {
            continue;
        };
        // A small frame must not wait for the answer to the one before.
        let _ = (client.set_nodelay(true), service.set_nodelay(true));
        let (from_client, to_client) = client.into_split();
        let (from_service, to_service) = service.into_split();
        let counted = shared.clone();
        connections.spawn(pass(from_client, to_service, PREFACE, move |frame| {
            counted.rpcs.fetch_add(frame.opened, Ordering::Relaxed);
            counted.there.fetch_add(frame.messages, Ordering::Relaxed);
        }));
        let counted = shared.clone();
        connections.spawn(pass(from_service, to_client, 0, move |frame| {
            counted.back.fetch_add(frame.messages, Ordering::Relaxed);
        }));
    }
}

/// One direction of one connection, until either side closes it: then the other side's half is closed, too.
async fn pass(
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    preface: usize,
    count: impl Fn(Counted) + Send,
) -> io::Result<()> {
    let mut from = BufReader::with_capacity(64 << 10, from);
    let mut to = BufWriter::with_capacity(64 << 10, to);
    let mut frame = vec![0; preface];
    from.read_exact(&mut frame).await?;
    to.write_all(&frame).await?;
    let mut streams = Streams::default();
    loop {
        frame.resize(9, 0);
        from.read_exact(&mut frame).await?;
        let length = u32::from_be_bytes([0, frame[0], frame[1], frame[2]]);
        frame.resize(9 + length as usize, 0);
        from.read_exact(&mut frame[9..]).await?;
        count(streams.read(&frame));
        to.write_all(&frame).await?;
        if from.buffer().is_empty() {
            to.flush().await?;
        }
    }
}

/// What is new with a frame.
#[derive(Default)]
struct Counted {
    opened: usize,
    messages: usize,
}

/// The streams of one direction of a connection.
#[derive(Default)]
struct Streams {
    newest: u32,
    messages: HashMap<u32, Messages>,
}

impl Streams {
    fn read(&mut self, frame: &[u8]) -> Counted {
        let id = u32::from_be_bytes([frame[5], frame[6], frame[7], frame[8]]) & (u32::MAX >> 1);
        let mut counted = Counted::default();
        match frame[3] {
            HEADERS if id > self.newest => {
                self.newest = id;
                counted.opened = 1;
            }
            DATA => counted.messages = self.messages.entry(id).or_default().read(&frame[9..]),
            _ => {}
        }
        counted
    }
}

/// The messages of one stream, which do not keep to frames. Each begins with a flag and its length.
#[derive(Default)]
struct Messages {
    prefix: Vec<u8>,
    left: usize,
}

impl Messages {
    /// How many begin in this data.
    fn read(&mut self, mut data: &[u8]) -> usize {
        let mut count = 0;
        loop {
            let of_last = self.left.min(data.len());
            self.left -= of_last;
            data = &data[of_last..];
            if data.is_empty() {
                return count;
            }
            let (more, rest) = data.split_at((5 - self.prefix.len()).min(data.len()));
            self.prefix.extend_from_slice(more);
            data = rest;
            if let [_, a, b, c, d] = self.prefix[..] {
                self.left = u32::from_be_bytes([a, b, c, d]) as usize;
                self.prefix.clear();
                count += 1;
            }
        }
    }
}
