//! Messages that cannot be processed end in the dead-letter queue, whole and with a reason, and hold nobody up.

use std::collections::HashMap;
use std::time::Duration;

use crate::common::{Folder, transfer};
use onlyonce::Message;
use onlyonce::attributes::DEAD_LETTER_REASON;
use onlyonce::driver::ReceiveLimits;

const HUGE: usize = 10 << 20;

/// Each kind of poison, with what its reason must say.
fn poison() -> Vec<(Message, &'static str)> {
    let id = |n: usize| format!("poison-{n}");
    let bodies: Vec<(Vec<u8>, &str)> = vec![
        (vec![0xff, 0xfe, 0x00], "not the JSON"),
        (br#"{"transfer_id":"#.to_vec(), "not the JSON"),
        (br#"{"transfer_id":7}"#.to_vec(), "not the JSON"),
        (
            br#"{"transfer_id":"x","from":"a","to":"b","amount":-5}"#.to_vec(),
            "amount",
        ),
        (Vec::new(), "not the JSON"),
        (vec![b'x'; HUGE], "not the JSON"),
    ];
    let with_id = bodies
        .into_iter()
        .enumerate()
        .map(|(n, (body, reason))| (Message::new(body).with_dedup_id(id(n)), reason));
    let without_id = Message::new(transfer(1_000).body);
    let other_payload = Message::new(transfer(1_001).body).with_dedup_id("transfer-0");
    with_id
        .chain([
            (without_id, "no dedup key"),
            (other_payload, "payload mismatch"),
        ])
        .collect()
}

/// Transfers that are unusual and fine.
fn unusual() -> Vec<Message> {
    let note = "n".repeat(HUGE);
    let huge =
        format!(r#"{{"transfer_id":"huge","from":"a","to":"b","amount":1,"note":"{note}"}}"#);
    let odd = r#"{"transfer_id":"ключ'; DROP TABLE entries; --","from":"a","to":"b","amount":1}"#;
    vec![
        Message::new(huge).with_dedup_id("huge"),
        Message::new(odd).with_dedup_id("\u{1F511}".repeat(30_000)),
    ]
}

async fn dead_letters(folder: &Folder) -> Vec<Message> {
    let source = onlyonce::source(&format!("{}.dead", folder.queue()))
        .await
        .unwrap();
    let limit = ReceiveLimits::new(100, Duration::from_millis(200));
    let mut letters = Vec::new();
    loop {
        let deliveries = source.receive(limit).await.unwrap();
        if deliveries.is_empty() {
            return letters;
        }
        letters.extend(deliveries.iter().map(|d| Message::clone(&d.message)));
    }
}

async fn poison_is_set_aside(mode: &str) {
    // Long enough for 10 MB in a build that is not optimized.
    let folder = Folder::with_lease(30);
    // All in one group: if poison held its group up, the transfers behind it would never be applied.
    let mut messages = vec![transfer(0)];
    for (n, (message, _)) in poison().into_iter().enumerate() {
        messages.extend([message, transfer(n as u64 + 1)]);
    }
    messages.extend(unusual());
    let good = 1 + poison().len() as u64 + 2;
    messages.extend(unusual());
    let messages: Vec<_> = messages.into_iter().map(|m| m.with_group("one")).collect();
    folder.publish(&messages).await;
    let arguments = ["--mode", mode, "--drain-when-empty", "1"];
    let report = folder.worker(&arguments).report();
    folder.assert_each_once(good);
    assert_eq!(report.count("applied"), good, "{report:?}");
    assert_eq!(report.count("duplicates"), 2, "{report:?}");
    assert_eq!(report.count("payload_mismatches"), 1, "{report:?}");
    assert_eq!(
        report.count("retried"),
        0,
        "poison is not tried again: {report:?}"
    );
    assert_eq!(
        report.count("dead_lettered"),
        poison().len() as u64,
        "{report:?}"
    );

    let letters: HashMap<_, _> = dead_letters(&folder)
        .await
        .into_iter()
        .map(|letter| ((letter.dedup_id.clone(), letter.body.clone()), letter))
        .collect();
    assert_eq!(letters.len(), poison().len());
    for (message, reason) in poison() {
        let letter = &letters[&(message.dedup_id.clone(), message.body.clone())];
        let said = letter
            .attributes
            .get(DEAD_LETTER_REASON)
            .unwrap_or_default();
        assert!(said.contains(reason), "{}: {said}", message.label());
    }
}

#[tokio::test]
async fn poison_is_set_aside_in_transactional_mode() {
    poison_is_set_aside("transactional").await;
}

#[tokio::test]
async fn poison_is_set_aside_in_idempotent_mode() {
    poison_is_set_aside("idempotent").await;
}
