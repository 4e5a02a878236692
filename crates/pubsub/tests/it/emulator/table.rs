//! The deviations that concern the adapter. What an answer says of an ack id stands behind the message's name.

use super::*;

deviations! {
    ack_after_the_deadline {
        service: "A PERMANENT_FAILURE_INVALID_ACK_ID",
        source: "https://cloud.google.com/pubsub/docs/exactly-once-delivery",
        emulator: "accepted",
        covered_by: "settling::an_ack_that_the_service_finds_too_late_is_a_lost_lease",
    }
    extension_after_the_deadline {
        service: "A PERMANENT_FAILURE_INVALID_ACK_ID",
        source: "https://cloud.google.com/pubsub/docs/exactly-once-delivery",
        emulator: "accepted, and leased again",
        covered_by: "settling::an_extension_has_an_answer_for_each_id",
    }
    give_back_after_the_deadline {
        service: "A PERMANENT_FAILURE_INVALID_ACK_ID",
        source: "https://cloud.google.com/pubsub/docs/exactly-once-delivery",
        emulator: "accepted",
        covered_by: "settling::a_give_back_has_an_answer_for_each_id",
    }
    acks_beside_a_made_up_id {
        service: "made up PERMANENT_FAILURE_INVALID_ACK_ID; then comes nothing",
        source: "https://cloud.google.com/pubsub/docs/exactly-once-delivery",
        emulator: "InvalidArgument; then comes A, B",
        covered_by: "settling::each_ack_has_its_own_answer",
    }
    give_backs_beside_a_made_up_id {
        service: "made up PERMANENT_FAILURE_INVALID_ACK_ID; then comes A, B",
        source: "https://cloud.google.com/pubsub/docs/exactly-once-delivery",
        emulator: "InvalidArgument; then comes nothing",
        covered_by: "settling::a_give_back_has_an_answer_for_each_id",
    }
    ack_of_a_made_up_id_on_ordering_keys {
        service: "InvalidArgument",
        source: "https://cloud.google.com/pubsub/docs/reference/error-codes",
        emulator: "accepted",
        covered_by: "settling::what_is_refused_as_a_whole_is_not_tried_again",
    }
    acks_of_700_kb {
        service: "InvalidArgument",
        source: "https://cloud.google.com/pubsub/quotas#resource_limits",
        emulator: "accepted",
        covered_by: "settling::a_request_takes_a_thousand_ids_and_half_a_megabyte",
    }
    acks_out_of_order_in_one_request {
        service: "accepted",
        source: "https://github.com/googleapis/google-cloud-rust/issues/3970",
        emulator: "A1 TRANSIENT_FAILURE_UNORDERED_ACK_ID, A0 TRANSIENT_FAILURE_UNORDERED_ACK_ID",
        covered_by: "settling::acks_of_a_key_go_in_the_order_of_delivery",
    }
    acks_behind_a_head_given_back {
        service: "accepted; then comes A0, A1, A2",
        source: "https://cloud.google.com/pubsub/docs/ordering",
        emulator: "accepted; then comes A0",
        covered_by: "settling::a_failed_head_goes_back_with_all_that_follows_it",
    }
    give_back_behind_the_head {
        service: "A1, A2",
        source: "https://cloud.google.com/pubsub/docs/ordering",
        emulator: "A1",
        covered_by: "settling::a_failed_head_goes_back_with_all_that_follows_it",
    }
    give_backs_last_first {
        service: "A0, A1, A2",
        source: "https://cloud.google.com/pubsub/docs/ordering",
        emulator: "A2, A1, A0",
        covered_by: "settling::what_is_given_back_together_goes_in_one_request_in_order",
    }
    head_given_back_with_a_retry_policy {
        service: "A0, A1, A2",
        source: "https://cloud.google.com/pubsub/docs/ordering",
        emulator: "A1, A2, A0",
        covered_by: "settling::a_failed_head_goes_back_with_all_that_follows_it",
    }
    lease_of_601_seconds {
        service: "InvalidArgument",
        source: "https://cloud.google.com/pubsub/docs/reference/rpc/google.pubsub.v1#modifyackdeadlinerequest",
        emulator: "accepted",
        covered_by: "settling::a_delay_is_a_deadline_in_whole_seconds",
    }
    deadline_of_9_seconds {
        service: "InvalidArgument",
        source: "https://cloud.google.com/pubsub/docs/reference/rpc/google.pubsub.v1#subscription",
        emulator: "accepted",
        covered_by: "receiving::leases_count_from_before_the_pull",
    }
    dead_letters_on_ordering_keys {
        service: "accepted; dead letters: A",
        source: "https://cloud.google.com/pubsub/docs/dead-letter-topics",
        emulator: "Unknown; dead letters: nothing",
        covered_by: "sending::a_dead_letter_is_acked_when_its_topic_has_it",
    }
    attempts_with_a_retry_policy {
        service: "0",
        source: "https://cloud.google.com/pubsub/docs/reference/rpc/google.pubsub.v1#receivedmessage",
        emulator: "1",
        covered_by: "receiving::attempts_are_told_where_the_service_counts_them",
    }
    pull_of_a_push_subscription {
        service: "FailedPrecondition",
        source: "https://cloud.google.com/pubsub/docs/reference/error-codes",
        emulator: "accepted",
        covered_by: "inspecting::what_cannot_be_pulled_from_is_refused_with_what_to_change",
    }
    pull_of_an_export_subscription {
        service: "FailedPrecondition",
        source: "https://cloud.google.com/pubsub/docs/reference/error-codes",
        emulator: "accepted",
        covered_by: "inspecting::what_cannot_be_pulled_from_is_refused_with_what_to_change",
    }
    detaching {
        service: "accepted",
        source: "https://cloud.google.com/pubsub/docs/detach-subscriptions",
        emulator: "Unimplemented",
        covered_by: "inspecting::what_cannot_be_pulled_from_is_refused_with_what_to_change",
    }
    seek_on_ordering_keys {
        service: "accepted; then comes A0, A1",
        source: "https://cloud.google.com/pubsub/docs/replay-overview",
        emulator: "Unimplemented; then comes nothing",
        covered_by: "inspecting::records_have_to_cover_a_seek_to_the_past",
    }
    attribute_key_of_257_bytes {
        service: "InvalidArgument",
        source: "https://cloud.google.com/pubsub/quotas#resource_limits",
        emulator: "accepted",
        covered_by: "message::tests::limits_are_told_before_anything_is_sent",
    }
    attribute_value_of_1025_bytes {
        service: "InvalidArgument",
        source: "https://cloud.google.com/pubsub/quotas#resource_limits",
        emulator: "accepted",
        covered_by: "message::tests::limits_are_told_before_anything_is_sent",
    }
    attribute_of_google {
        service: "InvalidArgument",
        source: "https://cloud.google.com/pubsub/docs/publisher#using-attributes",
        emulator: "accepted",
        covered_by: "message::tests::attributes_that_no_publisher_may_set_are_carried",
    }
    a_hundred_and_one_attributes {
        service: "InvalidArgument",
        source: "https://cloud.google.com/pubsub/quotas#resource_limits",
        emulator: "accepted",
        covered_by: "message::tests::limits_are_told_before_anything_is_sent",
    }
    ordering_key_of_1025_bytes {
        service: "InvalidArgument",
        source: "https://cloud.google.com/pubsub/quotas#resource_limits",
        emulator: "accepted",
        covered_by: "message::tests::limits_are_told_before_anything_is_sent",
    }
    message_beyond_10_mb {
        service: "InvalidArgument",
        source: "https://cloud.google.com/pubsub/quotas#resource_limits",
        emulator: "accepted",
        covered_by: "message::tests::limits_are_told_before_anything_is_sent",
    }
    two_ordering_keys_in_one_request {
        service: "InvalidArgument",
        source: "https://cloud.google.com/pubsub/docs/reference/rpc/google.pubsub.v1#pubsubmessage",
        emulator: "accepted",
        covered_by: "sending::a_request_has_one_key",
    }
    give_back_before_what_was_not_delivered {
        service: "A0, A1, A2",
        source: "https://cloud.google.com/pubsub/docs/ordering",
        emulator: "A2, A0, A1",
        covered_by: "settling::a_failed_head_goes_back_with_all_that_follows_it",
    }
    ack_without_a_key_out_of_order {
        service: "accepted",
        source: "https://cloud.google.com/pubsub/docs/ordering",
        emulator: "B TRANSIENT_FAILURE_UNORDERED_ACK_ID",
        covered_by: "settling::each_ack_has_its_own_answer",
    }
}
