//! Whether everything is settled in the end.
//!
//! stateright's own `eventually` does not see what goes round in circles. So from *every* reachable state one schedule
//! is followed in which nothing more goes wrong: it must arrive where all is settled. States that are known to arrive
//! are remembered, which makes it one step for each.

use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::{Arc, Mutex, PoisonError};

use super::protocol::Protocol;
use super::state::{InFlight, Queued, State};
use super::step::{Exchange, Step};
use super::store::ClaimResult;

/// More steps than any calm run takes; one that takes more goes round in circles.
const LONGEST: usize = 500;

/// The states from which a calm run is known to arrive, by their hashes.
#[derive(Clone, Debug, Default)]
pub struct Calm(Arc<Mutex<HashSet<u64>>>);

impl Protocol {
    pub fn is_settled(&self, state: &State) -> bool {
        state.queue.iter().all(|q| *q == Queued::Gone) && state.all_in_flight().next().is_none()
    }

    /// Whether a run in which nothing more goes wrong settles everything.
    pub fn settles_in_calm(&self, state: &State) -> bool {
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        let mut arriving = self.calm.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut path = Vec::new();
        let mut state = state.clone();
        while path.len() < LONGEST {
            let hash = hasher.hash_one(&state);
            path.push(hash);
            if arriving.contains(&hash) || self.is_settled(&state) {
                arriving.extend(path);
                return true;
            }
            match self.calm_step(&state) {
                Some(step) => state = self.after(&state, step),
                None => return false,
            }
        }
        false
    }

    /// The next step of the calm run: whoever is furthest goes on; time passes only when nobody can.
    pub fn calm_step(&self, state: &State) -> Option<Step> {
        let mut steps = Vec::new();
        self.steps(state, &mut steps);
        let ranked = steps
            .into_iter()
            .filter_map(|step| Some((self.calm_rank(state, step)?, step)));
        ranked.min_by_key(|(rank, _)| *rank).map(|(_, step)| step)
    }

    /// `None`: something goes wrong in this step, or nothing changes by it.
    fn calm_rank(&self, state: &State, step: Step) -> Option<u8> {
        use Exchange::Answered;
        let held = |message| {
            let newest = |f: InFlight| f.message == message && f.newest_receipt;
            state.all_in_flight().any(|(_, f)| newest(f))
        };
        match step {
            Step::Settle(_, _, Answered) => Some(0),
            Step::Complete(_, _, Answered) => Some(1),
            Step::Publish(_, Answered) => Some(2),
            Step::Release(_, _, Answered) => Some(3),
            Step::Run(_) | Step::Quarantine(_) | Step::Start(_, _, Answered) => Some(4),
            Step::Cancel(_) => Some(5),
            Step::LookUp(_)
            | Step::Claim(_, ClaimResult::Acquired { .. } | ClaimResult::Completed, Answered) => {
                Some(6)
            }
            Step::ExpireClaim { key } if self.is_orphan(state, key) => Some(7),
            Step::ExpireLease { message } if !held(message) => Some(8),
            Step::Receive { .. } => Some(9),
            _ => None,
        }
    }
}
