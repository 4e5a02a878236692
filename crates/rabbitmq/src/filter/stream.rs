//! The filter around the stream to the broker. [`lapin`] takes any stream from a runtime whose streams are of that type.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::{DummyIO, RuntimeParts};
use async_rs::{Runtime, Tokio};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use lapin::tcp::{AMQPUriTcpExt as _, AsyncTcpStream, OwnedTLSConfig};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties};

use super::{Broker, Filter};

/// Read from the socket in one go.
const CHUNK: usize = 64 << 10;

/// Connects as [`Connection::connect_uri`] does, TLS included, with the filter in between.
pub(crate) async fn connector(
    uri: AMQPUri,
    tls: OwnedTLSConfig,
    properties: ConnectionProperties,
) -> lapin::Result<(Connection, Arc<Broker>)> {
    let tokio = Runtime::tokio_current();
    let parts = RuntimeParts::new(Tokio::current(), FilteredTokio(Tokio::current()));
    let broker = Arc::new(Broker::default());
    let told = Arc::clone(&broker);
    let connect = async move |uri: AMQPUri, _: Runtime<_>| {
        let stream = uri.connect_with_config_async(tls.as_ref(), &tokio).await?;
        Ok::<_, lapin::Error>(AsyncTcpStream::Plain(Filtered::new(stream, &told)))
    };
    let connection = Connection::connector(uri, Runtime::new(parts), connect, properties).await?;
    Ok((connection, broker))
}

/// A stream whose reader gets what the filter makes of it. Writes go through as they are.
pub(crate) struct Filtered<S> {
    stream: S,
    filter: Filter,
    chunk: Box<[u8]>,
    /// What the filter made, up to `given` handed out.
    output: Vec<u8>,
    given: usize,
    /// Why nothing more can be read, for when `output` is handed out.
    failed: Option<io::Error>,
}

impl<S> Filtered<S> {
    pub(super) fn new(stream: S, broker: &Arc<Broker>) -> Self {
        Self {
            stream,
            filter: Filter::new(Arc::clone(broker)),
            chunk: vec![0; CHUNK].into(),
            output: Vec::new(),
            given: 0,
            failed: None,
        }
    }

    /// Hands out what there is.
    fn give(&mut self, buffer: &mut [u8]) -> usize {
        let ready = &self.output[self.given..];
        let many = ready.len().min(buffer.len());
        buffer[..many].copy_from_slice(&ready[..many]);
        self.given += many;
        if self.given == self.output.len() {
            self.given = 0;
            self.output.clear();
            // One large frame is no reason to keep its room.
            self.output.shrink_to(2 * CHUNK);
        }
        many
    }

    fn failure(&mut self) -> Option<io::Error> {
        let error = self.failed.take()?;
        self.failed = Some(io::Error::new(error.kind(), error.to_string()));
        Some(error)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Filtered<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            if !this.output.is_empty() {
                return Poll::Ready(Ok(this.give(buffer)));
            }
            if let Some(error) = this.failure() {
                return Poll::Ready(Err(error));
            }
            let stream = Pin::new(&mut this.stream);
            let many = ready!(stream.poll_read(context, &mut this.chunk))?;
            if many == 0 {
                return Poll::Ready(Ok(0));
            }
            let read = this.filter.read(&this.chunk[..many], &mut this.output);
            this.failed = read.err();
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Filtered<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, buffer)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, buffers)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_close(context)
    }
}

impl<S> fmt::Debug for Filtered<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filtered").finish_non_exhaustive()
    }
}

/// Tokio's reactor, as that of a runtime whose streams are filtered.
#[derive(Clone, Debug)]
struct FilteredTokio(Tokio);

impl Reactor for FilteredTokio {
    type TcpStream = Filtered<AsyncTcpStream<<Tokio as Reactor>::TcpStream>>;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// The client registers no sockets of its own.
    fn register<H: Read + Write + Send + 'static>(
        &self,
        _socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<DummyIO, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move {
            let stream = AsyncTcpStream::Plain(connecting.await?);
            Ok(Filtered::new(stream, &Arc::default()))
        }
    }
}
