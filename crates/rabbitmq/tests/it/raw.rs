//! A publisher that writes its frames itself: no client encodes what the filter is for.

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufStream};
use tokio::net::TcpStream;

use crate::common::{address, url};

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const END: u8 = 0xCE;
type Id = (u16, u16);

/// One channel with confirms.
pub(crate) struct RawPublisher {
    stream: BufStream<TcpStream>,
    published: u64,
    confirmed: u64,
    /// The longest frame, as the broker says; it takes eight bytes more.
    pub(crate) frame_max: usize,
}

pub(crate) fn short(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&[u8::try_from(text.len()).unwrap()], text].concat()
}

pub(crate) fn long(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    let length = u32::try_from(bytes.len()).unwrap();
    [&length.to_be_bytes(), bytes].concat()
}

impl RawPublisher {
    pub(crate) async fn connect() -> Self {
        let url = url::Url::parse(&url()).unwrap();
        let stream = TcpStream::connect(address()).await.unwrap();
        let mut publisher = Self {
            stream: BufStream::new(stream),
            published: 0,
            confirmed: 0,
            frame_max: 0,
        };
        let stream = &mut publisher.stream;
        stream.write_all(b"AMQP\0\0\x09\x01").await.unwrap();
        publisher.expect((10, 10)).await;
        let plain = format!(
            "\0{}\0{}",
            url.username(),
            url.password().unwrap_or_default()
        );
        let answer = [long(""), short("PLAIN"), long(plain), short("en_US")].concat();
        publisher.method(0, (10, 11), &answer).await;
        let tune = publisher.expect((10, 30)).await;
        publisher.frame_max = u32::from_be_bytes(tune[2..6].try_into().unwrap()) as usize;
        let no_heartbeat = [&tune[..6], &[0, 0]].concat();
        publisher.method(0, (10, 31), &no_heartbeat).await;
        let vhost = url.path().trim_start_matches('/').replace("%2f", "/");
        let vhost = if vhost.is_empty() { "/" } else { &vhost };
        let open = [short(vhost), short(""), vec![0]].concat();
        publisher.method(0, (10, 40), &open).await;
        publisher.expect((10, 41)).await;
        publisher.method(1, (20, 10), &short("")).await;
        publisher.expect((20, 11)).await;
        publisher.method(1, (85, 10), &[0]).await;
        publisher.expect((85, 11)).await;
        publisher
    }

    /// Publishes; `properties` begin with their flags.
    pub(crate) async fn publish(
        &mut self,
        exchange: &str,
        key: &[u8],
        properties: &[u8],
        body: &str,
    ) {
        let target = [vec![0, 0], short(exchange), short(key), vec![0]].concat();
        self.method(1, (60, 40), &target).await;
        let size = (body.len() as u64).to_be_bytes();
        let header = [&[0, 60, 0, 0][..], &size, properties].concat();
        self.frame(HEADER, 1, &header).await;
        self.frame(BODY, 1, body.as_bytes()).await;
        self.published += 1;
    }

    /// Waits until the broker has confirmed all.
    pub(crate) async fn confirm(&mut self) {
        while self.confirmed < self.published {
            let ack = self.expect((60, 80)).await;
            let tag = u64::from_be_bytes(ack[..8].try_into().unwrap());
            self.confirmed = match ack[8] {
                0 => self.confirmed + 1,
                _multiple => self.confirmed.max(tag),
            };
        }
    }

    async fn method(&mut self, channel: u16, (class, method): Id, arguments: &[u8]) {
        let payload = [&class.to_be_bytes(), &method.to_be_bytes(), arguments].concat();
        self.frame(METHOD, channel, &payload).await;
    }

    async fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let frame = [&[kind][..], &channel.to_be_bytes(), &long(payload), &[END]].concat();
        self.stream.write_all(&frame).await.unwrap();
    }

    /// The arguments of the next method, which is this one.
    async fn expect(&mut self, id: Id) -> Vec<u8> {
        self.stream.flush().await.unwrap();
        let payload = self.read_method().await.unwrap();
        let number = |at: usize| u16::from_be_bytes([payload[at], payload[at + 1]]);
        let shown = String::from_utf8_lossy(&payload);
        assert_eq!((number(0), number(2)), id, "{shown}");
        payload[4..].to_vec()
    }

    async fn read_method(&mut self) -> io::Result<Vec<u8>> {
        loop {
            let kind = self.stream.read_u8().await?;
            let _channel = self.stream.read_u16().await?;
            let mut payload = vec![0; self.stream.read_u32().await? as usize];
            self.stream.read_exact(&mut payload).await?;
            self.stream.read_u8().await?;
            if kind == METHOD {
                return Ok(payload);
            }
        }
    }
}
