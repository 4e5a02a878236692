//! Tells a counterexample in words.

use stateright::Path;

use super::protocol::{Mistake, Protocol};
use super::state::{Action, At, Phase, State};
use super::step::{Exchange, Step};

/// One line for each step.
pub fn lines(protocol: &Protocol, path: Path<State, Step>) -> Vec<String> {
    let steps = path.into_vec().into_iter();
    let told = steps.filter_map(|(state, step)| Some(line(protocol, &state, step?)));
    told.collect()
}

fn line(protocol: &Protocol, state: &State, step: Step) -> String {
    match step {
        Step::Receive {
            worker,
            first,
            last,
        } if first == last => by(worker, &format!("receives message {first}")),
        Step::Receive {
            worker,
            first,
            last,
        } => by(worker, &format!("receives messages {first} to {last}")),
        Step::Claim(at, claimed, call) => {
            let what = match protocol.mistake {
                Some(Mistake::MarkBeforeProcessing) => "mark as done",
                Some(Mistake::MarkAfterProcessing) => "look up",
                _ => "claim",
            };
            of(state, at, what, &format!("{claimed:?}"), call)
        }
        Step::Renew(at) => of(state, at, "renew", "Ok", Exchange::Answered),
        Step::Start(at, verdict, call) => of(state, at, "start", &format!("{verdict:?}"), call),
        Step::Quarantine(at) => of(state, at, "quarantine", "uncertain", Exchange::Answered),
        Step::Run(at) => {
            let effect = match protocol.mode.is_transactional() {
                true => "succeeds, not yet committed",
                false => "succeeds, the EFFECT is there",
            };
            of(state, at, "handler", effect, Exchange::Answered)
        }
        Step::Fail(at, then) => of(
            state,
            at,
            "handler",
            &format!("fails, {then:?}"),
            Exchange::Answered,
        ),
        Step::Cancel(at) => of(state, at, "handler", "cancelled", Exchange::Answered),
        Step::Complete(at, verdict, call) => {
            let what = match protocol.mode.is_transactional() {
                true => "commit EFFECT and record",
                false => "complete",
            };
            of(state, at, what, &format!("{verdict:?}"), call)
        }
        Step::Publish(at, call) => of(state, at, "publish dead letter", "Ok", call),
        Step::Release(at, verdict, call) => of(state, at, "release", &format!("{verdict:?}"), call),
        Step::Settle(at, answer, call) => {
            let action = match state.flight(at).map(|flight| flight.phase) {
                Some(Phase::Settling(action)) => action,
                _ => Action::Ack,
            };
            of(
                state,
                at,
                &format!("settle, {action:?}"),
                &format!("{answer:?}"),
                call,
            )
        }
        Step::Crash { worker } => by(worker, "CRASHES"),
        Step::LoseDelivery { message } => format!("broker    delivers message {message} to nobody"),
        Step::ExpireLease { message } => format!("broker    the lease of message {message} ends"),
        Step::ExpireClaim { key } => format!("store     the claim on key {key} expires"),
        Step::Prune { key } => format!("store     prunes the record of key {key}"),
        Step::LoseClaim { key } => format!("store     CRASHES and loses the claim on key {key}"),
    }
}

fn by(worker: usize, what: &str) -> String {
    format!("worker {worker}  {what}")
}

fn of(state: &State, at: At, what: &str, answer: &str, call: Exchange) -> String {
    let message = state.flight(at).map_or(0, |flight| flight.message);
    let heard = match call {
        Exchange::Answered => "",
        Exchange::AnswerLost => ", but the answer is lost",
        Exchange::CallLost => ", but the call is lost",
    };
    by(
        at.worker,
        &format!("message {message}: {what}: {answer}{heard}"),
    )
}
