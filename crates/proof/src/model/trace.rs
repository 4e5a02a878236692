//! Tells a counterexample in words.

use stateright::Path;

use super::protocol::{Mistake, Protocol};
use super::state::{At, Disposition, Phase, State};
use super::step::{Exchange, Step};

/// One line for each step.
pub fn lines(protocol: &Protocol, path: Path<State, Step>) -> Vec<String> {
    let steps = path.into_vec().into_iter();
    let told = steps.filter_map(|(state, step)| Some(line(protocol, &state, step?)));
    told.collect()
}

fn line(protocol: &Protocol, state: &State, step: Step) -> String {
    if let Some((at, what)) = of_message(protocol, state, step) {
        let message = state.in_flight(at).map_or(0, |in_flight| in_flight.message);
        return format!("worker {}  message {message}: {what}", at.worker);
    }
    match step {
        Step::Receive {
            worker,
            first,
            last,
        } => match first == last {
            true => format!("worker {worker}  receives message {first}"),
            false => format!("worker {worker}  receives messages {first} to {last}"),
        },
        Step::Crash { worker } => format!("worker {worker}  CRASHES"),
        Step::LoseDelivery { message } => format!("broker    delivers message {message} to nobody"),
        Step::ExpireLease { message } => format!("broker    the lease of message {message} ends"),
        Step::ExpireClaim { key } => format!("store     the claim on key {key} expires"),
        Step::Prune { key } => format!("store     prunes the record of key {key}"),
        Step::LoseClaim { key } => format!("store     CRASHES and loses the claim on key {key}"),
        other => format!("{other:?}"),
    }
}

/// What a worker does with one of its messages.
fn of_message(protocol: &Protocol, state: &State, step: Step) -> Option<(At, String)> {
    let transactional = protocol.mode.is_transactional();
    let (at, what) = match step {
        Step::Claim(at, claimed, call) => {
            let what = match protocol.mistake {
                Some(Mistake::MarkBeforeProcessing) => "mark as done",
                Some(Mistake::MarkAfterProcessing) => "look up",
                _ => "claim",
            };
            (at, format!("{what}: {claimed:?}{}", lost(call)))
        }
        Step::LookUp(at) => (at, "look up: no record, no claim".into()),
        Step::Renew(at) => (at, "renew: Ok".into()),
        Step::Start(at, verdict, call) => (at, format!("start: {verdict:?}{}", lost(call))),
        Step::Quarantine(at) => (at, "in doubt: quarantine".into()),
        Step::Run(at) if transactional => (at, "handler succeeds, not yet committed".into()),
        Step::Run(at) => (at, "handler succeeds, the EFFECT is there".into()),
        Step::Fail(at, then) => (at, format!("handler fails: {then:?}")),
        Step::Cancel(at) => (at, "handler is cancelled".into()),
        Step::Complete(at, verdict, call) => {
            let effect = if transactional {
                " and commit EFFECT"
            } else {
                ""
            };
            (at, format!("complete{effect}: {verdict:?}{}", lost(call)))
        }
        Step::Publish(at, call) => (at, format!("publish dead letter{}", lost(call))),
        Step::Release(at, verdict, call) => (at, format!("release: {verdict:?}{}", lost(call))),
        Step::Settle(at, answer, call) => {
            let disposition = match state.in_flight(at)?.phase {
                Phase::Settling(disposition) => disposition,
                _ => Disposition::Ack,
            };
            (
                at,
                format!("settle, {disposition:?}: {answer:?}{}", lost(call)),
            )
        }
        _ => return None,
    };
    Some((at, what))
}

fn lost(call: Exchange) -> &'static str {
    match call {
        Exchange::Answered => "",
        Exchange::AnswerLost => ", but the answer is lost",
        Exchange::CallLost => ", but the call is lost",
    }
}
