//! The demo's worker processes: this program again, one at a time.

use std::fs::File;
use std::io;
use std::process::{ExitStatus, Stdio};

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::watch;

use onlyonce::Report;

/// A worker process. It is killed when this is dropped.
pub struct Worker {
    child: Child,
    figures: watch::Receiver<Report>,
}

impl Worker {
    /// Starts `ledger work` with these arguments; its log goes to `log`.
    pub fn start(arguments: &[String], log: File) -> io::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("work")
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            // Panics are among the faults.
            .env("RUST_BACKTRACE", "0")
            .kill_on_drop(true)
            .spawn()?;
        let (latest, figures) = watch::channel(Report::default());
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(follow(stdout, latest));
        }
        Ok(Self { child, figures })
    }

    /// What it last said of itself.
    pub fn figures(&self) -> Report {
        *self.figures.borrow()
    }

    /// SIGKILL: it gets no chance to end anything.
    pub async fn kill(&mut self) -> io::Result<()> {
        self.child.kill().await?;
        self.all_said().await;
        Ok(())
    }

    /// How it ended, if it has.
    pub async fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        let status = self.child.try_wait()?;
        if status.is_some() {
            self.all_said().await;
        }
        Ok(status)
    }

    /// Waits until everything that it printed was read.
    async fn all_said(&mut self) {
        while self.figures.changed().await.is_ok() {}
    }
}

async fn follow(stdout: ChildStdout, latest: watch::Sender<Report>) {
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        // The last line of a killed process may be cut.
        if let Ok(figures) = serde_json::from_str(&line) {
            latest.send_replace(figures);
        }
    }
}
