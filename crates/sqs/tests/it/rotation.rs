//! Credentials in a file that somebody else renews, against a server that knows which are good.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use onlyonce_core::ErrorKind;
use onlyonce_core::driver::Source as _;
use onlyonce_sqs::{Config, SqsSource};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep};

use crate::common::limit;

const TEST: &str = "rotation::rotated_credentials_are_read_again";
/// Set in a process of its own, where the file is the only source of credentials.
const FILE: &str = "AWS_SHARED_CREDENTIALS_FILE";

#[tokio::test]
async fn rotated_credentials_are_read_again() {
    if let Some(file) = std::env::var_os(FILE) {
        return outlives_its_credentials(Path::new(&file)).await;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = alone(folder.path());
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
}

fn alone(folder: &Path) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("AWS_") {
            command.env_remove(name);
        }
    }
    command
        .args(["--exact", TEST])
        .env(FILE, folder.join("credentials"))
        .env("AWS_CONFIG_FILE", folder.join("config"))
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .output()
        .unwrap()
}

async fn outlives_its_credentials(file: &Path) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let good = file.with_file_name("good");
    tokio::spawn(serve(listener, good.clone()));
    let config: Config = format!(
        "http://127.0.0.1:{port}/000000000000/orders?region=us-east-1&visibility_timeout=30s"
    )
    .parse()
    .unwrap();
    let rotate = |key: &str| {
        std::fs::write(&good, key).unwrap();
        let profile = format!("[default]\naws_access_key_id={key}\naws_secret_access_key=secret\n");
        std::fs::write(file, profile).unwrap();
    };
    rotate("FIRST");
    let source = SqsSource::new(config).unwrap();
    let receive = || source.receive(limit(1, Duration::from_secs(1)));
    assert_eq!(receive().await.unwrap().len(), 0);
    rotate("SECOND");
    let refused = receive().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Permission);
    assert!(refused.is_retryable(), "{refused}");
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Err(error) = receive().await {
        assert!(Instant::now() < deadline, "{error}");
        sleep(Duration::from_millis(100)).await;
    }
}

/// Takes the key whose name stands in the file `good`, and no other. The queue is empty.
async fn serve(listener: TcpListener, good: std::path::PathBuf) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let good = std::fs::read_to_string(&good).unwrap();
        tokio::spawn(answer(stream, good));
    }
}

async fn answer(stream: TcpStream, good: String) {
    let mut stream = BufReader::new(stream);
    let (mut length, mut known) = (0, false);
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        known |= line.contains(&format!("credential={}/", good.to_ascii_lowercase()));
    }
    stream.read_exact(&mut vec![0; length]).await.unwrap();
    let (status, body) = match known {
        true => ("200 OK", "{}"),
        false => (
            "403 Forbidden",
            r#"{"__type":"com.amazon.coral.service#InvalidClientTokenId","message":"invalid"}"#,
        ),
    };
    let answer = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/x-amz-json-1.0\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(answer.as_bytes()).await.unwrap();
}
