use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::faults::{Direction, Lanes};
use super::pump::{Holes, Pump};
use super::{End, Side};

/// A server that does not answer for this time is not there.
const CONNECTING: Duration = Duration::from_secs(10);

/// What a connection is told to do.
#[derive(Debug)]
enum Order {
    Cut(End),
    /// And to say when it is done.
    HalfOpen(Side, oneshot::Sender<()>),
}

/// One client's connection and its task, which ends with it.
#[derive(Debug)]
pub(super) struct Connection {
    orders: mpsc::UnboundedSender<Order>,
    task: JoinHandle<()>,
}

impl Connection {
    /// Connects to `server` for `client`; if that fails, `client` is reset.
    pub(super) fn open(client: TcpStream, server: String, lanes: Arc<Lanes>) -> Self {
        let (orders, received) = mpsc::unbounded_channel();
        let task = tokio::spawn(serve(client, server, lanes, received));
        Self { orders, task }
    }

    pub(super) fn is_open(&self) -> bool {
        !self.task.is_finished()
    }

    pub(super) fn cut(&self, end: End) {
        // An error: it has ended already.
        let _ = self.orders.send(Order::Cut(end));
    }

    /// Resolves when it is done, or the connection ended.
    pub(super) fn half_open(&self, gone: Side) -> oneshot::Receiver<()> {
        let (done, told) = oneshot::channel();
        let _ = self.orders.send(Order::HalfOpen(gone, done));
        told
    }

    pub(super) async fn ended(mut self) {
        let _ = (&mut self.task).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Orders = mpsc::UnboundedReceiver<Order>;

async fn serve(mut client: TcpStream, server: String, lanes: Arc<Lanes>, mut orders: Orders) {
    // Orders wait for it, so that they find both sides.
    let Ok(Ok(mut server)) = timeout(CONNECTING, TcpStream::connect(server)).await else {
        return close(client, End::Reset).await;
    };
    let order = tokio::select! {
        biased;
        order = orders.recv() => order,
        end = carry(&mut client, &mut server, &lanes) => Some(Order::Cut(end)),
    };
    match order {
        // Without a proxy the task is aborted.
        None => {}
        Some(Order::Cut(end)) => {
            close(client, end).await;
            close(server, end).await;
        }
        Some(Order::HalfOpen(side, done)) => {
            let (gone, kept) = match side {
                Side::Client => (client, server),
                Side::Server => (server, client),
            };
            close(gone, End::Reset).await;
            let _ = done.send(());
            keep(kept, orders).await;
        }
    }
}

/// Carries both directions until both streams have ended, or the connection is to be cut.
async fn carry(client: &mut TcpStream, server: &mut TcpStream, lanes: &Lanes) -> End {
    // The proxy adds no delay of its own; where this cannot be set it adds one.
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let holes = Holes::default();
    let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
    let there = Pump::new(to_server, Direction::ToServer, &holes, lanes);
    let back = Pump::new(to_client, Direction::ToClient, &holes, lanes);
    match tokio::try_join!(there.run(from_client), back.run(from_server)) {
        Ok(_) => End::Finish,
        Err(end) => end,
    }
}

/// The end of a half-open connection that is never told: reads and answers nothing, until it is cut or has ended itself.
async fn keep(mut kept: TcpStream, mut orders: Orders) {
    let mut swallowed = [0; 4096];
    loop {
        tokio::select! {
            order = orders.recv() => {
                let end = match order {
                    Some(Order::Cut(end)) => end,
                    _ => End::Reset,
                };
                return close(kept, end).await;
            }
            read = kept.read(&mut swallowed) => {
                if !matches!(read, Ok(1..)) {
                    return;
                }
            }
        }
    }
}

/// Ends a connection's one side. An error means that its peer was faster.
async fn close(mut stream: TcpStream, end: End) {
    let _ = match end {
        End::Finish => stream.shutdown().await,
        End::Reset => stream.set_zero_linger(),
    };
}
