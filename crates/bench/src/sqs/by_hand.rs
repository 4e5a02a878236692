//! The loops that people write with aws-sdk-sqs.

use std::time::{Duration, Instant};

use onlyonce::sqs::aws_sdk_sqs::types::{DeleteMessageBatchRequestEntry, Message};

use super::queue::Queue;
use crate::Error;

async fn handler(message: &Message) -> usize {
    message.body().map_or(0, str::len)
}

/// As AWS's own examples for Rust: a receive with nothing set, the handler, a delete.
/// <https://docs.aws.amazon.com/sdk-for-rust/latest/dg/rust_sqs_code_examples.html>
pub(crate) async fn one_by_one(queue: &Queue, count: usize) -> Result<Duration, Error> {
    let began = Instant::now();
    let mut done = 0;
    while done < count {
        let received = queue
            .client
            .receive_message()
            .queue_url(&queue.url)
            .send()
            .await?;
        for message in received.messages() {
            handler(message).await;
            let delete = queue.client.delete_message().queue_url(&queue.url);
            let delete = delete.set_receipt_handle(message.receipt_handle.clone());
            delete.send().await?;
            done += 1;
        }
    }
    Ok(began.elapsed())
}

/// As well as one loop can do: ten at a time, one long poll after the other.
pub(crate) async fn batches(queue: &Queue, count: usize) -> Result<Duration, Error> {
    let began = Instant::now();
    let mut done = 0;
    while done < count {
        let receive = queue.client.receive_message().queue_url(&queue.url);
        let receive = receive.max_number_of_messages(10).wait_time_seconds(20);
        let received = receive.send().await?;
        let messages = received.messages();
        if messages.is_empty() {
            continue;
        }
        let mut delete = queue.client.delete_message_batch().queue_url(&queue.url);
        for (id, message) in messages.iter().enumerate() {
            handler(message).await;
            let entry = DeleteMessageBatchRequestEntry::builder().id(id.to_string());
            let entry = entry.set_receipt_handle(message.receipt_handle.clone());
            delete = delete.entries(entry.build()?);
        }
        let deleted = delete.send().await?;
        if !deleted.failed().is_empty() {
            return Err("an entry failed".into());
        }
        done += messages.len();
    }
    Ok(began.elapsed())
}
