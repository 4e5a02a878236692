use std::sync::Arc;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::task::{JoinHandle, JoinSet};

/// A TCP proxy in front of the broker whose connections can be cut, as a network would.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    connections: Arc<Mutex<JoinSet<()>>>,
    listener: JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn to(address: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = Arc::new(Mutex::new(JoinSet::new()));
        let open = connections.clone();
        let listener = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let address = address.clone();
                open.lock().await.spawn(async move {
                    let Ok(mut broker) = TcpStream::connect(address).await else {
                        return;
                    };
                    let _ = copy_bidirectional(&mut client, &mut broker).await;
                });
            }
        });
        Self {
            port,
            connections,
            listener,
        }
    }

    /// Ends every connection; new ones are taken.
    pub(crate) async fn cut(&self) {
        self.connections.lock().await.shutdown().await;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listener.abort();
    }
}
