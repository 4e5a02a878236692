//! Against a live broker: `./tests/run rabbitmq`.

mod common;

use common::*;
use onlyonce_core::Source as _;

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn what_is_published_is_delivered_and_acked() {
    for kind in [Kind::Classic, Kind::Quorum] {
        let queue = Queue::declare("roundtrip", kind, &[]).await;
        queue.fill(100).await;
        let source = queue.source("");
        let deliveries = receive(&source, 100).await;
        assert_eq!(bodies(&deliveries), numbers(0..100));
        ack(&source, &deliveries).await;
        source.close().await.unwrap();
        queue.assert_left(0).await;
    }
}
