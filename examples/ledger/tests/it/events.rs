//! Each transfer has one event in another queue, in order for each account, and a worker that has drained its queue has left none
//! behind.

use std::collections::HashMap;
use std::time::Duration;

use onlyonce::driver::ReceiveLimits;
use serde_json::Value;

use crate::common::{Folder, transfers};

const TRANSFERS: u64 = 100;

#[tokio::test]
async fn each_transfer_has_one_event() {
    let folder = Folder::new();
    folder.publish(&transfers(TRANSFERS)).await;
    folder.publish(&transfers(TRANSFERS)).await;
    let events = format!("sqlite:{}?queue=events", folder.path("events.db").display());
    let arguments = ["--events", &events, "--drain-when-empty", "1"];
    folder.worker(&arguments).report();
    folder.assert_each_once(TRANSFERS);

    let source = onlyonce::source(&events).await.unwrap();
    let limit = ReceiveLimits::new(1_000, Duration::from_millis(200));
    let deliveries = source.receive(limit).await.unwrap();
    assert_eq!(deliveries.len() as u64, TRANSFERS);
    let mut numbers = HashMap::new();
    for delivery in &deliveries {
        let event: Value = serde_json::from_slice(&delivery.message.body).unwrap();
        let account = event["from"].as_str().unwrap().to_owned();
        assert_eq!(delivery.message.group, Some(account.clone()));
        assert!(delivery.message.dedup_id.is_some());
        let number = numbers.entry(account).or_insert(0);
        *number += 1;
        assert_eq!(event["number"], *number, "{event}");
    }
}
