//! What a producer writes is data: no id, payload or error of its making can forge a line or a field of a log.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onlyonce_core::handler::*;
use onlyonce_core::memory::{MemoryQueue, MemoryStore};
use onlyonce_core::*;
use serde::Deserialize;
use serde_json::Value;
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::fmt::MakeWriter;

use crate::support::*;

const FORGED: &str =
    "m1\n2026-01-01T00:00:00Z ERROR forged\r\n{\"level\":\"ERROR\"}\u{1b}[2J\u{202e}";

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Log {
    fn plain() -> (Self, DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(log.clone());
        (log, tracing::subscriber::set_default(subscriber.finish()))
    }

    fn json() -> (Self, DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(log.clone())
            .json();
        (log, tracing::subscriber::set_default(subscriber.finish()))
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

/// The error of serde names what it did not know as it stands in the payload.
#[derive(Deserialize)]
enum Kind {
    Order,
}

fn hostile(payload: &str) -> Message {
    Message::new(serde_json::to_string(payload).unwrap())
        .with_dedup_id(format!("{payload}{FORGED}{}", "x".repeat(100_000)))
        .with_group(FORGED)
        .with_attribute(FORGED, FORGED)
}

/// Has a message fail by its payload, one by its handler, lets a dead letter be refused and a settlement fail.
async fn run_hostile_messages() {
    let queue = MemoryQueue::new("orders");
    publish(&queue, [hostile(FORGED), hostile("Order")]).await;
    let source = FaultyQueue {
        settle: first(2, Fault::ReplyLost),
        retryable: false,
        ..FaultyQueue::new(&queue)
    };
    let sink = FaultySink::new(|call| (call == 0).then(|| Error::new(ErrorKind::Message, FORGED)));
    let report = Pipeline::idempotent(source, MemoryStore::new())
        .dead_letter(sink)
        .retry(RetryPolicy::default().max_attempts(2))
        .stop_when_idle(Duration::from_secs(120))
        .run(async |Json(kind): Json<Kind>| match kind {
            Kind::Order => Err::<(), _>(Failure::retry(FORGED)),
        })
        .await
        .unwrap();
    assert_eq!(report.dead_lettered, 2, "{report:?}");
    assert!(report.unknown > 0, "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn no_producer_forges_a_line() {
    let (log, _guard) = Log::plain();
    run_hostile_messages().await;
    let text = log.text();
    for what in ["handler failed", "dead-lettered", "not confirmed"] {
        assert!(text.contains(what), "{what}: {text}");
    }
    for line in text.lines() {
        assert!(line.contains(" onlyonce_core::pipeline"), "{line}");
        assert!(line.len() < 10_000, "{} bytes", line.len());
    }
    let printable = |c: char| c == '\n' || !c.is_control() && c != '\u{202e}';
    assert!(text.chars().all(printable), "{text:?}");
}

#[tokio::test(start_paused = true)]
async fn no_producer_replaces_what_an_event_says() {
    let (log, _guard) = Log::json();
    run_hostile_messages().await;
    let mut named = 0;
    for line in log.text().lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        let fields = event["fields"].as_object().unwrap();
        let said = fields["message"].as_str().unwrap();
        assert!(!said.contains("m1"), "{said}");
        named += usize::from(fields.contains_key("message_id"));
        let one_line = |value: &Value| value.as_str().is_none_or(|text| !text.contains('\n'));
        assert!(fields.values().all(one_line), "{line}");
    }
    assert!(named > 3, "{named} events name a message");
}

#[test]
fn an_error_is_one_line_whatever_it_quotes() {
    let error = Error::new(ErrorKind::Other, format!("refused: {FORGED}"))
        .on_queue(FORGED)
        .on_message(&Message::new("").with_dedup_id(FORGED))
        .caused_by(FORGED.repeat(1_000));
    let text = error.to_string();
    assert!(text.chars().all(|c| !c.is_control()), "{text}");
    assert!(text.len() < 5_000, "{} bytes", text.len());
}

async fn slower_than_its_lease() {
    tokio::time::sleep(Duration::from_secs(60)).await;
}

/// What is cancelled and delivered again without end must not be silent.
#[tokio::test(start_paused = true)]
async fn a_run_that_was_cut_off_is_said_with_queue_message_lease_and_handler() {
    let (log, _guard) = Log::plain();
    let queue = MemoryQueue::new("orders").with_lease(Duration::from_secs(7));
    publish(&queue, [numbered(1)]).await;
    let mut source = FaultyQueue::new(&queue);
    source.extend = false;
    let report = Pipeline::idempotent(source, MemoryStore::new())
        .retry(RetryPolicy::default().max_attempts(2))
        .stop_when_idle(Duration::from_secs(60))
        .run(slower_than_its_lease)
        .await
        .unwrap();
    assert_eq!(report.dead_lettered, 1, "{report:?}");
    let text = log.text();
    let mut warnings = text.lines().filter(|line| line.contains("cut off"));
    let warning = warnings.next().expect("it is said");
    for part in ["orders", "m1", "7s", "slower_than_its_lease", "attempt=1"] {
        assert!(warning.contains(part), "{part}: {warning}");
    }
}
