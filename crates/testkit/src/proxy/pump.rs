use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::End;
use super::faults::{Direction, Fault, Lane, Lanes};

/// Read at once, at most.
const CHUNK: usize = 16 << 10;
/// Chunks that are held while they are delayed or throttled.
const HELD: usize = 64;
/// A throttled stream passes in pieces that take this time.
const PIECE: Duration = Duration::from_millis(50);

/// In which directions a connection has lost something.
#[derive(Default)]
pub(super) struct Holes([AtomicBool; 2]);

impl Holes {
    fn make(&self, direction: Direction) {
        self.0[direction as usize].store(true, Ordering::SeqCst);
    }

    fn has(&self, direction: Direction) -> bool {
        self.0[direction as usize].load(Ordering::SeqCst)
    }
}

/// What was read at one moment.
struct Chunk {
    read_at: Instant,
    read: Read,
}

enum Read {
    Bytes(Bytes),
    End(End),
}

/// What becomes of the next bytes.
enum Admitted {
    Pass(usize),
    Swallow,
    Cut,
}

/// One direction of one connection.
pub(super) struct Pump<'a> {
    to: WriteHalf<'a>,
    direction: Direction,
    holes: &'a Holes,
    lane: &'a Lane,
    fault: watch::Receiver<Option<Fault>>,
    /// When a throttled stream goes on.
    next: Instant,
}

impl<'a> Pump<'a> {
    pub(super) fn new(
        to: WriteHalf<'a>,
        direction: Direction,
        holes: &'a Holes,
        lanes: &'a Lanes,
    ) -> Self {
        let lane = lanes.of(direction);
        Self {
            to,
            direction,
            holes,
            lane,
            fault: lane.watch(),
            next: Instant::now(),
        }
    }

    /// Carries everything from `from` up to the end of its stream, which it passes on. An error says how the connection
    /// is to be ended instead. Never returns once something was lost.
    pub(super) async fn run(mut self, from: ReadHalf<'a>) -> Result<(), End> {
        let (held, mut chunks) = mpsc::channel(HELD);
        let read = async {
            read(from, held).await;
            Ok(())
        };
        let carry = async {
            while let Some(chunk) = chunks.recv().await {
                self.carry(chunk).await?;
            }
            Ok(())
        };
        tokio::try_join!(read, carry)?;
        if self.holes.has(self.direction) {
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn carry(&mut self, chunk: Chunk) -> Result<(), End> {
        match chunk.read {
            Read::Bytes(mut bytes) => {
                while !bytes.is_empty() {
                    match self.admitted(chunk.read_at, bytes.len()).await {
                        Admitted::Pass(some) => self.write(&bytes.split_to(some)).await?,
                        Admitted::Swallow => self.swallow(std::mem::take(&mut bytes).len()),
                        Admitted::Cut => return Err(End::Finish),
                    }
                }
                Ok(())
            }
            Read::End(end) => match (self.admitted(chunk.read_at, 0).await, end) {
                (Admitted::Swallow, _) => {
                    self.swallow(0);
                    Ok(())
                }
                (_, End::Finish) => self.to.shutdown().await.map_err(|_| End::Reset),
                (_, End::Reset) => Err(End::Reset),
            },
        }
    }

    /// Waits until the faults let something pass, and says how much of `left`.
    async fn admitted(&mut self, read_at: Instant, left: usize) -> Admitted {
        loop {
            let fault = *self.fault.borrow_and_update();
            match fault {
                Some(Fault::BlackHole) => return Admitted::Swallow,
                _ if self.holes.has(self.direction) => return Admitted::Swallow,
                Some(Fault::Delay(delay)) if read_at.elapsed() < delay => {
                    self.fault_or(read_at + delay).await;
                }
                Some(Fault::Throttle(0)) => {
                    // It can only be changed: the lane outlives its pumps.
                    let _ = self.fault.changed().await;
                }
                Some(Fault::Throttle(_)) if Instant::now() < self.next => {
                    self.fault_or(self.next).await;
                }
                Some(Fault::Throttle(rate)) => return Admitted::Pass(self.piece(rate, left)),
                Some(Fault::Truncate(_)) => {
                    return self.lane.take(left).map_or(Admitted::Cut, Admitted::Pass);
                }
                Some(Fault::Delay(_)) | None => return Admitted::Pass(left),
            }
        }
    }

    /// Waits for another fault, or until `moment`.
    async fn fault_or(&mut self, moment: Instant) {
        tokio::select! {
            _ = self.fault.changed() => {}
            () = sleep_until(moment) => {}
        }
    }

    /// How much of `left` passes at once at this many bytes a second; sets when it goes on.
    fn piece(&mut self, rate: u64, left: usize) -> usize {
        let most = (rate as f64 * PIECE.as_secs_f64()).max(1.0) as usize;
        let piece = left.min(most);
        self.next = Instant::now() + Duration::from_secs_f64(piece as f64 / rate as f64);
        piece
    }

    async fn write(&mut self, bytes: &Bytes) -> Result<(), End> {
        match self.to.write_all(bytes).await {
            Ok(()) => self.lane.count_passed(bytes.len()),
            // Whom it was for is gone, but word of that cannot come back.
            Err(_) if self.holes.has(self.direction.opposite()) => self.swallow(bytes.len()),
            Err(_) => return Err(End::Reset),
        }
        Ok(())
    }

    fn swallow(&self, bytes: usize) {
        self.holes.make(self.direction);
        self.lane.count_swallowed(bytes);
    }
}

async fn read(mut from: ReadHalf<'_>, held: mpsc::Sender<Chunk>) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        let read = match from.read_buf(&mut buffer).await {
            Ok(0) => Read::End(End::Finish),
            Ok(_) => Read::Bytes(buffer.split().freeze()),
            Err(_) => Read::End(End::Reset),
        };
        let over = matches!(read, Read::End(_));
        let read_at = Instant::now();
        if held.send(Chunk { read_at, read }).await.is_err() || over {
            return;
        }
    }
}
