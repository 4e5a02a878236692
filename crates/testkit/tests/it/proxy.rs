//! Each fault of the proxy, with plain sockets.

use std::io::ErrorKind;
use std::time::Duration;

use onlyonce_testkit::proxy::{Direction, End, Fault, Proxy, Side};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

use Direction::{ToClient, ToServer};

/// What is to happen happens within this time.
const PATIENCE: Duration = Duration::from_secs(20);
/// What must not happen would have happened by then.
const MOMENT: Duration = Duration::from_millis(200);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("it happens in time")
}

/// A connection through a proxy, and who listens behind it.
struct Line {
    proxy: Proxy,
    listener: TcpListener,
    client: TcpStream,
    server: TcpStream,
}

impl Line {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let proxy = Proxy::to(format!("localhost:{port}")).await.unwrap();
        let (client, server) = connect(&proxy, &listener).await;
        Self {
            proxy,
            listener,
            client,
            server,
        }
    }

    /// Another connection works in both directions.
    async fn assert_next_is_sound(&self) {
        let (mut client, mut server) = connect(&self.proxy, &self.listener).await;
        assert_passes(&mut client, &mut server).await;
        assert_passes(&mut server, &mut client).await;
    }
}

async fn connect(proxy: &Proxy, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = soon(TcpStream::connect(proxy.addr())).await.unwrap();
    let (server, _) = soon(listener.accept()).await.unwrap();
    (client, server)
}

async fn assert_passes(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"hello").await.unwrap();
    assert_eq!(soon(read(to, 5)).await, b"hello");
}

async fn read(from: &mut TcpStream, many: usize) -> Vec<u8> {
    let mut bytes = vec![0; many];
    from.read_exact(&mut bytes).await.unwrap();
    bytes
}

/// What comes up to the end of the stream.
async fn rest(from: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    soon(from.read_to_end(&mut bytes)).await.unwrap();
    bytes
}

async fn assert_reset(stream: &mut TcpStream) {
    let error = soon(stream.read(&mut [0])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

/// Neither bytes nor an end come.
async fn assert_silent(stream: &mut TcpStream) {
    let read = timeout(MOMENT, stream.read(&mut [0])).await;
    assert!(read.is_err(), "{read:?}");
}

/// Polls `is` until it holds.
async fn until(is: impl Fn() -> bool) {
    soon(async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Bytes of which no two neighbours are alike.
fn pattern(many: usize) -> Vec<u8> {
    (0..many).map(|n| (n % 251) as u8).collect()
}

#[tokio::test]
async fn without_a_fault_bytes_and_ends_pass_and_are_counted() {
    let mut line = Line::new().await;
    let sent = pattern(1 << 20);
    let (write, received) = tokio::join!(
        async {
            line.client.write_all(&sent).await.unwrap();
            line.client.shutdown().await.unwrap();
        },
        rest(&mut line.server)
    );
    assert_eq!(((), &received), (write, &sent));
    // The other direction is still open.
    line.server.write_all(b"answer").await.unwrap();
    line.server.shutdown().await.unwrap();
    assert_eq!(rest(&mut line.client).await, b"answer");
    assert_eq!(line.proxy.bytes(ToServer), 1 << 20);
    assert_eq!(line.proxy.bytes(ToClient), 6);
    until(|| line.proxy.connections() == 0).await;
}

#[tokio::test]
async fn a_reset_passes_too() {
    let mut line = Line::new().await;
    line.client.set_zero_linger().unwrap();
    drop(line.client);
    assert_reset(&mut line.server).await;
    until(|| line.proxy.connections() == 0).await;
}

#[tokio::test]
async fn a_server_that_is_down_resets_the_client() {
    let line = Line::new().await;
    drop(line.listener);
    let mut client = TcpStream::connect(line.proxy.addr()).await.unwrap();
    assert_reset(&mut client).await;
}

#[tokio::test]
async fn a_cut_ends_both_sides_as_told() {
    let mut line = Line::new().await;
    line.proxy.cut(End::Finish).await;
    assert_eq!(line.proxy.connections(), 0);
    assert_eq!(rest(&mut line.client).await, b"");
    assert_eq!(rest(&mut line.server).await, b"");
    let (mut client, mut server) = connect(&line.proxy, &line.listener).await;
    assert_eq!(line.proxy.connections(), 1);
    line.proxy.cut(End::Reset).await;
    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
    line.assert_next_is_sound().await;
}

#[tokio::test]
async fn a_cut_finds_clients_that_nobody_has_accepted() {
    let line = Line::new().await;
    // This thread is the proxy's, too: it has had no time.
    let clients: Vec<_> = (0..10)
        .map(|_| std::net::TcpStream::connect(line.proxy.addr()).unwrap())
        .collect();
    assert_eq!(line.proxy.connections(), 11);
    line.proxy.cut(End::Reset).await;
    assert_eq!((line.proxy.connections(), line.proxy.accepted()), (0, 11));
    for mut client in clients {
        let error = std::io::Read::read(&mut client, &mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn a_half_open_connection_never_tells_who_is_left() {
    for side in [Side::Client, Side::Server] {
        let line = Line::new().await;
        let (mut gone, mut left) = match side {
            Side::Client => (line.client, line.server),
            Side::Server => (line.server, line.client),
        };
        line.proxy.half_open(side).await;
        assert_reset(&mut gone).await;
        // More than all buffers hold: it is read, and answered by nobody.
        soon(left.write_all(&pattern(32 << 20))).await.unwrap();
        line.proxy.heal();
        assert_silent(&mut left).await;
        assert_eq!(line.proxy.connections(), 1);
        line.proxy.cut(End::Reset).await;
        assert_reset(&mut left).await;
    }
}

#[tokio::test]
async fn a_delay_is_one_way_and_does_not_add_up() {
    let mut line = Line::new().await;
    let delay = Duration::from_secs(1);
    line.proxy.set(ToServer, Fault::Delay(delay));
    let begun = Instant::now();
    for _ in 0..100 {
        line.client.write_all(b"x").await.unwrap();
        line.client.flush().await.unwrap();
        // So that they are read one by one.
        tokio::task::yield_now().await;
    }
    line.client.shutdown().await.unwrap();
    assert_passes(&mut line.server, &mut line.client).await;
    assert_eq!(line.proxy.bytes(ToServer), 0, "the way back was faster");
    assert_eq!(rest(&mut line.server).await.len(), 100);
    assert!(begun.elapsed() >= delay, "{:?}", begun.elapsed());
    assert!(begun.elapsed() < 10 * delay, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_throttled_direction_keeps_to_its_rate() {
    let mut line = Line::new().await;
    line.proxy.set(ToClient, Fault::Throttle(20_000));
    let (begun, sent) = (Instant::now(), pattern(20_000));
    line.server.write_all(&sent).await.unwrap();
    assert_eq!(soon(read(&mut line.client, 20_000)).await, sent);
    // The first piece does not wait, which is a twentieth.
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(900), "{took:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[tokio::test]
async fn healing_lets_go_what_waits() {
    for fault in [
        Fault::Delay(Duration::from_secs(3_600)),
        Fault::Throttle(0),
        Fault::Throttle(1),
    ] {
        let mut line = Line::new().await;
        line.proxy.set(ToServer, fault);
        line.client.write_all(b"hello").await.unwrap();
        line.client.shutdown().await.unwrap();
        let early = timeout(MOMENT, read(&mut line.server, 5)).await;
        assert!(early.is_err(), "{fault:?}");
        line.proxy.heal();
        let rest = rest(&mut line.server).await;
        assert!(b"hello".ends_with(&rest), "{fault:?}: {rest:?}");
        assert_eq!(line.proxy.bytes(ToServer), 5);
    }
}

#[tokio::test]
async fn what_waits_is_bounded_and_complete() {
    const ALL: usize = 64 << 20;
    let mut line = Line::new().await;
    line.proxy.set(ToServer, Fault::Throttle(0));
    let sent = pattern(ALL);
    let mut written = 0;
    while let Ok(wrote) = timeout(MOMENT, line.client.write(&sent[written..])).await {
        written += wrote.unwrap();
        assert!(written < ALL, "the sender is held back");
    }
    line.proxy.heal();
    let (wrote, received) = tokio::join!(
        line.client.write_all(&sent[written..]),
        read(&mut line.server, ALL)
    );
    wrote.unwrap();
    assert!(received == sent, "nothing is missing or out of place");
}

#[tokio::test]
async fn a_black_hole_swallows_one_direction_for_good() {
    for (direction, other) in [(ToServer, ToClient), (ToClient, ToServer)] {
        let mut line = Line::new().await;
        let (from, to) = match direction {
            ToServer => (&mut line.client, &mut line.server),
            ToClient => (&mut line.server, &mut line.client),
        };
        line.proxy.set(direction, Fault::BlackHole);
        from.write_all(b"lost").await.unwrap();
        assert_passes(to, from).await;
        until(|| line.proxy.swallowed(direction) == 4).await;
        line.proxy.heal();
        from.write_all(b"more").await.unwrap();
        until(|| line.proxy.swallowed(direction) == 8).await;
        // Nor is the end of the stream told.
        from.shutdown().await.unwrap();
        assert_silent(to).await;
        assert_passes(to, from).await;
        assert_eq!(line.proxy.bytes(direction), 0);
        assert_eq!(line.proxy.bytes(other), 10);
        line.assert_next_is_sound().await;
    }
}

#[tokio::test]
async fn word_that_somebody_is_gone_goes_through_no_black_hole() {
    let mut line = Line::new().await;
    line.proxy.set(ToServer, Fault::BlackHole);
    line.client.write_all(b"lost").await.unwrap();
    until(|| line.proxy.swallowed(ToServer) == 4).await;
    line.client.set_zero_linger().unwrap();
    drop(line.client);
    // The client's machine would answer with resets, which are lost as well.
    for _ in 0..20 {
        line.server.write_all(&pattern(100_000)).await.unwrap();
    }
    assert_silent(&mut line.server).await;
    // But it is told when it goes where nothing is lost.
    let (mut client, mut server) = connect(&line.proxy, &line.listener).await;
    line.proxy.set(ToClient, Fault::BlackHole);
    server.write_all(b"lost").await.unwrap();
    until(|| line.proxy.swallowed(ToClient) >= 4).await;
    client.set_zero_linger().unwrap();
    line.proxy.heal();
    client.write_all(b"last").await.unwrap();
    assert_eq!(soon(read(&mut server, 4)).await, b"last");
    drop(client);
    assert_reset(&mut server).await;
}

#[tokio::test]
async fn a_truncated_stream_ends_after_so_many_bytes() {
    for (n, pieces) in [(0, 1), (1, 1), (700, 1), (700, 7), (70_000, 3)] {
        let mut line = Line::new().await;
        assert_passes(&mut line.server, &mut line.client).await;
        line.proxy.set(ToClient, Fault::Truncate(n));
        let sent = pattern(100_000);
        for piece in sent.chunks(sent.len() / pieces) {
            // The last ones may meet the end.
            let _ = line.server.write_all(piece).await;
            tokio::task::yield_now().await;
        }
        let mut received = Vec::new();
        soon(line.client.read_to_end(&mut received)).await.unwrap();
        assert!(received == sent[..n], "{n}: {} bytes", received.len());
        // Whoever sent hears of it, too: an end, or a reset since not all was read.
        assert!(!matches!(soon(line.server.read(&mut [0])).await, Ok(1..)));
        line.assert_next_is_sound().await;
    }
}

#[tokio::test]
async fn new_connections_are_refused_and_old_ones_stay() {
    let mut line = Line::new().await;
    line.proxy.refuse();
    // The reset may be seen as early as this.
    if let Ok(mut refused) = TcpStream::connect(line.proxy.addr()).await {
        assert_reset(&mut refused).await;
    }
    assert_passes(&mut line.client, &mut line.server).await;
    line.proxy.heal();
    line.assert_next_is_sound().await;
}

#[tokio::test]
async fn a_dropped_proxy_leaves_nothing() {
    let mut line = Line::new().await;
    let addr = line.proxy.addr();
    line.proxy.set(ToServer, Fault::BlackHole);
    line.client.write_all(b"lost").await.unwrap();
    until(|| line.proxy.swallowed(ToServer) == 4).await;
    drop(line.proxy);
    assert_eq!(rest(&mut line.client).await, b"");
    assert_eq!(rest(&mut line.server).await, b"");
    soon(async { while TcpStream::connect(addr).await.is_ok() {} }).await;
}
