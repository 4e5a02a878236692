//! URLs: what they open, and what a wrong one says.

use onlyonce::Message;
use onlyonce::driver::ReceiveLimits;
use std::time::Duration;

async fn wrong_source(url: &str) -> String {
    match onlyonce::source(url).await {
        Ok(_) => panic!("{url} was taken"),
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn a_memory_queue_is_the_same_for_source_and_sink() {
    let sink = onlyonce::sink("memory:letters").await.unwrap();
    let source = onlyonce::source("memory:letters").await.unwrap();
    sink.publish(&[Message::new("hello")])
        .await
        .pop()
        .unwrap()
        .unwrap();
    let limit = ReceiveLimits::new(1, Duration::from_secs(1)).with_bytes(1_000);
    let received = source.receive(limit).await.unwrap();
    assert_eq!(received[0].message.body, "hello");
}

#[tokio::test]
async fn wrong_urls_say_what_to_write_instead() {
    for (url, hint) in [
        ("orders", "write one like `memory:orders`"),
        ("memory:", "write `memory:NAME`"),
        ("memory:orders?prefetch=3", "unknown parameter `prefetch`"),
        ("memory:orders#1", "write it `%23`"),
        ("memory://host/orders", "no host"),
        ("kafka://host/topic", "there are memory:, sqlite:, amqp:"),
    ] {
        let error = wrong_source(url).await;
        assert!(error.contains(hint), "{url}: {error}");
    }
    let error = onlyonce::store("amqp://localhost").await.err().unwrap();
    assert!(error.to_string().contains("no store has the scheme"));
}

#[cfg(feature = "sqs")]
#[tokio::test]
async fn an_sqs_queue_has_three_names() {
    for url in [
        "https://sqs.eu-central-1.amazonaws.com/123456789012/orders.fifo",
        "sqs://orders.fifo?region=eu-central-1",
        "arn:aws:sqs:eu-central-1:123456789012:orders.fifo",
    ] {
        let source = onlyonce::source(url).await.unwrap();
        assert_eq!(source.name(), "orders.fifo", "{url}");
        let sink = onlyonce::sink(url).await.unwrap();
        assert_eq!(sink.name(), "orders.fifo", "{url}");
    }
}

#[cfg(not(feature = "sqs"))]
#[tokio::test]
async fn sqs_needs_its_feature() {
    for url in [
        "https://sqs.eu-west-1.amazonaws.com/1/q",
        "sqs://q",
        "arn:aws:sqs:eu-west-1:1:q",
    ] {
        let error = wrong_source(url).await;
        assert!(error.contains("--features sqs"), "{error}");
    }
}

#[cfg(not(feature = "rabbitmq"))]
#[tokio::test]
async fn a_missing_feature_is_named() {
    for url in [
        "amqp://u:secret@h/v?queue=q",
        "amqps://u:secret@h/v?queue=q",
    ] {
        let error = wrong_source(url).await;
        assert!(error.contains("--features rabbitmq"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[cfg(feature = "sqlite")]
#[tokio::test]
async fn sqlite_urls_open_a_file() {
    let dir = std::env::temp_dir().join(format!("onlyonce-urls-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("app.db");
    let url = format!("sqlite:{}", path.display());
    onlyonce::store(&url).await.unwrap();
    onlyonce::source(&format!("{url}?queue=orders"))
        .await
        .unwrap();
    let error = wrong_source(&url).await;
    assert!(error.contains("queue="), "{error}");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[cfg(feature = "rabbitmq")]
#[tokio::test]
async fn rabbitmq_urls_are_checked_before_anything_is_sent() {
    for (url, hint) in [
        ("amqp://h/v", "queue=NAME"),
        (
            "amqp://h/v?queue=q&prefetsch=1",
            "unknown parameter `prefetsch`",
        ),
    ] {
        let error = wrong_source(url).await;
        assert!(error.contains(hint), "{url}: {error}");
    }
}
