/// Registers every check of [`source`](crate::source) as a test of its own, in a module `source`.
///
/// The last argument makes a fresh harness, with a fresh queue; it is evaluated in each test and may `.await`.
/// Before it, either nothing, or `ignore = "why"`, or all attributes that each test shall have:
///
/// ```text
/// source_suite!(MyHarness::new().await);
/// source_suite!(ignore = "needs a broker: ./tests/run mine", MyHarness::new().await);
/// source_suite!(#[tokio::test(start_paused = true)] MyHarness::default());
/// ```
///
/// For two suites in one file, put each into a module that begins with `use super::*;`.
#[macro_export]
macro_rules! source_suite {
    ($($args:tt)+) => { $crate::__suite! { __source_checks source $($args)+ } };
}

/// Registers every check of [`store`](crate::store) as a test of its own, in a module `store`.
/// The arguments are those of [`source_suite!`].
#[macro_export]
macro_rules! store_suite {
    ($($args:tt)+) => { $crate::__suite! { __store_checks store $($args)+ } };
}

/// Registers every check of [`transactional_store`](crate::transactional_store) as a test of its own, in a module
/// `transactional_store`. The arguments are those of [`source_suite!`].
#[macro_export]
macro_rules! transactional_store_suite {
    ($($args:tt)+) => {
        $crate::__suite! { __transactional_store_checks transactional_store $($args)+ }
    };
}

/// Registers every check of [`outbox`](crate::outbox) as a test of its own, in a module `outbox`. The arguments are those of
/// [`source_suite!`].
#[macro_export]
macro_rules! outbox_suite {
    ($($args:tt)+) => { $crate::__suite! { __outbox_checks outbox $($args)+ } };
}

/// Gives every suite the same arguments.
#[doc(hidden)]
#[macro_export]
macro_rules! __suite {
    ($checks:ident $suite:ident ignore = $why:literal, $harness:expr $(,)?) => {
        $crate::$checks! { tests $suite { #[tokio::test] #[ignore = $why] } ($harness) }
    };
    ($checks:ident $suite:ident $(#[$attribute:meta])+ $harness:expr $(,)?) => {
        $crate::$checks! { tests $suite { $(#[$attribute])+ } ($harness) }
    };
    ($checks:ident $suite:ident $harness:expr $(,)?) => {
        $crate::$checks! { tests $suite { #[tokio::test] } ($harness) }
    };
}

/// What is made of a list of checks: their names, or their tests.
#[doc(hidden)]
#[macro_export]
macro_rules! __checks {
    (names $($check:ident)+) => { &[$(stringify!($check)),+] };
    (tests $suite:ident $attributes:tt $harness:tt $($check:ident)+) => {
        mod $suite {
            #[allow(unused_imports)]
            use super::*;
            $($crate::__check! { $suite $attributes $harness $check })+
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __check {
    ($suite:ident { $(#[$attribute:meta])+ } ($harness:expr) $check:ident) => {
        $(#[$attribute])+
        async fn $check() {
            let harness = $harness;
            let check = $crate::$suite::$check(&harness);
            $crate::$suite::run(&harness, stringify!($check), check).await;
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __source_checks {
    ($($then:tt)+) => {
        $crate::__checks! { $($then)+
            message_survives_the_queue
            empty_body_survives_the_queue
            large_body_survives_the_queue
            empty_receive_returns_after_its_wait
            receive_wakes_when_a_message_comes
            receive_respects_its_limit
            empty_batches_are_harmless
            ack_removes
            nack_redelivers
            delayed_nack_waits
            second_ack_is_harmless
            bad_receipt_affects_only_itself
            acks_settle_nothing_but_themselves
            dead_letter_keeps_its_reason
            broker_id_is_given_once
            identity_is_told_and_stays
            namesake_is_another_queue
            queue_info_tells_the_lease
            expired_lease_redelivers
            extend_keeps_the_lease
            late_settlement_disturbs_nobody
            groups_are_delivered_in_order
            group_waits_while_its_head_is_leased
            failed_head_comes_back_first
            blocked_group_stalls_no_other
            close_gives_back
            dropped_receive_loses_nothing
            concurrent_receivers_share
            broken_connection_gives_back
            refused_message_affects_only_itself
            failed_message_stops_its_group
            random_histories_lose_nothing
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __store_checks {
    ($($then:tt)+) => {
        $crate::__checks! { $($then)+
            completed_key_is_a_duplicate
            live_claim_is_in_progress_for_others
            same_owner_claims_again_with_a_higher_token
            expired_claim_is_taken_over
            stale_token_is_fenced
            takeovers_are_counted
            token_is_fenced_once_it_is_spent
            expired_claim_that_nobody_took_completes
            renewed_claim_outlives_its_first_lease
            released_key_is_new
            in_doubt_only_after_a_start
            doubt_outlives_takeovers
            starts_are_counted
            other_payload_is_a_mismatch
            corrected_payload_takes_over_what_never_started
            second_claim_in_a_batch_is_in_progress
            answers_follow_the_batch
            large_batches_are_taken_whole
            opposite_orders_do_not_block_each_other
            empty_batches_are_harmless
            one_live_owner_per_key
            prune_removes_only_what_has_expired
            record_survives_a_crash
            tokens_rise_across_a_crash
            outcome_of_64_kib_is_replayed
            random_histories_agree_with_the_model
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __transactional_store_checks {
    ($($then:tt)+) => {
        $crate::__checks! { $($then)+
            effect_and_record_commit_together
            effect_and_record_survive_a_crash
            rollback_takes_back_only_its_savepoint
            unfinished_savepoint_is_not_committed
            dropped_transaction_leaves_nothing
            stale_token_is_fenced
            last_savepoint_completes_with_the_commit
            savepoint_completes_once
            savepoint_of_several_messages_is_recorded_whole
            expired_claim_that_nobody_took_completes
            takeover_and_commit_exclude_each_other
            refused_commit_leaves_nothing
            refused_commit_spares_the_others
            racing_owners_take_effect_once
            look_up_tells_what_is_there
            looked_up_message_takes_effect_once
            record_of_a_look_up_fences_claims
            record_of_a_claim_fences_look_ups
            look_up_counts_for_no_longer_than_a_record
            racing_look_ups_take_effect_once
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __outbox_checks {
    ($($then:tt)+) => {
        $crate::__checks! { $($then)+
            committed_messages_are_fetched_in_order
            rolled_back_message_never_leaves
            rolled_back_savepoint_takes_its_messages_along
            message_leaves_with_the_last_savepoint
            late_commit_is_not_skipped
            message_survives_the_outbox
            message_survives_a_crash
            wait_ends_with_a_commit
            wait_ends_by_itself
            ids_are_stable_across_fetches
            fetch_respects_its_limits
            destinations_are_apart
            blocked_messages_hide_nothing
            message_without_a_group_waits_for_nobody
            empty_outbox_is_harmless
            sent_message_is_removed
            failed_message_delays_its_group_alone
            set_aside_message_is_kept_with_its_reason
            requeued_message_has_its_place_again
            second_relay_waits_for_the_end_of_the_lease
            fetch_renews_the_lease
            released_destination_is_free
            relay_that_was_taken_over_settles_only_what_it_sent
            expired_lease_that_nobody_took_settles
            random_histories_agree_with_the_model
        }
    };
}
