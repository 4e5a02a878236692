//! Runs the `ledger` program on an embedded queue.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use onlyonce::Message;
use serde_json::Value;
use tempfile::TempDir;

/// Longer than anything here may take, on a slow machine.
const DEADLINE: Duration = Duration::from_secs(90);

/// A folder with a queue and a ledger.
pub struct Folder {
    folder: TempDir,
    /// Of messages and of claims, in seconds.
    lease: u64,
}

impl Folder {
    pub fn new() -> Self {
        Self::with_lease(2)
    }

    pub fn with_lease(lease: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { folder, lease }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn queue(&self) -> String {
        format!("sqlite:{}?queue=transfers", self.path("queue.db").display())
    }

    pub fn store(&self) -> String {
        format!("sqlite:{}", self.path("ledger.db").display())
    }

    pub async fn publish(&self, messages: &[Message]) {
        let sink = onlyonce::sink(&self.queue()).await.unwrap();
        for result in sink.publish(messages).await {
            result.unwrap();
        }
        sink.close().await.unwrap();
    }

    /// Starts `ledger work` on both.
    pub fn worker(&self, arguments: &[&str]) -> Worker {
        let source = format!("{}&lease={}s", self.queue(), self.lease);
        let mut command = ledger();
        command
            .args(["work", "--source", &source, "--store", &self.store()])
            .args([
                "--claim-lease",
                &self.lease.to_string(),
                "--report-every",
                "0.02",
            ])
            .args(arguments);
        Worker::start(command)
    }

    /// What `ledger audit` says, and whether it finds it sound.
    pub fn audit(&self) -> (Value, bool) {
        let output = ledger()
            .args(["audit", "--store", &self.store()])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (
            serde_json::from_str(&text).unwrap(),
            output.status.success(),
        )
    }

    /// Asserts that `transfers` transfers are in the tables, each once.
    pub fn assert_each_once(&self, transfers: u64) {
        let (audit, sound) = self.audit();
        assert!(sound, "{audit}");
        assert_eq!(audit["transfers"], transfers, "{audit}");
        assert_eq!(audit["entries"], 2 * transfers, "{audit}");
    }

    pub fn sql(&self, file: &str) -> rusqlite::Connection {
        rusqlite::Connection::open(self.path(file)).unwrap()
    }
}

pub fn ledger() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ledger"))
}

/// A worker process and the counts that it printed last.
pub struct Worker {
    child: Child,
    figures: Arc<Mutex<Value>>,
    reader: Option<JoinHandle<()>>,
}

impl Worker {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let figures = Arc::new(Mutex::new(Value::Null));
        let latest = figures.clone();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Ok(value) = serde_json::from_str(&line) {
                    *latest.lock().unwrap() = value;
                }
            }
        });
        Self {
            child,
            figures,
            reader: Some(reader),
        }
    }

    /// One of the counts that it printed last.
    pub fn count(&self, name: &str) -> u64 {
        self.figures.lock().unwrap()[name].as_u64().unwrap_or(0)
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args([name, &pid]).status().unwrap();
        assert!(status.success(), "kill {name} {pid}");
    }

    /// Waits for a good end, and returns the report.
    pub fn report(mut self) -> Report {
        let child = &mut self.child;
        let status = until("a worker's end", || child.try_wait().unwrap());
        assert!(status.success(), "{status}");
        self.reader.take().unwrap().join().unwrap();
        let report = self.figures.lock().unwrap().take();
        Report(report)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Also where it is stopped; where it has ended, there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a worker printed at its end.
#[derive(Debug)]
pub struct Report(Value);

impl Report {
    pub fn count(&self, name: &str) -> u64 {
        self.0[name].as_u64().unwrap()
    }
}

/// Waits until `ready` gives something.
pub fn until<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(it) = ready() {
            return it;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `n` transfers of 1 each.
pub fn transfers(n: u64) -> Vec<Message> {
    (0..n).map(transfer).collect()
}

pub fn transfer(n: u64) -> Message {
    let id = format!("transfer-{n}");
    let body = format!(
        r#"{{"transfer_id":"{id}","from":"a{}","to":"b","amount":1}}"#,
        n % 7
    );
    Message::new(body).with_dedup_id(id)
}
