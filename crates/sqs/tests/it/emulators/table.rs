//! The deviations that concern the adapter. Codes are written without what the old protocol puts before them and JSON
//! behind.

use super::*;

deviations! {
    delete_after_expiry {
        aws: "InvalidParameterValue",
        source: "https://github.com/aws/aws-sdk-js/issues/1750",
        ministack: "accepted",
        localstack: "InvalidParameterValue",
        covered_by: "settling::nothing_is_sent_once_the_lease_has_ended",
    }
    batch_delete_after_expiry {
        aws: "ReceiptHandleIsInvalid, by the sender's fault",
        source: "https://github.com/smaskalik/sqsmover/issues/54",
        ministack: "accepted",
        localstack: "InvalidParameterValue",
        covered_by: "settling::an_entry_that_fails_concerns_no_other",
    }
    extension_after_expiry {
        aws: "MessageNotInflight",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ChangeMessageVisibility.html",
        ministack: "accepted, and leased again",
        localstack: "accepted, without effect",
        covered_by: "settling::nothing_is_sent_once_the_lease_has_ended",
    }
    batch_extension_after_expiry {
        aws: "MessageNotInflight, by the sender's fault",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ChangeMessageVisibility.html",
        ministack: "accepted, and leased again",
        localstack: "accepted, without effect",
        covered_by: "settling::an_extension_moves_the_deadline",
    }
    stale_delete_after_redelivery {
        aws: "InvalidParameterValue",
        source: "https://github.com/bbc/sqs-consumer/issues/83",
        ministack: "ReceiptHandleIsInvalid",
        localstack: "accepted",
        covered_by: "settling::nothing_is_sent_once_the_lease_has_ended",
    }
    stale_batch_delete_after_redelivery {
        aws: "ReceiptHandleIsInvalid, by the sender's fault",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_DeleteMessage.html",
        ministack: "ReceiptHandleIsInvalid, by the sender's fault",
        localstack: "accepted",
        covered_by: "settling::an_entry_that_fails_concerns_no_other",
    }
    stale_give_back_after_redelivery {
        aws: "ReceiptHandleIsInvalid",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ChangeMessageVisibility.html",
        ministack: "ReceiptHandleIsInvalid",
        localstack: "accepted, and the other's lease ended",
        covered_by: "settling::nothing_is_sent_once_the_lease_has_ended",
    }
    stale_batch_give_back_after_redelivery {
        aws: "ReceiptHandleIsInvalid, by the sender's fault",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ChangeMessageVisibility.html",
        ministack: "ReceiptHandleIsInvalid, by the sender's fault",
        localstack: "accepted, and the other's lease ended",
        covered_by: "settling::an_entry_that_fails_concerns_no_other",
    }
    second_delete {
        aws: "accepted",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_DeleteMessage.html",
        ministack: "ReceiptHandleIsInvalid",
        localstack: "accepted",
        covered_by: "errors::what_fails_as_a_whole_is_unknown_for_each_and_can_be_tried_again",
    }
    visibility_change_after_delete {
        aws: "InvalidParameterValue",
        source: "https://github.com/localstack/localstack/blob/v4.13.1/tests/aws/services/sqs/test_sqs.py",
        ministack: "ReceiptHandleIsInvalid",
        localstack: "InvalidParameterValue",
        covered_by: "settling::an_entry_that_fails_concerns_no_other",
    }
    attempt_repeated {
        aws: "the same messages by the same handles",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ReceiveMessage.html",
        ministack: "nothing",
        localstack: "nothing",
        covered_by: "receiving::a_lost_answer_is_asked_for_again_by_its_id",
    }
    tail_given_back_alone {
        aws: "nothing",
        source: "https://github.com/localstack/localstack/pull/13386",
        ministack: "nothing",
        localstack: "A1, A2",
        covered_by: "settling::a_fifo_queue_gets_its_messages_back_last_first",
    }
    head_given_back_alone {
        aws: "A0",
        source: "https://github.com/localstack/localstack/pull/13386",
        ministack: "nothing",
        localstack: "A0, A2",
        covered_by: "settling::a_fifo_queue_gets_its_messages_back_last_first",
    }
    expiry_beside_another_groups_lease {
        aws: "B",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/FIFO-queues-understanding-logic.html",
        ministack: "B",
        localstack: "nothing",
        covered_by: "settling::an_extension_moves_the_deadline",
    }
    groups_of_one_receive {
        aws: "A0, A1",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/FIFO-queues-understanding-logic.html",
        ministack: "A0, B0",
        localstack: "A0, A1",
        covered_by: "receiving::a_receive_asks_for_no_more_than_its_limit",
    }
    wait_of_21_seconds {
        aws: "InvalidParameterValue",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ReceiveMessage.html",
        ministack: "accepted",
        localstack: "InvalidParameterValue",
        covered_by: "receiving::a_poll_waits_as_long_as_it_may",
    }
    lease_beyond_12_hours {
        aws: "InvalidParameterValue",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-visibility-timeout.html",
        ministack: "accepted",
        localstack: "accepted",
        covered_by: "settling::a_lease_ends_12_hours_after_the_receive",
    }
    wrong_signature {
        aws: "InvalidSignature",
        source: "https://github.com/async-aws/aws/issues/1948",
        ministack: "accepted",
        localstack: "accepted",
        covered_by: "errors::a_wrong_signature_shows_no_secret",
    }
    sender_fault_of_a_refused_entry {
        aws: "InvalidMessageContents, by the sender's fault",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_BatchResultErrorEntry.html",
        ministack: "InvalidMessageContents, by the sender's fault",
        localstack: "InvalidMessageContents",
        covered_by: "sending::an_entry_that_fails_concerns_no_other",
    }
    eleven_attributes {
        aws: "InvalidParameterValue",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html",
        ministack: "accepted",
        localstack: "accepted",
        covered_by: "sending::what_sqs_cannot_take_is_not_sent",
    }
    empty_attribute {
        aws: "InvalidParameterValue",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_MessageAttributeValue.html",
        ministack: "accepted",
        localstack: "InvalidParameterValue",
        covered_by: "sending::what_sqs_cannot_take_is_not_sent",
    }
    control_character_in_an_attribute {
        aws: "InvalidParameterValue",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_MessageAttributeValue.html",
        ministack: "accepted",
        localstack: "InvalidParameterValue",
        covered_by: "sending::what_sqs_cannot_take_is_not_sent",
    }
    attribute_name_with_a_blank {
        aws: "InvalidParameterValue",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-message-metadata.html",
        ministack: "accepted",
        localstack: "InvalidParameterValue",
        covered_by: "sending::what_sqs_cannot_take_is_not_sent",
    }
    attributes_beyond_1_mib {
        aws: "InvalidParameterValue",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html",
        ministack: "accepted",
        localstack: "InvalidParameterValue",
        covered_by: "sending::what_sqs_cannot_take_is_not_sent",
    }
    group_of_129_characters {
        aws: "InvalidParameterValue",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html",
        ministack: "accepted",
        localstack: "InvalidParameterValue",
        covered_by: "message::tests::every_id_and_group_survives",
    }
    dedup_id_on_a_standard_queue {
        aws: "InvalidParameterValue",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html",
        ministack: "accepted",
        localstack: "InvalidParameterValue",
        covered_by: "sending::an_entry_says_all_that_the_message_says",
    }
    trace_of_a_batch_entry {
        aws: "delivered",
        source: "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessageBatchRequestEntry.html",
        ministack: "dropped",
        localstack: "delivered",
        covered_by: "sending::an_entry_says_all_that_the_message_says",
    }
}
