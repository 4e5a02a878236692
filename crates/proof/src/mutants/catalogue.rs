//! The planted bugs: each a place in the code and what stands there instead.
//!
//! All are planted into one copy of the code, behind a switch that exists in that copy alone.

/// A bug as somebody might have written it; several have been, by others or by us.
pub struct Mutant {
    pub name: &'static str,
    /// What the bug is, for the table.
    pub bug: &'static str,
    pub file: &'static str,
    /// Found exactly once in the file.
    pub find: &'static str,
    /// `PLANTED` stands for the switch.
    pub replace: &'static str,
}

const STORE: &str = "crates/core/src/memory/store.rs";
const TX: &str = "crates/core/src/memory/tx.rs";
const OUTBOX: &str = "crates/core/src/memory/outbox.rs";
const DESTINATION: &str = "crates/core/src/relay/destination.rs";
const ROUND: &str = "crates/core/src/relay/round.rs";
const BATCH: &str = "crates/core/src/pipeline/batch.rs";
const CLAIM: &str = "crates/core/src/pipeline/claim.rs";
const COMPLETE: &str = "crates/core/src/pipeline/complete.rs";
const DEAD_LETTER: &str = "crates/core/src/pipeline/dead_letter.rs";
const DOUBT: &str = "crates/core/src/pipeline/doubt.rs";
const ENGINE: &str = "crates/core/src/pipeline/engine.rs";
const INTAKE: &str = "crates/core/src/pipeline/intake.rs";
const INVOKE: &str = "crates/core/src/pipeline/invoke.rs";
const LEASE_RENEWER: &str = "crates/core/src/pipeline/lease_renewer.rs";
const LANES: &str = "crates/core/src/pipeline/lanes.rs";
const STARTS: &str = "crates/core/src/driver/store.rs";
const SETTLE: &str = "crates/core/src/pipeline/settle.rs";
const SUSPECTS: &str = "crates/core/src/pipeline/suspects.rs";
const TRANSACTION: &str = "crates/core/src/pipeline/transaction.rs";
const LEASE_STATE: &str = "crates/core/src/pipeline/lease_state.rs";
const TRANSITIONS: &str = "crates/core/src/pipeline/transitions.rs";
const WORKER: &str = "crates/core/src/pipeline/worker.rs";
const CONSUMER: &str = "crates/testkit/src/simulated/source.rs";

pub const MUTANTS: &[Mutant] = &[
    // The store's fences.
    Mutant {
        name: "renew-without-token",
        bug: "a claim is renewed by whoever held the key once",
        file: STORE,
        find: "records.held(held).map(|(until, _)| *until = end)",
        replace: "let newest = records.newest(held, PLANTED);\n            records.held(&newest).map(|(until, _)| *until = end)",
    },
    Mutant {
        name: "complete-without-token",
        bug: "a stale worker's completion counts",
        file: STORE,
        find: "Ok(self.each(batch, Records::complete))",
        replace: "Ok(self.each(batch, |records, one| {\n            let mut one = one.clone();\n            one.precondition = records.newest_of(one.precondition, PLANTED);\n            records.complete(&one)\n        }))",
    },
    Mutant {
        name: "release-without-token",
        bug: "a stale worker frees its successor's claim",
        file: STORE,
        find: "            records.held(held)?;\n            records.by_key.remove",
        replace: "            let newest = records.newest(held, PLANTED);\n            records.held(&newest)?;\n            records.by_key.remove",
    },
    Mutant {
        name: "commit-without-token",
        bug: "a transaction commits although the key was taken over",
        file: TX,
        find: "    async fn commit(self) -> Result<(), Error> {\n        let mut records = self.store.lock();\n",
        replace: "    async fn commit(mut self) -> Result<(), Error> {\n        let store = self.store.clone();\n        let mut records = store.lock();\n        for completion in self.savepoints.iter_mut().flat_map(|savepoint| &mut savepoint.completions) {\n            completion.precondition = records.newest_of(completion.precondition, PLANTED);\n        }\n",
    },
    Mutant {
        name: "claim-without-owner",
        bug: "a live claim of somebody else is taken over",
        file: STORE,
        find: "} if *until > now && (*holder != owner || *token >= first) => {",
        replace: "} if *until > now && !PLANTED && (*holder != owner || *token >= first) => {",
    },
    Mutant {
        name: "token-reused",
        bug: "a takeover gets the token of its predecessor",
        file: STORE,
        find: "        self.last_token += 1;\n",
        replace: "        let taken_over = self.by_key.contains_key(&claim.key);\n        self.last_token += u64::from(!(taken_over && PLANTED));\n",
    },
    Mutant {
        name: "prune-live-claims",
        bug: "pruning removes claims too",
        file: STORE,
        find: "        let mut records = self.lock();\n        let now = Instant::now();\n        let mut removed = 0;",
        replace: "        let mut records = self.lock();\n        if PLANTED {\n            records.by_key.retain(|_, record| matches!(record.state, State::Done { .. }));\n        }\n        let now = Instant::now();\n        let mut removed = 0;",
    },
    Mutant {
        name: "fingerprint-ignored",
        bug: "another payload under a used key is dropped as a duplicate",
        file: STORE,
        find: "if record.fingerprint != claim.fingerprint && record.is_binding(now) {",
        replace: "if record.fingerprint != claim.fingerprint && record.is_binding(now) && !PLANTED {",
    },
    Mutant {
        name: "no-savepoint-rollback",
        bug: "what a failed handler wrote is committed with the others' effects",
        file: TRANSACTION,
        find: "        tx.rollback().await.map_err(Broken)\n",
        replace: "        if PLANTED {\n            return Ok(());\n        }\n        tx.rollback().await.map_err(Broken)\n",
    },
    Mutant {
        name: "record-is-replaced",
        bug: "what was looked up is recorded once more, although somebody was first",
        file: STORE,
        find: "match self.by_key.get(&looked_up.key).is_some_and(is_done) || self.clock() >= ends {",
        replace: "match !PLANTED && self.by_key.get(&looked_up.key).is_some_and(is_done) || self.clock() >= ends {",
    },
    // Claims and records.
    Mutant {
        name: "busy-is-a-duplicate",
        bug: "a message in progress elsewhere is acked",
        file: CLAIM,
        find: "            ClaimResult::Completed { outcome } => self.took_effect(in_flight, outcome),",
        replace: "            ClaimResult::InProgress { .. } if PLANTED => self.took_effect(in_flight, None),\n            ClaimResult::Completed { outcome } => self.took_effect(in_flight, outcome),",
    },
    Mutant {
        name: "claim-answers-shifted",
        bug: "one result of a batch is dropped, the rest meet the wrong messages",
        file: CLAIM,
        find: "        let mut claimed = answers.claimed.into_iter();",
        replace: "        let dropped = usize::from(answers.claimed.len() > 1 && PLANTED);\n        let mut claimed = answers.claimed.into_iter().skip(dropped);",
    },
    Mutant {
        name: "recorded-before-handler",
        bug: "a key is marked done before its handler runs, and stays so when that fails",
        file: WORKER,
        find: "        let ended = self.call(from_ref(&in_flight), None, working).await;\n",
        replace: "        if let (Some(store), Some(done), true) = (&self.store, self.completion(&in_flight, Outcome::default()), PLANTED) {\n            let _ = store.complete(&[done]).await;\n        }\n        let ended = self.call(from_ref(&in_flight), None, working).await;\n",
    },
    Mutant {
        name: "completion-error-is-success",
        bug: "an error of the commit is logged, and the message acked",
        file: TRANSACTION,
        find: "            Err(error) => return self.broken(run, error),\n        };\n",
        replace: "            Err(_) if PLANTED => Ok(()),\n            Err(error) => return self.broken(run, error),\n        };\n",
    },
    Mutant {
        name: "refusal-is-doubt",
        bug: "a commit that the store refuses is tried again as if its answer had been lost",
        file: TRANSACTION,
        find: "            ErrorKind::Refused if run.alone => {",
        replace: "            ErrorKind::Refused if PLANTED => self.not_committed(run, &error),\n            ErrorKind::Refused if run.alone => {",
    },
    Mutant {
        name: "refusal-blamed-on-the-head",
        bug: "the first message of a refused transaction counts as failed, whoever is the cause",
        file: TRANSACTION,
        find: "            ErrorKind::Refused => self.separate(run, &error),",
        replace: "            ErrorKind::Refused if PLANTED => {\n                let heads = run.heads(|_| {}).into_iter();\n                heads.for_each(|one| self.failed(one, &Failure::retry(error.clone())));\n            }\n            ErrorKind::Refused => self.separate(run, &error),",
    },
    Mutant {
        name: "completion-result-dropped",
        bug: "the last result of a batch of completions is dropped, and with it its message",
        file: COMPLETE,
        find: "            Ok(verdicts) => messages\n                .into_iter()",
        replace: "            Ok(verdicts) => messages\n                .into_iter()\n                .skip(usize::from(completions.len() > 1 && PLANTED))",
    },
    Mutant {
        name: "fenced-is-settled",
        bug: "a fenced completion is acked as if it had counted",
        file: TRANSITIONS,
        find: "            Err(Fenced) => self.fenced(in_flight),",
        replace: "            Err(Fenced) if PLANTED => self.applied(in_flight),\n            Err(Fenced) => self.fenced(in_flight),",
    },
    Mutant {
        name: "fenced-is-dropped",
        bug: "a fenced message is left to a redelivery that a living connection never brings",
        file: TRANSITIONS,
        find: "            Err(Fenced) => self.fenced(in_flight),\n        }",
        replace: "            Err(Fenced) if PLANTED => {}\n            Err(Fenced) => self.fenced(in_flight),\n        }",
    },
    Mutant {
        name: "short-retention",
        bug: "a record is forgotten while its message can still come again",
        file: ENGINE,
        find: "            self.options.dedup_retention,",
        replace: "            if PLANTED { Duration::from_secs(5) } else { self.options.dedup_retention },",
    },
    Mutant {
        name: "doubt-released",
        bug: "the doubt about a quarantined message is forgotten, a duplicate runs",
        file: DOUBT,
        find: "held.filter(|_| !self.keeps_doubt(in_flight))",
        replace: "held.filter(|_| PLANTED || !self.keeps_doubt(in_flight))",
    },
    // Settlements.
    Mutant {
        name: "ack-before-commit",
        bug: "the broker is told before the effect is durable",
        file: TRANSACTION,
        find: "        let mut all = run.done.iter().chain(&run.last);",
        replace: "        if PLANTED {\n            let all = run.done.iter().chain(&run.last);\n            let ack = |in_flight: &Box<InFlight>| crate::driver::Settlement::new(in_flight.delivery.receipt.clone(), crate::driver::Disposition::Ack);\n            let acks: Vec<_> = all.map(ack).collect();\n            self.source.settle(&acks).await;\n        }\n        let mut all = run.done.iter().chain(&run.last);",
    },
    Mutant {
        name: "partial-failure-ignored",
        bug: "an entry of a batch that failed counts as settled",
        file: SETTLE,
        find: "                SettleResult::Applied => applied += 1,\n",
        replace: "                SettleResult::Unknown(_) if PLANTED => applied += 1,\n                SettleResult::Applied => applied += 1,\n",
    },
    Mutant {
        name: "tail-waits-for-more",
        bug: "what fills no request is settled only when more comes",
        file: SETTLE,
        find: "        if waiting.is_empty() && !take_up",
        replace: "        if (waiting.is_empty() || PLANTED) && !take_up",
    },
    Mutant {
        name: "settled-past-the-lease",
        bug: "a delivery is settled after its lease has ended",
        file: SETTLE,
        find: "batch.extract_if(.., |(in_flight, _)| !in_flight.lease.leased())",
        replace: "batch.extract_if(.., |(in_flight, _)| !PLANTED && !in_flight.lease.leased())",
    },
    Mutant {
        name: "tag-reused-after-reconnect",
        bug: "a delivery tag of a former connection settles another message",
        file: CONSUMER,
        find: "        let out = channel.out.get(&(number, tag)).cloned();",
        replace: "        let number = if PLANTED { channel.epoch } else { number };\n        let out = channel.out.get(&(number, tag)).cloned();",
    },
    Mutant {
        name: "ack-multiple",
        bug: "an ack of the highest tag acks those below it, which are not done",
        file: CONSUMER,
        find: "        let request = self.settling(sent);",
        replace: "        if PLANTED && let Some((highest, _)) = sent.iter().rfind(|(s, _)| s.disposition == Disposition::Ack) {\n            let highest = highest.receipt.clone();\n            let below: Vec<_> = self.channel().out.values().take_while(|out| out.receipt != highest).cloned().collect();\n            sent.extend(below.into_iter().map(|out| (Settlement::new(out.receipt, Disposition::Ack), out.message)));\n        }\n        let request = self.settling(sent);",
    },
    Mutant {
        name: "unacked-is-not-given-back",
        bug: "at_most_once forgets what it has not acked instead of giving it back",
        file: TRANSITIONS,
        find: "        if !in_flight.acked {",
        replace: "        if !in_flight.acked && !(PLANTED && self.mode == Mode::AtMostOnce) {",
    },
    // Leases.
    Mutant {
        name: "renewed-from-the-reply",
        bug: "an extended lease is counted from the answer, not from before the request",
        file: CONSUMER,
        find: "        let answers = merge(answers, replies).into_iter();",
        replace: "        let asked = if PLANTED { Instant::now() } else { asked };\n        let answers = merge(answers, replies).into_iter();",
    },
    Mutant {
        name: "renewed-by-wall-clock",
        bug: "a renewed claim is counted by a wall clock that is three seconds off",
        file: LEASE_RENEWER,
        find: "                state.renewed(*held, verdict.map_or(sent, |()| sent + lease));",
        replace: "                let off = Duration::from_secs(if PLANTED { 3 } else { 0 });\n                state.renewed(*held, verdict.map_or(sent, |()| sent + off + lease));",
    },
    Mutant {
        name: "lease-end-not-watched",
        bug: "a handler goes on after its lease has ended",
        file: LEASE_STATE,
        find: "            if deadline.is_some_and(|d| d <= Instant::now()) {",
        replace: "            if PLANTED {\n                return std::future::pending().await;\n            }\n            if deadline.is_some_and(|d| d <= Instant::now()) {",
    },
    Mutant {
        name: "started-without-lease",
        bug: "what was buffered runs although its lease has run out",
        file: LEASE_STATE,
        find: "        self.can_start_again() && self.claim_lasts(claim_lease / 8)",
        replace: "        PLANTED || (self.can_start_again() && self.claim_lasts(claim_lease / 8))",
    },
    Mutant {
        name: "started-after-notice",
        bug: "what was buffered runs although its lease will soon be taken away",
        file: LEASE_STATE,
        find: "        !is_cancelled(self.lease.revoked.as_ref()) && self.lease_lasts(self.length() / 8)",
        replace: "        (PLANTED || !is_cancelled(self.lease.revoked.as_ref())) && self.lease_lasts(self.length() / 8)",
    },
    Mutant {
        name: "shared-lease-told-to-one",
        bug: "only the first message of a shared lease learns that it was extended",
        file: LEASE_RENEWER,
        find: "            same.iter().for_each(|state| state.extended(until));",
        replace: "            let told = if PLANTED { 1 } else { same.len() };\n            same.iter().take(told).for_each(|state| state.extended(until));",
    },
    Mutant {
        name: "shared-leases-are-one",
        bug: "the extension of one session counts for every other",
        file: LEASE_RENEWER,
        find: "filter(|other| other.lease.shared == Some(number));",
        replace: "filter(|other| other.lease.shared.is_some() && (PLANTED || other.lease.shared == Some(number)));",
    },
    Mutant {
        name: "not-checked-after-start-mark",
        bug: "a handler starts although its lease ended while its start was being noted",
        file: WORKER,
        find: "            Ok(verdicts) if verdicts == [Ok(())] && self.can_start(&in_flight) => {",
        replace: "            Ok(verdicts) if verdicts == [Ok(())] && (PLANTED || self.can_start(&in_flight)) => {",
    },
    Mutant {
        name: "vain-mark-hides-a-doubt",
        bug: "a claim that was marked as started and did not run hides the doubt of another worker's",
        file: CLAIM,
        find: "                vain.retain(|token| in_doubt.is_some_and(|starts| starts.last == *token));",
        replace: "                vain.retain(|token| PLANTED || in_doubt.is_some_and(|starts| starts.last == *token));",
    },
    // Order.
    Mutant {
        name: "retry-leaves-its-lane",
        bug: "a message that is retried is overtaken by the next of its group",
        file: TRANSITIONS,
        find: "        in_flight.retries += 1;\n        self.postpone(in_flight, delay);",
        replace: "        in_flight.retries += 1;\n        if PLANTED {\n            in_flight.lane = None;\n        }\n        self.postpone(in_flight, delay);",
    },
    Mutant {
        name: "rest-stays-behind",
        bug: "a head is given back without those behind it",
        file: TRANSITIONS,
        find: "            .map(LaneLock::rest)",
        replace: "            .filter(|_| !PLANTED)\n            .map(LaneLock::rest)",
    },
    Mutant {
        name: "next-connection-goes-back-too",
        bug: "a head whose connection broke sends back what the next connection brought",
        file: TRANSITIONS,
        find: "            && in_flight.lease.connection_is_lost()",
        replace: "            && !PLANTED\n            && in_flight.lease.connection_is_lost()",
    },
    Mutant {
        name: "last-savepoint-loses-its-place",
        bug: "the last of a shared transaction is tried again behind its successors",
        file: TRANSACTION,
        find: "            one.lane = lane.map(|place| run.lanes.swap_remove(place));",
        replace: "            let lane = lane.filter(|_| !PLANTED);\n            one.lane = lane.map(|place| run.lanes.swap_remove(place));",
    },
    Mutant {
        name: "replay-loses-its-place",
        bug: "a duplicate gives up its place for its key before it is settled, and two wait for each other",
        file: CLAIM,
        find: "            in_flight.next = Next::Replay(Outcome(outcome));",
        replace: "                if PLANTED {\n                    in_flight.key_place = None;\n                }\n            in_flight.next = Next::Replay(Outcome(outcome));",
    },
    Mutant {
        name: "behind-a-busy-lane-dropped",
        bug: "a message whose group is busy is dropped until its lease ends",
        file: LANES,
        find: "                    lane.push_back(in_flight);\n                    continue;",
        replace: "                    if !PLANTED {\n                        lane.push_back(in_flight);\n                    }\n                    continue;",
    },
    // Dead letters, keys, bounds.
    Mutant {
        name: "dead-letter-not-confirmed",
        bug: "a message is acked although the dead-letter queue did not take it",
        file: DEAD_LETTER,
        find: "                    Ok(()) => confirmed.push((in_flight, reason)),",
        replace: "                    _ if PLANTED => confirmed.push((in_flight, reason)),\n                    Ok(()) => confirmed.push((in_flight, reason)),",
    },
    Mutant {
        name: "dead-letter-without-reason",
        bug: "nobody knows why a message was set aside",
        file: DEAD_LETTER,
        find: "            .insert(DEAD_LETTER_REASON, reason.as_str());",
        replace: "            .insert(DEAD_LETTER_REASON, if PLANTED { \"\" } else { reason.as_str() });",
    },
    Mutant {
        name: "random-key",
        bug: "a message without a key gets a fresh one with every delivery",
        file: INTAKE,
        find: "        let choose = || self.options.dedup_key.choose(&delivery.message);",
        replace: "        let random = || PLANTED.then(|| DedupKey::new(fastrand::u64(..).to_string()));\n        let choose = || self.options.dedup_key.choose(&delivery.message).or_else(random);",
    },
    Mutant {
        name: "endless-retries",
        bug: "a message that always fails is never set aside",
        file: TRANSITIONS,
        find: "            _ if attempt >= max => {",
        replace: "            _ if attempt >= max && !PLANTED => {",
    },
    Mutant {
        name: "dead-letter-frees-its-group",
        bug: "the next of a group runs before a dead letter of it is out of the queue",
        file: TRANSITIONS,
        find: "    pub(crate) fn dead_letter(&self, mut in_flight: Box<InFlight>, reason: impl Into<String>) {\n",
        replace: "    pub(crate) fn dead_letter(&self, mut in_flight: Box<InFlight>, reason: impl Into<String>) {\n        if PLANTED {\n            in_flight.lane = None;\n        }\n",
    },
    Mutant {
        name: "held-is-run",
        bug: "a message is given up after deliveries in which it was only held",
        file: SUSPECTS,
        find: "        let alone = in_flight.in_doubt().map_or(0, |starts| starts.count);",
        replace: "        let alone = in_flight.in_doubt().map_or(0, |starts| starts.count);\n        let alone = if PLANTED { RUNS_ALONE } else { alone };",
    },
    Mutant {
        name: "one-run-alone-is-enough",
        bug: "a message is given up when its worker is killed once while it runs alone",
        file: SUSPECTS,
        find: "alone >= RUNS_ALONE;",
        replace: "alone >= if PLANTED { 1 } else { RUNS_ALONE };",
    },
    Mutant {
        name: "runs-alone-not-counted",
        bug: "a message that kills its workers is never given up",
        file: STARTS,
        find: "before.map_or(0, |starts| starts.count)",
        replace: "before.filter(|_| !PLANTED).map_or(0, |starts| starts.count)",
    },
    Mutant {
        name: "redrive-decides-for-good",
        bug: "a message that was put back once is never quarantined again",
        file: DOUBT,
        find: "reason.is_some_and(|reason| reason.ends_with(&mark(starts)))",
        replace: "reason.is_some_and(|reason| PLANTED || reason.ends_with(&mark(starts)))",
    },
    Mutant {
        name: "prefetch-unbounded",
        bug: "more is received than there is room for",
        file: INTAKE,
        find: "            room.messages.max(1),",
        replace: "            if PLANTED { usize::MAX } else { room.messages.max(1) },",
    },
    Mutant {
        name: "dead-letter-is-repeated",
        bug: "a dead letter whose ack was lost leaves another when it comes again",
        file: DEAD_LETTER,
        find: "            if self.is_set_aside(&in_flight) {",
        replace: "            if self.is_set_aside(&in_flight) && !PLANTED {",
    },
    Mutant {
        name: "set-aside-before-confirmed",
        bug: "a message is taken for set aside before its dead letter is confirmed",
        file: DEAD_LETTER,
        find: "let results = sink.publish(&letters).await;",
        replace: "if PLANTED {\n                for id in batch.iter().filter_map(|(dead, _)| dead.broker_id()) {\n                    self.set_aside.insert(id, ());\n                }\n            }\n            let results = sink.publish(&letters).await;",
    },
    // Batches.
    Mutant {
        name: "batch-fails-as-a-whole",
        bug: "a batch that fails is not halved: every message of it has failed",
        file: WORKER,
        find: "                Ended::Failed(_) if part.len() > 1 =>",
        replace: "                Ended::Failed(_) if part.len() > 1 && !PLANTED =>",
    },
    Mutant {
        name: "batch-loses-a-half",
        bug: "of a batch that is halved, one half is never run",
        file: TRANSACTION,
        find: "            Ended::Failed(_) if part.len() > 1 => run.parts.extend(halves(part)),",
        replace: "            Ended::Failed(_) if part.len() > 1 => run.parts.extend(halves(part).into_iter().skip(usize::from(PLANTED))),",
    },
    Mutant {
        name: "failed-in-batch-is-done",
        bug: "a message that the handler of a batch fails is acked with the others",
        file: TRANSACTION,
        find: "                Err(failure) => run.failed(one, failure),\n",
        replace: "                Err(_) if PLANTED => run.last.push(one),\n                Err(failure) => run.failed(one, failure),\n",
    },
    Mutant {
        name: "batch-overtakes",
        bug: "what a batch did behind a failed message of the same group stays",
        file: TRANSACTION,
        find: "        if is_overtaken(&part, &answers) {",
        replace: "        if !PLANTED && is_overtaken(&part, &answers) {",
    },
    Mutant {
        name: "behind-the-failed-runs",
        bug: "a later part of a batch runs what is behind a failed message of its group",
        file: TRANSACTION,
        find: "        if let Some(lane) = self.lanes.iter().find(|lane| lane.is_of(&one)) {",
        replace: "        if let Some(lane) = self.lanes.iter().find(|lane| !PLANTED && lane.is_of(&one)) {",
    },
    Mutant {
        name: "group-twice-in-a-batch",
        bug: "outside a transaction a batch has several messages of one group",
        file: BATCH,
        find: "            let lane = lane.filter(|_| self.transactions.is_some());",
        replace: "            let lane = lane.filter(|_| PLANTED || self.transactions.is_some());",
    },
    Mutant {
        name: "batch-outlives-a-lease",
        bug: "the call for a batch does not end with the leases of its messages",
        file: INVOKE,
        find: "                [one] => one.lease.ended().await,",
        replace: "                [_, _, ..] if PLANTED => std::future::pending().await,\n                [one] => one.lease.ended().await,",
    },
    Mutant {
        name: "letter-without-a-lease",
        bug: "between two tries to leave a dead letter the lease ends, and the letter is left all the same",
        file: DEAD_LETTER,
        find: "            self.give_back_lost(&mut batch);",
        replace: "            if !PLANTED {\n                self.give_back_lost(&mut batch);\n            }",
    },
    // The outbox and its relays.
    Mutant {
        name: "relay-settles-first",
        bug: "a message is removed from the outbox before its queue has it",
        file: DESTINATION,
        find: "            let answers = self.call(&batch, ends).await;\n",
        replace: "            if PLANTED {\n                let sent = |one: &Outgoing| OutboxSettlement::new(one.id, OutboxDisposition::Sent);\n                let sent: Vec<_> = batch.iter().map(sent).collect();\n                self.settle(&sent).await?;\n            }\n            let answers = self.call(&batch, ends).await;\n",
    },
    Mutant {
        name: "unanswered-is-sent",
        bug: "a call to a queue that has no answer counts as published",
        file: DESTINATION,
        find: "        answers.resize_with(batch.len(), no_answer);",
        replace: "        answers.resize_with(batch.len(), || if PLANTED { Ok(()) } else { no_answer() });",
    },
    Mutant {
        name: "call-outlasts-its-lease",
        bug: "a call to a queue goes on after the destination's lease has ended",
        file: DESTINATION,
        find: "tokio::time::timeout_at(ends, self.sink",
        replace: "tokio::time::timeout_at(if PLANTED { ends + self.options.lease } else { ends }, self.sink",
    },
    Mutant {
        name: "relay-passes-a-failure",
        bug: "what stands behind a failure of its group is published in the same round",
        file: ROUND,
        find: "            group.is_none_or(|group| !stopped.contains(group))",
        replace: "            PLANTED || group.is_none_or(|group| !stopped.contains(group))",
    },
    Mutant {
        name: "every-queue-stops-groups",
        bug: "a call carries a whole group to a queue that goes on after a failure",
        file: ROUND,
        find: "        if self.stops_groups {",
        replace: "        if self.stops_groups || PLANTED {",
    },
    Mutant {
        name: "set-aside-at-once",
        bug: "a message is set aside at its first failure",
        file: ROUND,
        find: "attempt >= retry.max_attempts {",
        replace: "(PLANTED || attempt >= retry.max_attempts) {",
    },
    Mutant {
        name: "busy-is-refused",
        bug: "a message is set aside because its queue was busy",
        file: ROUND,
        find: "match !error.is_retryable() && ",
        replace: "match (PLANTED || !error.is_retryable()) && ",
    },
    Mutant {
        name: "outbox-before-commit",
        bug: "a message is in the outbox when it is written, not when it is committed",
        file: TX,
        find: "        self.open.published.push(written);\n",
        replace: "        if PLANTED {\n            self.store.lock().outgoing.commit(written);\n        } else {\n            self.open.published.push(written);\n        }\n",
    },
    Mutant {
        name: "rollback-keeps-messages",
        bug: "what a failed handler has published is committed with the others' messages",
        file: TX,
        find: "    async fn rollback(&mut self) -> Result<(), Error> {\n        self.open = Effects::default();",
        replace: "    async fn rollback(&mut self) -> Result<(), Error> {\n        let published = std::mem::take(&mut self.open.published);\n        let published = if PLANTED { published } else { Vec::new() };\n        self.open = Effects { published, ..Effects::default() };",
    },
    Mutant {
        name: "late-commit-is-skipped",
        bug: "a message that is committed behind one with a higher number is never looked at",
        file: OUTBOX,
        find: "        let destination = self.destinations.entry(destination).or_default();\n        destination.mark += 1;\n",
        replace: "        let destination = self.destinations.entry(destination).or_default();\n        if PLANTED && destination.mark > place {\n            return;\n        }\n        destination.mark = if PLANTED { place } else { destination.mark + 1 };\n",
    },
    Mutant {
        name: "outgoing-id-drawn-anew",
        bug: "a message has another id each time it is fetched",
        file: OUTBOX,
        find: "                    ready.push(row.outgoing.clone());",
        replace: "                    let mut outgoing = row.outgoing.clone();\n                    if PLANTED {\n                        outgoing.id = OutgoingId::random();\n                    }\n                    ready.push(outgoing);",
    },
    Mutant {
        name: "destination-leased-twice",
        bug: "a destination is leased to one relay while another has it",
        file: OUTBOX,
        find: "            && until > now\n",
        replace: "            && until > now && !PLANTED\n",
    },
    Mutant {
        name: "failure-without-lease",
        bug: "a relay that was taken over delays a message, or sets it aside",
        file: OUTBOX,
        find: "            _ if !held => return Err(Fenced),",
        replace: "            _ if !held && !PLANTED => return Err(Fenced),",
    },
    Mutant {
        name: "delayed-blocks-no-group",
        bug: "what stands behind a delayed message of its group is published",
        file: OUTBOX,
        find: "                Some(group) if !is_ready => drop(blocked.insert(group)),",
        replace: "                Some(group) if !is_ready && !PLANTED => drop(blocked.insert(group)),",
    },
    Mutant {
        name: "set-aside-blocks-no-group",
        bug: "a group goes on without what was set aside although it is to wait",
        file: OUTBOX,
        find: "                State::SetAside(_) if fetch.waits_for_set_aside => false,",
        replace: "                State::SetAside(_) if fetch.waits_for_set_aside && !PLANTED => false,",
    },
];

/// What the copy needs beside the bugs: the switch, and a way to a key's newest token.
pub const SUPPORT: &[(&str, &str, &str)] = &[
    (
        "crates/core/src/lib.rs",
        "mod error;",
        "/// Whether this bug is planted.\npub fn planted(bug: &str) -> bool {\n    static PLANTED: std::sync::OnceLock<String> = std::sync::OnceLock::new();\n    PLANTED.get_or_init(|| std::env::var(\"ONLYONCE_PLANTED\").unwrap_or_default()) == bug\n}\n\nmod error;",
    ),
    (
        STORE,
        "    /// Whether the precondition holds.\n    pub(super) fn verify(",
        "    /// The claim with the key's newest token, if that bug is planted.\n    pub(super) fn newest(&self, held: &HeldClaim, planted: bool) -> HeldClaim {\n        match self.by_key.get(&held.key).map(|r| &r.state) {\n            Some(State::Claimed { token, .. }) if planted => HeldClaim::new(held.key, *token),\n            _ => *held,\n        }\n    }\n\n    pub(super) fn newest_of(&self, precondition: Precondition, planted: bool) -> Precondition {\n        match precondition {\n            Precondition::Claim(held) => self.newest(&held, planted).into(),\n            other => other,\n        }\n    }\n\n    /// Whether the precondition holds.\n    pub(super) fn verify(",
    ),
];
